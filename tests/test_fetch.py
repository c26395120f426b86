"""Statements that psycopg runs itself have the results and the errors of SQLAlchemy's."""

import asyncio
import enum
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import StatementError
from sqlmodel import Session

from app.db.database import Database
from app.db.engine import sqlstate
from app.db.fetch import fetch
from app.errors import OutcomeUnknown
from app.telemetry import metrics

pytestmark = pytest.mark.parametrize("backend", ["postgresql"])


def text(sql: str, **types: Any) -> Any:
    """A statement with an integer as its result."""
    parameters = [sa.bindparam(name, type_=kind) for name, kind in types.items()]
    return sa.text(sql).bindparams(*parameters).columns(value=sa.Integer)


def execute(session: Session, statement: Any, parameters: dict[str, Any]) -> Any:
    """The usual way."""
    return session.connection().execute(statement, parameters).all()


def run(url: sa.URL, run_statement: Callable[..., Any], *arguments: Any) -> Any:
    async def work() -> Any:
        database = Database(url, pool_size=1, timeout=5)
        try:
            return await database.run(run_statement, *arguments)
        finally:
            await database.close()

    return asyncio.run(work())


def test_a_row_is_a_plain_tuple(database_url: sa.URL) -> None:
    statement = text("SELECT :value + 1 AS value", value=sa.Integer)
    assert run(database_url, execute, statement, {"value": 1}) == [(2,)]
    [row] = run(database_url, fetch, statement, {"value": 1})
    assert type(row) is tuple
    assert row == (2,)


@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        (text("SELECT 1 / :value AS value", value=sa.Integer), {"value": 0}),
        (text("SELECT value FROM missing"), {}),
        (
            text(
                "INSERT INTO hero (name, secret_name) VALUES ('', :secret) RETURNING 1",
                secret=sa.String,
            ),
            {"secret": "Dive Wilson"},
        ),
        (text("SELECT length(:value) AS value", value=sa.String), {"value": "\0"}),
        (text("SELECT :value AS value", value=sa.Integer), {"value": 2**200}),
        (text("SELECT 1 FROM pg_terminate_backend(pg_backend_pid())"), {}),
    ],
)
def test_errors_are_those_of_sqlalchemy(
    database_url: sa.URL, statement: Any, parameters: dict[str, Any]
) -> None:
    errors: list[Any] = []
    for run_statement in (execute, fetch):
        before = _counted()
        with pytest.raises((StatementError, OutcomeUnknown)) as caught:
            run(database_url, run_statement, statement, parameters)
        error = caught.value
        errors.append(error.__cause__ if isinstance(error, OutcomeUnknown) else error)
        assert _counted() == before + 1
    usual, own = errors
    assert type(own) is type(usual)
    assert type(own.orig) is type(usual.orig)
    assert sqlstate(own.orig) == sqlstate(usual.orig)
    invalidated = [getattr(error, "connection_invalidated", None) for error in errors]
    assert invalidated[0] == invalidated[1]
    assert "Dive Wilson" not in str(own).replace(str(own.orig), "")


def _counted() -> float:
    """The number of failed statements."""
    [family] = metrics.database_errors.collect()
    return sum(each.value for each in family.samples if each.name.endswith("_total"))


class Colour(enum.Enum):
    RED = "r"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (sa.Enum(Colour, native_enum=False), Colour.RED),
        (sa.JSON(), {"a": [1]}),
        (sa.Numeric(10, 2), Decimal("1.50")),
        (sa.Numeric(10, 2, asdecimal=False), 1.5),
        (sa.Float(), 1.5),
        (sa.Uuid(), uuid.UUID(int=1)),
        (sa.Uuid(as_uuid=False), str(uuid.UUID(int=1))),
        (sa.DateTime(timezone=True), datetime(2026, 1, 1, tzinfo=UTC)),
        (sa.Interval(), timedelta(days=1)),
        (sa.LargeBinary(), b"\0"),
        (sa.ARRAY(sa.String()), ["a", None]),
        (sa.Integer(), None),
    ],
)
def test_values_of_every_type_are_those_of_sqlalchemy(
    database_url: sa.URL, kind: Any, value: object
) -> None:
    cast = sa.cast(sa.bindparam("given", type_=kind), kind)
    statement = sa.select(cast.label("value"), sa.literal(value, kind).label("literal"))
    for run_statement in (execute, fetch):
        [row] = run(database_url, run_statement, statement, {"given": value})
        assert tuple(row) == (value, value)


def test_a_listener_gets_each_statement(database_url: sa.URL) -> None:
    statements: list[str] = []

    async def work() -> None:
        database = Database(database_url, pool_size=1, timeout=5)
        sa.event.listen(
            database.engine, "before_cursor_execute", lambda *call: statements.append(call[2])
        )
        await database.run(fetch, text("SELECT 42 AS value"), {})
        await database.close()

    asyncio.run(work())
    assert "SELECT 42 AS value" in statements
