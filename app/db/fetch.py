"""Run a statement with psycopg itself, as SQL that SQLAlchemy has compiled once.

SQLAlchemy's `Connection` and `Result` take as much time as PostgreSQL for a short statement. Only
the statements of `Crud` that run for many callers use this.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import ARRAY, Boolean, Dialect, Executable, Numeric
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.type_api import TypeEngine
from sqlalchemy.util import await_only
from sqlmodel import Session

from app.db.engine import count_error

# The key in `Session.info` of the psycopg cursor of a session in autocommit.
CURSOR = "cursor"
# The types of the results that SQLAlchemy's numeric types expect: table pg_type.
_OID_NUMERIC, _OID_FLOAT8 = 1700, 701


class _Query(NamedTuple):
    """A compiled statement, and the parameters that have fixed values."""

    text: str
    fixed: dict[str, Any]


def fetch(session: Session, statement: Executable, parameters: dict[str, Any]) -> Sequence[Any]:
    """Return the rows of the statement, which the caller keeps and uses again.

    Raises the same errors as `Session.execute`. This is `Session.execute` without a psycopg cursor
    in the session, for a column type that SQLAlchemy has to convert, and if a listener of
    `before_cursor_execute` has to get each statement.
    """
    cursor = session.info.get(CURSOR)
    bind: Any = session.get_bind()
    query = cursor and _compile(statement, bind.dialect)
    if not (cursor and query) or bind.engine.dispatch.before_cursor_execute:
        return session.connection().execute(statement, parameters).all()
    try:
        return await_only(_rows(cursor, query.text, {**query.fixed, **parameters}))
    except Exception as error:
        count_error(error)
        raise DBAPIError.instance(
            query.text,
            None,
            error,
            psycopg.Error,
            hide_parameters=True,
            connection_invalidated=cursor.connection.closed,
        ) from error


async def _rows(
    cursor: psycopg.AsyncCursor[Any], text: str, parameters: dict[str, Any]
) -> Sequence[Any]:
    await cursor.execute(text, parameters)
    return await cursor.fetchall()


@lru_cache(maxsize=1024)
def _compile(statement: Any, dialect: Dialect) -> _Query | None:
    compiled = statement.compile(dialect=dialect)
    binds = compiled.bind_names
    kinds = [each.type for each in (*binds, *statement.exported_columns)]
    if any(bind.expanding for bind in binds) or any(is_converted(each, dialect) for each in kinds):
        return None
    fixed = {name: compiled.params[name] for bind, name in binds.items() if not bind.required}
    return _Query(compiled.string, fixed)


def is_converted(kind: TypeEngine[Any], dialect: Dialect) -> bool:
    """Return whether SQLAlchemy converts values of this type. psycopg has its own conversions."""
    one = kind.item_type if isinstance(kind, ARRAY) else kind
    own = one.dialect_impl(dialect)
    if isinstance(own, Boolean):  # SQLAlchemy only checks these.
        return False
    oid = _OID_NUMERIC if isinstance(own, Numeric) else _OID_FLOAT8
    return bool(own.bind_processor(dialect) or own.result_processor(dialect, oid))
