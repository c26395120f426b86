"""Run synchronous data functions without blocking the event loop."""

import asyncio
import math
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple

from psycopg_pool import PoolTimeout
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import greenlet_spawn
from sqlmodel import Session

from app.db.admission import Lane, only_reads
from app.db.batching import Batcher
from app.db.engine import is_read_only, is_stale_plan, sqlite_engine
from app.db.pool import ConnectionPool, PooledConnection
from app.errors import DatabaseTimeout, DatabaseUnavailable, OutcomeUnknown
from app.telemetry import metrics

Ts = TypeVarTuple("Ts")
T = TypeVar("T")
Item = TypeVar("Item")

# The extra time to cancel a statement on the server. The connection of a server that does not
# respond even to that is given up.
_CANCEL_SECONDS = 0.5
# SQLite checks the time of a call after so many instructions of its virtual machine. The insert of
# a row has more.
_SQLITE_STEPS = 10


class _Call:
    """One call, its lanes and its connection. `deadline` is on the clock of `time.monotonic`."""

    __slots__ = (
        "args",
        "connection",
        "deadline",
        "fn",
        "lanes",
        "may_have_written",
        "only_reads",
        "seconds",
        "start",
    )

    def __init__(self, fn: Callable[..., Any], seconds: float) -> None:
        self.fn = fn
        self.args: Sequence[Any] = ()
        self.only_reads = only_reads(fn)
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.lanes: list[Lane] = []
        self.start: float | None = None
        self.connection: PooledConnection | None = None
        self.may_have_written = False


class Database:
    """Runs plain synchronous functions over a `Session`.

    Each call ends within its timeout, in seconds: waiting for a connection, for locks and for the
    statements. A call commits before it returns. On PostgreSQL it runs in one greenlet on the event
    loop, and the server cancels it after its timeout. On SQLite it runs in a worker thread, which
    cannot be cancelled: after its timeout it starts no statement and waits for no lock, but a
    commit in progress completes.

    At most `queue_size` calls wait for a connection. Connections are made on first use, so the
    service starts while the database is down.
    """

    def __init__(self, url: URL, *, pool_size: int, timeout: float, queue_size: int = 500) -> None:
        self.timeout = timeout
        self._queue_size = queue_size
        self._all = Lane(pool_size, queue_size)
        self._writes = Lane(pool_size - pool_size // 4, queue_size)
        # Of the calls that wait for a connection.
        self.timeouts: set[asyncio.Timeout] = set()
        self._responded_at = -math.inf
        self._batchers: dict[Callable[..., Any], Batcher[Any, Any]] = {}
        self._pool: ConnectionPool | None = None
        self._spawn: Callable[..., Awaitable[Any]]
        if url.get_backend_name() == "sqlite":
            self.engine = sqlite_engine(url, pool_size, timeout)
            self._spawn = asyncio.to_thread
        else:
            self._pool = ConnectionPool(url, pool_size, timeout, self._end_waiting)
            self.engine = self._pool.engine
            self._spawn = greenlet_spawn

    async def run(
        self,
        fn: Callable[[Session, *Ts], T],
        *args: *Ts,
        timeout: float | None = None,  # noqa: ASYNC109  (The server cancels the statement too.)
    ) -> T:
        """Run `fn(session, *args)`, which is one statement, in autocommit.

        `timeout` replaces the default timeout, in seconds. Raises `Overloaded`,
        `DatabaseUnavailable`, `DatabaseTimeout`, `OutcomeUnknown`, or the error of SQLAlchemy or
        `fn`.
        """
        seconds = timeout or self.timeout
        result: T = await self._run(self._autocommit, fn, lambda: args, seconds)
        return result

    async def run_in_transaction(
        self,
        fn: Callable[[Session, *Ts], T],
        *args: *Ts,
        timeout: float | None = None,  # noqa: ASYNC109  (The server cancels the statement too.)
    ) -> T:
        """Run `fn(session, *args)` between BEGIN and COMMIT, or ROLLBACK if it raises.

        `fn` may use the ORM, lazy relationships included. Objects that it returns keep their loaded
        attributes. `timeout` replaces the default timeout, in seconds. After a stale plan or on a
        standby `fn` runs a second time. Raises the same errors as `run`. On error nothing was
        written, except that after `OutcomeUnknown` the COMMIT may have succeeded.
        """
        seconds = timeout or self.timeout
        result: T = await self._run(self._transaction, fn, lambda: args, seconds)
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
            batcher = Batcher(
                fn.__name__,
                lambda take, seconds: self._run(self._autocommit, fn, lambda: (take(),), seconds),
                only_reads=only_reads(fn),
                timeout=self.timeout,
                limit=self._queue_size,
            )
            self._batchers[fn] = batcher
        result: T = await batcher.call(item)
        return result

    async def close(self) -> None:
        """Wait for the batches in progress, then close the idle connections."""
        for batcher in self._batchers.values():
            await batcher.close()
        if self._pool:
            await self._pool.close()
        else:
            self.engine.dispose()

    @property
    def connections(self) -> tuple[int, int]:
        """The number of connections in use, and of idle ones."""
        if self._pool:
            return self._pool.connections
        pool = self.engine.pool
        assert isinstance(pool, QueuePool)  # noqa: S101
        return pool.checkedout(), pool.checkedin()

    @property
    def has_responded(self) -> bool:
        """Whether a call has succeeded within the last timeout."""
        return time.monotonic() - self._responded_at < self.timeout

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a connection."""
        return len(self.timeouts)

    async def _run(
        self,
        run: Callable[..., Any],
        fn: Callable[..., Any],
        take: Callable[[], Sequence[Any]],
        seconds: float,
    ) -> Any:
        """Run `fn` by `run`. `take` returns its arguments, once there is a connection."""
        call = _Call(fn, seconds)
        try:
            return await self._run_once(run, call, take)
        except DBAPIError as error:
            if not (is_stale_plan(error.orig) or is_read_only(error.orig)):
                raise
        # The server refused the statement before running it, and the connection is replaced.
        again = _Call(fn, call.deadline - time.monotonic())
        return await self._run_once(run, again, lambda: call.args)

    async def _run_once(
        self, run: Callable[..., Any], call: _Call, take: Callable[[], Sequence[Any]]
    ) -> Any:
        """Run the call within its time, on a connection of its own."""
        start = time.monotonic()
        try:
            async with (
                asyncio.timeout(call.seconds + _CANCEL_SECONDS),
                asyncio.timeout(call.seconds) as limit,
            ):
                try:
                    await self._acquire(call, limit)
                    call.args = take()
                    result = await self._spawn(run, call)
                    self._responded_at = time.monotonic()
                    return result
                except DBAPIError as error:
                    await self._drain_after(error, call)
                    raise
                finally:
                    await self._release(call)
        except (TimeoutError, PoolTimeout) as error:
            if self._pool and self._pool.error and not call.connection:
                raise DatabaseUnavailable(self._pool.error) from error
            metrics.database_errors.labels("timeout").inc()
            raise (OutcomeUnknown if call.may_have_written else DatabaseTimeout) from error
        except DBAPIError as error:
            if call.may_have_written and error.connection_invalidated:
                raise OutcomeUnknown from error
            raise
        finally:
            metrics.operation_duration.observe(time.monotonic() - start)

    async def _acquire(self, call: _Call, limit: asyncio.Timeout) -> None:
        self.timeouts.add(limit)
        try:
            for lane in (self._all,) if call.only_reads else (self._writes, self._all):
                await lane.enter(self.timeout)
                call.lanes.append(lane)
            if self._pool:
                call.connection = await self._pool.acquire()
        finally:
            self.timeouts.discard(limit)
        call.start = time.monotonic()

    async def _release(self, call: _Call) -> None:
        # A call with a longer timeout, such as an import, says nothing about the others.
        held = None
        if call.start and call.seconds <= self.timeout:
            held = time.monotonic() - call.start
        for lane in call.lanes:
            lane.leave(held)
        if call.connection and self._pool:
            await self._pool.release(call.connection)

    async def _drain_after(self, error: DBAPIError, call: _Call) -> None:
        """Drain the pool after an error that would repeat on each of its connections."""
        if not (call.connection and self._pool):
            return
        if is_stale_plan(error.orig):
            await self._pool.drain(call.connection)
        elif is_read_only(error.orig):
            await self._pool.drain_read_only(call.connection)

    def _end_waiting(self) -> None:
        """End the calls that wait for a connection, because none can be made."""
        for limit in self.timeouts:
            if not limit.expired():
                limit.reschedule(0)

    def _autocommit(self, call: _Call) -> Any:
        session = (
            call.connection.session
            if call.connection
            else Session(self.engine, expire_on_commit=False)
        )
        is_used = True
        try:
            with self._limited(session, call):
                call.may_have_written = not call.only_reads
                result = call.fn(session, *call.args)
                session.flush()  # Without it, added objects would be lost silently.
                is_used = session.in_transaction()
                return result
        finally:
            # To close a session that has only fetched is 3% of a read.
            if is_used:
                session.close()

    def _transaction(self, call: _Call) -> Any:
        # The caller gets objects after the commit, when they could not be loaded again.
        bind = call.connection.bind if call.connection else self.engine
        with (
            Session(bind, expire_on_commit=False) as session,
            self._limited(session, call),
        ):
            connection = session.connection()
            if call.connection:
                # Ends the autocommit until the pool gets the connection back.
                connection.connection.dbapi_connection.autocommit = False  # type: ignore[union-attr]
                if call.seconds != self.timeout:
                    milliseconds = max(1, math.ceil((call.deadline - time.monotonic()) * 1000))
                    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {milliseconds}")
            else:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            result = call.fn(session, *call.args)
            call.may_have_written = not call.only_reads
            # A thread on SQLite continues after its caller has learned that nothing was written.
            if time.monotonic() > call.deadline:
                call.may_have_written = False
                raise TimeoutError
            session.commit()
            return result

    @contextmanager
    def _limited(self, session: Session, call: _Call) -> Iterator[None]:
        """Limit the time of a call on SQLite, whose thread cannot be cancelled."""
        if call.connection:
            yield
            return
        driver = session.connection().connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)  # noqa: S101
        # Ends a little earlier than the caller's timeout. Otherwise the call could write after its
        # caller has gone, and the outcome would be unknown.
        end = call.deadline - min(0.1 * call.seconds, 0.5)
        seconds = end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        driver.execute(f"PRAGMA busy_timeout = {math.ceil(seconds * 1000)}")
        # A statement that gets its lock, or starts, too late is interrupted before it writes.
        driver.set_progress_handler(lambda: time.monotonic() > end, _SQLITE_STEPS)
        try:
            yield
        finally:
            driver.set_progress_handler(None, 0)
