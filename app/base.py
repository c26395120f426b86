"""Columns, types of members and names of constraints, for the models of all tables."""

from contextlib import suppress
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import BeforeValidator, GetCoreSchemaHandler, StringConstraints
from pydantic_core import PydanticCustomError
from sqlalchemy import (
    BigInteger,
    DefaultClause,
    Index,
    Integer,
    MetaData,
    Table,
    UniqueConstraint,
    event,
)
from sqlalchemy.exc import NoReferenceError
from sqlalchemy.orm import declared_attr
from sqlalchemy.types import NullType
from sqlmodel import Field, SQLModel

INT4_MAX = 2**31 - 1
INT8_MAX = 2**63 - 1

# PostgreSQL's own default names. A database made by the tutorial's `create_all` has them, and
# migrations rely on them. Must be set before the first model.
SQLModel.metadata.naming_convention = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ck": "%(table_name)s_%(constraint_name)s_check",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "pk": "%(table_name)s_pkey",
}


@event.listens_for(Table, "after_parent_attach")
def _complete(table: Table, metadata: MetaData) -> None:
    """Complete a model's table with the parts that a live database needs.

    A foreign key gets the type of its target, which would be INTEGER otherwise. It gets an index,
    without which a delete in the other table scans this one. A NOT NULL column with a default gets
    it in the database too, for writers that do not know the column: the previous release. SQLite
    would give the id of a deleted row to the next one, whose ETag is the same.
    """
    if metadata is not SQLModel.metadata:
        return
    if table.autoincrement_column is not None:
        table.dialect_options["sqlite"]["autoincrement"] = True
    for foreign_key in table.foreign_keys:
        # SQLAlchemy replaces the null type when the other table is defined later.
        foreign_key.parent.type = NullType()
        with suppress(NoReferenceError):
            foreign_key.parent.type = foreign_key.column.type
    unique = [each for each in table.constraints if isinstance(each, UniqueConstraint)]
    whole = [index for index in table.indexes if not is_partial(index)]
    keys: list[Any] = [table.primary_key, *unique, *whole]
    indexed = [list(each.columns) for each in keys]
    for constraint in table.foreign_key_constraints:
        columns = list(constraint.columns)
        if columns not in [begin[: len(columns)] for begin in indexed]:
            Index(None, *columns)
    for column in table.columns:
        default = getattr(column.default, "arg", None)
        if isinstance(default, Enum):
            # A column of SQLAlchemy's Enum stores another text, such as the name of the member.
            default = None if isinstance(column.type, sa.Enum) else default.value
        if not column.nullable and column.server_default is None:
            # SQLite has no true, but both databases read '1' as one.
            if isinstance(default, bool):
                default = int(default)
            if isinstance(default, str | int | float | Decimal):
                column.server_default = DefaultClause(str(default))


def is_partial(index: Index) -> bool:
    """Return whether the index has only some of the rows, so that it does not find all."""
    return any(options.get("where") is not None for options in index.dialect_options.values())


# PostgreSQL cannot store NUL in text. The pattern also makes pydantic refuse lone surrogates,
# which UTF-8 cannot encode.
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


def _refuse_bool_and_str(value: object) -> object:
    if isinstance(value, bool | str):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


# For an integer: without pydantic's conversion of true and "42".
NoConversion = BeforeValidator(_refuse_bool_and_str)
Id = Annotated[int, Field(ge=1, le=INT8_MAX)]
# The id of a row of another table.
Reference = Annotated[Id, NoConversion]


class NotNull:
    """Marks an optional member of an update that must not be null: its column is NOT NULL."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Return the schema of X for the annotation `X | None`."""
        return handler(source)["schema"]


class Row(SQLModel):
    """The columns that every table of the API has."""

    # SQLite requires the type name INTEGER for its 64-bit row ids.
    id: int | None = Field(
        default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer, "sqlite")
    )
    # The number of writes of the row, which is its ETag. The default in the database is for
    # writers that do not know the column: the previous release and the tutorial's code.
    version: int = Field(default=1, sa_column_kwargs={"server_default": "1"})

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:  # noqa: N805
        """Let the ORM count writes too: https://docs.sqlalchemy.org/orm/versioning.html."""
        return {"version_id_col": cls.__table__.c.version}  # type: ignore[attr-defined]
