"""Many waiting reads of single heroes become one query, and nobody can tell but by its speed."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import URL, Engine, text
from sqlalchemy.exc import DBAPIError

from app import heroes, metrics
from app.coalescing import MOST, HeroReads
from app.database import Database
from app.errors import DatabaseTimeout
from app.heroes import HeroRow
from app.models import HeroCreate, HeroUpdate
from tests.faults.load import Load
from tests.service import Service, engine, gunicorn


def batches() -> tuple[int, int]:
    """How many queries were sent, and how many reads shared them."""
    counts = {
        sample.name: int(sample.value)
        for metric in metrics.hero_read_batch.collect()
        for sample in metric.samples
        if not sample.labels
    }
    return counts["hero_read_batch_size_count"], counts["hero_read_batch_size_sum"]


Work = Callable[[Database, HeroReads], Awaitable[None]]


def run(database_url: URL, work: Work, timeout: float = 5) -> None:
    async def with_database() -> None:
        database = Database(database_url, pool_size=4, timeout=timeout)
        reads = HeroReads(database)
        try:
            await work(database, reads)
        finally:
            await reads.close()
            await database.close()

    asyncio.run(with_database())


async def create(database: Database, count: int) -> list[HeroRow]:
    return [
        await database.statement(heroes.create, HeroCreate(name=f"n{n}", secret_name="s"))
        for n in range(count)
    ]


def test_a_read_with_no_other_is_a_query_of_its_own_and_sent_at_once(database_url: URL) -> None:
    async def work(database: Database, reads: HeroReads) -> None:
        rows = await create(database, 3)
        queries, shared = batches()
        for row in rows:
            assert await reads.get(row.id) == row
        assert await reads.get(99) is None
        assert batches() == (queries + 4, shared + 4)

    run(database_url, work)


def test_reads_that_wait_share_the_next_query(database_url: URL) -> None:
    async def work(database: Database, reads: HeroReads) -> None:
        rows = await create(database, 3)
        queries, shared = batches()
        wanted = [*rows, None, *rows, rows[0]]
        found = await asyncio.gather(*(reads.get(row.id if row else 99) for row in wanted))
        assert found == wanted
        # The first goes at once, the others together.
        assert batches() == (queries + 2, shared + 8)

    run(database_url, work)


def test_no_query_is_larger_than_its_bound(database_url: URL) -> None:
    async def work(database: Database, reads: HeroReads) -> None:
        [row] = await create(database, 1)
        queries, shared = batches()
        asked = 2 * MOST + 2
        assert await asyncio.gather(*(reads.get(row.id) for _ in range(asked))) == [row] * asked
        assert batches() == (queries + 4, shared + asked)

    run(database_url, work)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_reads_do_not_wait_for_a_query_that_is_late(database_url: URL, database: Engine) -> None:
    async def work(service: Database, reads: HeroReads) -> None:
        [row] = await create(service, 1)
        with database.connect() as holder, database.connect() as observer:
            holder.execute(text("BEGIN"))
            holder.execute(text("LOCK TABLE hero IN ACCESS EXCLUSIVE MODE"))
            first = asyncio.create_task(reads.get(row.id))
            await asyncio.sleep(0.1)
            others = [asyncio.create_task(reads.get(row.id)) for _ in range(10)]
            await asyncio.sleep(0.2)
            waiting = observer.execute(
                text(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event = 'relation'"
                )
            ).scalar_one()
            assert waiting == 3  # The late one, one more at once, and the rest together.
            holder.execute(text("COMMIT"))
        assert await asyncio.gather(first, *others) == [row] * 11

    run(database_url, work)


def test_a_reader_that_goes_away_is_nothing_to_the_others(database_url: URL) -> None:
    async def work(database: Database, reads: HeroReads) -> None:
        rows = await create(database, 10)
        tasks = [asyncio.create_task(reads.get(row.id)) for row in rows for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks[::3]:  # The first of them is the one whose read was sent.
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in found[::3])
        assert found[1::3] == rows
        assert found[2::3] == rows

    run(database_url, work)


def test_closing_waits_for_the_query_whose_readers_have_all_gone_away(database_url: URL) -> None:
    async def work(database: Database, reads: HeroReads) -> None:
        [row] = await create(database, 1)
        reader = asyncio.create_task(reads.get(row.id))
        for _ in range(5):  # Turns of the event loop: enough for the query to be under way.
            await asyncio.sleep(0)
        reader.cancel()
        await reads.close()
        assert database.in_use == 0
        # Once more at the very moment at which a query ends.
        assert await reads.get(row.id) == row
        await reads.close()

    run(database_url, work)


def test_a_query_that_fails_fails_its_readers_and_no_later_ones(
    database_url: URL, database: Engine
) -> None:
    async def work(service: Database, reads: HeroReads) -> None:
        [row] = await create(service, 1)
        with database.connect() as beside:
            beside.execute(text("ALTER TABLE hero RENAME TO gone"))
            found = await asyncio.gather(
                *(reads.get(row.id) for _ in range(10)), return_exceptions=True
            )
            assert all(isinstance(each, DBAPIError) for each in found)
            beside.execute(text("ALTER TABLE gone RENAME TO hero"))
        assert await reads.get(row.id) == row

    run(database_url, work)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_every_reader_is_answered_within_the_timeout(database_url: URL, database: Engine) -> None:
    async def work(service: Database, reads: HeroReads) -> None:
        [row] = await create(service, 1)
        with database.connect() as holder:
            holder.execute(text("BEGIN"))
            holder.execute(text("LOCK TABLE hero IN ACCESS EXCLUSIVE MODE"))
            start = time.monotonic()
            found = await asyncio.gather(
                *(reads.get(row.id) for _ in range(300)), return_exceptions=True
            )
            assert all(isinstance(each, DatabaseTimeout | DBAPIError) for each in found)
            assert time.monotonic() - start < 2
            holder.execute(text("COMMIT"))
        assert await reads.get(row.id) == row

    run(database_url, work, timeout=1)


@dataclass
class History:
    """What is known of a hero's version from the answers so far."""

    answered: dict[int, int] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=dict)


@given(
    st.lists(
        st.tuples(st.sampled_from("rrrwc"), st.integers(0, 2), st.integers(0, 30)), max_size=60
    )
)
@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_read_sees_every_write_that_was_answered_before_it(
    database_url: URL, steps: list[tuple[str, int, int]]
) -> None:
    """Reads, writes and readers that go away, each beginning at some turn of the event loop."""

    async def work(database: Database, reads: HeroReads) -> None:
        rows = await create(database, 3)
        versions = History({row.id: 1 for row in rows}, {row.id: 1 for row in rows})

        async def write(hero_id: int) -> None:
            versions.begun[hero_id] += 1
            row = await database.statement(heroes.change, hero_id, HeroUpdate(age=1))
            assert row
            versions.answered[hero_id] = max(versions.answered[hero_id], row.version)

        async def read(hero_id: int) -> None:
            at_least = versions.answered[hero_id]
            row = await reads.get(hero_id)
            assert row
            assert row.id == hero_id
            assert at_least <= row.version <= versions.begun[hero_id]

        async def step(kind: str, hero_id: int, turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            if kind == "c":
                leaving = asyncio.create_task(read(hero_id))
                await asyncio.sleep(0)
                leaving.cancel()
                await asyncio.wait([leaving])
            else:
                await (write if kind == "w" else read)(hero_id)

        await asyncio.gather(*(step(kind, rows[hero].id, turns) for kind, hero, turns in steps))

    run(database_url, work)


def test_readers_of_a_failed_query_have_the_503_that_they_would_have_had(
    service: Service, client: httpx2.Client, database: Engine
) -> None:
    client.post("/heroes/", json={"name": "a", "secret_name": "s"})
    with database.connect() as connection:
        connection.execute(text("ALTER TABLE hero RENAME TO gone"))

    def read(_: int) -> httpx2.Response:
        with service.client() as own:
            return own.get("/heroes/1")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(read, range(8)))
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["detail"] for answer in answers} == {
        "The database's schema is behind: run alembic upgrade head"
    }
    assert len({answer.headers["x-request-id"] for answer in answers}) == 8


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
    beside = engine(database_url)
    with gunicorn(database_url, tmp_path) as server, beside.connect() as connection:
        body = {"name": "a", "secret_name": "s"}
        httpx2.post(f"http://127.0.0.1:{server.port}/heroes/", json=body)
        with Load(server.port, requests).running() as load:
            for of_type in ("bigint", "integer", "bigint"):
                time.sleep(1)
                connection.execute(text(f"ALTER TABLE hero ALTER COLUMN age TYPE {of_type}"))
            time.sleep(1)
        errors = server.get("/metrics").body.decode()
    beside.dispose()
    assert load.lost == []
    # The control: the plans did go stale.
    assert 'database_errors_total{sqlstate_class="0A"}' in errors
    figures.append(f"three changes of a column's type under load: 0 lost of {load.answered:,}")
