"""Connections to PostgreSQL: psycopg's pool, and how a connection is made."""

import asyncio
import logging
import math
import random
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Self

import psycopg
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import URL, Connection, NullPool, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import greenlet_spawn
from sqlmodel import Session

from app import NAME
from app.db.engine import convert_prepare_threshold, count_errors, sqlstate
from app.db.fetch import CURSOR
from app.errors import DatabaseUnavailable
from app.telemetry import metrics

logger = logging.getLogger(__name__)
# It warns of each attempt and each lost connection. This module logs when the state changes.
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)

# The next address is tried after this time, or when the previous one fails (RFC 8305).
_STAGGER_SECONDS = 0.25
# Between two rounds over all addresses. Doubled after each round up to the maximum.
_MIN_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 0.5
_CONNECT_SECONDS = 5
# Load balancers and firewalls forget connections that are idle for longer: the shortest time of a
# large provider is 4 minutes (Azure).
_KEEPALIVE_SECONDS = 30
_MAX_LIFETIME_SECONDS = 30 * 60
_MAX_IDLE_SECONDS = 10 * 60
_NEW_SECONDS = 1


class PooledConnection(psycopg.AsyncConnection[Any]):
    """A connection of the pool. Sessions use it through `bind`, SQLAlchemy's object for it.

    `session` is for calls in autocommit. To make one for each call is 11% of a read on one
    connection. `made_at` is on the clock of `time.monotonic`.
    """

    bind: Connection
    session: Session
    made_at: float

    @classmethod
    async def connect(cls, _: str = "", *, pool: "ConnectionPool") -> Self:  # type: ignore[override]
        """Make a connection for psycopg's pool."""
        bind = await pool.connect()
        connection = bind.connection.driver_connection
        bind.detach()  # Its pool is psycopg's, not SQLAlchemy's.
        assert isinstance(connection, cls)  # noqa: S101
        connection.bind = bind
        info = {CURSOR: connection.cursor()}
        connection.session = Session(bind, expire_on_commit=False, info=info)
        connection.made_at = time.monotonic()
        return connection

    @classmethod
    async def connect_to(cls, address: dict[str, Any]) -> Self:
        """Make a connection to one address."""
        return await super().connect(**address)


class ConnectionPool:
    """At most `size` connections in autocommit, made in the background and used again.

    A new connection goes to the next caller in line, also if the caller that caused it has gone.
    While the server is down, a few tasks retry and `acquire` fails immediately. `on_failure` is
    called when an attempt fails and the pool has no connection.

    The server ends statements a little before `timeout` seconds, and their waits for locks after
    half of it. With an empty `?options=` in the URL no `options` are sent, because some poolers
    refuse them. These limits then come from `ALTER ROLE ... SET`.
    """

    def __init__(self, url: URL, size: int, timeout: float, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        # Why the last attempt failed, until the next one succeeds.
        self.error: str | None = None
        self._in_use = 0
        self._drained_at = -math.inf
        self._closed = asyncio.Event()
        self._parameters = _parameters(url, timeout)
        self.engine = create_async_engine(
            "postgresql+psycopg://",
            async_creator=self._connect,
            poolclass=NullPool,
            # Parameters include secrets, which must not get into a log.
            hide_parameters=True,
            # A ROLLBACK drops all prepared statements, so there is none: autocommit needs no
            # rollback.
            isolation_level="AUTOCOMMIT",
            skip_autocommit_rollback=True,
            # The type needs a query for each new connection, and no column has it.
            use_native_hstore=False,
        ).sync_engine
        count_errors(self.engine)
        event.listen(self.engine, "handle_error", _keep_new_connections)
        self._pool = AsyncConnectionPool(
            connection_class=PooledConnection,
            kwargs={"pool": self},
            min_size=0,
            max_size=size,
            timeout=math.inf,  # The callers limit their wait.
            max_lifetime=_MAX_LIFETIME_SECONDS,
            max_idle=_MAX_IDLE_SECONDS,
            open=False,
            name=NAME,
        )

    async def acquire(self) -> PooledConnection:
        """Wait for a connection that is neither drained nor closed by the server, and return it.

        Raises `DatabaseUnavailable` if there is none and the last attempt to make one failed.
        """
        if self._pool.closed:
            await self._pool.open()
        while True:
            if self.error and not any(self.connections):
                raise DatabaseUnavailable(self.error)
            connection = await self._pool.getconn()
            # A call can release a connection, and another one can get it, while a drain starts.
            is_drained = connection.made_at <= self._drained_at
            if not (is_drained or _is_closed(connection)):
                self._in_use += 1
                return connection
            await connection.close()
            await self._pool.putconn(connection)

    async def release(self, connection: PooledConnection) -> None:
        """Give the connection back. The pool replaces it if it is broken."""
        self._in_use -= 1
        if connection.bind.invalidated or connection.closed:
            await connection.close()
        elif not connection.autocommit:
            await connection.set_autocommit(True)
        await self._pool.putconn(connection)

    async def drain(self, connection: PooledConnection) -> None:
        """Replace all connections, because this one failed for a reason that concerns them all.

        Those in use are replaced when they are released.
        """
        if connection.made_at > self._drained_at:
            self._drained_at = time.monotonic()
            await self._pool.drain()

    async def drain_read_only(self, connection: PooledConnection) -> None:
        """Replace all connections, because this one leads to a standby.

        Only the connection itself if it is new, so that each write to a standby does not empty the
        pool.
        """
        if time.monotonic() - connection.made_at > _NEW_SECONDS:
            await self.drain(connection)
        else:
            await connection.close()

    async def connect(self) -> Connection:
        """Make a connection, and retry until there is one.

        SQLAlchemy asks the first one for the server's version. This fails after the login if a
        pooler accepts connections while its server is down. psycopg's pool would double its delay
        up to minutes.
        """
        while not self._closed.is_set():
            try:
                connection = await greenlet_spawn(self.engine.connect)
            except DBAPIError as error:
                self._failed(error.orig or error)
                await asyncio.sleep(_MAX_RETRY_SECONDS)
                continue
            if self.error:
                logger.info("Connected to the database again")
                self.error = None
            return connection
        raise DatabaseUnavailable("the pool is closed")

    async def close(self) -> None:
        """Close the idle connections, and those in use when they are released."""
        self._closed.set()
        await self._pool.close(timeout=2 * _MAX_RETRY_SECONDS)

    @property
    def connections(self) -> tuple[int, int]:
        """The number of connections in use, and of idle ones."""
        return self._in_use, self._pool.get_stats()["pool_available"]

    async def _connect(self) -> PooledConnection:
        """Connect to the address that accepts first, and retry until one does.

        Each round resolves the names again, because a name may move to a new primary. An attempt
        may outlast its round, because a silent address takes longer to fail.
        """
        attempts: set[asyncio.Task[PooledConnection]] = set()
        delay = _MIN_RETRY_SECONDS
        try:
            while not self._closed.is_set():
                errors: list[BaseException] = []
                for address in await _resolve(self._parameters, errors):
                    attempts.add(asyncio.create_task(PooledConnection.connect_to(address)))
                    if connection := await _first(attempts, _STAGGER_SECONDS, errors):
                        return connection
                if attempts and (connection := await _first(attempts, _MAX_RETRY_SECONDS, errors)):
                    return connection
                if errors:
                    self._failed(errors[-1])
                if not attempts:
                    await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311
                    delay = min(2 * delay, _MAX_RETRY_SECONDS)
        finally:
            for attempt in attempts:
                # It may have ended at the moment when this task was cancelled.
                if not (attempt.cancel() or attempt.cancelled() or attempt.exception()):
                    await attempt.result().close()
        raise DatabaseUnavailable("the pool is closed")

    def _failed(self, error: BaseException) -> None:
        metrics.database_errors.labels((sqlstate(error) or "none")[:2]).inc()
        if not self.error:
            logger.warning("Cannot connect to the database: %s", error)
        self.error = str(error)
        if not any(self.connections):
            self._on_failure()


def _keep_new_connections(context: ExceptionContext) -> None:
    """Use a connection even if SQLAlchemy noticed the loss of another one while it was made."""
    context.invalidate_pool_on_disconnect = False


def _parameters(url: URL, timeout: float) -> dict[str, Any]:
    """Return psycopg's parameters: those of the URL, and defaults for the others."""
    given: dict[str, Any] = {**url.get_dialect()().create_connect_args(url)[1]}
    convert_prepare_threshold(given)
    milliseconds = math.ceil(timeout * 1000)
    return {
        "autocommit": True,
        "application_name": NAME,
        # Not the database's encoding: psycopg would return the texts of SQL_ASCII as bytes.
        "client_encoding": "utf8",
        "connect_timeout": _CONNECT_SECONDS,
        # Limits the time until the loss of a server is noticed.
        "tcp_user_timeout": milliseconds,
        "keepalives_idle": _KEEPALIVE_SECONDS,
        "keepalives_interval": _KEEPALIVE_SECONDS // 3,
        "keepalives_count": 3,
        # Before the client gives up: then the outcome is known, and the connection can be kept. A
        # wait for a lock counts as part of its statement's time.
        "options": f"-c statement_timeout={milliseconds * 9 // 10}"
        f" -c lock_timeout={milliseconds // 2}"
        f" -c idle_in_transaction_session_timeout={milliseconds}",
        **given,
    }


async def _resolve(parameters: dict[str, Any], errors: list[BaseException]) -> list[dict[str, Any]]:
    """Return the parameters for each address of each host. Append names without an address."""
    hosts, addresses, ports = (
        str(parameters.get(name) or "").split(",") for name in ("host", "hostaddr", "port")
    )
    count = max(len(hosts), len(addresses))
    found = []
    for host, address, port in zip(
        *(each * count if len(each) == 1 else each for each in (hosts, addresses, ports)),
        strict=True,
    ):
        own = {"host": host, "hostaddr": address, "port": port}
        one = {**parameters, **{name: value or None for name, value in own.items()}}
        if address or not host or host.startswith(("/", "@")):
            found.append(one)
            continue
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(
                host, port or None, type=socket.SOCK_STREAM
            )
            found += [{**one, "hostaddr": info[4][0]} for info in infos]
        except OSError as error:
            errors.append(error)
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(found)
    return found


async def _first(
    attempts: set[asyncio.Task[PooledConnection]], seconds: float, errors: list[BaseException]
) -> PooledConnection | None:
    """Return the first connection within this time. Remove ended attempts, append their errors."""
    ended, _ = await asyncio.wait(attempts, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    attempts -= ended
    connection = None
    for attempt in ended:
        if error := attempt.exception():
            errors.append(error)
        elif connection:
            await attempt.result().close()
        else:
            connection = attempt.result()
    return connection


def _is_closed(connection: PooledConnection) -> bool:
    """Return whether the server has closed an idle connection.

    It becomes readable only then, and the kernel knows that. A query would cost a round trip.
    """
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))
