"""While the database is down, the service runs on and responds with 503 in time."""

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import URL, Engine, make_url, text

from tests.examples import DEADPOND
from tests.migrations import migrate
from tests.postgres import EmbeddedPostgres
from tests.service import serve, settings

EVERY_OPERATION: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/heroes/", DEADPOND),
    ("GET", "/heroes/", None),
    ("GET", "/heroes/1", None),
    ("PATCH", "/heroes/1", {"age": 3}),
    ("DELETE", "/heroes/1", None),
    ("GET", "/health/ready", None),
]


def assert_unavailable(client: httpx2.Client, detail: str = "database") -> None:
    for method, path, members in EVERY_OPERATION:
        start = time.monotonic()
        response = client.request(method, path, json=members)
        assert response.status_code == 503, (method, path, response.text)
        assert response.headers["retry-after"] == "1"
        assert detail in response.json()["detail"]
        assert time.monotonic() - start < 6
    assert client.get("/health/live").status_code == 200
    metrics = client.get("/metrics")
    assert metrics.status_code == 200
    assert 'database=""' in metrics.text


def test_the_service_uses_a_database_within_a_second_after_it_is_up_again(
    own_postgres: EmbeddedPostgres,
) -> None:
    """The database is down at the start, then up, then down after use, then up again."""
    migrate(own_postgres.url, "upgrade", "head")
    own_postgres.stop()
    with serve(settings(own_postgres.url)) as service, service.client() as client:
        assert_unavailable(client)

        own_postgres.start()
        assert_ready_within_a_second(client)
        hero = client.post("/heroes/", json=DEADPOND).json()
        # Open every connection of the pool, so that the pool loses all of them.
        occupy_the_pool(client)

        own_postgres.stop()
        assert_unavailable(client)

        own_postgres.start()
        assert_ready_within_a_second(client)
        assert client.get(f"/heroes/{hero['id']}").json() == hero


def test_no_request_fails_after_the_server_closed_idle_connections(
    own_postgres: EmbeddedPostgres,
) -> None:
    migrate(own_postgres.url, "upgrade", "head")
    with serve(settings(own_postgres.url)) as service, service.client() as client:
        occupy_the_pool(client)
        with own_postgres.connect() as connection:
            ended = connection.execute(
                "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
                " WHERE application_name = 'heroes'"
            ).fetchone()
        assert ended is not None
        assert ended[0] > 1
        for _ in range(20):
            assert client.get("/heroes/").status_code == 200


def occupy_the_pool(client: httpx2.Client) -> None:
    def read() -> None:
        for _ in range(20):
            assert client.get("/heroes/?name=a").status_code == 200  # Not batched.

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def assert_ready_within_a_second(client: httpx2.Client) -> None:
    deadline = time.monotonic() + 1
    while client.get("/health/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(20):
        assert client.get("/heroes/").status_code == 200


def test_a_service_with_too_much_load_is_ready(database_url: URL) -> None:
    """Otherwise a load balancer would take each worker out, one after the other."""
    statuses: Counter[int] = Counter()
    is_over = threading.Event()

    def read(client: httpx2.Client) -> None:
        while not is_over.is_set():
            statuses[client.get("/heroes/?name=a").status_code] += 1  # Not batched.

    small = settings(database_url, database_pool_size=1, database_queue_size=2)
    with serve(small) as service, service.client() as client, ThreadPoolExecutor() as threads:
        assert client.get("/health/ready").status_code == 200
        for _ in range(8):
            threads.submit(read, client)
        try:
            ready = {client.get("/health/ready").status_code for _ in range(100)}
        finally:
            is_over.set()
    assert ready == {200}
    assert statuses[503], "the control: clients are refused"


def test_a_request_to_a_hanging_database_server_is_503_in_time(
    own_postgres: EmbeddedPostgres,
) -> None:
    """A suspended server accepts data on its sockets and never replies."""
    migrate(own_postgres.url, "upgrade", "head")
    with (
        serve(settings(own_postgres.url, database_timeout=1)) as service,
        service.client() as client,
    ):
        assert client.get("/heroes/").status_code == 200
        with own_postgres.connect() as connection:
            pids = [
                int(row[0])
                for row in connection.execute(
                    "SELECT pid FROM pg_stat_activity WHERE application_name = 'heroes'"
                )
            ]
        processes = [own_postgres.pid, *pids]
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            assert client.get("/heroes/").status_code == 503
            waited = time.monotonic() - start
            assert client.get("/health/live").status_code == 200
            assert client.get("/health/ready").status_code == 503
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
        assert 0.9 < waited < 2
        assert_ready_within_a_second(client)


def test_an_empty_database_is_503_with_a_hint_to_run_the_migrations(empty_database: URL) -> None:
    with serve(settings(empty_database)) as service, service.client() as client:
        assert_unavailable(client, "alembic upgrade head")
        migrate(empty_database, "upgrade", "head")
        assert_ready_within_a_second(client)


def test_the_service_is_not_ready_on_an_older_schema_but_ready_on_a_newer_one(
    database_url: URL, database: Engine
) -> None:
    with serve(settings(database_url)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200

        with database.connect() as connection:
            connection.execute(text("DELETE FROM alembic_version"))
        response = client.get("/health/ready")
        assert response.status_code == 503
        assert "alembic upgrade head" in response.json()["detail"]

        with database.connect() as connection:
            connection.execute(text("INSERT INTO alembic_version VALUES ('of a newer release')"))
        assert client.get("/health/ready").status_code == 200


def test_a_sqlite_file_that_cannot_be_opened_is_503(tmp_path: Path) -> None:
    file = tmp_path / "away" / "heroes.db"
    url = make_url(f"sqlite:///{file}")
    with serve(settings(url)) as service, service.client() as client:
        assert_unavailable(client)
        file.parent.mkdir()
        migrate(url, "upgrade", "head")
        assert_ready_within_a_second(client)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_on_a_read_only_server_writes_are_503_and_reads_succeed(
    database_url: URL, database: Engine
) -> None:
    with database.connect() as connection:
        name = database_url.database
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    with serve(settings(database_url)) as service, service.client() as client:
        assert client.post("/heroes/", json=DEADPOND).status_code == 503
        assert client.get("/heroes/").status_code == 200
