"""The statements of one table: create, list, get, update and delete.

Each function runs one statement, so it is atomic and takes one round trip.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise, repeat
from operator import attrgetter
from types import NoneType
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, get_origin
from uuid import UUID

import sqlalchemy as sa
from pydantic import TypeAdapter
from pydantic_core import to_json
from sqlmodel import Session, SQLModel

from app.db import etags
from app.db.admission import reads
from app.db.fetch import fetch, is_converted
from app.db.pagination import (
    LOOK_UP,
    MAX_TEXT_LENGTH,
    Cursor,
    Order,
    Page,
    Position,
    page_statement,
    pages_statement,
)
from app.errors import Changed, NotFound

Create = TypeVar("Create", bound=SQLModel)


Public = dict[str, Any]  # A row as clients see it: the public model's fields, in their order.


class Record(NamedTuple):
    """A row, and the columns that every table has."""

    id: int
    version: int
    public: Public


Records = list[Record]
Rows = list[Public]
_id = attrgetter("id")
# PostgreSQL reads the JSON form of such a value, in such a column, as the same value.
_JSON_TYPES: dict[Any, Any] = {
    str: sa.String,
    int: sa.Integer,
    bool: sa.Boolean,
    float: sa.Float,
    Decimal: sa.Numeric,
    date: sa.Date,
    datetime: sa.DateTime,
    UUID: sa.Uuid,
}


class Crud(Generic[Create]):
    """Reads and writes one table. Builds each statement on first use.

    `public` is the model of responses: its fields are the columns that are read, in their order in
    JSON. `create` is the model of new rows: its fields are the columns that an insert writes.
    `sorts` are the sort keys of lists, such as `name` and `-name`. `filters` are conditions by
    name, with one parameter of the same name each. The table has the columns `id` and `version`.
    """

    def __init__(
        self,
        model: type[SQLModel],
        *,
        public: type[SQLModel],
        create: type[Create],
        sorts: Sequence[str],
        filters: Mapping[str, sa.ColumnElement[bool]],
    ) -> None:
        self.name = model.__name__
        self.model = model
        self.table: sa.Table = sa.inspect(model).local_table
        self.public = public
        self.create_model = create
        self.orders = {key: self._order(key) for key in sorts}
        self.filters = filters
        self.names = list(public.model_fields)
        self.public_columns = [self.table.c[name] for name in self.names]
        self._id_index = self.names.index("id")
        read = [*self.public_columns, self.table.c.version]
        row_id = self.table.c.id
        # As bigint, so that an id outside of an integer's range is not found instead of an error.
        self._has_id = row_id == sa.bindparam("row_id", type_=sa.BigInteger)
        self._has_version = self.table.c.version.in_(sa.bindparam("versions", expanding=True))
        self._select = sa.select(*read)
        self._select_by_id = self._select.where(self._has_id)
        self._insert = sa.insert(self.table).returning(*read)
        self._update = sa.update(self.table).returning(*read)
        # An array on PostgreSQL, a JSON array on SQLite: one parameter for any number of ids.
        array = sa.cast(sa.bindparam("ids", type_=sa.Text), sa.ARRAY(sa.BigInteger))
        json_array = sa.func.json_each(sa.bindparam("ids")).table_valued("value")
        self._select_by_array = self._select.where(row_id == sa.func.any(array))
        self._select_by_json = self._select.where(row_id.in_(sa.select(json_array.c.value)))
        # Clients choose filters and members: a limit keeps the caches small.
        self._list_statement = lru_cache(maxsize=256)(self._build_list)
        self._pages_statement = lru_cache(maxsize=256)(self._build_pages)
        self._count_statement = lru_cache(maxsize=256)(self._build_count)
        self._update_statement = lru_cache(maxsize=256)(self._build_update)
        self._delete_statement = lru_cache(maxsize=2)(self._build_delete)
        self._insert_one = self._build_insert_one()
        self._insert_batch = lru_cache(maxsize=2)(self._build_insert_batch)
        self._update_batch = lru_cache(maxsize=256)(self._build_update_batch)
        self._delete_batch = lru_cache(maxsize=2)(self._build_delete_batch)

    def create(self, session: Session, row: Create) -> Record:
        """Insert the row and return it with its id."""
        [record] = self.create_many(session, [row])
        return record

    def create_many(self, session: Session, rows: list[Create]) -> Records:
        """Insert the rows and return them in the same order."""
        values = [row.model_dump() for row in rows]
        if len(values) == 1 and self._insert_one is not None:
            return self._records(session, self._insert_one, values[0])
        batch = self._insert_batch(session.get_bind().dialect)
        if batch is None:
            found = self._to_records(session.connection().execute(self._insert, values).all())
        else:
            found = self._records(session, batch, {"rows": _json(values)})
        # The database gives out ids in the order of the rows, but may return them in another one.
        return sorted(found, key=_id)

    @reads
    def list(self, session: Session, page: Page) -> Rows:
        """Return the rows of the page, at most `page.limit`."""
        parameters = {**page.filters, **self._page_parameters(page)}
        statement = self._list_statement(page.sort, frozenset(page.filters), page.position)
        return self._public_rows(fetch(session, statement, parameters))

    @reads
    def list_many(self, session: Session, pages: Sequence[Page]) -> Sequence[Rows]:
        """Return the rows of each page. They have no filters."""
        found: dict[Any, Rows] = {}
        shapes: dict[Any, list[Page]] = {}
        for page in {page[:-1]: page for page in pages}.values():
            shapes.setdefault((page.sort, page.position), []).append(page)
        for (sort, position), same in shapes.items():
            if len(same) == 1:
                found[same[0][:-1]] = self.list(session, same[0])
            elif position == "start" and _are_close(same):
                found |= self._list_range(session, same)
            elif self._can_list_together(session, sort, position):
                found |= self._list_same(session, same)
            else:
                found |= {page[:-1]: self.list(session, page) for page in same}
        return [found[page[:-1]] for page in pages]

    def _list_range(self, session: Session, pages: Sequence[Page]) -> dict[Any, Rows]:
        """Return the rows of pages that are close: read each row once, and cut the range."""
        start = min(page.offset for page in pages)
        end = max(page.offset + page.limit for page in pages)
        rows = self.list(session, Page(end - start, start, pages[0].sort))
        return {page[:-1]: rows[page.offset - start :][: page.limit] for page in pages}

    def _list_same(self, session: Session, pages: Sequence[Page]) -> dict[Any, Rows]:
        """Return the rows of pages that differ only in their parameters, by one statement."""
        each = [self._page_parameters(page) for page in pages]
        parameters = {name: [values[name] for values in each] for name in each[0]}
        statement = self._pages_statement(pages[0].sort, pages[0].position)
        rows = fetch(session, statement, parameters)
        # The rows are ordered by the number of their page, their last column.
        numbers = [row[-1] for row in rows]
        ends = [bisect_right(numbers, number) for number in range(len(pages) + 1)]
        public = self._public_rows(rows)
        return {page[:-1]: public[a:b] for page, (a, b) in zip(pages, pairwise(ends), strict=True)}

    @reads
    def count(self, session: Session, filters: Mapping[str, Any]) -> int:
        """Return the number of rows that match the filters."""
        statement = self._count_statement(frozenset(filters))
        return int(session.connection().execute(statement, dict(filters)).scalar_one())

    @reads
    def get(self, session: Session, row_id: int) -> Record | None:
        """Return the row with this id, or None."""
        records = self._records(session, self._select_by_id, {"row_id": row_id})
        return records[0] if records else None

    @reads
    def get_many(self, session: Session, ids: Sequence[int]) -> Sequence[Record | None]:
        """Return the rows with these ids, in the same order, and None for a missing row."""
        distinct = list(set(ids))
        if len(distinct) == 1:
            records = self._records(session, self._select_by_id, {"row_id": distinct[0]})
        elif session.get_bind().dialect.name == "postgresql":
            ids_text = f"{{{','.join(map(str, distinct))}}}"
            records = self._records(session, self._select_by_array, {"ids": ids_text})
        else:
            records = self._records(session, self._select_by_json, {"ids": json.dumps(distinct)})
        found = {record.id: record for record in records}
        return [found.get(row_id) for row_id in ids]

    def update(
        self, session: Session, row_id: int, changes: SQLModel, if_match: str | None
    ) -> Record:
        """Write the members of `changes` that are set, and return the row.

        Raises `NotFound` if there is no such row, and `Changed` if it does not match `if_match`, a
        valid If-Match header.
        """
        values = changes.model_dump(exclude_unset=True)
        record = self._update_one(session, row_id, values, self._versions(if_match))
        if record is None:
            raise self._not_written(session, row_id, if_match)
        return record

    def _update_one(
        self, session: Session, row_id: int, values: dict[str, Any], versions: dict[str, Any]
    ) -> Record | None:
        parameters = {f"new_{name}": value for name, value in values.items()}
        parameters |= versions | {"row_id": row_id}
        statement = self._update_statement(frozenset(values), bool(versions))
        records = self._records(session, statement, parameters)
        return records[0] if records else None

    def delete(self, session: Session, row_id: int, if_match: str | None) -> None:
        """Delete the row. Raises the same errors as `update`."""
        parameters = self._versions(if_match) | {"row_id": row_id}
        statement = self._delete_statement("versions" in parameters)
        if not session.connection().execute(statement, parameters).rowcount:
            raise self._not_written(session, row_id, if_match)

    def update_many(
        self, session: Session, items: Sequence[tuple[int, SQLModel]]
    ) -> Sequence[Record | None]:
        """Write the set members of each item's changes, and return the rows in the same order.

        Returns None for a row that was not written, because it does not exist, another transaction
        has locked it, or an earlier item changes it too. So no call waits for another call's lock,
        and batches cannot deadlock. Call `update` for these. A single item is as `update`.
        """
        if len(items) == 1:
            [(row_id, model)] = items
            return [self._update_one(session, row_id, model.model_dump(exclude_unset=True), {})]
        changes: dict[int, dict[str, Any]] = {}
        for row_id, model in items:
            changes.setdefault(row_id, model.model_dump(exclude_unset=True))
        names = frozenset(name for change in changes.values() for name in change)
        optional = frozenset(
            name for name in names if not all(name in change for change in changes.values())
        )
        batch = self._update_batch(session.get_bind().dialect, names, optional)
        if batch is None:
            return [None] * len(items)
        rows = []
        for row_id, change in changes.items():
            row = {"row_id": row_id} | {f"new_{name}": value for name, value in change.items()}
            row |= {f"has_{name}": name in change for name in optional}
            rows.append(row)
        records = self._records(session, batch, {"rows": _json(rows)})
        found = {record.id: record for record in records}
        return [found.pop(row_id, None) for row_id, _ in items]

    def delete_many(self, session: Session, ids: Sequence[int]) -> Sequence[bool]:
        """Delete the rows. Returns False for each row that `update_many` would not write."""
        batch = self._delete_batch(session.get_bind().dialect)
        if batch is None:
            return [False] * len(ids)
        parameters = {"rows": _json([{"row_id": row_id} for row_id in set(ids)])}
        deleted = {row[0]: True for row in fetch(session, batch, parameters)}
        return [deleted.pop(row_id, False) for row_id in ids]

    def not_found(self) -> NotFound:
        """Return the error for an id without a row."""
        return NotFound(f"{self.name} not found")

    def cursor(self, row: Public, sort: str) -> Cursor:
        """Return the cursor of the page that follows this row."""
        value = row[self.orders[sort].column.name]
        is_long = isinstance(value, str) and len(value) > MAX_TEXT_LENGTH
        return Cursor(sort, LOOK_UP if is_long else value, row["id"])

    def _can_list_together(self, session: Session, sort: str, position: Position) -> bool:
        """Return whether `_list_same` can read such pages: each is one range of an index."""
        order = self.orders[sort]
        is_range = position == "start" or order.by_id or not order.column.nullable
        is_postgresql = session.get_bind().dialect.name == "postgresql"
        return is_range and position != "after row" and is_postgresql

    def _order(self, key: str) -> Order:
        name = key.removeprefix("-")
        values: TypeAdapter[Any] = TypeAdapter(
            plain_type(self.public.model_fields[name].annotation)
        )
        return Order(key, self.table.c[name], key.startswith("-"), values)

    def _page_parameters(self, page: Page) -> dict[str, Any]:
        if page.after is None:
            return {"limit": page.limit, "offset": page.offset}
        return {"limit": page.limit, "after_value": page.after.value, "after_id": page.after.id}

    def _versions(self, if_match: str | None) -> dict[str, Any]:
        versions = None if if_match is None else etags.versions(if_match)
        return {} if versions is None else {"versions": list(versions)}

    def _not_written(self, session: Session, row_id: int, if_match: str | None) -> Exception:
        """Return the reason why no row was written. It takes a second statement."""
        if if_match is None or not self.get(session, row_id):
            return self.not_found()
        return Changed(f"The {self.name.lower()} has changed")

    def _records(self, session: Session, statement: Any, parameters: Any) -> Records:
        return self._to_records(fetch(session, statement, parameters))

    def _to_records(self, rows: Sequence[Any]) -> Records:
        id_index = self._id_index
        public_rows = zip(rows, self._public_rows(rows), strict=True)
        return [Record(row[id_index], row[-1], public) for row, public in public_rows]

    def _public_rows(self, rows: Sequence[Any]) -> Rows:
        """Return the public columns, which come first. This is faster than a comprehension."""
        return list(map(dict, map(zip, repeat(self.names), rows)))

    def _build_list(self, sort: str, filters: frozenset[str], position: Position) -> sa.Select[Any]:
        rows = sa.select(*self.public_columns).where(*(self.filters[name] for name in filters))
        return page_statement(rows, self.table, self.orders[sort], position)

    def _build_pages(self, sort: str, position: Position) -> sa.Select[Any]:
        page = self._build_list(sort, frozenset(), position)
        return pages_statement(page, self.orders[sort])

    def _build_count(self, filters: frozenset[str]) -> sa.Select[Any]:
        conditions = (self.filters[name] for name in filters)
        return sa.select(sa.func.count()).select_from(self.table).where(*conditions)

    def _build_update(
        self, names: frozenset[str], has_versions: bool
    ) -> sa.Select[Any] | sa.Update:
        conditions = self._conditions(has_versions)
        if not names:
            return self._select.where(*conditions)
        values: dict[str, Any] = {
            name: sa.bindparam(f"new_{name}", type_=self.table.c[name].type) for name in names
        }
        values["version"] = self.table.c.version + 1
        return self._update.where(*conditions).values(values)

    def _build_delete(self, has_versions: bool) -> sa.Delete:
        return sa.delete(self.table).where(*self._conditions(has_versions))

    def _can_batch(self, dialect: sa.Dialect, names: Iterable[str]) -> bool:
        """Return whether one statement can write these columns of many rows, by JSON.

        It cannot on SQLite, or if JSON may have another value than psycopg sends: of a time without
        a zone, or of a type that SQLAlchemy converts, such as an enumeration.
        """
        return dialect.name == "postgresql" and all(
            self._has_json_form(name, dialect) for name in names
        )

    def _has_json_form(self, name: str, dialect: sa.Dialect) -> bool:
        kind: Any = self.table.c[name].type
        value = plain_type(self.model.model_fields[name].annotation)
        wrapped = getattr(kind, "impl_instance", kind)  # SQLModel's type wraps SQLAlchemy's.
        return (
            isinstance(wrapped, _JSON_TYPES.get(value, ()))
            and getattr(kind, "timezone", True)
            and not is_converted(kind, dialect)
        )

    def _lock(self, columns: Mapping[str, Any]) -> sa.CTE:
        """Return the given rows that exist. They are locked, or left out if others lock them."""
        given = _recordset({"row_id": sa.BigInteger(), **columns})
        row_id = self.table.c.id
        return (
            sa.select(*given.c)
            .select_from(given.join(self.table, row_id == given.c.row_id))
            .order_by(row_id)
            .with_for_update(of=self.table, skip_locked=True)
            .cte("locked")
        )

    def _build_insert_one(self) -> sa.Insert | None:
        """Return None if only SQLAlchemy can give a column its default: a Python function."""
        names = sorted(self.create_model.model_fields)
        others = [column for column in self.table.c if column.name not in names]
        if any(column.default and not column.server_default for column in others):
            return None
        values = [sa.bindparam(name, type_=self.table.c[name].type) for name in names]
        return self._insert.from_select(names, sa.select(*values), include_defaults=False)

    def _build_insert_batch(self, dialect: sa.Dialect) -> sa.Insert | None:
        names = sorted(self.create_model.model_fields)
        if self._insert_one is None or not self._can_batch(dialect, names):
            return None
        given = _recordset({name: self.table.c[name].type for name in names})
        return self._insert.from_select(names, sa.select(*given.c), include_defaults=False)

    def _build_update_batch(
        self, dialect: sa.Dialect, names: frozenset[str], optional: frozenset[str]
    ) -> sa.Update | None:
        """Return the statement that writes these columns. Not every row has the optional ones."""
        if not self._can_batch(dialect, names):
            return None
        columns: dict[str, Any] = {f"new_{name}": self.table.c[name].type for name in sorted(names)}
        columns |= {f"has_{name}": sa.Boolean() for name in sorted(optional)}
        locked = self._lock(columns)
        values: dict[str, Any] = {name: locked.c[f"new_{name}"] for name in names}
        for name in optional:
            has = locked.c[f"has_{name}"]
            values[name] = sa.case((has, values[name]), else_=self.table.c[name])
        values["version"] = self.table.c.version + 1
        return self._update.where(self.table.c.id == locked.c.row_id).values(values)

    def _build_delete_batch(self, dialect: sa.Dialect) -> sa.sql.dml.ReturningDelete[Any] | None:
        if not self._can_batch(dialect, ()):
            return None
        row_id = self.table.c.id
        condition = row_id == self._lock({}).c.row_id
        return sa.delete(self.table).where(condition).returning(row_id)

    def _conditions(self, has_versions: bool) -> Sequence[sa.ColumnElement[bool]]:
        return [self._has_id, self._has_version] if has_versions else [self._has_id]


def _recordset(columns: Mapping[str, Any]) -> sa.TableValuedAlias:
    """Return the rows of the parameter `rows`, a JSON array of objects, as a table."""
    rows = sa.cast(sa.bindparam("rows", type_=sa.Text), sa.JSON)
    return (
        sa.func.json_to_recordset(rows)
        .table_valued(*(sa.column(name, kind) for name, kind in columns.items()), name="given")
        .render_derived(with_types=True)
    )


def _json(rows: Sequence[Mapping[str, Any]]) -> str:
    return to_json(rows, inf_nan_mode="strings").decode()


def _are_close(pages: Sequence[Page]) -> bool:
    """Return whether the range over all pages has at most twice as many rows as the pages."""
    start = min(page.offset for page in pages)
    end = max(page.offset + page.limit for page in pages)
    return end - start <= 2 * sum(page.limit for page in pages)


def plain_type(annotation: Any) -> Any:
    """Return a field's type without `Annotated` and without None: `int` for `Age | None`."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    types = [each for each in get_args(annotation) if each is not NoneType]
    return plain_type(types[0]) if NoneType in get_args(annotation) else annotation
