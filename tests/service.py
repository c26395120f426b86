"""The real app on a real server, and plain connections to it."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


class Migration(NamedTuple):
    returncode: int
    output: str


class Migrators:
    """The `alembic` command, run by tests/migrator.py."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.migrator"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, database_url: URL | str, *arguments: str, check: bool = True, **env: str
    ) -> Migration:
        """`alembic ARGUMENTS`, as an operator runs it."""
        [migration] = self.at_once(1, database_url, *arguments, **env)
        assert migration.returncode == 0 or not check, migration.output
        return migration

    def at_once(
        self, count: int, database_url: URL | str, *arguments: str, **env: str
    ) -> list[Migration]:
        """The same by `count` migrators at the same time."""
        assert self._process.stdin
        assert self._process.stdout
        request = {
            "argv": arguments,
            "env": {"LOG_FORMAT": "console"} | environment(database_url, **env),
            "count": count,
            "output": str(self._output),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return [
            Migration(code, Path(f"{self._output}.{number}").read_text())
            for number, code in enumerate(codes)
        ]

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


def alembic(
    database_url: URL | str, *arguments: str, root: Path = ROOT, **env: str
) -> subprocess.Popen[str]:
    """The `alembic` command as a process of its own, with the code in `root`."""
    return subprocess.Popen(
        [BIN / "alembic", *arguments],
        cwd=root,
        env=environment(database_url, **{"LOG_FORMAT": "console", "PYTHONPATH": str(root)} | env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def copy_project(folder: Path) -> Path:
    """Return a copy of the project without its tests, in which a test can change something."""
    copy = folder / "project"
    copy.mkdir()
    for part in ("app", "alembic", "alembic.ini", "pyproject.toml"):
        copy_part = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy_part(ROOT / part, copy / part)
    return copy


@contextmanager
def uvicorn_process(database_url: URL, root: Path = ROOT) -> Iterator["Service"]:
    """Run the code in `root` in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"],
        cwd=root,
        env=environment(database_url, LOG_FORMAT="json", PYTHONPATH=str(root)),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    try:
        for line in process.stderr:
            assert line.startswith("{"), line + process.stderr.read()
            message = json.loads(line)["message"]
            if "running on" in message:
                break
        yield Service(int(message.split(":")[2].split(" ")[0]), set())
    finally:
        process.terminate()
        process.communicate(timeout=10)


def engine(database_url: URL) -> Engine:
    """Return an engine for a test's own statements."""
    # A new connection each time, which has no prepared statements of an older schema.
    return create_engine(database_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()


class PromptServer(uvicorn.Server):
    """uvicorn's, which looks ten times as often whether it is to stop: the tests stop many."""

    async def main_loop(self) -> None:
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            await asyncio.sleep(0.01)


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
        thread.join(10)


class Gunicorn:
    """The service in its production form: gunicorn with its own configuration."""

    def __init__(
        self,
        database_url: URL,
        folder: Path,
        *arguments: str,
        root: Path = ROOT,
        port: int = 0,
        **env: str,
    ) -> None:
        self._log = folder / "gunicorn.log"
        self._pidfile = folder / "gunicorn.pid"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(BIN / "gunicorn", "--bind", f"127.0.0.1:{port}"),
                    *("--pid", str(self._pidfile), *arguments),
                ],
                cwd=root,
                env=environment(
                    database_url,
                    LOG_FORMAT="json",
                    # The code in `root` instead of the installed code.
                    PYTHONPATH=str(root),
                    **{"WEB_CONCURRENCY": "2"} | env,
                ),
                stderr=log,
            )
        self.started = 0
        self.wait_for_workers(int(env.get("WEB_CONCURRENCY", "2")))
        listening = next(line for line in self.log if "Listening at" in line["message"])
        self.port = int(listening["message"].split(":")[3].split(" ")[0])

    def get(self, path: str) -> Answer:
        """On a connection of its own."""
        with Connection(self.port) as connection:
            return connection.send("GET", path)

    @property
    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def pid(self) -> int:
        """Of the master."""
        return int(self._pidfile.read_text())

    @property
    def children(self) -> list[int]:
        """The master's: its workers, and in a roll the next master."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def wait_for_workers(self, count: int) -> None:
        """Waits until `count` more workers than before serve."""
        self.started += count
        self.wait_for(
            lambda: sum("startup complete" in line for line in self.lines) >= self.started
        )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(
                line for line in self.lines[-200:] if "heroes.access" not in line
            )
            time.sleep(0.02)

    def roll(self, workers: int = 2) -> None:
        """Replace the master by a new one, as in docs/operations.md."""
        old = self.pid
        os.kill(old, signal.SIGUSR2)
        self.wait_for_workers(workers)
        os.kill(old, signal.SIGTERM)
        self.wait_for(lambda: self._pidfile.exists() and self.pid != old)
        self.wait_for(lambda: not alive(old))

    def stop(self) -> None:
        """Stop the current master, and reap the first one."""
        if self._pidfile.exists() and alive(pid := self.pid):
            os.kill(pid, signal.SIGTERM)
            self.wait_for(lambda: not alive(pid), 40)
        self._process.wait(40)


def alive(pid: int) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@contextmanager
def gunicorn(
    database_url: URL, folder: Path, *arguments: str, root: Path = ROOT, port: int = 0, **env: str
) -> Iterator[Gunicorn]:
    server = Gunicorn(database_url, folder, *arguments, root=root, port=port, **env)
    try:
        yield server
    finally:
        server.stop()
