"""The parts that app/base.py adds to the tables of the models."""

import enum
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Enum, Index, String, Table, text
from sqlmodel import Field, SQLModel

from app.base import Row


class Kind(str, enum.Enum):  # noqa: UP042  (Its text is "Kind.HUMAN".)
    HUMAN = "human"


@pytest.fixture
def tables() -> Iterator[list[Table]]:
    """The tables of the test. Migrations are compared with the tables in SQLModel.metadata."""
    tables: list[Table] = []
    yield tables
    for table in tables:
        SQLModel.metadata.remove(table)


def test_the_default_of_a_column_is_the_text_that_the_database_stores(tables: list[Any]) -> None:
    """The name of the member, "Kind.HUMAN", would be in each old row."""

    class Villain(Row, table=True):
        kind: Kind = Field(default=Kind.HUMAN, sa_type=String)
        by_name: Kind = Field(default=Kind.HUMAN, sa_type=Enum(Kind, native_enum=False))
        alive: bool = True

    tables.append(columns := SQLModel.metadata.tables["villain"])
    defaults = {column.name: getattr(column.server_default, "arg", None) for column in columns.c}
    assert defaults["kind"] == "human"
    assert defaults["alive"] == "1"
    # Autogenerate refuses such a column until it has a default of its own.
    assert defaults["by_name"] is None


def test_a_foreign_key_with_a_partial_index_gets_a_whole_one(tables: list[Any]) -> None:
    """A delete in the other table cannot use the partial index."""

    class Lair(Row, table=True):
        hero_id: int | None = Field(default=None, foreign_key="hero.id")
        __table_args__ = (
            Index("ix_own", "hero_id", postgresql_where=text("id > 1"), sqlite_where=text("id>1")),
        )

    tables.append(table := SQLModel.metadata.tables["lair"])
    assert {index.name for index in table.indexes} == {"ix_own", "ix_lair_hero_id"}
