"""The name of the database's host moves to a new primary, as in a managed service."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import URL

from app import NAME
from tests.examples import DEADPOND
from tests.faults.network import SteadyLoad
from tests.migrations import migrate
from tests.postgres import POSTGRES_BIN
from tests.processes import gunicorn

HOSTS = Path("/etc/hosts")
MOUNT = ("unshare", "--mount", "mount", "--bind", str(HOSTS), str(HOSTS))
pytestmark = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(MOUNT, capture_output=True).returncode != 0,
    reason="needs unshare, and the right to mount a file over /etc/hosts",
)
# PostgreSQL refuses to run as root.
USER = "nobody" if os.getuid() == 0 else None
REQUESTS = [("POST", "/heroes/", DEADPOND), ("GET", "/heroes/?limit=1", None)]


class Node:
    """A PostgreSQL server with an address of its own."""

    def __init__(self, folder: Path, address: str, port: int) -> None:
        self.folder, self.address, self.port = folder, address, port
        self.data = folder / "data"
        folder.mkdir()
        folder.chmod(0o777)

    def run(self, program: str, *arguments: str | Path) -> None:
        log = self.folder / "log"
        with log.open("ab") as output:
            subprocess.run(
                [POSTGRES_BIN / program, *arguments],
                user=USER,
                cwd=self.folder,
                check=True,
                stdout=output,
                stderr=output,
                timeout=60,
            )

    def initialize(self) -> None:
        arguments = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        self.run("initdb", "--pgdata", self.data, *arguments)

    def copy(self, primary: "Node") -> None:
        """Become a standby's data, with the address of its primary."""
        source = f"host={primary.address} port={primary.port} user=postgres"
        arguments = ("--checkpoint=fast", "--no-sync", "--write-recovery-conf")
        self.run("pg_basebackup", "--pgdata", self.data, "--dbname", source, *arguments)

    def start(self) -> None:
        options = f"-h {self.address} -p {self.port} -k {self.folder} -c fsync=off"
        self.control("start", "-o", options)

    def control(self, action: str, *arguments: str) -> None:
        self.run("pg_ctl", action, "--wait", "--pgdata", self.data, *arguments)

    def follow(self, primary: "Node") -> None:
        """Start again as a standby."""
        (self.data / "standby.signal").touch()
        source = f"primary_conninfo = 'host={primary.address} port={primary.port} user=postgres'\n"
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.write(source)
        self.start()

    def connections(self) -> int:
        """Return the number of the service's connections."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        with psycopg.connect(host=self.address, port=self.port, user="postgres") as connection:
            [count] = connection.execute(query, (NAME,)).fetchone() or (0,)
        return int(count)


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    """A primary and its standby, which listen on the same port of two addresses."""
    with tempfile.TemporaryDirectory(prefix="heroes-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        with socket.create_server(("127.0.0.2", 0)) as free:
            port = free.getsockname()[1]
        first, second = (Node(folder / host, f"127.0.0.{host}", port) for host in ("2", "3"))
        try:
            first.initialize()
            first.start()
            second.copy(first)
            second.start()
            yield first, second
        finally:
            for node in (first, second):
                if (node.data / "postmaster.pid").exists():
                    node.control("stop", "--mode=immediate")


def test_writes_follow_the_name_of_the_host_to_the_new_primary(
    nodes: tuple[Node, Node], tmp_path: Path, figures: list[str]
) -> None:
    """The former primary is a standby then, to which the service has connected again."""
    old, new = nodes
    url = URL.create("postgresql+psycopg", "postgres", None, old.address, old.port, "postgres")
    migrate(url, "upgrade", "head")
    hosts = tmp_path / "hosts"

    def move_name(node: Node) -> None:
        hosts.write_text(f"127.0.0.1 localhost\n{node.address} primary.test\n")

    move_name(old)
    mount = f'mount --bind "{hosts}" {HOSTS} && exec "$@"'
    launcher = ("unshare", "--mount", "sh", "-c", mount, "sh")
    url = url.set(host="primary.test")
    with gunicorn(url, tmp_path, launcher=launcher) as service:
        with SteadyLoad(service.port, 60, REQUESTS) as load:
            time.sleep(1)
            failed_over_at = load.now
            old.control("stop", "--mode=fast")
            new.control("promote")
            old.follow(new)
            standby_at = load.now
            time.sleep(2)
            connected = old.connections()
            moved_at = load.now
            move_name(new)
            time.sleep(3)
        remaining = old.connections()
    writes = [sample for sample in load.samples if sample.method == "POST"]
    assert {s.status for s in writes if s.at + s.took < failed_over_at} == {200}
    # The control: the name has not moved yet. Reads work again after a second.
    assert connected
    assert {s.status for s in writes if standby_at < s.at < moved_at - 0.5} == {503}
    reads = [s for s in load.between(standby_at + 1) if s.method == "GET"]
    assert {s.status for s in reads} == {200}

    first = min(s.at + s.took for s in writes if s.status == 200 and s.at > moved_at)
    figures.append(f"the name of the host moves: first write after {first - moved_at:.1f} s")
    assert {s.status for s in writes if s.at > moved_at + 2} == {200}
    assert remaining == 0
