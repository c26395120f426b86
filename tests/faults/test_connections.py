"""Partitions, silent hosts, forgotten connections and waits for locks heal by themselves."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import psycopg
import pytest
from sqlalchemy import URL, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from app.database_url import parse_url
from app.db.admission import Lane, reads
from app.db.database import Database
from app.db.pool import ConnectionPool, PooledConnection
from app.errors import DatabaseTimeout, DatabaseUnavailable, Overloaded
from app.heroes import heroes
from app.models import HeroCreate, HeroUpdate
from tests.examples import DEADPOND
from tests.faults.network import SteadyLoad, client_ports, needs_iptables, network
from tests.service import serve, settings

pytestmark = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
REQUESTS = [
    ("GET", "/heroes/1", None),
    ("POST", "/heroes/", DEADPOND),
    ("PATCH", "/heroes/1", {"age": 1}),
]


@needs_iptables
@pytest.mark.parametrize("round_trip", [0, 0.2])
def test_requests_succeed_within_two_seconds_after_a_partition(
    database_url: URL, round_trip: float, figures: list[str]
) -> None:
    """For longer than the timeout all packets are lost, under steady load."""
    with (
        network(database_url, round_trip) as link,
        serve(settings(link.url)) as service,
        service.client() as client,
    ):
        assert client.post("/heroes/", json=DEADPOND).status_code == 200
        with SteadyLoad(service.port, 130, REQUESTS) as load:
            time.sleep(3)
            lost_at = load.now
            with link.losing_packets():
                time.sleep(8)
            healed_at = load.now
            time.sleep(4)
    statuses = {sample.status for sample in load.samples}
    assert statuses == {200, 503}
    # The control: the partition was one.
    during = load.between(lost_at + 0.5, healed_at - 5.5)
    assert {sample.status for sample in during} == {503}
    slowest = max(load.samples, key=lambda sample: sample.took)
    assert slowest.took < 7.5, slowest  # The timeout and 2 s, and the time of this process.
    first = min(
        s.at + s.took for s in load.samples if s.status == 200 and s.at + s.took > healed_at
    )
    assert first - healed_at < 2
    late = load.between(healed_at + 2)
    assert {sample.status for sample in late} == {200}
    figures.append(
        f"partition, round trip {round_trip} s: first success after {first - healed_at:.1f} s"
    )


@contextmanager
def silent_host() -> Iterator[int]:
    """A port that accepts connections and never sends a byte."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_silent_first_host_delays_a_connection_by_a_fraction_of_a_second(
    database_url: URL,
) -> None:
    with silent_host() as silent, network(database_url) as link:
        url = link.url.set(host=None, port=None).update_query_dict(
            {"host": "127.0.0.1,127.0.0.1", "port": f"{silent},{link.port}"}
        )

        async def first_call() -> float:
            database = Database(url, pool_size=2, timeout=5)
            start = time.monotonic()
            try:
                assert await database.run(heroes.get, 1) is None
            finally:
                await database.close()
            return time.monotonic() - start

        assert asyncio.run(first_call()) < 1.5
        # The control: libpq waits for the first host before it tries the next one.
        start = time.monotonic()
        plain = url.set(drivername="postgresql").update_query_dict({"connect_timeout": "2"})
        psycopg.connect(plain.render_as_string(hide_password=False)).close()
        assert time.monotonic() - start > 1.9


def test_with_several_hosts_the_service_connects_to_the_one_that_accepts_writes(
    database_url: URL, database: Engine
) -> None:
    """A standby is read-only, as these databases are at first."""
    read_only = f"ALTER DATABASE {database_url.database} SET default_transaction_read_only = "
    with network(database_url) as first, network(database_url) as second:
        several = first.url.set(host=None, port=None).update_query_dict(
            {"host": "127.0.0.1,127.0.0.1", "port": f"{first.port},{second.port}"}
        )
        url = parse_url(several.render_as_string(hide_password=False))

        async def work() -> None:
            service = Database(url, pool_size=2, timeout=5)
            try:
                with pytest.raises(DatabaseUnavailable, match="read-only"):
                    await service.run(heroes.get, 1)
                with database.connect() as connection:
                    connection.execute(text("SET default_transaction_read_only = off"))
                    connection.execute(text(read_only + "off"))
                await asyncio.sleep(2)
                await service.run(heroes.create, HeroCreate.model_validate(DEADPOND))
            finally:
                await service.close()

        with database.connect() as connection:
            connection.execute(text(read_only + "on"))
        asyncio.run(work())


def test_a_pooler_that_was_without_its_server_at_the_start_is_used_within_two_seconds(
    database_url: URL,
) -> None:
    """The first connection also asks for the server's version, and fails after its login."""

    is_down = True

    def closes_on(data: bytes) -> bool:
        """Whether the client sends a statement (Parse or Query), which needs the server."""
        return is_down and data[:1] in (b"P", b"Q")

    async def work(url: URL) -> None:
        nonlocal is_down
        database = Database(url, pool_size=2, timeout=1)
        try:
            # For long enough that a delay that doubles after each attempt is over two seconds.
            deadline = time.monotonic() + 8
            while time.monotonic() < deadline:
                with pytest.raises(DatabaseUnavailable):
                    await database.run(heroes.get, 1)
                await asyncio.sleep(0.1)
            is_down = False
            await asyncio.sleep(2)
            assert await database.run(heroes.get, 1) is None
        finally:
            await database.close()

    with network(database_url, closes_on=closes_on) as pooler:
        asyncio.run(work(pooler.url))


@needs_iptables
def test_connections_that_the_network_has_forgotten_fail_no_request(database_url: URL) -> None:
    """A firewall forgets idle connections: their packets are lost, those of new ones are not."""

    async def occupy(database: Database) -> None:
        await asyncio.gather(*(database.run(heroes.get, 1) for _ in range(8)))

    async def statuses(url: URL) -> list[bool]:
        database = Database(url, pool_size=4, timeout=1)
        try:
            await occupy(database)
            with contextlib.ExitStack() as stack:
                await asyncio.to_thread(forget, stack)
                await asyncio.sleep(5)
                results = [database.run(heroes.get, 1) for _ in range(4)]
                found = await asyncio.gather(*results, return_exceptions=True)
            return [isinstance(each, Exception) for each in found]
        finally:
            await database.close()

    with network(database_url) as link:

        def forget(stack: contextlib.ExitStack) -> None:
            stack.enter_context(link.losing_packets(client_ports(link.port)))

        keepalives = {"keepalives_idle": "1", "keepalives_interval": "1", "keepalives_count": "2"}
        assert asyncio.run(statuses(link.url.update_query_dict(keepalives))) == [False] * 4
        without = link.url.update_query_dict({"keepalives": "0"})
        assert any(asyncio.run(statuses(without))), "the control did not fail"


@contextmanager
def writes_blocked(database: Engine) -> Iterator[None]:
    """Hold a lock on the table that lets reads pass."""
    with database.connect() as connection:
        connection.execute(text("BEGIN"))
        connection.execute(text("LOCK TABLE hero IN SHARE ROW EXCLUSIVE MODE"))
        yield
        connection.execute(text("COMMIT"))


def test_reads_keep_their_connections_while_200_writers_wait_for_a_lock(
    database_url: URL, database: Engine, figures: list[str]
) -> None:
    async def slowest_read(service: Database) -> float:
        row = await service.run(heroes.create, HeroCreate.model_validate(DEADPOND))

        async def write(number: int) -> None:
            if number % 2:
                await service.run(heroes.update, row.id, HeroUpdate(age=number), None)
            else:
                await service.run_batched(heroes.create_many, HeroCreate.model_validate(DEADPOND))

        with writes_blocked(database):
            writers = [asyncio.create_task(write(number)) for number in range(200)]
            await asyncio.sleep(0.2)
            times = []
            for _ in range(50):
                start = time.monotonic()
                await service.run(heroes.get, row.id)
                await service.run_batched(heroes.get_many, row.id)
                times.append(time.monotonic() - start)
        await asyncio.gather(*writers, return_exceptions=True)
        return max(times)

    async def work(write_connections: int) -> float:
        service = Database(database_url, pool_size=4, timeout=3)
        service._writes = Lane(write_connections, 500)
        try:
            return await slowest_read(service)
        finally:
            await service.close()

    slowest = asyncio.run(work(3))
    assert slowest < 0.5
    figures.append(f"reads while 200 writers wait for a lock: at most {slowest * 1000:.0f} ms")
    assert asyncio.run(work(4)) > 1, "the control: no connection is kept for reads"


def test_calls_that_cannot_be_served_in_time_are_refused_immediately(database_url: URL) -> None:
    async def work() -> None:
        service = Database(database_url, pool_size=1, timeout=2, queue_size=10)

        outcomes: list[type[Exception] | None] = []  # In the order of the calls' ends.

        async def call(seconds: float) -> None:
            try:
                await service.run(sleep, seconds)
            except (Overloaded, DatabaseTimeout, DBAPIError) as error:
                outcomes.append(type(error))
            else:
                outcomes.append(None)

        try:
            # One runs, ten wait, and the others are more than the queue holds.
            await asyncio.gather(*(call(0.01) for _ in range(15)))
            assert outcomes == [Overloaded] * 4 + [None] * 11
            # After calls of 0.5 s, no more than four can end within 2 s.
            for _ in range(40):
                await call(0.5) if _ > 30 else await call(0.01)
            outcomes.clear()
            await asyncio.gather(*(call(0.5) for _ in range(10)))
            refused = outcomes.count(Overloaded)
            assert refused >= 2
            assert outcomes[:refused] == [Overloaded] * refused
            # The calls that were let in are served.
            await asyncio.sleep(0.5)
            await call(0.01)
            assert outcomes[-1] is None
        finally:
            await service.close()

    asyncio.run(work())


@reads
def sleep(session: Session, seconds: float) -> None:
    session.connection().execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


@pytest.fixture
def slow_writes(database: Engine) -> None:
    """Let each insert of a hero take three seconds."""
    with database.connect() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_sleep(3); RETURN NEW; END $$"
            )
        )
        connection.execute(
            text("CREATE TRIGGER wait BEFORE INSERT ON hero FOR EACH ROW EXECUTE FUNCTION wait()")
        )


@pytest.mark.usefixtures("slow_writes")
def test_a_write_whose_connection_is_lost_is_503_with_an_unknown_outcome(
    database_url: URL, database: Engine
) -> None:
    terminate = text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE state = 'active'"
        " AND datname = current_database() AND query LIKE 'INSERT INTO hero %'"
    )
    with serve(settings(database_url)) as service, ThreadPoolExecutor(1) as pool:

        def lose(**headers: str) -> httpx2.Response:
            with service.client() as client, database.connect() as connection:
                response = pool.submit(client.post, "/heroes/", json=DEADPOND, headers=headers)
                deadline = time.monotonic() + 10
                while not connection.scalar(terminate):
                    assert time.monotonic() < deadline, "there is no insert"
                    time.sleep(0.05)
                return response.result()

        unknown = lose()
        assert unknown.status_code == 503
        assert unknown.json() == {
            "detail": "The database did not confirm the write: it may have happened"
        }
        assert "retry-after" not in unknown.headers
        # A transaction stores no row before its COMMIT is sent.
        known = lose(**{"Idempotency-Key": "k"})
        assert known.status_code == 503
        assert known.json() == {"detail": "The database is unavailable"}
        assert known.headers["retry-after"] == "1"


@pytest.mark.usefixtures("slow_writes")
def test_a_write_that_the_server_does_not_confirm_in_time_has_an_unknown_outcome(
    database_url: URL,
) -> None:
    """The server's own timeout is switched off, so it cannot report that it wrote nothing."""
    url = database_url.update_query_dict({"options": "-c statement_timeout=0"})

    def create(url: URL) -> httpx2.Response:
        with serve(settings(url, database_timeout=2)) as service, service.client() as client:
            assert client.get("/heroes/").status_code == 200  # The pool has a connection.
            return client.post("/heroes/", json=DEADPOND)

    assert "may have happened" in create(url).json()["detail"]
    # The control: with the server's timeout, the write has certainly not happened.
    known = create(database_url)
    assert known.json() == {"detail": "The database is unavailable"}
    assert known.headers["retry-after"] == "1"


def test_a_connection_is_kept_for_the_next_caller_when_the_first_has_gone(
    database_url: URL,
) -> None:
    """At a round trip of 0.2 s a connection takes longer than the timeout of a call."""

    async def work(url: URL) -> None:
        database = Database(url, pool_size=2, timeout=0.5)
        try:
            with pytest.raises(DatabaseTimeout):
                await database.run(heroes.get, 1)
            await asyncio.sleep(3)
            assert await database.run(heroes.get, 1) is None
        finally:
            await database.close()

    with network(database_url, 0.2) as link:
        asyncio.run(work(link.url))


def test_a_connection_whose_pool_has_gone_is_closed(
    database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop ends at the moment when the connection is made."""
    made: list[PooledConnection] = []

    async def work() -> None:
        pool = ConnectionPool(database_url, 1, 5, lambda: None)
        connecting = asyncio.create_task(pool._connect())
        connect_to = PooledConnection.connect_to

        async def connect_and_cancel(address: dict[str, Any]) -> PooledConnection:
            connection = await connect_to(address)
            made.append(connection)
            connecting.cancel()
            return connection

        monkeypatch.setattr(PooledConnection, "connect_to", connect_and_cancel)
        with pytest.raises(asyncio.CancelledError):
            await connecting

    asyncio.run(work())
    assert [connection.closed for connection in made] == [True]


def test_a_connection_in_the_making_is_used_although_an_older_one_is_lost(
    database_url: URL, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a round trip of 0.2 s a connection takes 0.8 s. SQLAlchemy would make it twice."""
    connect_to = PooledConnection.connect_to
    made = []

    async def count(address: dict[str, Any]) -> PooledConnection:
        made.append(await connect_to(address))
        return made[-1]

    monkeypatch.setattr(PooledConnection, "connect_to", count)
    terminate = text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE state = 'active'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def work(url: URL) -> None:
        service = Database(url, pool_size=2, timeout=5)
        try:
            await service.run(heroes.get, 1)
            older = asyncio.create_task(service.run(sleep, 30))
            await asyncio.sleep(0.3)
            newer = asyncio.create_task(service.run(heroes.get, 1))
            await asyncio.sleep(0.3)
            with database.connect() as connection:
                assert connection.scalar(terminate) == 1
            await newer
            assert len(made) == 2
            await asyncio.gather(older, return_exceptions=True)
        finally:
            await service.close()

    with network(database_url, 0.2) as link:
        asyncio.run(work(link.url))
