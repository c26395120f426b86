"""What can be done with heroes: the statements, built once, and a plain function for each.

Each function runs exactly one statement, so that it is atomic by itself and one round trip. None
of them reads `secret_name`.
"""

from itertools import combinations
from typing import NamedTuple

from sqlalchemy import BigInteger, bindparam, delete, insert, update
from sqlmodel import Session, SQLModel, select

from app.models import Hero, HeroCreate, HeroUpdate


class HeroRow(NamedTuple):
    """What is ever read of a row."""

    id: int
    name: str
    age: int | None


# Columns of the table and not of the class: rows need no entities made and tracked for them.
_hero = SQLModel.metadata.tables[str(Hero.__tablename__)]
_row = (_hero.c.id, _hero.c.name, _hero.c.age)
# Bound as bigint whatever the column is, so that an id that cannot exist is merely not found.
_by_id = _hero.c.id == bindparam("hero_id", type_=BigInteger)

_CREATE = insert(_hero).returning(*_row)
_GET = select(*_row).where(_by_id)
_READ = (
    select(*_row)
    .order_by(_hero.c.id)
    .offset(bindparam("offset", type_=BigInteger))
    .limit(bindparam("limit"))
)
# One statement for each set of members that a request can change.
_members = tuple(HeroUpdate.model_fields)
_UPDATE = {
    frozenset(members): update(_hero)
    .where(_by_id)
    .values({member: bindparam(f"new_{member}") for member in members})
    .values(version=_hero.c.version + 1)
    .returning(*_row)
    for count in range(1, len(_members) + 1)
    for members in combinations(_members, count)
}
_DELETE = delete(_hero).where(_by_id).returning(_hero.c.id)


def create(session: Session, hero: HeroCreate) -> HeroRow:
    """Inserts the hero and returns it with its new id."""
    return HeroRow._make(session.exec(_CREATE, params=hero.model_dump()).one())


def read(session: Session, offset: int, limit: int) -> list[HeroRow]:
    """Up to `limit` heroes in the order of their ids, without the first `offset`."""
    rows = session.exec(_READ, params={"offset": offset, "limit": limit})
    return [HeroRow._make(row) for row in rows]


def get(session: Session, hero_id: int) -> HeroRow | None:
    """The hero with this id, or None."""
    row = session.exec(_GET, params={"hero_id": hero_id}).one_or_none()
    return HeroRow._make(row) if row else None


def change(session: Session, hero_id: int, hero: HeroUpdate) -> HeroRow | None:
    """Writes the members that are set and returns the whole hero, or None where there is none."""
    changes = hero.model_dump(exclude_unset=True)
    if not changes:
        return get(session, hero_id)
    parameters = {f"new_{member}": value for member, value in changes.items()}
    statement = _UPDATE[frozenset(changes)]
    row = session.exec(statement, params=parameters | {"hero_id": hero_id}).one_or_none()
    return HeroRow._make(row) if row else None


def remove(session: Session, hero_id: int) -> bool:
    """Deletes the hero; says whether there was one."""
    return session.exec(_DELETE, params={"hero_id": hero_id}).one_or_none() is not None
