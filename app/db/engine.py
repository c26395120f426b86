"""SQLAlchemy engines for SQLite and PostgreSQL, and the SQLSTATE of their errors."""

import math
import select
import sqlite3
from typing import Any

import psycopg
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app import NAME
from app.telemetry import metrics

# SQLite's result codes (https://www.sqlite.org/rescode.html) as SQLSTATEs.
_SQLSTATE_OF_SQLITE = {
    sqlite3.SQLITE_BUSY: "55P03",
    sqlite3.SQLITE_LOCKED: "55P03",
    sqlite3.SQLITE_READONLY: "25006",
    sqlite3.SQLITE_CONSTRAINT: "23000",
    sqlite3.SQLITE_FULL: "53100",
    sqlite3.SQLITE_IOERR: "58030",
    sqlite3.SQLITE_CANTOPEN: "58030",
    sqlite3.SQLITE_CORRUPT: "58030",
    sqlite3.SQLITE_NOTADB: "58030",
}


_READ_ONLY = "25006"


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
        return _SQLSTATE_OF_SQLITE.get(error.sqlite_errorcode & 0xFF, "HY000")
    state: str | None = getattr(error, "sqlstate", None)
    if state or isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return state
    # A text with NUL, a time without a zone, a number that is too large.
    bad_value = isinstance(error, psycopg.DataError | ValueError | ArithmeticError)
    return "22000" if bad_value else "HY000"


def is_stale_plan(error: BaseException | None) -> bool:
    """Return whether a prepared statement failed because a column's type has changed since."""
    # The server translates the message "cached plan must not change result type", but not the
    # name of the function that raised it.
    return sqlstate(error) == "0A000" and (
        getattr(getattr(error, "diag", None), "source_function", None) == "RevalidateCachedQuery"
    )


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

    event.listen(engine, "handle_error", _count_error)
    return engine


def postgresql_engine(url: URL, pool_size: int, timeout: float) -> AsyncEngine:
    """Return an engine in autocommit. The server ends statements after `timeout` seconds.

    With an empty `?options=` in the URL, the engine sends no `options`, because some poolers refuse
    them. The server's timeouts then come from `ALTER ROLE ... SET statement_timeout` and
    `idle_in_transaction_session_timeout`.
    """
    milliseconds = math.ceil(timeout * 1000)
    defaults = {
        "application_name": NAME,
        # Not the database's encoding: psycopg would return the texts of SQL_ASCII as bytes.
        "client_encoding": "utf8",
        "connect_timeout": math.ceil(timeout),
        # Limits the time until the loss of a server is noticed.
        "tcp_user_timeout": milliseconds,
        # A wait for a lock counts as part of its statement's time.
        "options": f"-c statement_timeout={milliseconds}"
        f" -c idle_in_transaction_session_timeout={milliseconds}",
    }
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        # A connection beyond the pool's size would be opened and closed for one statement.
        max_overflow=0,
        pool_timeout=timeout,
        # Parameters include secrets, which must not get into a log.
        hide_parameters=True,
        # A ROLLBACK drops all prepared statements, so there is none: autocommit needs no rollback.
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        # Parameters in the URL override the defaults. libpq does not send empty `options`.
        connect_args={name: value for name, value in defaults.items() if name not in url.query},
    )
    event.listen(engine.sync_engine, "checkout", _refuse_closed_connection)
    event.listen(engine.sync_engine, "handle_error", _disconnect)
    event.listen(engine.sync_engine, "handle_error", _count_error)
    return engine


@event.listens_for(Engine, "do_connect")
def _convert_prepare_threshold(_: object, __: object, ___: object, arguments: Any) -> None:
    """Convert psycopg's own parameter, which a URL contains as text, for all engines."""
    if isinstance(threshold := arguments.get("prepare_threshold"), str):
        arguments["prepare_threshold"] = int(threshold) if threshold.isdecimal() else None


def _refuse_closed_connection(connection: Any, *_: object) -> None:
    """Make the pool reconnect instead of handing out a connection that the server has closed.

    An idle connection becomes readable only when the server closes it, and the kernel knows that.
    `pool_pre_ping` would ask the server instead, at the cost of a round trip per statement.
    """
    connection = connection.driver_connection
    if not connection.closed:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        if not poll.poll(0):
            return
    raise InvalidatePoolError


def _disconnect(context: ExceptionContext) -> None:
    """Drop all connections after an error that would repeat on each of them.

    After a stale plan, because the other connections have prepared the statement too. After a write
    on a read-only server, because a new connection may lead to the new primary.
    """
    error = context.original_exception
    if is_stale_plan(error) or sqlstate(error) == _READ_ONLY:
        context.is_disconnect = True


def _count_error(context: ExceptionContext) -> None:
    state = sqlstate(context.original_exception)
    metrics.database_errors.labels(state[:2] if state else "none").inc()
