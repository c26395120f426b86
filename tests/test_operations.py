"""Updates, deletes and lists that share statements behave as they do alone."""

import asyncio
import enum
import math
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import URL, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel
from sqlmodel.sql.sqltypes import AutoString

from app.db.crud import Crud, Rows
from app.db.database import Database
from app.db.operations import delete_row, list_rows, update_row
from app.db.pagination import LOOK_UP, Cursor, Page
from app.errors import Changed, NotFound
from app.heroes import heroes
from app.models import HeroCreate, HeroUpdate
from tests.test_batching import batches


@asynccontextmanager
async def opened(url: URL) -> AsyncIterator[Database]:
    database = Database(url, pool_size=4, timeout=5)
    try:
        yield database
    finally:
        await database.close()


async def create(database: Database, count: int) -> list[int]:
    rows = [HeroCreate(name=f"n{n}", age=n % 3 or None, secret_name="s") for n in range(count)]
    return [(await database.run(heroes.create, row)).id for row in rows]


def test_concurrent_changes_of_different_members_share_a_statement(database_url: URL) -> None:
    async def work() -> None:
        async with opened(database_url) as database:
            ids = await create(database, 4)
            sent, _ = batches("update_many")
            changes = [
                HeroUpdate(age=7),
                HeroUpdate(name="new"),
                HeroUpdate(age=None),
                HeroUpdate(name="both", age=9, secret_name="t"),
            ]
            rows = await asyncio.gather(
                *(
                    update_row(database, heroes, *pair, None)
                    for pair in zip(ids, changes, strict=True)
                )
            )
            assert [(row.public["name"], row.public["age"]) for row in rows] == [
                ("n0", 7),
                ("new", 1),
                ("n2", None),
                ("both", 9),
            ]
            assert [row.id for row in rows] == ids
            assert [row.version for row in rows] == [2] * 4
            assert batches("update_many")[0] == sent + 1

    asyncio.run(work())


def test_a_change_that_the_database_refuses_fails_alone(database_url: URL) -> None:
    async def work() -> None:
        async with opened(database_url) as database:
            ids = await create(database, 3)
            names = ["a", "n" * 300, "c"]
            found = await asyncio.gather(
                *(
                    update_row(
                        database,
                        heroes,
                        row_id,
                        HeroUpdate.model_construct({"name"}, name=name),
                        None,
                    )
                    for row_id, name in zip(ids, names, strict=True)
                ),
                return_exceptions=True,
            )
            assert [isinstance(each, DBAPIError) for each in found] == [False, True, False]
            rows = await database.run(heroes.get_many, ids)
            assert [row and (row.public["name"], row.version) for row in rows] == [
                ("a", 2),
                ("n1", 1),
                ("c", 2),
            ]

    asyncio.run(work())


def test_many_changes_and_deletes_of_one_row_happen_one_after_the_other(database_url: URL) -> None:
    async def work() -> None:
        async with opened(database_url) as database:
            [row_id] = await create(database, 1)
            rows = await asyncio.gather(
                *(update_row(database, heroes, row_id, HeroUpdate(age=n), None) for n in range(30))
            )
            assert sorted(row.version for row in rows) == list(range(2, 32))
            deleted = await asyncio.gather(
                *(delete_row(database, heroes, row_id, None) for _ in range(5)),
                return_exceptions=True,
            )
            assert (
                sorted(type(each).__name__ for each in deleted) == ["NoneType"] + ["NotFound"] * 4
            )
            with pytest.raises(NotFound):
                await update_row(database, heroes, row_id, HeroUpdate(age=1), None)

    asyncio.run(work())


def test_if_match_and_an_empty_change_are_not_batched(database_url: URL) -> None:
    async def work() -> None:
        async with opened(database_url) as database:
            [row_id] = await create(database, 1)
            before = batches("update_many")
            assert (await update_row(database, heroes, row_id, HeroUpdate(), None)).version == 1
            assert (
                await update_row(database, heroes, row_id, HeroUpdate(age=1), '"1"')
            ).version == 2
            with pytest.raises(Changed):
                await update_row(database, heroes, row_id, HeroUpdate(age=1), '"1"')
            with pytest.raises(Changed):
                await delete_row(database, heroes, row_id, '"1"')
            assert batches("update_many") == before

    asyncio.run(work())


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_locked_row_delays_only_its_own_callers(database_url: URL, database: Engine) -> None:
    async def work() -> None:
        async with opened(database_url) as service:
            ids = await create(service, 20)
            with database.connect() as holder:
                holder.execute(text("BEGIN"))
                holder.execute(text("SELECT * FROM hero WHERE id = :id FOR UPDATE"), {"id": ids[0]})
                start = time.monotonic()
                tasks = [
                    asyncio.create_task(
                        update_row(service, heroes, row_id, HeroUpdate(age=1), None)
                    )
                    for row_id in ids
                ]
                await asyncio.gather(*tasks[1:])
                assert time.monotonic() - start < 1
                assert not tasks[0].done()
                holder.execute(text("COMMIT"))
            assert (await tasks[0]).version == 2

    asyncio.run(work())


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_two_workers_that_change_the_same_rows_neither_deadlock_nor_lose_a_change(
    database_url: URL, database: Engine, figures: list[str]
) -> None:
    """The versions count exactly the acknowledged changes."""
    acknowledged: Counter[int] = Counter()
    lock = threading.Lock()

    async def change(ids: list[int], seconds: float) -> None:
        async with opened(database_url) as service:
            end = time.monotonic() + seconds

            async def client() -> None:
                while time.monotonic() < end:
                    for row_id in ids:
                        await update_row(service, heroes, row_id, HeroUpdate(age=1), None)
                        with lock:
                            acknowledged[row_id] += 1

            await asyncio.gather(*(client() for _ in range(8)))

    async def prepare() -> list[int]:
        async with opened(database_url) as service:
            return await create(service, 10)

    ids = asyncio.run(prepare())
    threads = [
        threading.Thread(target=asyncio.run, args=(change(order, 3),)) for order in (ids, ids[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.connect() as connection:
        rows = connection.execute(text("SELECT id, version - 1 FROM hero"))
        versions: dict[int, int] = {row.id: row[1] for row in rows}
        deadlocks = connection.scalar(
            text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        )
    assert versions == dict(acknowledged)
    assert deadlocks == 0
    figures.append(f"two workers, the same ten rows: {sum(versions.values()):,} changes, none lost")


@given(
    st.lists(
        st.tuples(
            st.integers(1, 20),  # The limit.
            st.integers(0, 15),  # The offset, or the row to start after.
            st.sampled_from(list(heroes.orders)),
            st.sampled_from(["offset", "cursor", "cursor that looks up"]),
        ),
        min_size=1,
        max_size=30,
    )
)
@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_pages_that_share_a_statement_have_the_rows_of_each_page_alone(
    database_url: URL, asked: list[tuple[int, int, str, str]]
) -> None:
    def page(rows: Rows, limit: int, place: int, sort: str, kind: str) -> Page:
        if kind == "offset":
            return Page(limit, place, sort)
        cursor = heroes.cursor(rows[place % len(rows)], sort)
        if kind != "cursor" and "id" not in sort:
            cursor = cursor._replace(value=LOOK_UP)
        return Page(limit, 0, sort, cursor)

    async def work() -> None:
        async with opened(database_url) as database:
            await create(database, 12)
            rows = await database.run(heroes.list, Page(100))
            pages = [page(rows, *each) for each in asked]
            alone = [await database.run(heroes.list, each) for each in pages]
            together = await asyncio.gather(*(list_rows(database, heroes, each) for each in pages))
            assert together == alone

    asyncio.run(work())


def test_pages_with_filters_or_at_a_great_offset_are_not_batched(database_url: URL) -> None:
    async def work() -> None:
        async with opened(database_url) as database:
            await create(database, 3)
            before = batches("list_many")
            assert await list_rows(database, heroes, Page(5, 1001)) == []
            assert len(await list_rows(database, heroes, Page(5, filters={"name": "n1"}))) == 1
            assert batches("list_many") == before
            assert len(await list_rows(database, heroes, Page(5, 1))) == 2
            assert batches("list_many") == (before[0] + 1, before[1] + 1)

    asyncio.run(work())


def test_a_list_sees_the_writes_acknowledged_before_it_started(database_url: URL) -> None:
    async def work() -> None:
        async with opened(database_url) as database:

            async def client(seed: int) -> None:
                chance = random.Random(seed)
                for _ in range(8):
                    row = await database.run_batched(
                        heroes.create_many, HeroCreate(name="a", secret_name="s")
                    )
                    if chance.random() < 0.5:
                        row = await update_row(database, heroes, row.id, HeroUpdate(age=5), None)
                    page = Page(1, 0, "id", Cursor("id", row.id - 1, row.id - 1))
                    [found] = await list_rows(database, heroes, page)
                    assert found == row.public
                    await delete_row(database, heroes, row.id, None)
                    found_after = await list_rows(database, heroes, page)
                    assert row.public not in found_after

            await asyncio.gather(*(client(seed) for seed in range(10)))

    asyncio.run(work())


AWARE = datetime(2026, 1, 1, 1, 2, 3, 4, timezone(timedelta(hours=5, minutes=30)))


class Colour(enum.Enum):
    RED = "r"


def crud_of(annotation: Any, kind: Any) -> Crud[Any]:
    """The data functions of a table `sample` with one column of this type."""
    optional = annotation | None

    class Create(SQLModel, registry=registry()):
        value: optional = None  # type: ignore[valid-type]

    class Sample(Create, table=True):
        id: int | None = Field(default=None, primary_key=True)
        version: int = Field(default=1, sa_column_kwargs={"server_default": "1"})
        value: optional = Field(default=None, sa_type=kind)  # type: ignore[valid-type]

    class Public(Create):
        id: int

    return Crud(Sample, public=Public, create=Create, sorts=["id"], filters={})


@pytest.mark.parametrize("backend", ["postgresql"])
@pytest.mark.parametrize(
    ("annotation", "kind", "is_batched", "values"),
    [
        (str, AutoString(5), True, ["", "null", '"\\{}', " a ", ",", "\u2028\t", "é😀"]),
        (str, sa.CHAR(3), True, ["a", "abc"]),
        (str, sa.Text(), True, ["x" * 10_000]),
        (int, sa.Integer(), True, [0, -1, 2**31 - 1]),
        (int, sa.BigInteger(), True, [2**63 - 1, 2**53 + 1]),
        (bool, sa.Boolean(), True, [True, False]),
        (float, sa.Float(), True, [0.1 + 0.2, -0.0, 5e-324, 1e308, math.nan, math.inf]),
        (float, sa.REAL(), True, [0.1 + 0.2, 16777217.0]),
        (float, sa.Numeric(), False, [0.1 + 0.2]),
        (Decimal, sa.Numeric(), True, [Decimal("0." + "1" * 40), Decimal("-1.50")]),
        (Decimal, sa.Numeric(6, 2), True, [Decimal("1.005"), Decimal("NaN")]),
        (date, sa.Date(), True, [date.min, date.max]),
        (datetime, sa.DateTime(), False, [AWARE.replace(tzinfo=None), AWARE]),
        (datetime, sa.DateTime(timezone=True), True, [AWARE, AWARE.replace(tzinfo=None)]),
        (timedelta, sa.Interval(), False, [timedelta(days=-1, microseconds=1)]),
        (UUID, sa.Uuid(), True, [UUID(int=1)]),
        (Colour, sa.Enum(Colour, native_enum=False), False, [Colour.RED]),
        (bytes, sa.LargeBinary(), False, [b"\0\xff"]),
        (dict[str, Any], sa.JSON(), False, [{"a": [1, None]}, {}]),
        (list[str], sa.ARRAY(sa.String()), False, [["a", None], []]),
    ],
)
def test_a_batch_writes_the_same_values_as_single_statements(
    database_url: URL,
    database: Engine,
    annotation: Any,
    kind: Any,
    is_batched: bool,
    values: list[Any],
) -> None:
    crud = crud_of(annotation, kind)
    with database.connect() as connection:
        column = kind.compile(database.dialect)
        connection.execute(
            text(
                "CREATE TABLE sample (id integer GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,"
                f" version integer NOT NULL DEFAULT 1, value {column})"
            )
        )

    async def work() -> None:
        async with opened(database_url) as database:
            for value in [*values, None]:
                row = crud.create_model.model_construct(value=value)
                [single] = await database.run(crud.create_many, [row])
                pair = await database.run(crud.create_many, [row, row])
                stored = repr(single.public["value"])
                assert [repr(each.public["value"]) for each in pair] == [stored, stored]

                other = crud.create_model.model_construct(_fields_set={"value"}, value=value)
                [changed] = await database.run(crud.update_many, [(single.id, other)])
                assert changed
                assert repr(changed.public["value"]) == stored
                both = await database.run(crud.update_many, [(each.id, other) for each in pair])
                if is_batched:
                    assert [each and repr(each.public["value"]) for each in both] == [
                        stored,
                        stored,
                    ]
                else:  # Each of these changes then runs alone.
                    assert both == [None, None]

    asyncio.run(work())
