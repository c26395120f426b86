"""The comparison of tables with models, for the types and constraints that a team may add."""

import uuid
from datetime import datetime
from decimal import Decimal

import pytest
import sqlalchemy as sa
from sqlalchemy import URL, Engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlmodel import Field, Session, SQLModel

from app.db.drift import differences, reflect


class Of(SQLModel, table=True):
    __tablename__ = "of_sqlmodel"
    metadata = sa.MetaData(naming_convention=SQLModel.metadata.naming_convention)

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(index=True, unique=True, max_length=20)
    price: Decimal = Field(max_digits=5, decimal_places=2)
    key: uuid.UUID
    at: datetime


def models() -> sa.MetaData:
    metadata = sa.MetaData(naming_convention=SQLModel.metadata.naming_convention)
    sa.Table("team", metadata, sa.Column("id", sa.BigInteger, primary_key=True))
    sa.Table(
        "power",
        metadata,
        sa.Column("id", sa.Integer, sa.Identity(), primary_key=True),
        sa.Column("team_id", sa.ForeignKey("team.id", ondelete="cascade"), index=True),
        sa.Column("name", sa.String(50), nullable=False, unique=True),
        sa.Column("note", sa.Text, server_default=""),
        sa.Column("quote", sa.Text, server_default="it's 100 % : done"),
        sa.Column("level", sa.SmallInteger, server_default=sa.text("1")),
        sa.Column("ratio", sa.Float, server_default="0.5"),
        sa.Column("ratios", sa.Double),
        sa.Column("price", sa.Numeric(10, 2), server_default="9.99"),
        sa.Column("is_secret", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.func.now()),
        sa.Column("day", sa.Date),
        sa.Column("time", sa.Time),
        sa.Column("took", sa.Interval),
        sa.Column("data", sa.JSON),
        sa.Column("binary", sa.JSON().with_variant(postgresql.JSONB, "postgresql")),
        sa.Column("tags", sa.JSON().with_variant(postgresql.ARRAY(sa.Text), "postgresql")),
        sa.Column("key", sa.Uuid),
        sa.Column("picture", sa.LargeBinary),
        sa.Column("kind", sa.Enum("strength", "magic", name="kind")),
        sa.Column("code", sa.CHAR(3)),
        sa.Column("double", sa.Integer, sa.Computed("level * 2", persisted=True)),
        sa.CheckConstraint("level BETWEEN 1 AND 9", name="level"),
        sa.CheckConstraint("kind IN ('strength', 'magic')", name="kind"),
        sa.CheckConstraint("name NOT LIKE '%s:name %%'", name="name"),
        sa.UniqueConstraint("level", "price"),
        sa.Index("ix_power_lower", sa.text("lower(name)"), unique=True),
        sa.Index("ix_power_latest", sa.text("at DESC"), "id"),
        sa.Index(
            "ix_power_secret",
            "name",
            postgresql_where=sa.text("is_secret AND level > 3"),
            sqlite_where=sa.text("is_secret AND level > 3"),
        ),
    )

    Of.__table__.to_metadata(metadata)  # type: ignore[attr-defined]
    return metadata


@pytest.fixture
def created(empty_database: URL) -> sa.MetaData:
    """The models, created in the database."""
    metadata = models()
    engine = sa.create_engine(empty_database)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("CREATE TYPE kind AS ENUM ('strength', 'magic')"))
        for table in metadata.sorted_tables:
            connection.execute(CreateTable(table))
            for index in table.indexes:
                connection.execute(CreateIndex(index))
    engine.dispose()
    return metadata


@pytest.fixture
def database(empty_database: URL) -> Engine:
    return sa.create_engine(empty_database, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)


def compare(database: Engine, metadata: sa.MetaData) -> list[str]:
    lines: list[str] = []
    with Session(database) as session:
        for model in metadata.sorted_tables:
            live = reflect(session, model)
            assert live is not None
            lines += differences(session, model, live)
    return lines


def test_a_table_that_was_created_from_its_model_has_no_differences(
    database: Engine, created: sa.MetaData
) -> None:
    assert compare(database, created) == []


CHANGES = {
    "an expression of an index": (
        "DROP INDEX ix_power_lower;\n CREATE UNIQUE INDEX ix_power_lower ON power (upper(name))",
        "power: the index ix_power_lower is UNIQUE (upper(name::text)),"
        " the models have UNIQUE (lower(name))",
    ),
    "a condition of an index": (
        "DROP INDEX ix_power_secret;\n"
        " CREATE INDEX ix_power_secret ON power (name) WHERE is_secret AND level > 4",
        "power: the index ix_power_secret is INDEX (name) WHERE (is_secret AND (level > 4)),"
        " the models have INDEX (name) WHERE is_secret AND level > 3",
    ),
    "an order of an index": (
        "DROP INDEX ix_power_latest;\n CREATE INDEX ix_power_latest ON power (at, id)",
        "power: the index ix_power_latest is INDEX (at, id), the models have INDEX (at DESC, id)",
    ),
    "an action of a foreign key": (
        "ALTER TABLE power DROP CONSTRAINT power_team_id_fkey,"
        " ADD CONSTRAINT power_team_id_fkey FOREIGN KEY (team_id) REFERENCES team",
        "power: the constraint power_team_id_fkey is"
        " FOREIGN KEY (team_id) REFERENCES team.id ON DELETE NO ACTION,"
        " the models have FOREIGN KEY (team_id) REFERENCES team.id ON DELETE CASCADE",
    ),
    "a precision": (
        "ALTER TABLE power ALTER price TYPE numeric(12, 2)",
        "power: the column price is NUMERIC(12, 2) DEFAULT 9.99,"
        " the models have NUMERIC(10, 2) DEFAULT '9.99'",
    ),
    "a time zone": (
        "ALTER TABLE power ALTER at TYPE timestamp",
        "power: the column at is TIMESTAMP WITHOUT TIME ZONE DEFAULT now(),"
        " the models have TIMESTAMP WITH TIME ZONE DEFAULT now()",
    ),
    "a text in a default": (
        "ALTER TABLE power ALTER quote SET DEFAULT 'it''s 99 % : done'",
        "power: the column quote is TEXT DEFAULT 'it''s 99 % : done'::text,"
        " the models have TEXT DEFAULT 'it''s 100 % : done'",
    ),
    "a type that SQLAlchemy does not know": (
        "ALTER TABLE power ADD COLUMN place box",
        "power: the column place is not in the models: of a type unknown to SQLAlchemy",
    ),
}


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
@pytest.mark.parametrize(("statements", "line"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_one_difference(
    database: Engine, created: sa.MetaData, statements: str, line: str
) -> None:
    with database.connect() as connection:
        for statement in statements.split(";\n"):
            connection.exec_driver_sql(statement.replace("%", "%%"))
    assert compare(database, created) == [line]
