"""Concurrent calls share statements, and no caller notices anything but the speed."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import URL, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from app.db.batching import MAX_BATCH_SIZE
from app.db.crud import Record
from app.db.database import Database
from app.errors import DatabaseTimeout, OutcomeUnknown
from app.heroes import heroes
from app.models import HeroCreate, HeroUpdate
from app.telemetry import metrics
from tests.faults.load import Load
from tests.processes import gunicorn
from tests.service import Service, engine


def batches(operation: str = "get_many") -> tuple[int, int]:
    """The number of batches sent so far, and of the calls in them."""
    counts = Counter(
        {
            sample.name: int(sample.value)
            for metric in metrics.batch_size.collect()
            for sample in metric.samples
            if sample.labels == {"operation": operation}
        }
    )
    return counts["batch_size_count"], counts["batch_size_sum"]


Work = Callable[[Database], Awaitable[None]]


def run(database_url: URL, work: Work, timeout: float = 5) -> None:
    async def with_database() -> None:
        database = Database(database_url, pool_size=4, timeout=timeout)
        try:
            await work(database)
        finally:
            await database.close()

    asyncio.run(with_database())


def hero(name: str) -> HeroCreate:
    """A new hero, without the validation of its name."""
    return HeroCreate.model_construct(name=name, age=None, secret_name="s")


async def create(database: Database, count: int) -> list[Record]:
    return [await database.run(heroes.create, hero(f"n{n}")) for n in range(count)]


async def get(database: Database, hero_id: int) -> Record | None:
    return await database.run_batched(heroes.get_many, hero_id)


def names_in(database: Engine) -> list[str]:
    with database.connect() as connection:
        return list(connection.scalars(text("SELECT name FROM hero ORDER BY id")))


def test_a_lone_call_is_sent_immediately_in_a_batch_of_its_own(database_url: URL) -> None:
    async def work(database: Database) -> None:
        rows = await create(database, 3)
        sent, calls = batches()
        for row in rows:
            assert await get(database, row.id) == row
        assert await get(database, 99) is None
        assert batches() == (sent + 4, calls + 4)

    run(database_url, work)


def test_concurrent_calls_share_a_batch_and_get_their_own_results(database_url: URL) -> None:
    async def work(database: Database) -> None:
        rows = await create(database, 3)
        sent, calls = batches()
        wanted = [*rows, None, *rows, rows[0]]
        found = await asyncio.gather(*(get(database, row.id if row else 99) for row in wanted))
        assert found == wanted
        assert batches() == (sent + 1, calls + 8)

    run(database_url, work)


def test_calls_during_a_batch_share_the_next_one(database_url: URL) -> None:
    async def work(database: Database) -> None:
        [row] = await create(database, 1)
        sent, calls = batches()
        first = asyncio.create_task(get(database, row.id))
        for _ in range(5):  # Turns of the event loop: enough for the batch to be in progress.
            await asyncio.sleep(0)
        assert await asyncio.gather(*(get(database, row.id) for _ in range(5))) == [row] * 5
        assert await first == row
        assert batches() == (sent + 2, calls + 6)

    run(database_url, work)


def test_no_batch_is_larger_than_its_limit(database_url: URL) -> None:
    async def work(database: Database) -> None:
        [row] = await create(database, 1)
        sent, calls = batches()
        count = 2 * MAX_BATCH_SIZE + 2
        assert await asyncio.gather(*(get(database, row.id) for _ in range(count))) == [row] * count
        assert batches() == (sent + 3, calls + count)

    run(database_url, work)


def test_batched_creates_insert_in_order_and_return_their_own_rows(
    database_url: URL, database: Engine
) -> None:
    names = [f"n{number * 7919 % 1009}" for number in range(2 * MAX_BATCH_SIZE + 5)]

    async def work(service: Database) -> None:
        sent, calls = batches("create_many")
        rows = await asyncio.gather(
            *(service.run_batched(heroes.create_many, hero(name)) for name in names)
        )
        assert [row.public["name"] for row in rows] == names
        # In order within a batch. A slow batch does not hold up the next one.
        for start in range(0, len(names), MAX_BATCH_SIZE):
            ids = [row.id for row in rows[start : start + MAX_BATCH_SIZE]]
            assert ids == sorted(ids)
        assert batches("create_many") == (sent + 3, calls + len(names))

    run(database_url, work)
    assert sorted(names_in(database)) == sorted(names)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_slow_batch_does_not_hold_up_later_calls(database_url: URL, database: Engine) -> None:
    async def work(service: Database) -> None:
        [row] = await create(service, 1)
        with database.connect() as holder, database.connect() as observer:
            holder.execute(text("BEGIN"))
            holder.execute(text("LOCK TABLE hero IN ACCESS EXCLUSIVE MODE"))

            def waiting() -> int:
                statement = text(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event = 'relation'"
                )
                return int(observer.execute(statement).scalar_one())

            first = asyncio.create_task(get(service, row.id))
            await asyncio.sleep(0.1)
            others = [asyncio.create_task(get(service, row.id)) for _ in range(10)]
            for _ in range(100):
                if waiting() == 2:
                    break
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            assert waiting() == 2  # The slow batch, and one for all later calls.
            holder.execute(text("COMMIT"))
        assert await asyncio.gather(first, *others) == [row] * 11

    run(database_url, work)


def test_cancelling_a_call_does_not_affect_the_others(database_url: URL) -> None:
    async def work(database: Database) -> None:
        rows = await create(database, 10)
        tasks = [asyncio.create_task(get(database, row.id)) for row in rows for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in found[::3])
        assert found[1::3] == rows
        assert found[2::3] == rows

    run(database_url, work)


def test_a_create_that_is_cancelled_before_it_is_sent_writes_nothing(
    database_url: URL, database: Engine
) -> None:
    async def work(service: Database) -> None:
        tasks = [
            asyncio.create_task(service.run_batched(heroes.create_many, hero(name)))
            for name in ("a", "b", "c")
        ]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks)

    run(database_url, work)
    assert names_in(database) == ["a", "c"]


def test_closing_waits_for_batches_whose_callers_have_gone(database_url: URL) -> None:
    async def work(database: Database) -> None:
        [row] = await create(database, 1)
        task = asyncio.create_task(get(database, row.id))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        await database.close()
        assert database.connections[0] == 0

    run(database_url, work)


def test_closing_at_the_moment_at_which_a_batch_ends_succeeds(database_url: URL) -> None:
    async def work(database: Database) -> None:
        [row] = await create(database, 1)
        assert await get(database, row.id) == row

    run(database_url, work)


def test_a_failing_item_fails_alone(database_url: URL, database: Engine) -> None:
    async def work(service: Database) -> None:
        sent, calls = batches("create_many")
        names = ["a", "", "b", "n" * 201, "c"]
        found = await asyncio.gather(
            *(service.run_batched(heroes.create_many, hero(name)) for name in names),
            return_exceptions=True,
        )
        assert [isinstance(each, DBAPIError) for each in found] == [False, True, False, True, False]
        assert [each.public["name"] for each in found if isinstance(each, Record)] == [
            "a",
            "b",
            "c",
        ]
        # The batch, and then each item alone.
        assert batches("create_many") == (sent + 6, calls + 10)

    run(database_url, work)
    assert sorted(names_in(database)) == ["a", "b", "c"]


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_an_item_that_the_driver_cannot_encode_fails_alone(
    database_url: URL, database: Engine
) -> None:
    async def work(service: Database) -> None:
        found = await asyncio.gather(
            *(service.run_batched(heroes.create_many, hero(name)) for name in ("a", "b\0", "c")),
            return_exceptions=True,
        )
        assert [isinstance(each, DBAPIError) for each in found] == [False, True, False]

    run(database_url, work)
    assert sorted(names_in(database)) == ["a", "c"]


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
@pytest.mark.parametrize("state", ["22003", "23505", "44000", "54000", "P0001"])
def test_an_item_that_a_trigger_refuses_fails_alone(
    database_url: URL, database: Engine, state: str
) -> None:
    with database.connect() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                f" IF NEW.name = 'b' THEN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END IF;"
                " RETURN NEW; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER refuse BEFORE INSERT ON hero FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        )

    async def work(service: Database) -> None:
        found = await asyncio.gather(
            *(service.run_batched(heroes.create_many, hero(name)) for name in ("a", "b", "c")),
            return_exceptions=True,
        )
        assert [isinstance(each, DBAPIError) for each in found] == [False, True, False]

    run(database_url, work)
    assert sorted(names_in(database)) == ["a", "c"]


def test_a_failing_batch_fails_its_calls_and_no_later_ones(
    database_url: URL, database: Engine
) -> None:
    async def work(service: Database) -> None:
        [row] = await create(service, 1)
        with database.connect() as outside:
            outside.execute(text("ALTER TABLE hero RENAME TO gone"))
            sent, calls = batches()
            found = await asyncio.gather(
                *(get(service, row.id) for _ in range(10)), return_exceptions=True
            )
            assert all(isinstance(each, DBAPIError) for each in found)
            assert batches() == (sent + 1, calls + 10), "the items ran one by one"
            outside.execute(text("ALTER TABLE gone RENAME TO hero"))
        assert await get(service, row.id) == row

    run(database_url, work)


def test_a_function_that_returns_too_few_results_fails_its_calls(database_url: URL) -> None:
    def too_few(_: Session, items: list[int]) -> list[int]:
        return items[1:]

    async def work(service: Database) -> None:
        found = await asyncio.gather(
            *(service.run_batched(too_few, number) for number in range(3)), return_exceptions=True
        )
        assert [type(each) for each in found] == [ValueError] * 3

    run(database_url, work)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_every_call_ends_within_the_timeout(database_url: URL, database: Engine) -> None:
    async def work(service: Database) -> None:
        [row] = await create(service, 1)
        with database.connect() as holder:
            holder.execute(text("BEGIN"))
            holder.execute(text("LOCK TABLE hero IN ACCESS EXCLUSIVE MODE"))
            start = time.monotonic()
            found = await asyncio.gather(
                *(get(service, row.id) for _ in range(300)), return_exceptions=True
            )
            assert all(isinstance(each, DatabaseTimeout | DBAPIError) for each in found)
            assert time.monotonic() - start < 2
            holder.execute(text("COMMIT"))
        assert await get(service, row.id) == row

    run(database_url, work, timeout=1)


def test_a_failing_item_does_not_double_the_timeout(database_url: URL, database: Engine) -> None:
    """The items then run one by one, in the remaining time of their calls."""

    def slow_then_invalid(session: Session, items: list[str]) -> list[str]:
        if session.get_bind().dialect.name == "postgresql":
            session.connection().exec_driver_sql("SELECT pg_sleep(0.8)")
        else:
            time.sleep(0.8)
        return [
            record.public["name"]
            for record in heroes.create_many(session, [hero(""), *map(hero, items)])
        ]

    async def work(service: Database) -> None:
        start = time.monotonic()
        found = await asyncio.gather(
            *(service.run_batched(slow_then_invalid, name) for name in ("a", "b")),
            return_exceptions=True,
        )
        assert [type(each) for each in found] == [OutcomeUnknown] * 2
        assert time.monotonic() - start < 1.9

    run(database_url, work, timeout=1)
    assert names_in(database) == []


@given(
    st.lists(
        st.tuples(st.sampled_from("rrruuccxb"), st.integers(0, 2), st.integers(0, 30)), max_size=60
    )
)
@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_call_sees_every_write_acknowledged_before_it_started(
    database_url: URL, steps: list[tuple[str, int, int]]
) -> None:
    """Reads, updates, creates, invalid creates and cancelled reads.

    Each starts at some turn of the event loop.
    """

    async def work(database: Database) -> None:
        rows = await create(database, 3)
        acknowledged = {row.id: 1 for row in rows}
        started = {row.id: 1 for row in rows}

        async def update(hero_id: int) -> None:
            started[hero_id] += 1
            row = await database.run(heroes.update, hero_id, HeroUpdate(age=1), None)
            acknowledged[hero_id] = max(acknowledged[hero_id], row.version)

        async def read(hero_id: int) -> None:
            at_least = acknowledged[hero_id]
            row = await get(database, hero_id)
            assert row
            assert row.id == hero_id
            assert at_least <= row.version <= started[hero_id]

        async def create_and_read(name: str) -> None:
            row = await database.run_batched(heroes.create_many, hero(name))
            assert row.public["name"] == name
            assert await get(database, row.id) == row

        async def step(number: int, kind: str, hero_id: int, turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            match kind:
                case "r":
                    await read(hero_id)
                case "u":
                    await update(hero_id)
                case "c":
                    await create_and_read(f"new {number}")
                case "b":
                    with pytest.raises(DBAPIError):
                        await database.run_batched(heroes.create_many, hero(""))
                case _:
                    cancelled = asyncio.create_task(read(hero_id))
                    await asyncio.sleep(0)
                    cancelled.cancel()
                    await asyncio.wait([cancelled])

        await asyncio.gather(
            *(
                step(number, kind, rows[index].id, turns)
                for number, (kind, index, turns) in enumerate(steps)
            )
        )

    run(database_url, work)


def test_reads_of_a_failed_batch_get_the_same_503_as_without_a_batch(
    service: Service, client: httpx2.Client, database: Engine
) -> None:
    client.post("/heroes/", json={"name": "a", "secret_name": "s"})
    with database.connect() as connection:
        connection.execute(text("ALTER TABLE hero RENAME TO gone"))

    def read(_: int) -> httpx2.Response:
        with service.client() as own:
            return own.get("/heroes/1")

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(read, range(8)))
    assert {response.status_code for response in responses} == {503}
    assert {response.json()["detail"] for response in responses} == {
        "The database's schema is behind: run alembic upgrade head"
    }
    assert len({response.headers["x-request-id"] for response in responses}) == 8


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_change_of_a_columns_type_under_load_fails_no_request(
    database_url: URL, tmp_path: Path, figures: list[str]
) -> None:
    """Every connection has prepared the statements for the old type."""
    requests: list[Any] = [
        ("GET", "/heroes/1", ""),
        ("GET", "/heroes/", ""),
        ("POST", "/heroes/", '{"name": "a", "secret_name": "s"}'),
        ("PATCH", "/heroes/1", '{"age": 2}'),
    ]
    outside = engine(database_url)
    with gunicorn(database_url, tmp_path) as server, outside.connect() as connection:
        body = {"name": "a", "secret_name": "s"}
        httpx2.post(f"http://127.0.0.1:{server.port}/heroes/", json=body)
        with Load(server.port, requests).running() as load:
            for of_type in ("bigint", "integer", "bigint"):
                time.sleep(1)
                connection.execute(text(f"ALTER TABLE hero ALTER COLUMN age TYPE {of_type}"))
            time.sleep(1)
        errors = server.get("/metrics").body.decode()
    outside.dispose()
    assert load.lost == []
    # The control: the plans did go stale.
    assert 'database_errors_total{sqlstate_class="0A"}' in errors
    figures.append(f"three changes of a column's type under load: 0 lost of {load.answered:,}")
