"""The tutorial's models, with the bounds that a service on the open network needs."""

from datetime import datetime
from typing import Annotated

from pydantic import BeforeValidator, StringConstraints
from pydantic_core import PydanticCustomError
from sqlalchemy import BigInteger, CheckConstraint, DateTime, Index, Integer, String
from sqlmodel import Field, SQLModel

INT4_MAX = 2**31 - 1
INT8_MAX = 2**63 - 1

# PostgreSQL's own names for what has no name, so that a database that the tutorial's `create_all`
# made already has the names that migrations rely on. This must stand before the first model.
SQLModel.metadata.naming_convention = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ck": "%(table_name)s_%(constraint_name)s_check",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "pk": "%(table_name)s_pkey",
}

# PostgreSQL cannot store NUL in a text. Lone surrogates, which UTF-8 cannot carry, are refused by
# pydantic itself as soon as a string has a pattern.
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


def _number(value: object) -> object:
    """Refuses what pydantic would turn into a number: true and "42"."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


Age = Annotated[int, Field(ge=0, le=INT4_MAX), BeforeValidator(_number)]


class HeroBase(SQLModel):
    """What is public and writable of a hero."""

    # The column stays without a length, as in the tutorial: a length is a rule for new rows, and
    # in the column's type it would refuse a table that has older, longer ones.
    name: Text = Field(sa_type=String)
    age: Age | None = None


class Hero(HeroBase, table=True):
    """A row of the table `hero`."""

    __table_args__ = (
        # What the API promises, kept also from those who write past it.
        CheckConstraint("length(name) BETWEEN 1 AND 200", name="name_length"),
        CheckConstraint("length(secret_name) BETWEEN 1 AND 200", name="secret_name_length"),
        CheckConstraint("age >= 0", name="age_not_negative"),
        # The tutorial's two, with the id, by which a list is in a total order.
        Index("ix_hero_name_id", "name", "id"),
        Index("ix_hero_age_id", "age", "id"),
    )

    # SQLite's INTEGER PRIMARY KEY has 64 bits already, and must be called so.
    id: int | None = Field(
        default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer, "sqlite")
    )
    secret_name: str
    # How often the row was written. It has a default in the database for those who do not know it:
    # the release before, and the tutorial's own code.
    version: int = Field(default=1, sa_column_kwargs={"server_default": "1"})


class IdempotencyKey(SQLModel, table=True):
    """A row of the table `idempotency_key`: a create that has been made, for its retries."""

    __tablename__ = "idempotency_key"

    key: str = Field(primary_key=True)
    fingerprint: str
    # Null only within the transaction that claims the key.
    answer: str | None = None
    created_at: datetime = Field(index=True, sa_type=DateTime(timezone=True))


class HeroPublic(HeroBase):
    """A hero as the API shows it: never with `secret_name`."""

    id: int


class HeroCreate(HeroBase):
    """A hero to be made."""

    secret_name: Text


class HeroUpdate(SQLModel):
    """The members of a hero to be changed; those left out stay as they are.

    `name` and `secret_name` may be left out but not be null: their columns are NOT NULL.
    """

    # By a factory, because OpenAPI would show null as the default.
    name: Text = Field(default_factory=lambda: None)
    age: Age | None = None
    secret_name: Text = Field(default_factory=lambda: None)
