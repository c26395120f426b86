"""Run synchronous data functions without blocking the event loop."""

import asyncio
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, TypeVarTuple

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import greenlet_spawn
from sqlmodel import Session

from app.db.batching import Batcher
from app.db.engine import is_stale_plan, postgresql_engine, sqlite_engine
from app.errors import DatabaseTimeout
from app.telemetry import metrics

Ts = TypeVarTuple("Ts")
T = TypeVar("T")
Item = TypeVar("Item")

# The extra time to cancel a statement on the server. The connection of a server that does not
# respond even to that is given up.
_CANCEL_SECONDS = 0.5


class Database:
    """Runs plain synchronous functions over a `Session`.

    Each call ends within its timeout, in seconds: waiting for a connection, for locks and for the
    statements. A call commits before it returns. On PostgreSQL it runs in one greenlet on the event
    loop, and the server cancels it after its timeout. On SQLite it runs in a worker thread, which
    cannot be cancelled: after its timeout it does not start and waits for no lock, but a commit in
    progress completes.

    Connections are made on first use, so the service starts while the database is down.
    """

    def __init__(self, url: URL, *, pool_size: int, timeout: float) -> None:
        self._timeout = timeout
        # SQLAlchemy's pool lets new callers overtake waiting ones. The semaphore is fair.
        self._connections = asyncio.Semaphore(pool_size)
        self._calls = 0
        self._batchers: dict[Callable[..., Any], Batcher[Any, Any]] = {}
        self._async_engine: AsyncEngine | None = None
        self._spawn: Callable[..., Awaitable[Any]]
        if url.get_backend_name() == "sqlite":
            self.engine = sqlite_engine(url, pool_size, timeout)
            self._spawn = asyncio.to_thread
        else:
            self._async_engine = postgresql_engine(url, pool_size, timeout)
            self.engine = self._async_engine.sync_engine
            self._spawn = greenlet_spawn

    async def run(self, fn: Callable[[Session, *Ts], T], *args: *Ts) -> T:
        """Run `fn(session, *args)`, which is one statement, in autocommit.

        Raises `DatabaseTimeout`, or the error of SQLAlchemy or `fn`.
        """
        async with self._call(self._timeout) as deadline:
            try:
                result: T = await self._spawn(self._autocommit, deadline, fn, *args)
            except DBAPIError as error:
                if not is_stale_plan(error.orig):
                    raise
                # The server refused the statement before running it, and the pool is empty now.
                result = await self._spawn(self._autocommit, deadline, fn, *args)
            return result

    async def run_in_transaction(
        self,
        fn: Callable[[Session, *Ts], T],
        *args: *Ts,
        timeout: float | None = None,  # noqa: ASYNC109  (The server cancels the statement too.)
    ) -> T:
        """Run `fn(session, *args)` between BEGIN and COMMIT, or ROLLBACK if it raises.

        `fn` may use the ORM, lazy relationships included. Objects that it returns keep their loaded
        attributes. `timeout` replaces the default timeout, in seconds. After a stale plan `fn` runs
        a second time. Raises `DatabaseTimeout`, or the error of SQLAlchemy or `fn`. On error
        nothing was written, unless the COMMIT succeeded and its reply came too late.
        """
        async with self._call(timeout or self._timeout) as deadline:
            try:
                result: T = await self._spawn(self._transaction, deadline, timeout, fn, *args)
            except DBAPIError as error:
                if not is_stale_plan(error.orig):
                    raise
                result = await self._spawn(self._transaction, deadline, timeout, fn, *args)
            return result

    async def run_batched(self, fn: Callable[[Session, list[Item]], Sequence[T]], item: Item) -> T:
        """Run `fn` for this item together with the items of concurrent calls.

        `fn(session, items)` is one statement and returns a result per item, in order. It is a
        module-level function or a method, not a lambda. A call joins only a batch that has not
        been sent, so it sees every write acknowledged before it started. Cancelling one call does
        not affect the others. If a batch fails for a reason that one item may have caused, its
        items run one by one. Any other failure goes to all calls. Raises the same errors as `run`.
        """
        batcher = self._batchers.get(fn)
        if batcher is None:
            batcher = Batcher(lambda items: self.run(fn, items), fn.__name__, self._timeout)
            self._batchers[fn] = batcher
        result: T = await batcher.call(item)
        return result

    async def close(self) -> None:
        """Wait for the batches in progress, then close the idle connections."""
        for batcher in self._batchers.values():
            await batcher.close()
        if self._async_engine:
            await self._async_engine.dispose()
        else:
            self.engine.dispose()

    @property
    def connections(self) -> tuple[int, int]:
        """The number of connections in use, and of idle ones."""
        pool = self.engine.pool
        assert isinstance(pool, QueuePool)  # noqa: S101
        return pool.checkedout(), pool.checkedin()

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a connection."""
        return max(0, self._calls - self.connections[0])

    @asynccontextmanager
    async def _call(self, seconds: float) -> AsyncIterator[float]:
        """Limit one call in time, and all calls in number to the size of the pool.

        Yields the deadline on the clock of `time.monotonic`.
        """
        self._calls += 1
        start = time.monotonic()
        try:
            async with (
                asyncio.timeout(seconds + _CANCEL_SECONDS),
                asyncio.timeout(seconds),
                self._connections,
            ):
                yield start + seconds
        except (TimeoutError, PoolTimeout) as error:
            metrics.database_errors.labels("timeout").inc()
            raise DatabaseTimeout from error
        finally:
            self._calls -= 1
            metrics.operation_duration.observe(time.monotonic() - start)

    def _autocommit(self, deadline: float, fn: Callable[..., T], *args: Any) -> T:
        with Session(self.engine, expire_on_commit=False) as session:
            self._limit_lock_wait(session, deadline)
            result = fn(session, *args)
            session.flush()  # Without it, objects added to the session would be lost silently.
            return result

    def _transaction(
        self, deadline: float, timeout: float | None, fn: Callable[..., T], *args: Any
    ) -> T:
        # The caller gets objects after the commit, when they could not be loaded again.
        with Session(self.engine, expire_on_commit=False) as session:
            self._limit_lock_wait(session, deadline)
            if self._async_engine:
                # Ends the autocommit until the pool gets the connection back.
                session.connection(execution_options={"isolation_level": "READ COMMITTED"})
                if timeout is not None:
                    milliseconds = max(1, math.ceil((deadline - time.monotonic()) * 1000))
                    session.connection().exec_driver_sql(
                        f"SET LOCAL statement_timeout = {milliseconds}"
                    )
            else:
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            result = fn(session, *args)
            session.commit()
            return result

    def _limit_lock_wait(self, session: Session, deadline: float) -> None:
        """Limit the time that SQLite waits for a lock. The call's thread cannot be cancelled."""
        if self._async_engine:
            return
        driver = session.connection().connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)  # noqa: S101
        # Ends a little earlier than the caller's timeout. Otherwise the call could get the lock
        # after its caller has gone, and write.
        seconds = deadline - time.monotonic() - 0.05
        if seconds <= 0:
            raise TimeoutError
        driver.execute(f"PRAGMA busy_timeout = {math.ceil(seconds * 1000)}")
