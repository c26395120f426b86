"""The service through a real PgBouncer in transaction mode: deploy/compose.pgbouncer.yml."""

import os
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import psycopg
import pytest
from alembic.util import CommandError
from sqlalchemy import URL

from app.db import migrations
from app.db.engine import sqlstate
from tests.compose import Stack, has_compose
from tests.examples import DEADPOND
from tests.faults.load import Load
from tests.migrations import migrate

IMAGE = "edoburu/pgbouncer:latest"


def image_exists() -> bool:
    inspect = ["docker", "image", "inspect", IMAGE]
    return subprocess.run(inspect, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(
    not (os.environ.get("FAULTS") and has_compose and image_exists()),
    reason=f"takes minutes: run `make faults`, with Docker and the image {IMAGE}",
)


class Pooled(Stack):
    """The compose project with PgBouncer, and connections to its parts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "deploy/compose.pgbouncer.yml")
        self.addresses: dict[str, str] = {}  # A restarted container may have another one.

    def url(self, service: str, role: str = "heroes_owner", database: str = "heroes") -> URL:
        """The URL of PgBouncer or of PostgreSQL, from outside of the containers."""
        if service not in self.addresses:
            self.addresses[service] = self.address(service)
        passwords = {
            "heroes_owner": self.env["OWNER_PASSWORD"],
            "heroes_app": self.env["APP_PASSWORD"],
            "postgres": "postgres",
        }
        return URL.create(
            "postgresql+psycopg",
            role,
            passwords[role],
            self.addresses[service],
            {"pgbouncer": 6432, "db": 5432}[service],
            database,
        )

    def connect(
        self, service: str, role: str = "heroes_owner", database: str = "heroes"
    ) -> psycopg.Connection:
        url = self.url(service, role, database)
        return psycopg.connect(
            host=url.host,
            port=url.port,
            user=url.username,
            password=str(url.password),
            dbname=url.database,
            autocommit=True,
            connect_timeout=2,
        )

    def console(self, command: str) -> None:
        """Run a command of PgBouncer's console."""
        with self.connect("pgbouncer", database="pgbouncer") as connection:
            connection.execute(command.encode())


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pooled]:
    with Pooled(tmp_path_factory.mktemp("pgbouncer")).started() as stack:
        yield stack


@pytest.fixture
def stack(started: Pooled) -> Iterator[Pooled]:
    """The containers, with the settings and sessions of a new PgBouncer for each test."""
    yield started
    started.run("docker compose restart --timeout 0 pgbouncer")
    started.addresses.clear()
    wait_for(lambda: succeeds(lambda: started.console("SHOW VERSION")))


@pytest.fixture
def client(stack: Pooled) -> Iterator[httpx2.Client]:
    with stack.client() as client:
        yield client


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def succeeds(function: Callable[[], object]) -> bool:
    try:
        function()
    except psycopg.Error:
        return False
    return True


SERVICE_SESSIONS = "FROM pg_stat_activity WHERE usename = 'heroes_app'"


def test_the_contract_holds_through_pgbouncer(stack: Pooled, client: httpx2.Client) -> None:
    created = client.post("/heroes/", json=DEADPOND)
    assert created.status_code == 200
    hero = created.json()
    path = f"/heroes/{hero['id']}"
    for age in range(20):  # psycopg prepares a statement at its sixth use.
        assert client.get(path).json() == hero
        hero |= {"age": age}
        assert client.patch(path, json={"age": age}).json() == hero
        assert hero in client.get("/heroes/?sort=-id").json()
    stale = client.patch(path, json={"age": 1}, headers={"If-Match": created.headers["ETag"]})
    assert stale.status_code == 412
    assert client.delete(path).json() == {"ok": True}
    assert client.get(path).status_code == 404
    assert client.get("/health/ready").json() == {"status": "ready"}
    # All sessions come from PgBouncer.
    with stack.connect("db", "postgres") as database:
        addresses = database.execute(f"SELECT DISTINCT host(client_addr) {SERVICE_SESSIONS}")
        assert addresses.fetchall() == [(stack.url("pgbouncer").host,)]


def test_imports_exports_and_the_command_work_through_pgbouncer(
    stack: Pooled, client: httpx2.Client
) -> None:
    lines = b'{"name": "Imported", "secret_name": "s"}\n' * 50_000
    headers = {"Content-Type": "application/x-ndjson"}
    before = len(client.get("/heroes/export").content.splitlines())
    imported = client.post("/heroes/import", content=lines, headers=headers)
    assert imported.json() == {"created": 50_000}
    exported = client.get("/heroes/export").content.splitlines()
    assert len(exported) == before + 50_000
    by_the_command = stack.run("docker compose exec -T api python -m app export -")
    assert by_the_command.stdout.encode().splitlines() == exported
    stack.sql("DELETE FROM hero WHERE name = 'Imported'")


def test_a_call_that_waits_for_a_lock_ends_in_time_on_the_server_too(
    stack: Pooled, client: httpx2.Client
) -> None:
    """PgBouncer drops the timeouts that the service sends. The role has its own."""
    hero = client.post("/heroes/", json=DEADPOND).json()
    with stack.connect("db") as owner, owner.transaction():
        owner.execute("LOCK TABLE hero")
        start = time.monotonic()
        refused = client.patch(f"/heroes/{hero['id']}", json={"age": 1})
        assert refused.status_code == 503
        assert time.monotonic() - start < 7
        with stack.connect("db", "postgres") as database:
            waiting = f"SELECT count(*) {SERVICE_SESSIONS} AND wait_event_type = 'Lock'"
            assert database.execute(waiting).fetchone() == (0,)
            # Without the service, which cancels the statement too: only the role's timeout.
            with (
                stack.connect("pgbouncer", "heroes_app") as session,
                pytest.raises(psycopg.errors.LockNotAvailable, match="lock timeout"),
            ):
                session.execute("SELECT * FROM hero")
    assert client.patch(f"/heroes/{hero['id']}", json={"age": 1}).status_code == 200


def test_concurrent_creates_with_one_key_create_one_hero(stack: Pooled) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    body = DEADPOND | {"name": headers["Idempotency-Key"]}

    def create(_: int) -> tuple[int, bytes, bool]:
        with stack.client() as client:
            response = client.post("/heroes/", json=body, headers=headers)
        return response.status_code, response.content, "idempotency-replayed" in response.headers

    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(create, range(20)))
    assert len({response[:2] for response in responses}) == 1
    assert responses[0][0] == 200
    assert sum(not replayed for *_, replayed in responses) == 1
    with stack.client() as client:
        assert len(client.get("/heroes/", params={"name": body["name"]}).json()) == 1


def terminate_sessions(stack: Pooled) -> int:
    with stack.connect("db", "postgres") as database:
        ended = database.execute(
            f"SELECT count(pg_terminate_backend(pid, 5000)) {SERVICE_SESSIONS}"
        )
        return int((ended.fetchone() or [0])[0])


def test_no_request_fails_after_idle_server_connections_were_closed(stack: Pooled) -> None:
    with Load(stack.port).running():
        time.sleep(1)
    assert terminate_sessions(stack) > 1
    with stack.client() as client:
        assert [client.get("/heroes/").status_code for _ in range(20)] == [200] * 20


@contextmanager
def writing(stack: Pooled) -> Iterator[list[tuple[float, int, str]]]:
    """Create heroes with keys and retries; yield the time, status and name of each response."""
    responses: list[tuple[float, int, str]] = []
    stop = threading.Event()

    def write() -> None:
        with stack.client() as client:
            while not stop.is_set():
                name = uuid.uuid4().hex
                status = 0
                while status != 200 and not stop.is_set():
                    body, headers = DEADPOND | {"name": name}, {"Idempotency-Key": name}
                    status = client.post("/heroes/", json=body, headers=headers).status_code
                    responses.append((time.monotonic(), status, name))
                    time.sleep(0.02)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield responses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def assert_created_once(stack: Pooled, responses: list[tuple[float, int, str]]) -> None:
    created = sorted(name for _, status, name in responses if status == 200)
    with stack.connect("db", "postgres") as database:
        found = database.execute("SELECT name FROM hero WHERE name = ANY(%s)", (created,))
        assert sorted(name for (name,) in found) == created


def test_a_session_killed_in_its_commit_is_a_503() -> None:
    """PgBouncer sends the server's error and its own. psycopg expects one result of COMMIT."""
    error = psycopg.InternalError("received 2 results from command 'COMMIT'")
    assert sqlstate(error) is None


def test_kills_of_server_connections_under_load_lose_no_write(
    stack: Pooled, figures: list[str]
) -> None:
    with writing(stack) as responses:
        for _ in range(10):
            time.sleep(0.3)
            terminate_sessions(stack)
        last = time.monotonic()
        time.sleep(2)
    statuses = [status for _, status, _ in responses]
    assert set(statuses) <= {200, 503}
    assert all(status == 200 for when, status, _ in responses if when > last + 1)
    assert_created_once(stack, responses)
    failed = sum(status != 200 for status in statuses)
    figures.append(
        f"PgBouncer, ten kills of its server connections: {failed} of {len(statuses)} writes"
        " failed, each succeeded when it was sent again"
    )


@pytest.mark.parametrize("retry", [1, 15])
def test_writes_resume_after_a_restart_of_postgresql(
    stack: Pooled, retry: int, figures: list[str]
) -> None:
    """With PgBouncer's default `server_login_retry`, 15 s, they resume much later: the control."""
    if retry != 1:
        stack.console(f"SET server_login_retry = {retry}")
    with writing(stack) as responses:
        time.sleep(1)
        stack.run("docker compose stop db")
        time.sleep(1)  # PgBouncer fails to log in.
        stack.run("docker compose start db")
        stack.addresses.clear()
        wait_for(lambda: succeeds(lambda: stack.connect("db", "postgres").close()))
        up = time.monotonic()
        wait_for(lambda: any(when > up and status == 200 for when, status, _ in responses))
        time.sleep(1)
    resumed = min(when for when, status, _ in responses if when > up and status == 200)
    figures.append(
        f"PgBouncer with server_login_retry = {retry}: the first write"
        f" {resumed - up:.1f} s after PostgreSQL was up again"
    )
    assert {status for _, status, _ in responses} <= {200, 503}
    assert_created_once(stack, responses)
    if retry == 1:
        assert resumed - up < 2
        assert all(status == 200 for when, status, _ in responses if when > resumed + 1)
    else:
        assert resumed - up > 5


def test_stale_plans_stop_only_with_reconnect(stack: Pooled) -> None:
    """Each client prepares the statement again, and PgBouncer gives it the same stale plan."""
    count = re.compile(r'^database_errors_total\{sqlstate_class="0A"\} (.*)$', re.MULTILINE)
    with stack.client() as client:
        path = client.post("/heroes/", json=DEADPOND).headers["Location"]

        def stale_plans() -> float:
            """The number of stale plans during some reads, which all succeed."""

            def counted() -> float:
                found = count.search(client.get("/metrics").text)
                return float(found[1]) if found else 0

            before = counted()
            assert [client.get(path).status_code for _ in range(200)] == [200] * 200
            return counted() - before

        def change_type(name: str) -> None:
            with stack.connect("db") as owner:
                owner.execute(f"ALTER TABLE hero ALTER COLUMN age TYPE {name}".encode())

        assert stale_plans() == 0
        change_type("bigint")
        # The control.
        assert stale_plans() > 0
        assert stale_plans() > 0
        stack.run("docker compose run --rm --no-deps reconnect")
        assert stale_plans() == 0
        change_type("integer")
        stack.run("docker compose run --rm --no-deps reconnect")
        assert stale_plans() == 0


def advisory_locks(stack: Pooled) -> int:
    with stack.connect("db", "postgres") as database:
        held = database.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        return int((held.fetchone() or [0])[0])


def test_migrations_through_pgbouncer_are_refused_by_one_line(stack: Pooled) -> None:
    refused = migrate(stack.url("pgbouncer"), "upgrade", "head", check=False)
    assert refused.returncode != 0
    [line] = [line for line in refused.output.splitlines() if "FAILED" in line]
    assert "a pooler in transaction mode" in line
    assert "set MIGRATION_DATABASE_URL" in line
    assert "Traceback" not in refused.output
    assert advisory_locks(stack) == 0
    # The next upgrade, on the right URL, waits for nothing.
    start = time.monotonic()
    migrate(stack.url("db"), "upgrade", "head")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("round_robin", [0, 1])
@pytest.mark.parametrize("sessions", [1, 2, 3, 5])
def test_a_pooler_is_recognized_with_any_number_of_idle_sessions(
    stack: Pooled, sessions: int, round_robin: int
) -> None:
    stack.console(f"SET server_round_robin = {round_robin}")
    stack.console(f"SET default_pool_size = {sessions}")
    with ExitStack() as opened:
        for _ in range(sessions):
            opened.enter_context(stack.connect("pgbouncer")).execute("BEGIN")
    engine = migrations.engine(stack.url("pgbouncer"))
    for _ in range(5):
        with pytest.raises(CommandError, match="pooler"), migrations.only_migrator(engine):
            pass
    assert advisory_locks(stack) == 0


@pytest.mark.parametrize("round_robin", [0, 1])
def test_a_pooler_is_recognized_while_others_use_it(stack: Pooled, round_robin: int) -> None:
    stack.console(f"SET server_round_robin = {round_robin}")
    stop = threading.Event()

    def work() -> None:
        with stack.connect("pgbouncer") as connection:
            while not stop.is_set():
                connection.execute("SELECT 1")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        engine = migrations.engine(stack.url("pgbouncer"))
        for _ in range(20):
            with pytest.raises(CommandError, match="pooler"), migrations.only_migrator(engine):
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert advisory_locks(stack) == 0


def test_without_the_check_the_lock_outlives_the_migrator(
    stack: Pooled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control for the tests above."""
    monkeypatch.setattr(migrations, "_refuse_shared_session", lambda _: None)
    with migrations.only_migrator(migrations.engine(stack.url("pgbouncer"))):
        pass
    assert advisory_locks(stack) == 1


def test_migrations_run_through_a_pooler_in_session_mode(stack: Pooled) -> None:
    stack.console("SET pool_mode = session")
    migrate(stack.url("pgbouncer"), "downgrade", "-1")
    migrate(stack.url("pgbouncer"), "upgrade", "head")
    wait_for(lambda: advisory_locks(stack) == 0)
