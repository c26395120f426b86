"""Migrations on a live database: concurrent and killed migrators, held locks, traffic."""

import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from alembic.util import CommandError
from sqlalchemy import URL, Engine, make_url, text
from sqlalchemy.exc import DBAPIError

from app import MIGRATION_LOCK
from app.db import migrations
from tests.examples import DEADPOND
from tests.migrations import alembic, copy_project, migrate, upgrade_concurrently
from tests.postgres import Postgres
from tests.processes import gunicorn
from tests.schemas import schema_of
from tests.service import ROOT, engine, http_client
from tests.test_migrations import REVISIONS, rows, tutorials_database

postgresql_only = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)

ROUNDS = 5
MIGRATORS = 8


@pytest.fixture
def outside(empty_database: URL) -> Iterator[Engine]:
    outside = engine(empty_database)
    yield outside
    outside.dispose()


def fill(database: Engine, count: int) -> None:
    with database.connect() as connection:
        connection.execute(
            text(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
                " INSERT INTO hero (name, age, secret_name) SELECT 'hero ' || i, i % 90, 's' FROM n"
            ),
            {"count": count},
        )


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrent_migrators_all_succeed(
    backend: str,
    postgres: Postgres,
    database_url: URL,
    tmp_path: Path,
    figures: list[str],
) -> None:
    expected = schema_of(database_url)
    codes = []
    for number in range(ROUNDS):
        name = f"heroes_round_{uuid.uuid4().hex}"
        url = (
            make_url(f"sqlite:///{tmp_path / f'{number}.db'}")
            if backend == "sqlite"
            else postgres.create(name)
        )
        done = upgrade_concurrently(MIGRATORS, url)
        codes += [migration.returncode for migration in done]
        assert codes == [0] * len(codes), done
        assert schema_of(url) == expected
        if backend == "postgresql":
            postgres.drop(name)
    figures.append(
        f"{backend}: {ROUNDS} rounds of {MIGRATORS} concurrent migrators, all exit with 0"
    )


@pytest.mark.parametrize(
    ("backend", "revision"),
    # On SQLite the whole upgrade is one transaction. Only 0006 takes long enough to be killed.
    [("sqlite", "0006"), *(("postgresql", revision) for revision in REVISIONS)],
    indirect=["backend"],
)
def test_the_upgrade_succeeds_after_a_migrator_was_killed(
    empty_database: URL, outside: Engine, database_url: URL, revision: str
) -> None:
    on_postgresql = empty_database.get_backend_name() == "postgresql"
    tutorials_database(empty_database)
    fill(outside, 5000 if on_postgresql else 500_000)
    kept = rows(outside)
    process = alembic(empty_database, "upgrade", "head")
    assert process.stdout
    for line in process.stdout:
        if f"-> {revision}," in line:
            process.kill()
            break
    process.communicate()
    assert process.returncode == -9, f"not killed: {line}"

    migrate(empty_database, "upgrade", "head")
    assert rows(outside) == kept
    if on_postgresql:
        assert schema_of(empty_database) == schema_of(database_url)


@postgresql_only
def test_an_index_with_an_interrupted_build_is_rebuilt(
    empty_database: URL, outside: Engine
) -> None:
    migrate(empty_database, "upgrade", "0006")
    fill(outside, 100)
    valid = text(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('ix_hero_name_id')"
    )

    def build() -> None:
        with outside.connect() as connection, pytest.raises(DBAPIError):
            connection.execute(text("CREATE INDEX CONCURRENTLY ix_hero_name_id ON hero (name, id)"))

    with outside.connect() as older, outside.connect() as connection:
        older.execute(text("BEGIN"))
        older.execute(text("UPDATE hero SET age = 1 WHERE id = 1"))
        building = threading.Thread(target=build)
        building.start()
        terminate = text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE 'CREATE INDEX CONC%' AND wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        wait_for(lambda: connection.execute(terminate).first())
        building.join()
        older.execute(text("ROLLBACK"))
        assert connection.scalar(valid) is False, (
            "control: the interrupted build leaves an invalid index"
        )

        upgraded = migrate(empty_database, "upgrade", "head")
        assert "ix_hero_name_id is invalid, its build was interrupted" in upgraded.output
        assert connection.scalar(valid) is True
        invalid = text("SELECT count(*) FROM pg_index WHERE NOT indisvalid")
        assert connection.scalar(invalid) == 0


@contextmanager
def reading(outside: Engine) -> Iterator[list[float]]:
    """Read in a loop while the block runs; yield the seconds of each read."""
    took: list[float] = []
    stop = threading.Event()

    def read() -> None:
        with outside.connect() as connection:
            while not stop.is_set():
                start = time.monotonic()
                connection.execute(text("SELECT secret_name FROM hero LIMIT 1")).all()
                took.append(time.monotonic() - start)
                time.sleep(0.005)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()


@contextmanager
def transaction_of(outside: Engine, seconds: float) -> Iterator[None]:
    """Hold a transaction that has read the table open for some seconds."""
    with outside.connect() as holder:
        holder.execute(text("BEGIN"))
        holder.execute(text("SELECT secret_name FROM hero LIMIT 1")).all()
        end = threading.Timer(seconds, lambda: holder.execute(text("ROLLBACK")))
        end.start()
        yield
        end.join()


@postgresql_only
def test_the_upgrade_does_not_block_reads_while_a_transaction_holds_the_table(
    empty_database: URL, outside: Engine, figures: list[str]
) -> None:
    migrate(empty_database, "upgrade", "0001")
    fill(outside, 1000)
    with reading(outside) as took, transaction_of(outside, 8):
        start = time.monotonic()
        upgraded = migrate(empty_database, "upgrade", "head")
        waited = time.monotonic() - start
    figures.append(
        f"upgrade while a transaction held the table for 8 s: {waited:.1f} s,"
        f" the slowest of {len(took)} reads took {max(took):.2f} s"
    )
    assert "The table is in use: trying again in" in upgraded.output
    assert waited > 7
    assert max(took) < 0.7


@postgresql_only
def test_an_upgrade_without_the_lock_timeout_blocks_reads(
    empty_database: URL, outside: Engine
) -> None:
    """The control for the previous test."""
    migrate(empty_database, "upgrade", "0001")
    fill(outside, 1000)
    with (
        reading(outside) as took,
        transaction_of(outside, 2),
        outside.connect() as connection,
    ):
        connection.execute(text("ALTER TABLE hero ADD COLUMN power text"))
    assert max(took) > 1


@contextmanager
def tutorial(url: URL) -> Iterator[int]:
    """Serve the tutorial's own code; yield its port."""
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "tests.tutorial:app", "--port", "0", "--no-access-log"],
        cwd=ROOT,
        env=os.environ | {"TUTORIAL_DATABASE_URL": url.render_as_string(hide_password=False)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr
    port = 0
    while not port:
        line = server.stderr.readline()
        if "running on" in line:
            port = int(line.split(":")[3].split(" ")[0])
    try:
        yield port
    finally:
        server.terminate()
        server.communicate(timeout=20)


@contextmanager
def recorded(archive: Path, url: URL, folder: Path) -> Iterator[int]:
    """Migrate and serve the code of a recorded release; yield its port."""
    shutil.unpack_archive(archive, folder, filter="data")
    output, _ = alembic(url, "upgrade", "head", root=folder).communicate(timeout=60)
    assert "-> 0001," in output
    with gunicorn(url, folder, root=folder, DATABASE_POOL_SIZE="4") as server:
        yield server.port


def use_the_tutorial(client: httpx2.Client) -> Iterator[httpx2.Response]:
    yield client.post("/heroes/", json=DEADPOND)
    yield client.get("/heroes/?limit=10")
    yield client.patch("/heroes/7", json={"age": 7})
    yield client.patch("/heroes/8", json={"name": "Rusty-Man", "age": None})


def use_a_release(client: httpx2.Client) -> Iterator[httpx2.Response]:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    yield (created := client.post("/heroes/", json=DEADPOND, headers=key))
    yield (again := client.post("/heroes/", json=DEADPOND, headers=key))
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.content == created.content
    is_current = {"If-Match": created.headers["ETag"]}
    path = f"/heroes/{created.json()['id']}"
    yield client.patch(path, json={"age": 7}, headers=is_current)
    assert client.patch(path, json={"age": 8}, headers=is_current).status_code == 412
    yield (found := client.get(path))
    assert found.json() == created.json() | {"age": 7}
    yield client.get("/heroes/?limit=10")


Session = Callable[[httpx2.Client], Iterator[httpx2.Response]]


@dataclass
class Sessions:
    """Sessions of several clients, with the number of successful requests and the errors."""

    succeeded: int = 0
    slowest: float = 0
    errors: list[str] = field(default_factory=list)
    _stop: bool = False

    def _client(self, port: int, session: Session) -> None:
        while not self._stop:
            with http_client(port) as client:
                try:
                    for response in session(client):
                        response.raise_for_status()
                        self.succeeded += 1
                        self.slowest = max(self.slowest, response.elapsed.total_seconds())
                except (httpx2.HTTPError, AssertionError, KeyError) as error:
                    self.errors.append(repr(error))
            time.sleep(0.01)

    @contextmanager
    def running(self, port: int, session: Session, clients: int = 6) -> Iterator["Sessions"]:
        """Run the clients while the block runs."""
        threads = [
            threading.Thread(target=self._client, args=(port, session)) for _ in range(clients)
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop = True
            for thread in threads:
                thread.join()


# A revision after the newest one, so that each release has a newer schema.
EXPANSION = {
    "columns": f"""
import sqlalchemy as sa
from alembic import op

revision = "columns"
down_revision = "{REVISIONS[-1]}"


def upgrade() -> None:
    op.add_column("hero", sa.Column("power", sa.String()))
    op.add_column("hero", sa.Column("level", sa.Integer(), server_default="1", nullable=False))
""",
    "expansion": """
from app.db.migrations import add_checks, backfill, create_index

revision = "expansion"
down_revision = "columns"


def upgrade() -> None:
    add_checks("hero", {"hero_level_check": "level > 0"})
    backfill("hero", "power = 'none'", "power IS NULL", key="id")
    create_index("ix_hero_power", "hero", ["power"])
""",
}
ARCHIVES = sorted((ROOT / "tests" / "releases").glob("*.tar.gz"))
RELEASES = {"the tutorial": None} | {each.name.removesuffix(".tar.gz"): each for each in ARCHIVES}


@contextmanager
def earlier(release: str, url: URL, folder: Path) -> Iterator[tuple[int, Session]]:
    """Serve the code of an earlier release; yield its port and a session with it."""
    archive = RELEASES[release]
    if archive is None:
        with tutorial(url) as port:
            yield port, use_the_tutorial
    else:
        with recorded(archive, url, folder) as port:
            yield port, use_a_release


@postgresql_only
@pytest.mark.parametrize("release", RELEASES)
def test_no_request_of_an_earlier_release_fails_during_the_upgrade(
    empty_database: URL, outside: Engine, release: str, tmp_path: Path, figures: list[str]
) -> None:
    project = copy_project(tmp_path)
    for name, revision in EXPANSION.items():
        (project / "alembic" / "versions" / f"{name}.py").write_text(revision)
    with earlier(release, empty_database, tmp_path / "earlier") as (port, session):
        fill(outside, 20_000)
        with Sessions().running(port, session) as sessions:
            wait_for(lambda: sessions.succeeded > 20)
            before = sessions.succeeded
            upgrade = alembic(empty_database, "upgrade", "head", root=project)
            output, _ = upgrade.communicate(timeout=120)
            assert upgrade.returncode == 0, output
            during = sessions.succeeded - before
            wait_for(lambda: sessions.succeeded > before + during + 200, 30)  # The newest schema.
    figures.append(
        f"upgrade of 20,000 rows under the load of {release}: {len(sessions.errors)} of"
        f" {sessions.succeeded + len(sessions.errors)} requests failed ({during} during the"
        f" upgrade), the slowest took {sessions.slowest:.2f} s"
    )
    assert "-> expansion" in output
    assert sessions.errors == []
    assert during > 20
    with outside.connect() as connection:
        new = text("SELECT count(*) FROM hero WHERE id > 20000 AND level = 1")
        assert connection.execute(new).scalar_one() > 50


@postgresql_only
@pytest.mark.parametrize("release", RELEASES)
def test_an_incompatible_schema_change_fails_requests_of_an_earlier_release(
    empty_database: URL, outside: Engine, release: str, tmp_path: Path
) -> None:
    """The control for the previous test."""
    with earlier(release, empty_database, tmp_path / "earlier") as (port, session):
        fill(outside, 100)
        with Sessions().running(port, session) as sessions, outside.connect() as connection:
            wait_for(lambda: sessions.succeeded > 20)
            assert sessions.errors == []
            connection.execute(text("ALTER TABLE hero RENAME COLUMN secret_name TO alias"))
            wait_for(lambda: sessions.errors)


@postgresql_only
def test_a_migrator_that_waits_for_another_one_logs_it(
    empty_database: URL, outside: Engine
) -> None:
    with outside.connect() as other:
        other.execute(text(f"SELECT pg_advisory_lock({MIGRATION_LOCK})"))
        process = alembic(empty_database, "upgrade", "head")
        assert process.stdout
        assert any("Another migrator is running" in line for line in process.stdout)
        assert process.poll() is None
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output


@postgresql_only
def test_waits_for_another_migrator_and_for_a_lock_time_out(
    empty_database: URL, outside: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_WAIT_SECONDS", 1)
    monkeypatch.setattr(migrations, "OTHER_MIGRATOR_WAIT_SECONDS", 1)
    migrating = migrations.engine(empty_database)
    with outside.connect() as other:
        other.execute(text(f"SELECT pg_advisory_lock({MIGRATION_LOCK})"))
        with (
            pytest.raises(CommandError, match="Another migrator has been running"),
            migrations.only_migrator(migrating),
        ):
            pass
        other.execute(text("CREATE TABLE hero (id int)"))
        other.execute(text("BEGIN"))
        other.execute(text("LOCK TABLE hero"))

        def change() -> None:
            with migrating.begin() as connection:
                connection.execute(text("ALTER TABLE hero ADD COLUMN power text"))

        with pytest.raises(CommandError, match="Could not acquire a lock"):
            migrations.retry_on_lock_timeout(change)


def test_a_failed_upgrade_on_sqlite_is_rolled_back_and_can_be_repeated(tmp_path: Path) -> None:
    """The rollback also removes the temporary table of Alembic's batch mode."""
    url = make_url(f"sqlite:///{tmp_path / 'heroes.db'}")
    migrate(url, "upgrade", "0005")
    outside = engine(url)
    before = schema_of(url)
    with outside.connect() as connection:
        # 0007 fails because its index name is taken, after 0006 has copied the table.
        connection.execute(text("CREATE TABLE other (id int)"))
        connection.execute(text("CREATE VIEW ix_hero_age_id AS SELECT 1"))
    failed = migrate(url, "upgrade", "head", check=False)
    assert failed.returncode != 0
    with outside.connect() as connection:
        connection.execute(text("DROP VIEW ix_hero_age_id"))
        connection.execute(text("DROP TABLE other"))
    assert schema_of(url) == before
    migrate(url, "upgrade", "head")
    outside.dispose()
