"""The real app on a real server, and plain connections to it."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import uvicorn
from sqlalchemy import URL, Engine, create_engine

from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parents[1]


def settings(database_url: URL, **changes: Any) -> Settings:
    """Settings that owe nothing to the environment or to a `.env`."""
    return Settings(_env_file=None, database_url=database_url, **changes)


def environment(database_url: URL | str, **changes: str) -> dict[str, str]:
    """The environment of a process of the service on this database."""
    if isinstance(database_url, URL):
        database_url = database_url.render_as_string(hide_password=False)
    return os.environ | {"DATABASE_URL": database_url} | changes


def alembic(
    database_url: URL | str, *arguments: str, check: bool = True, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Runs the `alembic` command as an operator does."""
    return subprocess.run(
        [Path(sys.executable).parent / "alembic", *arguments],
        cwd=ROOT,
        env=environment(database_url, **changes),
        check=check,
        capture_output=True,
        text=True,
    )


def engine(database_url: URL) -> Engine:
    """For looking into the database beside the service."""
    return create_engine(database_url, isolation_level="AUTOCOMMIT")


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

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, **options)

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

    def close(self) -> None:
        self._http.close()


@contextmanager
def serve(settings: Settings) -> Iterator[Service]:
    """Runs the app under uvicorn, on a port of its own, until the end of the block."""
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive(), "the server ended while it started"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        yield Service(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)
