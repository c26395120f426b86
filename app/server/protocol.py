"""uvicorn's HTTP/1.1 protocol with limits per connection."""

import asyncio
import json
import logging
import sys
from asyncio import TimerHandle
from random import getrandbits
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 * 1024
MAX_HEAD_FIELDS = 100
# A client must send the head of a request within this time. Then it must send its body, and read
# the response, at a rate of at least this many bytes in this time.
CLIENT_TIMEOUT_SECONDS = 10
MIN_PROGRESS_BYTES = 1024
# Seconds after which a draining worker closes an idle connection.
DRAINING_KEEP_ALIVE_SECONDS = 5


class _HeadTooLarge(Exception):
    pass


class _HostMissing(Exception):
    pass


class _JoiningTransport:
    """Sends the head and the body of a response in one system call and one packet.

    uvicorn writes them one after the other, and uvloop sends each write immediately.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send the data together with the next write, or at the end of this turn of the loop."""
        if self._held:
            self._transport.write(self._held + data)
            self._held = b""
        else:
            self._held = data
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Send the data that is held, then close the connection."""
        self._flush()
        self._transport.close()

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes that have not been sent."""
        return self._transport.get_write_buffer_size() + len(self._held)

    def _flush(self) -> None:
        if self._held:
            self._transport.write(self._held)
            self._held = b""


class BoundedProtocol(HttpToolsProtocol):
    """Protects the worker from slow, oversized and ambiguous requests.

    A request's head (the request line and the header fields) over `MAX_HEAD_BYTES` or
    `MAX_HEAD_FIELDS` is refused with 431 (RFC 6585) as soon as it exceeds the limit. The same limit
    applies to chunk extensions, and to trailers, which are ignored. A connection that is silent or
    slow for `CLIENT_TIMEOUT_SECONDS` is closed: before its first request, during a request, and
    while the client does not read the response. Between requests uvicorn's keep-alive timeout
    applies.
    """

    # Bytes received since the start of the request or the last part of its body, without the body.
    _overhead = 0
    _head_complete = False
    _reading = True  # A new connection has to send its first request.
    _refused = False
    _data = b""
    _upgraded = False  # In this piece of data. A second one is refused.
    _progress = 0
    _slow: TimerHandle | None = None
    _unread: TimerHandle | None = None
    _unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        joining: Any = _JoiningTransport(transport, self.loop)
        super().connection_made(joining)
        self._slow = self.loop.call_later(CLIENT_TIMEOUT_SECONDS, self._close_if_slow)

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
        self._data, self._upgraded = data, False
        super().data_received(data)
        self._data = b""
        if self._refused or self.transport.is_closing():
            return
        if self._reading and self._overhead > MAX_HEAD_BYTES:
            self._refuse(431, "The request's head is too large")
        elif self._reading and self._slow is None:
            self._progress = 0
            self._slow = self.loop.call_later(CLIENT_TIMEOUT_SECONDS, self._close_if_slow)
        elif not self._reading and self._slow:
            self._slow.cancel()
            self._slow = None
        if not self._reading and self.cycle.response_complete and not self.timeout_keep_alive_task:
            # Empty lines between requests cancel uvicorn's timer without starting a request.
            self._start_keep_alive_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._head_complete, self._overhead = True, False, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_complete:  # Fields after the body are trailers.
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > MAX_HEAD_BYTES or len(self.headers) > MAX_HEAD_FIELDS:
            raise _HeadTooLarge
        hosts = [name for name, _ in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise _HostMissing  # RFC 9112, section 3.2.
        self._head_complete = True
        if self._is_upgrade():
            return
        super().on_headers_complete()
        if self.expect_100_continue:
            # A client that gets another status than 100 does not send the body, so the next bytes
            # may be the body or the next request.
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade():
            return
        super().on_message_complete()
        self._reading = False

    def _is_upgrade(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _unsupported_upgrade_warning(self) -> None:
        """Parse the request again without its Upgrade, which a server may ignore (RFC 9110, 7.8).

        httptools drops the body of such a request. Java's HttpClient asks for HTTP/2 by default.
        """
        upgrade = sys.exception()
        if self._upgraded or not isinstance(upgrade, HttpParserUpgrade):
            self._head_complete = False
            self._refuse(400, "Invalid HTTP request received.")
            return
        lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        self._data = b"\r\n".join([*lines, b"", self._data[upgrade.args[0] :]])
        self._upgraded = True
        self.parser = HttpRequestParser(self)
        super().data_received(self._data)

    def send_400_response(self, msg: str) -> None:
        # Called while uvicorn handles an error of httptools, which wraps the error of a callback.
        error = sys.exception()
        if error and isinstance(error.__context__, _HeadTooLarge):
            self._refuse(431, "The request's head is too large")
        else:
            self._refuse(400, msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_unread()

    def drain(self) -> None:
        """Close the connection after its next response, or if it stays idle."""
        if self.cycle and not self.cycle.response_started:  # A started response has its headers.
            self.cycle.keep_alive = False
        self.timeout_keep_alive = min(self.timeout_keep_alive, DRAINING_KEEP_ALIVE_SECONDS)
        if self.timeout_keep_alive_task:
            self._start_keep_alive_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_bytes = sys.maxsize  # The client made progress.

    def _refuse(self, status: int, detail: str) -> None:
        self._refused = True
        if not self._head_complete and self.cycle and not self.cycle.response_complete:
            # An earlier request on this connection still gets its response, which closes it.
            self.cycle.keep_alive = False
            return
        # No middleware sees this request.
        request_id = f"{getrandbits(128):032x}"
        client = self.client[0] if self.client else None
        logger.warning(
            "Refused a request: %s", detail, extra={"client": client, "request_id": request_id}
        )
        body = json.dumps({"detail": detail}).encode()
        fields = [
            *self.server_state.default_headers,
            (b"x-request-id", request_id.encode()),
            (b"content-type", b"application/json"),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in fields)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + body)
        self.transport.close()
        self._watch_unread()

    def _start_keep_alive_timer(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _close_if_slow(self) -> None:
        self._slow = None
        if self._head_complete and (self.flow.read_paused or self._progress >= MIN_PROGRESS_BYTES):
            self._progress = 0
            self._slow = self.loop.call_later(CLIENT_TIMEOUT_SECONDS, self._close_if_slow)
        else:
            # Without a response, because there is no complete request.
            self.transport.abort()

    def _watch_unread(self) -> None:
        """Limit the time in which the client reads, also on a connection that is closing."""
        if self._unread is None and (waiting := self.transport.get_write_buffer_size()):
            self._unread_bytes = waiting
            self._unread = self.loop.call_later(CLIENT_TIMEOUT_SECONDS, self._close_if_unread)

    def _close_if_unread(self) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size() > self._unread_bytes - MIN_PROGRESS_BYTES:
            self.transport.abort()
        else:
            self._watch_unread()
