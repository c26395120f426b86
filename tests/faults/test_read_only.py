"""A primary that becomes a standby, or read-only, and back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import URL, Engine, text

from tests.examples import DEADPOND
from tests.service import serve, settings

pytestmark = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)


@contextmanager
def read_only(database: Engine) -> Iterator[None]:
    """Make new sessions of the database read-only during the block, as those of a standby are."""
    name = database.url.database
    with database.connect() as connection:
        setting = f"ALTER DATABASE {name} SET default_transaction_read_only"
        connection.execute(text(f"{setting} = on"))
        yield
        connection.execute(text("SET transaction_read_only = off"))
        connection.execute(text(f"{setting} = off"))


def test_writes_work_again_soon_after_the_database_is_writable(
    database_url: URL, database: Engine
) -> None:
    """The sessions of the read-only time must not be used again."""
    with serve(settings(database_url)) as service, service.client() as client:
        with read_only(database):
            for _ in range(3):
                assert client.post("/heroes/", json=DEADPOND).status_code == 503
            assert client.get("/heroes/").status_code == 200, "reads work"
        created = [client.post("/heroes/", json=DEADPOND).status_code for _ in range(5)]
        # New sessions of the read-only time are replaced one by one.
        assert created[2:] == [200] * 3


def test_a_write_with_a_key_on_a_new_connection_to_a_standby_is_503(
    database_url: URL, database: Engine
) -> None:
    """The connection is closed within the transaction."""
    with (
        serve(settings(database_url)) as service,
        service.client() as client,
        read_only(database),
    ):
        for key in ("a", "b"):
            headers = {"Idempotency-Key": key}
            assert client.post("/heroes/", json=DEADPOND, headers=headers).status_code == 503


def test_a_read_only_database_is_not_ready(database_url: URL, database: Engine) -> None:
    with serve(settings(database_url)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200
    with serve(settings(database_url)) as service, service.client() as client:
        with read_only(database):
            ready = client.get("/health/ready")
            assert ready.status_code == 503
            assert ready.json() == {"detail": "The database cannot be used: it is read-only"}
            time.sleep(0.2)  # The pool makes a session that replaces the first one.
        # Both would stay read-only. The first check may use the second session.
        statuses = [client.get("/health/ready").status_code for _ in range(4)]
        assert statuses[1:] == [200] * 3
