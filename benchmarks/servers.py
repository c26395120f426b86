"""The servers of the benchmark: PostgreSQL with its rows, and the services that use it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg

from benchmarks.processes import tree, wait_until_idle

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WORKERS = 2
POOL_SIZE = 16


@dataclass
class Postgres:
    """The benchmark's own PostgreSQL server: its URL and its first process."""

    url: str
    pid: int
    version: str

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def empty(self) -> None:
        """Empty the table and flush all pending writes."""
        self.execute("TRUNCATE hero RESTART IDENTITY")
        self.execute("CHECKPOINT")

    def load(self, heroes: int) -> None:
        """Fill the empty table with this many heroes, then vacuum it and flush all writes."""
        self.empty()
        run([BIN / "heroes", "seed", str(heroes)], self.url)
        self.execute("VACUUM ANALYZE hero")
        self.execute("CHECKPOINT")

    def copy(self, what: str, folder: Path) -> float:
        """Run psql's `\\copy` with a file in the folder; return the seconds that psql reports."""
        printed = docker(
            *("run", "--rm", "--network", "host", "--volume", f"{folder}:{folder}"),
            *("--user", f"{os.getuid()}:{os.getgid()}", "postgres:18"),
            *("psql", self.url, "--command", r"\timing", "--command", rf"\copy {what}"),
        )
        return float(printed.splitlines()[-1].split()[1]) / 1000

    def count_statements(self, which: Literal["none", "top"]) -> None:
        """Turn counting on or off: it costs time, so it is off during other measurements."""
        self.execute(f"ALTER SYSTEM SET pg_stat_statements.track = '{which}'")
        self.execute("SELECT pg_reload_conf()")
        time.sleep(1)

    def statements(self) -> int:
        """The number of statements that the services have sent so far."""
        rows = self.execute("SELECT coalesce(sum(calls), 0)::int8 FROM pg_stat_statements")
        return int(str(rows[0][0]))


def run(command: list[str | Path], url: str) -> str:
    """Run a command with this database URL and return its stderr."""
    environment = os.environ | {"DATABASE_URL": url}
    done = subprocess.run(
        command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.stderr


# The default settings with three exceptions: connections for all contestants, a larger write-ahead
# log, because checkpoints would slow down some rounds and not others, and the extension that counts
# statements.
_SETTINGS = [
    *("-c", "max_connections=400", "-c", "max_wal_size=8GB", "-c", "checkpoint_timeout=1h"),
    *("-c", "shared_preload_libraries=pg_stat_statements"),
]


def docker(*arguments: str | Path) -> str:
    """Run a command of Docker and return its output."""
    done = subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextmanager
def container(*arguments: str) -> Iterator[int]:
    """Run a container on the host's network, without Docker's port proxy; yield its process."""
    name = docker("run", "--detach", "--rm", "--network", "host", *arguments)
    try:
        yield int(docker("inspect", "--format", "{{.State.Pid}}", name))
    finally:
        docker("stop", name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def postgres() -> Iterator[Postgres]:
    """PostgreSQL 18 in a container."""
    if not shutil.which("docker"):
        sys.exit("make bench needs Docker, for PostgreSQL")
    port = free_port()
    options = ("--shm-size", "1g", "--env", "POSTGRES_PASSWORD=benchmark")
    with container(*options, "postgres:18", *_SETTINGS, "-c", f"port={port}") as pid:
        url = f"postgresql://postgres:benchmark@127.0.0.1:{port}/postgres"
        wait_for(lambda: bool(psycopg.connect(url)))
        server = Postgres(url, pid, "")
        server.version = str(server.execute("SHOW server_version")[0][0])
        server.execute("CREATE EXTENSION pg_stat_statements")
        server.count_statements("none")
        run([BIN / "alembic", "upgrade", "head"], url)
        yield server


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError as error:
            reason: object = error
        except psycopg.OperationalError as error:
            reason = error
        if time.monotonic() > deadline:
            raise TimeoutError(reason)
        time.sleep(0.01)


@dataclass
class Service:
    """A running contestant: its port and its first process."""

    name: str
    port: int
    pid: int


# The Python peers run in a typical production setup: the same gunicorn, worker class and uvicorn,
# with the same event loop and parser.
_STOCK = [
    *("--config", "/dev/null", "--worker-class", "uvicorn_worker.UvicornWorker"),
    *("--keep-alive", "5", "--no-control-socket"),
]
_GUNICORN = str(BIN / "gunicorn")
CONTESTANTS: dict[str, list[str]] = {
    "heroes": [_GUNICORN],
    "tutorial": [_GUNICORN, *_STOCK, "tests.tutorial:app"],
    "asyncpg": [_GUNICORN, *_STOCK, "benchmarks.asyncpg_peer:app"],
    "lean": [_GUNICORN, *_STOCK, "benchmarks.lean_peer:app"],
}
BARE = [_GUNICORN, "benchmarks.bare:app"]


def install_fastify(folder: Path) -> list[str]:
    """Install the Fastify peer in the folder. Return its command, which is empty without npm."""
    if not shutil.which("node") or not shutil.which("npm"):
        print("Without Fastify, because there is no Node.js with npm.")
        return []
    shutil.copytree(ROOT / "benchmarks" / "fastify", folder, dirs_exist_ok=True)
    options = ("--prefer-offline", "--ignore-scripts", "--no-audit", "--loglevel=error")
    done = subprocess.run(["npm", "ci", *options], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        print(f"Without Fastify, because npm failed: {done.stderr.strip()}")
        return []
    return ["node", str(folder / "server.js")]


def _variables(url: str, port: int, pool_size: int) -> dict[str, str]:
    return {
        "DATABASE_URL": url,
        "TUTORIAL_DATABASE_URL": url.replace("postgresql:", "postgresql+psycopg:"),
        "DATABASE_POOL_SIZE": str(pool_size),
        "WEB_CONCURRENCY": str(WORKERS),
        "GUNICORN_CMD_ARGS": f"--bind=127.0.0.1:{port}",
        "PORT": str(port),
        "LOG_FORMAT": "json",
    }


def _responds(port: int) -> bool:
    address = f"http://127.0.0.1:{port}/heroes/?limit=1"
    with urllib.request.urlopen(address, timeout=2) as response:
        return bool(response.status == 200)


def settle(target: Service) -> None:
    """Wait until the contestant has served the remaining requests. Replace workers that hang.

    With many connections all threads of the tutorial's code wait for database connections, which
    waiting requests hold.
    """
    wait_until_idle(target.pid)
    try:
        for _ in range(8):  # The connections go to both workers.
            _responds(target.port)
    except OSError:
        for worker in tree(target.pid)[1:]:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)  # gunicorn starts a new one.
        wait_for(lambda: _responds(target.port))


@contextmanager
def service(
    name: str, command: list[str], url: str, folder: Path, pool_size: int = POOL_SIZE
) -> Iterator[Service]:
    """Run the contestant with two workers and its log in a file of the folder."""
    port = free_port()
    environment = os.environ | _variables(url, port, pool_size) | {"PYTHONPATH": str(ROOT)}
    with (folder / f"{port}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
    try:
        wait_for(lambda: _responds(port))
        yield Service(name, port, process.pid)
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def image(url: str) -> Iterator[Service]:
    """Run this service in its own image, which has a newer Python."""
    built = docker("build", "--quiet", ROOT)
    python = docker("run", "--rm", built, "python", "--version")
    port = free_port()
    variables = _variables(url, port, POOL_SIZE).items()
    environment = [f"--env={name}={value}" for name, value in variables]
    # Without the filter of system calls and the log driver, which cost time.
    options = ("--security-opt", "seccomp=unconfined", *environment, built)
    with container(*options, "sh", "-c", "exec gunicorn 2> /tmp/log") as pid:
        wait_for(lambda: _responds(port))
        yield Service(f"heroes, {python}", port, pid)
