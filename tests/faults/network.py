"""A network between the service and PostgreSQL that can be slow, or lose all packets."""

import asyncio
import itertools
import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
from sqlalchemy import URL

needs_iptables = pytest.mark.skipif(
    shutil.which("iptables") is None
    or subprocess.run(["iptables", "-w", "-L", "INPUT"], capture_output=True).returncode != 0,
    reason="needs iptables and the right to use it",
)


@dataclass
class Network:
    """A TCP port on loopback that leads to a server."""

    port: int
    server: URL

    @property
    def url(self) -> URL:
        """The server's URL by way of this network."""
        return self.server.difference_update_query(["host"]).set(host="127.0.0.1", port=self.port)

    @contextmanager
    def losing_packets(self, client_ports: Sequence[int] = (0,)) -> Iterator[None]:
        """Drop the packets of both directions during the block, without closing a socket.

        Those of all clients, or of the clients with these ports.
        """
        rules = []
        for client in client_ports:
            for here, there in ((self.port, client), (client, self.port)):
                ports = [("--sport", here), ("--dport", there)]
                given = [part for name, port in ports if port for part in (name, str(port))]
                rules.append(["INPUT", "-p", "tcp", *given])
        for rule in rules:
            subprocess.run(["iptables", "-w", "-I", *rule, "-j", "DROP"], check=True)
        try:
            yield
        finally:
            for rule in rules:
                subprocess.run(["iptables", "-w", "-D", *rule, "-j", "DROP"], check=True)


class _End(asyncio.Protocol):
    """One of the two sockets of a relayed connection: to the client or to the server."""

    def __init__(self, relay: "_Relay", client: "_End | None" = None) -> None:
        self.relay, self.peer = relay, client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.relay.transports.add(transport)
        if self.relay.end.is_set():
            transport.abort()
        elif self.peer:
            self.peer.peer = self
            self.peer.transport.resume_reading()
        else:
            transport.pause_reading()
            self.connecting = self.relay.loop.create_task(self.relay.connect(self))

    def data_received(self, data: bytes) -> None:
        assert self.peer
        if self.relay.closes_on(data):
            self.transport.close()
        else:
            self.relay.loop.call_later(self.relay.delay, self.peer.transport.write, data)

    def eof_received(self) -> bool:
        self._close_peer()
        return True  # The peer's bytes pass until it is closed.

    def connection_lost(self, _: Exception | None) -> None:
        self.relay.transports.remove(self.transport)
        self._close_peer()

    def _close_peer(self) -> None:
        if self.peer:
            self.relay.loop.call_later(self.relay.delay, self.peer.transport.close)


class _Relay:
    def __init__(self, server: URL, delay: float, closes_on: Callable[[bytes], bool]) -> None:
        self.server, self.delay, self.closes_on = server, delay, closes_on
        self.port = 0
        self.is_open = threading.Event()
        # The open sockets. The end of the event loop does not close them.
        self.transports: set[asyncio.Transport] = set()

    async def run(self) -> None:
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        listener = await self.loop.create_server(lambda: _End(self), "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        self.is_open.set()
        await self.end.wait()
        # Waits for connections that are being made. If the listener closes while asyncio accepts
        # one, its socket stays open (https://github.com/python/cpython/issues/109564).
        while connecting := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(connecting)
        listener.close()
        for transport in self.transports:
            transport.abort()

    async def connect(self, client: _End) -> None:
        """Connect a client to the server."""
        try:
            if folder := self.server.query.get("host"):
                path = f"{folder}/.s.PGSQL.5432"
                await self.loop.create_unix_connection(lambda: _End(self, client), path)
            else:
                host, port = self.server.host or "", self.server.port or 5432
                await self.loop.create_connection(lambda: _End(self, client), host, port)
        except OSError:
            client.transport.abort()


@contextmanager
def network(
    server: URL,
    round_trip_seconds: float = 0,
    closes_on: Callable[[bytes], bool] = lambda _: False,
) -> Iterator[Network]:
    """Relay a port to the server. Each direction takes half of the round trip.

    Closes a connection if the client or the server sends bytes for which `closes_on` is true.
    """
    relay = _Relay(server, round_trip_seconds / 2, closes_on)
    thread = threading.Thread(target=lambda: asyncio.run(relay.run()))
    thread.start()
    assert relay.is_open.wait(30)
    try:
        yield Network(relay.port, server)
    finally:
        relay.loop.call_soon_threadsafe(relay.end.set)
        thread.join()


def client_ports(port: int) -> list[int]:
    """The ports of the established connections to a port of loopback."""
    established = "01"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        int(local.rpartition(":")[2], 16)
        for _, local, remote, state, *_ in rows
        if remote.endswith(f":{port:04X}") and state == established
    ]


@dataclass
class Sample:
    """One request: when it was sent in seconds since the load's start, and how long it took."""

    at: float
    method: str
    status: int
    took: float


class SteadyLoad:
    """Sends requests at a fixed rate, whether responses come or not."""

    def __init__(self, port: int, rate: float, requests: Sequence[tuple[str, str, object]]) -> None:
        self.port, self.rate, self.requests = port, rate, requests
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self.start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def now(self) -> float:
        return time.monotonic() - self.start

    def between(self, start: float, end: float = math.inf) -> list[Sample]:
        """The requests that were sent in this time."""
        return [sample for sample in self.samples if start <= sample.at < end]

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as sent:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                sent.create_task(self._send(*self.requests[number % len(self.requests)]))
                await asyncio.sleep(max(0, self.start + number / self.rate - time.monotonic()))

    async def _send(self, method: str, path: str, body: object) -> None:
        at = self.now
        content = b"" if body is None else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            status = int((await reader.readline()).split()[1])
            await reader.read()
        finally:
            writer.transport.abort()  # Else the socket of a failed or cancelled request stays open.
        self.samples.append(Sample(at, method, status, self.now - at))
