"""The gunicorn worker: uvicorn's, which bounds what a client may do and drains before it stops."""

import asyncio
import json
import logging
import sys
import time
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
    refused with 431 (RFC 6585), before more of it is kept; so is as much between the parts of a
    chunked body or behind it, where the fields are not kept at all. A connection that is silent or
    slow for `PATIENCE` seconds is closed: before its first request, while it sends one, and while
    it does not read the answer. Between requests uvicorn's own keep-alive timeout holds.
    """

    # Bytes that came since the request began or the last part of its body, and were no body.
    _overhead = 0
    _head_complete = False
    _reading = True  # Until the first request has come, the connection owes one.
    _refused = False
    _progress = 0
    _slow: TimerHandle | None = None
    _unread: TimerHandle | None = None
    _unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._slow = self.loop.call_later(PATIENCE, self._close_if_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._slow, self._unread):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._progress += len(data)
        self._overhead += len(data)
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if self._reading and self._overhead > HEAD_BYTES:
            self._refuse(431, "The request's head is too large")
        elif self._reading and self._slow is None:
            self._progress = 0
            self._slow = self.loop.call_later(PATIENCE, self._close_if_slow)
        elif not self._reading and self._slow:
            self._slow.cancel()
            self._slow = None
        if not self._reading and self.cycle.response_complete and not self.timeout_keep_alive_task:
            # Empty lines before a request, which end uvicorn's timer and begin nothing.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._head_complete, self._overhead = True, False, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_complete:  # Behind the body they are trailers, which nobody asked for.
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > HEAD_BYTES or len(self.headers) > HEAD_FIELDS:
            raise _HeadTooLarge
        self._head_complete = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

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

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_unread()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_bytes = sys.maxsize  # The client reads.

    def _refuse(self, status: int, detail: str) -> None:
        self._refused = True
        if not self._head_complete and self.cycle and not self.cycle.response_complete:
            # It came behind a good request: that one is answered, and the connection closed.
            self.cycle.keep_alive = False
            return
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
        self._watch_unread()

    def _close_if_slow(self) -> None:
        self._slow = None
        if self._head_complete and (self.flow.read_paused or self._progress >= PROGRESS_BYTES):
            self._progress = 0
            self._slow = self.loop.call_later(PATIENCE, self._close_if_slow)
        else:
            # Without an answer: to a silent client none is due, and a slow one has not asked yet.
            self.transport.abort()

    def _watch_unread(self) -> None:
        """Sees to it that what was written is read, also by a connection that is closing."""
        if self._unread is None and (waiting := self.transport.get_write_buffer_size()):
            self._unread_bytes = waiting
            self._unread = self.loop.call_later(PATIENCE, self._close_if_unread)

    def _close_if_unread(self) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size() > self._unread_bytes - PROGRESS_BYTES:
            self.transport.abort()
        else:
            self._watch_unread()


class DrainingServer(Server):
    """Stops without losing a request that was sent.

    uvicorn closes idle keep-alive connections at once, also those on which a request is on its way.
    This one first takes no new connections (other workers have the same listeners), says
    `connection: close` with each answer, and waits until the connections are gone: a well-behaved
    client closes its own, or sends no request for the keep-alive timeout, which then closes it.
    """

    drain_seconds: float = 25

    async def shutdown(self, sockets: object = None) -> None:  # noqa: ARG002  (closed with the servers)
        self.lifespan.state["draining"] = True  # For /health/ready.
        for server in self.servers:
            server.close()
        close = (b"connection", b"close")
        self.server_state.default_headers = [*self.server_state.default_headers, close]
        for connection in self.server_state.connections:
            cycle = getattr(connection, "cycle", None)
            if cycle and not cycle.response_started:  # It took its headers when it began.
                cycle.keep_alive = False
        logger.info("Draining %d connections", len(self.server_state.connections))
        deadline = time.monotonic() + self.drain_seconds
        while self.server_state.connections and time.monotonic() < deadline:
            if self.config.callback_notify:  # Or gunicorn would take the worker for dead.
                await self.config.callback_notify()
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
        # The heartbeat, in seconds: by default half of what gunicorn takes for death.
        self.config.timeout_notify = 1
        # What has not ended when the draining has; gunicorn kills what is left a little later.
        self.config.timeout_graceful_shutdown = 2

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = DrainingServer(self.config)
        server.drain_seconds = self.cfg.graceful_timeout - 5
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
