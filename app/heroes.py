"""The table of heroes: its sort keys, filters and sample rows."""

from collections.abc import Iterator
from typing import Any, Literal, get_args

from sqlalchemy import bindparam
from sqlmodel import col

from app.db.crud import Crud
from app.models import Hero, HeroCreate, HeroPublic

HeroSort = Literal["id", "-id", "name", "-name", "age", "-age"]

heroes = Crud(
    Hero,
    public=HeroPublic,
    create=HeroCreate,
    sorts=get_args(HeroSort),
    filters={
        "name": col(Hero.name) == bindparam("name"),
        "age_min": col(Hero.age) >= bindparam("age_min"),
        "age_max": col(Hero.age) <= bindparam("age_max"),
    },
)

_FIRST = ("Captain", "Doctor", "Iron", "Lady", "Midnight", "Silver", "Star", "Young")
_SECOND = ("Comet", "Falcon", "Lantern", "Panther", "Raven", "Spider", "Storm", "Tarantula", "Wasp")


def sample(number: int) -> Iterator[dict[str, Any]]:
    """Return so many made-up heroes, each time the same ones. For `heroes seed`."""
    for n in range(1, number + 1):
        name = f"{_FIRST[n % len(_FIRST)]} {_SECOND[n % len(_SECOND)]} {n}"
        age = None if n % 10 == 0 else 16 + n * 7 % 80
        yield {"name": name, "age": age, "secret_name": f"Secret {n}"}
