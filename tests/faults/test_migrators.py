"""Migrations on a live database: concurrent and killed migrators, held locks, traffic."""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.util import CommandError
from sqlalchemy import URL, Engine, make_url, text
from sqlalchemy.exc import DBAPIError

from app.db import migrations
from tests.faults.load import Load
from tests.schemas import schema_of
from tests.servers import Postgres
from tests.service import ROOT, Migrators, alembic, engine
from tests.test_migrations import REVISIONS, rows, tutorials_database

postgresql_only = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)

ROUNDS = 10
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
    migrate: Migrators,
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
        done = migrate.at_once(MIGRATORS, url, "upgrade", "head")
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
    empty_database: URL, outside: Engine, migrate: Migrators, database_url: URL, revision: str
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
    empty_database: URL, outside: Engine, migrate: Migrators
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
    empty_database: URL, outside: Engine, migrate: Migrators, figures: list[str]
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
    empty_database: URL, outside: Engine, migrate: Migrators
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


REQUESTS = [
    ("POST", "/heroes/", '{"name": "Deadpond", "secret_name": "Dive Wilson"}'),
    ("GET", "/heroes/?limit=10", ""),
    ("GET", "/heroes/7", ""),
    ("PATCH", "/heroes/7", '{"age": 7}'),
    ("PATCH", "/heroes/8", '{"name": "Rusty-Man", "age": null}'),
]

# Earlier releases. Their code must work during the upgrade to the newest schema and after it.
# Add each new release here: serve it from a worktree of its tag, and start the upgrade from the
# revision that was its head.
RELEASES = {"the tutorial": (tutorial, None)}


@postgresql_only
@pytest.mark.parametrize("release", RELEASES)
def test_no_request_of_an_earlier_release_fails_during_the_upgrade(
    empty_database: URL, outside: Engine, migrate: Migrators, release: str, figures: list[str]
) -> None:
    served, revision = RELEASES[release]
    if revision:
        migrate(empty_database, "upgrade", revision)
    with served(empty_database) as port:
        fill(outside, 50_000)
        with Load(port, REQUESTS, keep_alive_clients=6, fresh_clients=2).running() as load:
            time.sleep(1)
            before = load.answered
            migrate(empty_database, "upgrade", "head")
            during = load.answered - before
            time.sleep(2)  # On the newest schema.
    figures.append(
        f"upgrade of 50,000 rows under the load of {release}: {len(load.lost)} of"
        f" {load.answered + len(load.lost)} requests failed ({during} during the upgrade),"
        f" the slowest took {load.slowest:.2f} s"
    )
    assert load.lost == []
    assert during > 50
    with outside.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM hero")).scalar_one() > 50_000


@postgresql_only
def test_an_incompatible_schema_change_fails_requests_of_an_earlier_release(
    empty_database: URL, outside: Engine
) -> None:
    """The control for the previous test."""
    with tutorial(empty_database) as port:
        fill(outside, 100)
        load = Load(port, REQUESTS, keep_alive_clients=4, fresh_clients=1)
        with load.running(), outside.connect() as connection:
            wait_for(lambda: load.answered > 20)
            connection.execute(text("ALTER TABLE hero RENAME COLUMN secret_name TO alias"))
            wait_for(lambda: load.lost)


@postgresql_only
def test_a_migrator_that_waits_for_another_one_logs_it(
    empty_database: URL, outside: Engine
) -> None:
    with outside.connect() as other:
        other.execute(text(f"SELECT pg_advisory_lock({migrations._ADVISORY_LOCK})"))
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
        other.execute(text(f"SELECT pg_advisory_lock({migrations._ADVISORY_LOCK})"))
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


def test_a_failed_upgrade_on_sqlite_is_rolled_back_and_can_be_repeated(
    tmp_path: Path, migrate: Migrators
) -> None:
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
