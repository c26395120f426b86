"""The statements of a table other than heroes, with the names that tend to break."""

import asyncio
import io
import types
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import CHAR, URL, Engine, MetaData, String, bindparam, create_engine, text
from sqlalchemy.exc import DataError
from sqlalchemy.schema import CreateTable
from sqlmodel import Field, Session, SQLModel, col

from app.base import Row
from app.db.crud import Crud
from app.db.database import Database
from app.db.operations import update_row
from app.db.pagination import Cursor, Page
from app.errors import NotFound
from app.transfer.copy import dump, load
from app.transfer.formats import Format, encode_rows, read_rows


class OrderBase(SQLModel):
    # A reserved word, a name with the end of another, and the name of a method of tuples.
    user: str
    team_id: int
    count: int | None = None


class Order(OrderBase, Row, table=True):
    __tablename__ = "order"


class OrderPublic(OrderBase):
    id: int


class OrderCreate(OrderBase):
    pass


class OrderUpdate(SQLModel):
    count: int | None = None


orders = Crud(
    Order,
    public=OrderPublic,
    create=OrderCreate,
    sorts=("id", "-id", "team_id", "-team_id", "user", "count", "-count"),
    filters={"user": col(Order.user) == bindparam("user")},
)
# Only this module's: migrations are compared with the tables in SQLModel.metadata.
SQLModel.metadata.remove(orders.table)

ROWS = [("u", 9, None), ("v", 7, 1), ("u", 8, 2)]


@pytest.fixture
def session(empty_database: URL) -> Iterator[Session]:
    engine = create_engine(empty_database, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(CreateTable(orders.table.to_metadata(MetaData())))
    with Session(engine) as session:
        yield session
    engine.dispose()


def create(session: Session) -> list[dict[str, Any]]:
    rows = [OrderCreate(user=user, team_id=team_id, count=count) for user, team_id, count in ROWS]
    return [record.public for record in orders.create_many(session, rows)]


def test_a_table_with_reserved_names_has_every_operation(session: Session) -> None:
    created = create(session)
    assert created[0] == {"user": "u", "team_id": 9, "count": None, "id": 1}
    assert [record and record.id for record in orders.get_many(session, [3, 99, 1])] == [3, None, 1]
    updated = orders.update(session, 1, OrderUpdate(count=5), '"1"')
    assert (updated.version, updated.public["count"]) == (2, 5)
    orders.delete(session, 1, None)
    with pytest.raises(NotFound, match="Order not found"):
        orders.delete(session, 1, None)


def test_a_column_whose_name_ends_in_id_is_a_sort_key_of_its_own(session: Session) -> None:
    create(session)

    def teams(sort: str) -> list[int]:
        """The teams in this order, page by page."""
        found: list[int] = []
        after: Cursor | None = None
        while rows := orders.list(session, Page(1, sort=sort, after=after)):
            found.append(rows[0]["team_id"])
            after = Cursor.parse(str(orders.cursor(rows[0], sort)), orders.orders[sort])
        return found

    assert teams("team_id") == [7, 8, 9]
    assert teams("-team_id") == [9, 8, 7]
    assert teams("id") == [9, 7, 8]
    assert teams("count") == [7, 8, 9]
    assert teams("-count") == [9, 8, 7]


def test_filters_and_counts_take_the_same_conditions(session: Session) -> None:
    create(session)
    filters = {"user": "u"}
    assert [row["id"] for row in orders.list(session, Page(9, filters=filters))] == [1, 3]
    assert orders.count(session, filters) == 2


@pytest.mark.parametrize("file_format", ["ndjson", "csv"])
def test_a_table_with_reserved_names_is_imported_and_exported(
    session: Session, empty_database: URL, file_format: Format
) -> None:
    created = create(session)
    lines = encode_rows((), orders.names, file_format, header=True)
    engine = create_engine(empty_database)
    with Session(engine) as transaction:
        lines += b"".join(part for _, part in dump(transaction, orders, file_format))
    engine.dispose()
    rows = read_rows(OrderCreate, io.BytesIO(lines), file_format)
    session.connection().exec_driver_sql('DELETE FROM "order"')
    assert load(session, orders, rows) == len(ROWS)
    found = orders.list(session, Page(9))
    assert [row | {"id": 0} for row in found] == [row | {"id": 0} for row in created]


def test_a_table_with_thirty_members_starts() -> None:
    """An update may have any subset of them: a statement per subset would never be finished."""
    members: dict[str, Any] = {f"member_{number}": None for number in range(30)}
    types_of = dict.fromkeys(members, int | None)

    def model(name: str, base: Any, more: dict[str, Any], **options: Any) -> Any:
        namespace = {"__module__": __name__, "__annotations__": types_of | more, **members}
        return types.new_class(name, (base,), options, lambda body: body.update(namespace))

    table = model("Wide", Row, {}, table=True)
    public = model("WidePublic", SQLModel, {"id": int})
    wide = Crud(
        table, public=public, create=model("WideCreate", SQLModel, {}), sorts=(), filters={}
    )
    SQLModel.metadata.remove(wide.table)
    assert wide.names == [*members, "id"]


def test_concurrent_creates_of_one_table_share_a_statement(empty_database: URL) -> None:
    engine: Engine = create_engine(empty_database, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(CreateTable(orders.table.to_metadata(MetaData())))
        rows = [OrderCreate(user="u", team_id=number) for number in range(10)]

        async def work() -> list[int]:
            service = Database(empty_database, pool_size=2, timeout=5)
            calls = (service.run_batched(orders.create_many, row) for row in rows)
            found = [record.public["team_id"] for record in await asyncio.gather(*calls)]
            await service.close()
            return found

        assert asyncio.run(work()) == list(range(10))
        assert connection.scalar(text('SELECT count(*) FROM "order"')) == 10
    engine.dispose()


class BadgeBase(SQLModel):
    name: str = Field(sa_type=String(5))
    code: str | None = Field(default=None, sa_type=CHAR(5))


class Badge(BadgeBase, Row, table=True):
    pass


class BadgePublic(BadgeBase):
    id: int


class BadgeUpdate(SQLModel):
    name: str | None = None
    code: str | None = None


badges = Crud(Badge, public=BadgePublic, create=BadgeBase, sorts=(), filters={})
SQLModel.metadata.remove(badges.table)


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_batch_does_not_cut_a_text_that_is_too_long_for_its_column(empty_database: URL) -> None:
    """PostgreSQL refuses it in an INSERT or UPDATE, but a cast to VARCHAR(5) cuts it."""
    engine: Engine = create_engine(empty_database, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(CreateTable(badges.table.to_metadata(MetaData())))

    async def work() -> None:
        service = Database(empty_database, pool_size=2, timeout=5)
        try:
            await service.run(badges.create, BadgeBase(name="a"))
            for change in (BadgeUpdate(name="too long"), BadgeUpdate(code="too long")):
                with pytest.raises(DataError):
                    await update_row(service, badges, 1, change, None)
            assert (await update_row(service, badges, 1, BadgeUpdate(code="x"), None)).version == 2
        finally:
            await service.close()

    asyncio.run(work())
    engine.dispose()
