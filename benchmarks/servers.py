"""The servers of the benchmark: PostgreSQL with its rows, and the services that use it."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WORKERS = 2
_PORT = 54329


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
        done = subprocess.run(
            [
                *("docker", "run", "--rm", "--network", "host", "--volume", f"{folder}:{folder}"),
                *("--user", f"{os.getuid()}:{os.getgid()}", "postgres:18"),
                *("psql", self.url, "--command", r"\timing", "--command", rf"\copy {what}"),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        milliseconds = done.stdout.splitlines()[-1].split()[1]
        return float(milliseconds) / 1000

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


# The default settings with two exceptions: a larger write-ahead log, because checkpoints would
# slow down some rounds and not others, and the extension that counts statements.
_SETTINGS = [
    *("-c", "max_wal_size=8GB", "-c", "checkpoint_timeout=1h", "-c", f"port={_PORT}"),
    *("-c", "shared_preload_libraries=pg_stat_statements"),
]


@contextmanager
def postgres() -> Iterator[Postgres]:
    """PostgreSQL 18 in a container on the host's network, without Docker's port proxy."""
    docker = shutil.which("docker")
    if not docker:
        sys.exit("make bench needs Docker, for PostgreSQL")
    started = subprocess.run(
        [
            *(docker, "run", "--detach", "--rm", "--network", "host", "--shm-size", "1g"),
            *("--env", "POSTGRES_PASSWORD=benchmark", "postgres:18", *_SETTINGS),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    container = started.stdout.strip()
    try:
        url = f"postgresql://postgres:benchmark@127.0.0.1:{_PORT}/postgres"
        wait_for(lambda: bool(psycopg.connect(url)))
        inspect = [docker, "inspect", "--format", "{{.State.Pid}}", container]
        pid = subprocess.run(inspect, check=True, capture_output=True, text=True).stdout
        server = Postgres(url, int(pid), "")
        server.version = str(server.execute("SHOW server_version")[0][0])
        server.execute("CREATE EXTENSION pg_stat_statements")
        server.count_statements("none")
        run([BIN / "alembic", "upgrade", "head"], url)
        yield server
    finally:
        subprocess.run([docker, "stop", container], check=True, capture_output=True)


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


# The peers run in a typical production setup: the same gunicorn, worker class and uvicorn, with the
# same event loop and parser.
_STOCK = [
    "--worker-class",
    "uvicorn_worker.UvicornWorker",
    "--keep-alive",
    "5",
    "--no-control-socket",
]
CONTESTANTS: dict[str, list[str]] = {
    "heroes": [],
    "tutorial": ["--config", "/dev/null", *_STOCK, "tests.tutorial:app"],
    "asyncpg": ["--config", "/dev/null", *_STOCK, "benchmarks.asyncpg_peer:app"],
}
BARE = ["benchmarks.bare:app"]


@contextmanager
def service(name: str, port: int, url: str, log: Path) -> Iterator[Service]:
    """Run the contestant with two workers and its log in a file."""
    environment = os.environ | {
        "DATABASE_URL": url,
        "TUTORIAL_DATABASE_URL": url.replace("postgresql:", "postgresql+psycopg:"),
        "WEB_CONCURRENCY": str(WORKERS),
        "LOG_FORMAT": "json",
        "PYTHONPATH": str(ROOT),
    }
    command: list[str | Path] = [
        BIN / "gunicorn",
        "--bind",
        f"127.0.0.1:{port}",
        *CONTESTANTS.get(name, BARE),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
    try:
        address = f"http://127.0.0.1:{port}/heroes/?limit=1"
        wait_for(lambda: urllib.request.urlopen(address).status == 200)
        yield Service(name, port, process.pid)
    finally:
        process.terminate()
        process.wait(60)
