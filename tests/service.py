"""The real app on a real server, and plain connections to it."""

import asyncio
import http.client
import json
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx2
import uvicorn
from fastapi import FastAPI
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.pool import NullPool

from app.application import create_app
from app.settings import Settings

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def settings(database_url: URL, **changes: Any) -> Settings:
    """Settings that owe nothing to the environment or to a `.env`."""
    return Settings(_env_file=None, database_url=database_url, **changes)


def environment(database_url: URL | str, **changes: str) -> dict[str, str]:
    """The environment of a process of the service on this database."""
    if isinstance(database_url, URL):
        database_url = database_url.render_as_string(hide_password=False)
    return os.environ | {"DATABASE_URL": database_url} | changes


def environment_of_copy(database_url: URL | str, root: Path, **changes: str) -> dict[str, str]:
    """The same for a process of the code in `root`, instead of the installed code."""
    # Python's cache would miss a change within a second that keeps the size of a module.
    own = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return environment(database_url, **own | changes)


def engine(database_url: URL) -> Engine:
    """Return an engine for a test's own statements."""
    # A new connection each time, which has no prepared statements of an older schema.
    return create_engine(database_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# Without it, each client reads the certificates of all authorities, which takes 24 ms.
_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def http_client(port: int, **options: Any) -> httpx2.Client:
    """Return a client for a server on this port."""
    url = f"http://127.0.0.1:{port}"
    options = {"timeout": 30} | options
    return httpx2.Client(base_url=url, verify=_NO_CERTIFICATES, **options)


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Service:
    """The running app."""

    port: int
    connections: set[Any]

    def client(self, **options: Any) -> httpx2.Client:
        return http_client(self.port, **options)

    def connection(self) -> "Connection":
        return Connection(self.port)


class Connection:
    """One connection, never reconnected, for requests that a well-behaved client does not send."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._http.connect()
        self._http.auto_open = 0

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self._http.request(method, path, body, names)
        response = self._http.getresponse()
        return Answer(response.status, response.headers, response.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()


class PromptServer(uvicorn.Server):
    """uvicorn's server, which stops within some milliseconds, because the tests stop many."""

    async def main_loop(self) -> None:
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets: object = None) -> None:  # noqa: ARG002
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # uvicorn waits for 0.1 s at least.
        await self.lifespan.shutdown()


@contextmanager
def serve(app: Settings | FastAPI, **config: Any) -> Iterator[Service]:
    """Run the app, or one with these settings, under uvicorn on a port of its own."""
    if isinstance(app, Settings):
        app = create_app(app)
    config = {"port": 0, "log_config": None} | config
    server = PromptServer(uvicorn.Config(app, **config))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive(), "the server ended while it started"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Service(port, server.server_state.connections)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
