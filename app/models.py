"""The tutorial's models, with the limits that a public service needs."""

from typing import Annotated

from sqlalchemy import CheckConstraint, Index, String
from sqlmodel import Field, SQLModel

from app.base import INT4_MAX, NoConversion, NotNull, Row, Text

Age = Annotated[int, Field(ge=0, le=INT4_MAX), NoConversion]


class HeroBase(SQLModel):
    """The public members of a hero that clients write."""

    # The column has no length, as in the tutorial. A length in the type would refuse an existing
    # table with longer names.
    name: Text = Field(sa_type=String)
    age: Age | None = None


class Hero(HeroBase, Row, table=True):
    """A row of the table `hero`."""

    __table_args__ = (
        # The limits above, enforced for every writer.
        CheckConstraint("length(name) BETWEEN 1 AND 200", name="name_length"),
        CheckConstraint("length(secret_name) BETWEEN 1 AND 200", name="secret_name_length"),
        CheckConstraint("age >= 0", name="age_not_negative"),
        # The tutorial's two indexes, extended by the id: lists are in a total order.
        Index("ix_hero_name_id", "name", "id"),
        Index("ix_hero_age_id", "age", "id"),
    )

    secret_name: str


class HeroPublic(HeroBase):
    """A hero in responses. `secret_name` is never part of it."""

    model_config = {"json_schema_extra": {"examples": [{"name": "Rusty-Man", "age": 48, "id": 2}]}}

    id: int


class HeroCreate(HeroBase):
    """The body of a create, and a line of an import."""

    model_config = {
        "json_schema_extra": {
            "examples": [{"name": "Rusty-Man", "age": 48, "secret_name": "Tommy Sharp"}]
        }
    }

    secret_name: Text


class HeroUpdate(SQLModel):
    """The members of a hero to change. Members that are left out stay as they are."""

    model_config = {"json_schema_extra": {"examples": [{"age": 49}]}}

    name: Annotated[Text | None, NotNull()] = None
    age: Age | None = None
    secret_name: Annotated[Text | None, NotNull()] = None
