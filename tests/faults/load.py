"""A load generator for plain HTTP/1.1 that counts lost requests."""

import asyncio
import random
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Load:
    """Clients that reuse connections while they seem open and never retry a request."""

    port: int
    # Each client picks at random from these: method, path, body.
    requests: Sequence[tuple[str, str, str]] = (("GET", "/heroes/", ""),)
    keep_alive_clients: int = 16
    fresh_clients: int = 4
    # At most this long between two requests of a client, and before its first one.
    pause_seconds: float = 0.02
    host: str = "heroes"
    tls: ssl.SSLContext | None = None
    headers: str = ""  # Further lines, each with its line break.
    idempotency_keys: bool = False  # Send a new key with each request.
    answered: int = 0
    slowest: float = 0
    # Seconds without any response.
    longest_gap: float = 0
    # Errors of requests without a response, and those of them on a reused connection.
    lost: list[str] = field(default_factory=list)
    lost_in_use: list[str] = field(default_factory=list)
    _stop: bool = False
    _last: float = field(default_factory=time.monotonic)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: str
    ) -> bool:
        """Send one request; return whether the connection may be used again."""
        method, path, body = random.choice(self.requests)
        key = f"Idempotency-Key: {random.getrandbits(128):x}\r\n" if self.idempotency_keys else ""
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: {connection}\r\n"
            f"{self.headers}{key}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        if not head.startswith(b"http/1.1 200 "):
            raise ConnectionError(head.split(b"\r\n")[0].decode())
        return b"connection: close" not in head

    async def _client(self, *, keep_alive: bool) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        await asyncio.sleep(random.uniform(0, self.pause_seconds))
        try:
            while not self._stop:
                start = time.monotonic()
                again, in_use = False, connection is not None
                try:
                    connection = connection or await asyncio.open_connection(
                        "127.0.0.1",
                        self.port,
                        ssl=self.tls,
                        server_hostname=self.host if self.tls else None,
                    )
                    again = await self._exchange(
                        *connection, "keep-alive" if keep_alive else "close"
                    )
                    self.answered += 1
                    self.longest_gap = max(self.longest_gap, time.monotonic() - self._last)
                    self._last = time.monotonic()
                except (OSError, EOFError) as error:
                    self.lost.append(repr(error))
                    if in_use:
                        self.lost_in_use.append(repr(error))
                self.slowest = max(self.slowest, time.monotonic() - start)
                if connection and not again:
                    # `close` would wait for the server's own close of a TLS connection, which may
                    # come after the end of the event loop. The socket would then stay open.
                    connection[1].transport.abort()
                    connection = None
                await asyncio.sleep(random.uniform(0, self.pause_seconds))
        finally:
            if connection:
                connection[1].transport.abort()

    async def _run(self) -> None:
        await asyncio.gather(
            *(self._client(keep_alive=True) for _ in range(self.keep_alive_clients)),
            *(self._client(keep_alive=False) for _ in range(self.fresh_clients)),
        )

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """Run the clients while the block runs."""
        thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop, end = True, time.monotonic()
            thread.join(60)
            assert not thread.is_alive(), "a request did not end"
            self.longest_gap = max(self.longest_gap, end - self._last)
