"""SQLAlchemy engines for SQLite and PostgreSQL, and the SQLSTATE of their errors."""

import sqlite3
from typing import Any

import psycopg
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext

from app.telemetry import metrics

# SQLite's result codes (https://www.sqlite.org/rescode.html) as SQLSTATEs.
_SQLSTATE_OF_SQLITE = {
    sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY: "23503",
    sqlite3.SQLITE_BUSY: "55P03",
    sqlite3.SQLITE_LOCKED: "55P03",
    sqlite3.SQLITE_INTERRUPT: "57014",
    sqlite3.SQLITE_READONLY: "25006",
    sqlite3.SQLITE_CONSTRAINT: "23000",
    sqlite3.SQLITE_FULL: "53100",
    sqlite3.SQLITE_IOERR: "58030",
    sqlite3.SQLITE_CANTOPEN: "58030",
    sqlite3.SQLITE_CORRUPT: "58030",
    sqlite3.SQLITE_NOTADB: "58030",
}


def sqlstate(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of an error of a statement, translated for SQLite.

    None means a refused or lost connection. Other errors without a code get HY000, the general
    error, or 22000 (data exception) if the value of a parameter cannot be encoded.
    """
    if isinstance(error, sqlite3.Error):
        if not hasattr(error, "sqlite_errorcode"):
            return "HY000"
        if str(error).startswith("no such table"):
            return "42P01"
        if str(error).startswith("no such column") or "has no column named" in str(error):
            return "42703"
        code = error.sqlite_errorcode
        return _SQLSTATE_OF_SQLITE.get(code) or _SQLSTATE_OF_SQLITE.get(code & 0xFF, "HY000")
    state: str | None = getattr(error, "sqlstate", None)
    # psycopg raises InternalError if it cannot make sense of the results of a lost connection.
    lost = psycopg.OperationalError | psycopg.InterfaceError | psycopg.InternalError
    if state or isinstance(error, lost):
        return state
    # A text with NUL, a time without a zone, a number that is too large.
    bad_value = isinstance(error, psycopg.DataError | ValueError | ArithmeticError)
    return "22000" if bad_value else "HY000"


def is_foreign_key_violation(error: BaseException | None) -> bool:
    """Return whether a row refers to a missing row, or a deleted row is still referred to."""
    return sqlstate(error) in ("23503", "23001")  # 23001 is of ON DELETE RESTRICT.


def is_stale_plan(error: BaseException | None) -> bool:
    """Return whether a prepared statement failed because a column's type has changed since."""
    # The server translates the message "cached plan must not change result type", but not the
    # name of the function that raised it.
    return sqlstate(error) == "0A000" and (
        getattr(getattr(error, "diag", None), "source_function", None) == "RevalidateCachedQuery"
    )


def is_read_only(error: BaseException | None) -> bool:
    """Return whether a write failed because the server is a standby or its session read-only."""
    return sqlstate(error) == "25006"


def sqlite_engine(url: URL, pool_size: int, timeout: float) -> Engine:
    """Return an engine in autocommit. Locks are waited for during `timeout` seconds."""
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout,
        hide_parameters=True,
        connect_args={"isolation_level": None, "timeout": timeout, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: object) -> None:
        # With the write-ahead log, which the migrations switch on, NORMAL is enough for a commit
        # to survive the end of the process.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    count_errors(engine)
    return engine


@event.listens_for(Engine, "do_connect")
def _convert_prepare_threshold(_: object, __: object, ___: object, arguments: Any) -> None:
    """Convert psycopg's own parameter, which a URL contains as text, for all engines."""
    convert_prepare_threshold(arguments)


def convert_prepare_threshold(arguments: dict[str, Any]) -> None:
    """Convert psycopg's own parameter, which a URL contains as text."""
    if isinstance(threshold := arguments.get("prepare_threshold"), str):
        arguments["prepare_threshold"] = int(threshold) if threshold.isdecimal() else None


def count_error(error: BaseException) -> None:
    """Count a failed statement by the class of its SQLSTATE."""
    state = sqlstate(error)
    metrics.database_errors.labels(state[:2] if state else "none").inc()


def count_errors(engine: Engine) -> None:
    """Count the failed statements of the engine."""

    @event.listens_for(engine, "handle_error")
    def count(context: ExceptionContext) -> None:
        count_error(context.original_exception)
