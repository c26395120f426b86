"""The ways to run data functions, and the limit on every wait."""

import asyncio
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import URL, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from app.api.parameters import DatabaseDep
from app.application import create_app
from app.db.admission import reads
from app.db.database import Database, _Call
from app.db.engine import sqlstate
from app.db.pagination import Page
from app.errors import Changed, DatabaseTimeout, OutcomeUnknown
from app.heroes import heroes
from app.models import Hero, HeroCreate, HeroUpdate
from tests.service import engine, serve, settings

HERO = HeroCreate.model_validate({"name": "Deadpond", "secret_name": "Dive Wilson"})


@asynccontextmanager
async def closing(database: Database) -> AsyncIterator[Database]:
    try:
        yield database
    finally:
        await database.close()


def two_heroes(session: Session, fail: bool = False) -> None:
    heroes.create(session, HERO)
    heroes.create(session, HERO)
    if fail:
        raise LookupError


def count(database: Engine) -> int:
    with database.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM hero")).scalar_one())


@contextmanager
def another_writer(database: Engine) -> Iterator[None]:
    """Hold the table's lock during the block."""
    with database.connect() as connection:
        if database.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql("BEGIN; LOCK TABLE hero")
        yield
        connection.exec_driver_sql("ROLLBACK")


def test_a_transaction_commits_all_of_its_work(database_url: URL, database: Engine) -> None:
    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            await service.run_in_transaction(two_heroes)

    asyncio.run(work())
    assert count(database) == 2


def test_a_transaction_that_fails_leaves_nothing_and_its_connection_sound(
    database_url: URL, database: Engine
) -> None:
    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            with pytest.raises(LookupError):
                await service.run_in_transaction(two_heroes, True)
            assert await service.run(heroes.list, Page(100)) == []

    asyncio.run(work())
    assert count(database) == 0


def test_a_write_that_waits_for_a_lock_is_503_in_time_and_writes_nothing(
    database_url: URL, database: Engine
) -> None:
    with serve(settings(database_url, database_timeout=0.5)) as service, service.client() as client:
        hero = HERO.model_dump()
        with another_writer(database):
            start = time.monotonic()
            answer = client.post("/heroes/", json=hero)
            waited = time.monotonic() - start
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "detail" in answer.json()
        assert 0.2 < waited < 1.5
        assert count(database) == 0
        assert client.post("/heroes/", json=hero).status_code == 200, "the lock was the reason"


def test_objects_of_a_transaction_can_be_used_after_its_commit(database_url: URL) -> None:
    """An error after the commit would make the client send the create again."""

    def create(session: Session) -> Hero:
        hero = Hero.model_validate(HERO)
        session.add(hero)
        return hero

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            hero = await service.run_in_transaction(create)
            assert (hero.id, hero.name, hero.version) == (1, "Deadpond", 1)

    asyncio.run(work())


def test_a_write_by_the_orm_raises_the_version(database_url: URL) -> None:
    def change(session: Session) -> None:
        hero = session.get_one(Hero, 1)
        hero.age = 3

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            await service.run(heroes.create, HERO)
            await service.run_in_transaction(change)
            with pytest.raises(Changed):
                await service.run(heroes.update, 1, HeroUpdate(age=4), '"1"')
            assert (await service.run(heroes.update, 1, HeroUpdate(age=4), '"2"')).version == 3

    asyncio.run(work())


def test_a_write_by_the_orm_over_another_change_is_a_conflict(
    database_url: URL,
) -> None:
    def change(session: Session) -> None:
        hero = session.get_one(Hero, 1)
        session.connection().execute(text("UPDATE hero SET version = version + 1"))
        hero.age = 3

    async def route(database: DatabaseDep) -> None:
        await database.run_in_transaction(change)

    app = create_app(settings(database_url))
    app.add_api_route("/change", route)
    with serve(app) as service, service.client() as client:
        client.post("/heroes/", json=HERO.model_dump())
        refused = client.get("/change")
        assert refused.status_code == 409
        assert client.get("/heroes/1").json()["age"] is None


def test_objects_added_in_a_single_call_are_written(database_url: URL, database: Engine) -> None:
    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            await service.run(lambda session: session.add(Hero.model_validate(HERO)))

    asyncio.run(work())
    assert count(database) == 1


def test_one_frame_of_the_service_stands_between_the_greenlet_and_the_function(
    database_url: URL,
) -> None:
    def frames(_: Session) -> list[str]:
        return [frame.name for frame in traceback.extract_stack() if "/app/" in frame.filename]

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            assert await service.run(frames) == ["_autocommit"]
            assert await service.run_in_transaction(frames) == ["_transaction"]

    asyncio.run(work())


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_transaction_has_its_own_timeout(database_url: URL) -> None:
    def sleep(session: Session) -> None:
        session.connection().exec_driver_sql("SELECT pg_sleep(0.6)")

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=0.3)) as service:
            await service.run_in_transaction(sleep, timeout=5)
            with pytest.raises((DBAPIError, DatabaseTimeout)):
                await service.run_in_transaction(sleep)

    asyncio.run(work())


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_write_that_was_answered_with_503_is_not_made_afterwards(
    database_url: URL, database: Engine
) -> None:
    """Also not by those that waited for the one connection while it waited for the lock."""

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=0.5)) as service:
            with another_writer(database):
                units = (service.run(heroes.create, HERO) for _ in range(3))
                done = await asyncio.gather(*units, return_exceptions=True)
                assert all(isinstance(result, Exception) for result in done)
            await asyncio.sleep(1.5)

    asyncio.run(work())
    assert count(database) == 0


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize("run", ["run", "run_in_transaction"])
def test_a_statement_that_starts_after_its_timeout_does_not_write(
    database_url: URL, database: Engine, run: str
) -> None:
    """A thread may lose the CPU for so long."""
    has_ended = threading.Event()

    def late(session: Session) -> None:
        time.sleep(0.8)
        try:
            heroes.create(session, HERO)
        finally:
            has_ended.set()

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=0.5)) as service:
            with pytest.raises((DatabaseTimeout, OutcomeUnknown)):
                await getattr(service, run)(late)
            assert await asyncio.to_thread(has_ended.wait, 10)
            # Later calls have their own time, however long the connection was idle.
            await asyncio.sleep(0.6)
            with database.connect() as connection:
                connection.execute(text("CREATE TABLE other (id INTEGER)"))  # To be parsed.
            await service.run(heroes.get, 1)

    asyncio.run(work())
    assert count(database) == 0


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_transaction_that_outlasts_its_timeout_is_rolled_back(
    database_url: URL, database: Engine
) -> None:
    """Its thread cannot be cancelled, and its caller has been told that nothing was written."""

    def slow(session: Session) -> None:
        heroes.create(session, HERO)
        time.sleep(0.6)

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=0.4)) as service:
            with pytest.raises(DatabaseTimeout):
                await service.run_in_transaction(slow)
            await asyncio.sleep(0.6)

    asyncio.run(work())
    assert count(database) == 0


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_transaction_of_reads_has_no_unknown_outcome(database_url: URL, database: Engine) -> None:
    @reads
    def lose(session: Session) -> None:
        pid = session.connection().scalar(text("SELECT pg_backend_pid()"))
        with database.connect() as connection:
            connection.execute(text(f"SELECT pg_terminate_backend({pid}, 5000)"))

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            with pytest.raises(DBAPIError):
                await service.run_in_transaction(lose)

    asyncio.run(work())


def test_a_failed_call_leaves_nothing_to_the_next_call(database_url: URL) -> None:
    """Calls in autocommit use the session of their connection."""

    def add(session: Session) -> None:
        session.add(Hero(name="Deadpond", secret_name="Dive Wilson"))

    def add_and_fail(session: Session) -> None:
        add(session)
        raise ZeroDivisionError

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            with pytest.raises(ZeroDivisionError):
                await service.run(add_and_fail)
            assert await service.run(heroes.count, {}) == 0
            await service.run(add)
            assert await service.run(heroes.count, {}) == 1
            await service.run(add)
            assert await service.run(heroes.count, {}) == 2

    asyncio.run(work())


def test_an_exhausted_pool_is_a_timeout_and_then_recovers(database_url: URL) -> None:
    async def work() -> float:
        async with closing(Database(database_url, pool_size=1, timeout=0.3)) as database:
            holder = _Call(heroes.get, 5)
            await database._acquire(holder, asyncio.timeout(5))
            start = time.monotonic()
            with pytest.raises(DatabaseTimeout):
                await database.run(heroes.get, 1)
            waited = time.monotonic() - start

            await database._release(holder)
            assert await database.run(heroes.get, 1) is None
            return waited

    assert 0.25 < asyncio.run(work()) < 0.9


def test_units_of_work_get_their_connections_in_the_order_of_their_coming(
    database_url: URL,
) -> None:
    """Otherwise some calls would starve under load."""
    done: list[int] = []

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as database:

            async def client(first: int) -> None:
                for turn in range(3):
                    await database.run(heroes.get, 1)
                    done.append(first + 10 * turn)

            await asyncio.gather(*(client(first) for first in range(5)))

    asyncio.run(work())
    assert done == [first + 10 * turn for turn in range(3) for first in range(5)]


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_statement_past_its_time_is_cancelled_on_the_server(
    database_url: URL, database: Engine
) -> None:
    @reads
    def sleep(session: Session) -> None:
        session.connection().exec_driver_sql("SET statement_timeout = 0")
        session.connection().exec_driver_sql("SELECT pg_sleep(60)")

    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=0.3)) as service:
            with pytest.raises(DatabaseTimeout):
                await service.run(sleep)
            assert await service.run(heroes.get, 1) is None

    asyncio.run(work())
    with database.connect() as connection:
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"
        assert (
            connection.execute(
                text(sleeping + " AND state = 'active' AND pid <> pg_backend_pid()")
            ).scalar()
            == 0
        )


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
@pytest.mark.parametrize("pool_size", [1, 3])
def test_a_prepared_statement_outlives_a_change_of_its_columns_type(
    database_url: URL, database: Engine, pool_size: int
) -> None:
    async def work() -> None:
        async with closing(Database(database_url, pool_size=pool_size, timeout=5)) as service:
            row = await service.run(heroes.create, HERO)

            async def read() -> None:
                # psycopg prepares a statement at its sixth use on a connection.
                for _ in range(10 * pool_size):
                    reads = (service.run(heroes.get, row.id) for _ in range(pool_size))
                    assert await asyncio.gather(*reads) == [row] * pool_size

            await read()
            with database.connect() as connection:
                connection.execute(text("ALTER TABLE hero ALTER COLUMN age TYPE bigint"))
            await read()

            # The control: a request would get this error without the second run.
            with database.connect() as connection:
                connection.execute(text("ALTER TABLE hero ALTER COLUMN age TYPE integer"))
            call = _Call(heroes.get, 5)
            with pytest.raises(DBAPIError, match="cached plan"):
                await service._run_once(service._autocommit, call, lambda: (row.id,))

    asyncio.run(work())


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_connections_are_replaced_for_all_calls_while_the_pool_is_drained(
    database_url: URL, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool waits for its lock if other tasks use it. The other calls do not wait for that."""
    drain = AsyncConnectionPool.drain

    async def wait_and_drain(pool: AsyncConnectionPool[Any]) -> None:
        await asyncio.sleep(0.2)
        await drain(pool)

    monkeypatch.setattr(AsyncConnectionPool, "drain", wait_and_drain)

    async def work() -> None:
        async with closing(Database(database_url, pool_size=3, timeout=5)) as service:
            row = await service.run(heroes.create, HERO)

            async def read() -> None:
                reads = (service.run(heroes.get, row.id) for _ in range(3))
                assert await asyncio.gather(*reads) == [row] * 3

            for _ in range(10):
                await read()
            with database.connect() as connection:
                connection.execute(text("ALTER TABLE hero ALTER COLUMN age TYPE bigint"))
            await read()

    asyncio.run(work())


def test_every_error_of_a_statement_has_an_sqlstate(database_url: URL) -> None:
    beside = engine(database_url)
    statements = {
        "INSERT INTO hero (name) VALUES ('x')": "23",
        "SELECT * FROM villain": "42P01",
        "SELECT powers FROM hero": "42703",
    }
    with beside.connect() as connection:
        for statement, expected in statements.items():
            with pytest.raises(DBAPIError) as caught:
                connection.execute(text(statement))
            assert (sqlstate(caught.value.orig) or "").startswith(expected)
    beside.dispose()


def test_an_error_of_the_statement_shows_no_parameters(database_url: URL) -> None:
    async def work() -> None:
        async with closing(Database(database_url, pool_size=1, timeout=5)) as service:
            with pytest.raises(DBAPIError) as caught:
                await service.run(
                    lambda session: session.connection().execute(
                        text("INSERT INTO villain (secret_name) VALUES (:name)"), {"name": "Wilson"}
                    )
                )
            assert "Wilson" not in str(caught.value)

    asyncio.run(work())
