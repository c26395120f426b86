"""The gunicorn worker: uvicorn's, which bounds what a client may do and drains before it stops."""

import asyncio
import contextlib
import json
import logging
import sys
from asyncio import TimerHandle
from collections.abc import Sequence
from typing import Any

import psycopg
from gunicorn.arbiter import Arbiter
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.settings import Settings

logger = logging.getLogger(__name__)

HEAD_BYTES = 32 * 1024
HEAD_FIELDS = 100
# A request must have its head within this many seconds of its beginning, and then bring at least
# as many bytes in each such span; the same for the client's reading of the answer.
PATIENCE = 10
PROGRESS_BYTES = 1024


class _HeadTooLarge(Exception):
    pass


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, for clients that mean harm.

    A request's head (the request line and the header fields) over `HEAD_BYTES` or `HEAD_FIELDS` is
    refused with 431 (RFC 6585), before more of it is kept. A connection that is silent or slow for
    `PATIENCE` seconds is closed: before its first request, while it sends one, and while it does
    not read the answer. Between requests uvicorn's own keep-alive timeout holds.
    """

    _head_bytes = 0
    _head_complete = False
    _reading = True  # Until the first request has come, the connection owes one.
    _progress = 0
    _slow: TimerHandle | None = None
    _unread: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._slow = self.loop.call_later(PATIENCE, self._close_if_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_slow()
        self._cancel_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._progress += len(data)
        was_reading_head = self._reading and not self._head_complete
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._reading and not self._head_complete:
            # All of the data was head, but for what may have gone before it in this one read.
            self._head_bytes += len(data) if was_reading_head else 0
            if self._head_bytes > HEAD_BYTES:
                self._refuse(431, "The request's head is too large")
        if not self._reading:
            self._cancel_slow()
        elif self._slow is None:
            self._progress = 0
            self._slow = self.loop.call_later(PATIENCE, self._close_if_slow)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._head_complete, self._head_bytes = True, False, 0

    def on_headers_complete(self) -> None:
        self._head_complete = True
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > HEAD_BYTES or len(self.headers) > HEAD_FIELDS:
            raise _HeadTooLarge
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reading = False

    def send_400_response(self, msg: str) -> None:
        # Called while httptools' error is handled, which wraps the one of a callback.
        error = sys.exception()
        if error and isinstance(error.__context__, _HeadTooLarge):
            self._refuse(431, "The request's head is too large")
        else:
            self._refuse(400, msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_unread()

    def _refuse(self, status: int, detail: str) -> None:
        body = json.dumps({"detail": detail}).encode()
        fields = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in fields)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + body)
        self.transport.close()

    def _close_if_slow(self) -> None:
        self._slow = None
        if self._head_complete and (self.flow.read_paused or self._progress >= PROGRESS_BYTES):
            self._progress = 0
            self._slow = self.loop.call_later(PATIENCE, self._close_if_slow)
        elif not self.transport.is_closing():
            # Without an answer: to a silent client none is due, and a slow one has not asked yet.
            self.transport.abort()

    def _cancel_slow(self) -> None:
        if self._slow:
            self._slow.cancel()
            self._slow = None

    def _watch_unread(self) -> None:
        before = self.transport.get_write_buffer_size()

        def close_if_unread() -> None:
            if before - self.transport.get_write_buffer_size() < PROGRESS_BYTES:
                self.transport.abort()
            else:
                self._watch_unread()

        self._cancel_unread()
        self._unread = self.loop.call_later(PATIENCE, close_if_unread)

    def _cancel_unread(self) -> None:
        if self._unread:
            self._unread.cancel()
            self._unread = None


class DrainingServer(Server):
    """Stops without losing a request that was sent.

    uvicorn closes idle keep-alive connections at once, also those on which a request is on its way.
    This one first takes no new connections (other workers have the same listeners), says
    `connection: close` with each answer, and waits until the connections are gone or the keep-alive
    timeout has passed, after which no well-behaved client sends on them.
    """

    async def shutdown(self, sockets: object = None) -> None:  # noqa: ARG002  (closed with the servers)
        self.lifespan.state["draining"] = True  # For /health/ready.
        for server in self.servers:
            server.close()
        close = (b"connection", b"close")
        self.server_state.default_headers = [*self.server_state.default_headers, close]
        logger.info("Draining %d connections", len(self.server_state.connections))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_keep_alive):
                while self.server_state.connections:  # noqa: ASYNC110  (uvicorn has no event)
                    await asyncio.sleep(0.05)
        await super().shutdown()


class Worker(UvicornWorker):  # type: ignore[misc]
    """For gunicorn's `worker_class`."""

    CONFIG_KWARGS = {  # noqa: RUF012
        "loop": "uvloop",
        "http": BoundedProtocol,
        "ws": "none",
        # The app writes its own: see app/api/observe.py.
        "access_log": False,
        "server_header": False,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # gunicorn kills what is left after its own time: this worker cancels it a little before.
        self.config.timeout_graceful_shutdown = max(
            1, self.cfg.graceful_timeout - self.cfg.keepalive - 2
        )

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = DrainingServer(self.config)
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)


def log_connection_budget(settings: Settings, workers: int) -> None:
    """Logs how many connections all workers may hold, and warns where the server allows fewer.

    A server that is away is no error here.
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
    url = settings.database_url.set(drivername="postgresql")
    try:
        with psycopg.connect(
            url.render_as_string(hide_password=False), connect_timeout=2
        ) as connection:
            allowed = _allowed_connections(connection)
    except psycopg.Error as error:
        logger.warning("The server's max_connections is not known: %s", type(error).__name__)
        return
    if budget > allowed:
        logger.warning(
            "The connection budget of %d is over the %d that the server allows:"
            " lower DATABASE_POOL_SIZE or WEB_CONCURRENCY, or raise max_connections",
            budget,
            allowed,
        )


def _allowed_connections(connection: psycopg.Connection) -> int:
    row: Sequence[int] | None = connection.execute(
        "SELECT current_setting('max_connections')::int"
        " - current_setting('superuser_reserved_connections')::int"
        " - current_setting('reserved_connections')::int"
    ).fetchone()
    return row[0] if row else 0
