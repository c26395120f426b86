"""The engine for a URL, and the two ways to run work on it without blocking the event loop."""

import asyncio
import math
import select
import sqlite3
import time
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import greenlet_spawn
from sqlmodel import Session

from app import metrics
from app.errors import DatabaseTimeout

P = ParamSpec("P")
T = TypeVar("T")

# What SQLite's result codes (https://www.sqlite.org/rescode.html) are called in SQL's own terms.
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


def sqlstate(error: BaseException | None) -> str | None:
    """The SQLSTATE of a driver's error, translated for SQLite; None where there is none.

    A lost or refused connection has none. SQLite's errors that are nobody's but the statement's
    get HY000, the general error.
    """
    if isinstance(error, sqlite3.Error):
        if not hasattr(error, "sqlite_errorcode"):
            return "HY000"
        if str(error).startswith("no such table"):
            return "42P01"
        if str(error).startswith("no such column") or "has no column named" in str(error):
            return "42703"
        return _SQLSTATE_OF_SQLITE.get(error.sqlite_errorcode & 0xFF, "HY000")
    return getattr(error, "sqlstate", None)


class Database:
    """Runs plain synchronous functions over a `Session`, in autocommit or in a transaction.

    Connections are made when they are first needed, so that a database that is away when the
    service starts is no reason not to start. Every unit of work is answered within `timeout`
    seconds: the wait for a connection, then for locks, then for the statements. Its work is
    committed before its result is returned.

    On PostgreSQL a unit runs in one greenlet on the event loop (one switch in, one out), and past
    its time it is cancelled. On SQLite it runs in a worker thread, which cannot be cancelled: past
    its time it does not begin and waits for no lock, but a commit that is under way is made.
    """

    def __init__(self, url: URL, *, pool_size: int, timeout: float) -> None:
        self._timeout = timeout
        self._units = 0
        # The pool's own queue lets those that come overtake those that wait, some for ever.
        self._places = asyncio.Semaphore(pool_size)
        self._async_engine: AsyncEngine | None = None
        self._spawn: Callable[..., Awaitable[Any]]
        if url.get_backend_name() == "sqlite":
            self.engine = _sqlite(url, pool_size, timeout)
            self._spawn = asyncio.to_thread
        else:
            self._async_engine = _postgresql(url, pool_size, timeout)
            self.engine = self._async_engine.sync_engine
            self._spawn = greenlet_spawn
        event.listen(self.engine, "handle_error", _count)
        pool = self.engine.pool
        assert isinstance(pool, QueuePool)  # noqa: S101  (A pool with a bound is what was asked for.)
        self._pool = pool

    async def statement(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs `work(session, ...)` in autocommit: for work that is exactly one statement.

        Raises `DatabaseTimeout`, or what SQLAlchemy raises.
        """
        try:
            return await self._within_timeout(self._autocommit, work, *args, **kwargs)
        except DBAPIError as error:
            if not _is_stale_plan(error.orig):
                raise
            # The statement was refused before it did anything, and the pool has been emptied.
            return await self._within_timeout(self._autocommit, work, *args, **kwargs)

    async def transaction(
        self, work: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs `work(session, ...)` between BEGIN and COMMIT, or ROLLBACK when it raises.

        Raises `DatabaseTimeout`, or what SQLAlchemy or `work` raises. Nothing was written then, but
        for a COMMIT of which the answer did not come in time.
        """
        return await self._within_timeout(self._in_transaction, work, *args, **kwargs)

    async def long_transaction(
        self,
        seconds: float,
        work: Callable[Concatenate[Session, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """As `transaction`, for work that may take `seconds` instead of `timeout`."""
        return await self._within(seconds, self._in_long_transaction, work, *args, **kwargs)

    async def close(self) -> None:
        """Closes the connections that are not in use."""
        if self._async_engine:
            await self._async_engine.dispose()
        else:
            self.engine.dispose()

    @property
    def in_use(self) -> int:
        """Connections that units of work have taken from the pool."""
        return self._pool.checkedout()

    @property
    def waiting(self) -> int:
        """Units of work that wait for a connection."""
        return max(0, self._units - self.in_use)

    async def _within_timeout(self, run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return await self._within(self._timeout, run, *args, **kwargs)

    async def _within(self, seconds: float, run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        self._units += 1
        try:
            # At the time the statement is cancelled on the server too. A server that does not
            # answer even that gets no more patience: its connection is given up.
            async with asyncio.timeout(seconds + 0.5), asyncio.timeout(seconds):
                deadline = time.monotonic() + seconds
                async with self._places:
                    result: T = await self._spawn(run, deadline, *args, **kwargs)
                return result
        except (TimeoutError, PoolTimeout) as error:
            metrics.database_errors.labels("timeout").inc()
            raise DatabaseTimeout from error
        finally:
            self._units -= 1

    def _autocommit(self, deadline: float, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        with Session(self.engine) as session:
            self._bound_by(session, deadline)
            return work(session, *args, **kwargs)

    def _bound_by(self, session: Session, deadline: float) -> None:
        """Leaves SQLite's unit, which nobody can cancel, no more than its time."""
        if self._async_engine:
            return
        driver = session.connection().connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)  # noqa: S101
        # A little less, or a lock that is free at the last moment would be taken for nobody.
        left = deadline - time.monotonic() - 0.05
        if left <= 0:
            raise TimeoutError
        driver.execute(f"PRAGMA busy_timeout = {math.ceil(left * 1000)}")

    def _in_transaction(
        self, deadline: float, work: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        with Session(self.engine) as session:
            self._bound_by(session, deadline)
            if self._async_engine:
                # Until the connection is given back, it is not in autocommit.
                session.connection(execution_options={"isolation_level": "READ COMMITTED"})
            else:
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            result = work(session, *args, **kwargs)
            session.commit()
            return result

    def _in_long_transaction(
        self, deadline: float, work: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        def with_time(session: Session) -> T:
            if self._async_engine:
                left = math.ceil((deadline - time.monotonic()) * 1000)
                session.connection().exec_driver_sql(f"SET LOCAL statement_timeout = {left}")
            return work(session, *args, **kwargs)

        return self._in_transaction(deadline, with_time)


def _sqlite(url: URL, pool_size: int, timeout: float) -> Engine:
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=timeout,
        hide_parameters=True,
        # Autocommit; the timeout is for the lock that another writer holds.
        connect_args={"isolation_level": None, "timeout": timeout, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: object) -> None:
        # Enough with the write-ahead log that the migrations switch on: a commit survives the end
        # of the process.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    return engine


def _postgresql(url: URL, pool_size: int, timeout: float) -> AsyncEngine:
    milliseconds = math.ceil(timeout * 1000)
    defaults = {
        "application_name": "heroes",
        "connect_timeout": math.ceil(timeout),
        # A server that vanished without a word is noticed in this time.
        "tcp_user_timeout": milliseconds,
        # Locks are waited for within the statement's time.
        "options": f"-c statement_timeout={milliseconds}"
        f" -c idle_in_transaction_session_timeout={milliseconds}",
    }
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        # A connection over the pool's size would be opened and closed for one statement.
        max_overflow=0,
        pool_timeout=timeout,
        # The statement's parameters include secret names: they must not get into a log.
        hide_parameters=True,
        # Prepared statements live as long as nothing is rolled back, hence autocommit. To roll
        # back nothing is a tenth of a unit of work.
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        # What the URL says itself (PgBouncer, for one, takes no `options`) stands.
        connect_args={name: value for name, value in defaults.items() if name not in url.query},
    )
    event.listen(engine.sync_engine, "checkout", _refuse_a_closed_connection)
    event.listen(engine.sync_engine, "handle_error", _disconnect_on_a_stale_plan)
    return engine


def _refuse_a_closed_connection(connection: Any, *_: object) -> None:
    """Makes the pool connect anew instead of handing out connections that the server has closed.

    An idle connection has nothing to read but its end (or the notice of it), which the kernel
    knows: `pool_pre_ping` would ask the server, at the price of a round trip for each statement.
    """
    connection = connection.driver_connection
    if not connection.closed:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        if not poll.poll(0):
            return
    raise InvalidatePoolError


def _disconnect_on_a_stale_plan(context: ExceptionContext) -> None:
    """Gives up connections whose prepared statements outlived a change of the schema.

    On such a connection the statement would fail for ever. Every other one prepared it as well.
    """
    if _is_stale_plan(context.original_exception):
        context.is_disconnect = True


def _count(context: ExceptionContext) -> None:
    state = sqlstate(context.original_exception)
    metrics.database_errors.labels(state[:2] if state else "none").inc()


def _is_stale_plan(error: BaseException | None) -> bool:
    # The message, "cached plan must not change result type", is translated by the server; where
    # it was raised is not.
    return sqlstate(error) == "0A000" and (
        getattr(getattr(error, "diag", None), "source_function", None) == "RevalidateCachedQuery"
    )
