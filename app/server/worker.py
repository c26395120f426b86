"""The gunicorn worker: uvicorn's worker, with draining before it stops."""

import asyncio
import logging
import os
import select
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import psycopg
from gunicorn.arbiter import Arbiter
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.server.protocol import BoundedProtocol
from app.settings import Settings

logger = logging.getLogger(__name__)

# Seconds after which a stopping worker closes its listeners even if connections still wait. The
# accepted connections need the rest of the time.
MAX_ACCEPT_SECONDS = 5


class DrainingServer(Server):
    """Stops without losing a request that a client has sent.

    uvicorn closes idle keep-alive connections immediately, although a request may be on its way.
    This server first stops accepting connections, which other workers accept on the same listeners.
    It then sends `connection: close` with each response, and waits until all connections are
    closed: after their next response, or because they stay idle.
    """

    drain_seconds: float = 25

    async def shutdown(self, sockets: object = None) -> None:  # noqa: ARG002  (Closed with the servers.)
        self.lifespan.state["draining"] = True  # For /health/ready.
        start = time.monotonic()
        # The kernel resets the connections that wait in a listener that is closed. uvloop accepts
        # one connection in each turn of the event loop.
        waiting = select.poll()
        for server in self.servers:
            for listener in server.sockets:
                waiting.register(listener, select.POLLIN)
        while waiting.poll(0) and time.monotonic() < start + MAX_ACCEPT_SECONDS:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        await asyncio.sleep(0)  # The last connection gets its protocol.
        close = (b"connection", b"close")
        self.server_state.default_headers = [*self.server_state.default_headers, close]
        for connection in self.server_state.connections:
            if isinstance(connection, BoundedProtocol):
                connection.drain()
        logger.info("Draining %d connections", len(self.server_state.connections))
        deadline = start + self.drain_seconds
        while self.server_state.connections and time.monotonic() < deadline:
            if self.config.callback_notify:  # The heartbeat: without it gunicorn kills the worker.
                await self.config.callback_notify()
            await asyncio.sleep(0.05)
        await super().shutdown()


class Worker(UvicornWorker):  # type: ignore[misc]
    """The value of gunicorn's `worker_class`."""

    CONFIG_KWARGS = {  # noqa: RUF012
        "loop": "uvloop",
        "http": BoundedProtocol,
        "ws": "none",
        # app/api/middleware.py writes the access log.
        "access_log": False,
        "server_header": False,
    }

    def __init__(self, *args: Any) -> None:
        *_, cfg, log = args
        try:
            tempfile.TemporaryFile(dir=cfg.worker_tmp_dir).close()
        except OSError as error:  # gunicorn's master would end when it replaces a worker.
            log.warning("No heartbeat file in %s: %s", cfg.worker_tmp_dir, error)
            cfg.set("worker_tmp_dir", None)
        super().__init__(*args)
        # Seconds between heartbeats. The default is half of gunicorn's `timeout`.
        self.config.timeout_notify = 1
        # Seconds that open connections get after draining. gunicorn then kills the worker.
        self.config.timeout_graceful_shutdown = 2

    async def callback_notify(self) -> None:
        """Send the heartbeat. Stop if the master was killed: no one else would stop the worker."""
        await super().callback_notify()
        if os.getppid() != self.ppid:
            self._server.should_exit = True

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = self._server = DrainingServer(self.config)
        server.drain_seconds = self.cfg.graceful_timeout - 5
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)


def log_connection_budget(settings: Settings, workers: int) -> None:
    """Log how many connections all workers may open, and warn if the server allows fewer.

    If the server is down, only a warning is logged.
    """
    budget = workers * settings.database_pool_size
    logger.info(
        "Connection budget: %d workers x pool of %d = %d",
        workers,
        settings.database_pool_size,
        budget,
    )
    if settings.database_url.get_backend_name() != "postgresql":
        return
    url = settings.database_url.difference_update_query(["prepare_threshold"])
    _, arguments = url.get_dialect()().create_connect_args(url)
    try:
        with psycopg.connect(**{**arguments, "connect_timeout": 2}) as connection:
            allowed = _allowed_connections(connection)
    except psycopg.Error as error:
        logger.warning("Could not read the server's max_connections: %s", type(error).__name__)
        return
    if budget > allowed:
        logger.warning(
            "The connection budget of %d exceeds the %d that the server allows:"
            " lower DATABASE_POOL_SIZE or WEB_CONCURRENCY, or raise max_connections",
            budget,
            allowed,
        )


def _allowed_connections(connection: psycopg.Connection) -> int:
    row: Sequence[int] | None = connection.execute(
        "SELECT current_setting('max_connections')::int"
        " - current_setting('superuser_reserved_connections')::int"
        # New in PostgreSQL 16.
        " - coalesce(current_setting('reserved_connections', true), '0')::int"
    ).fetchone()
    return row[0] if row else 0
