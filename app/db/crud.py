"""The statements of one table: create, list, get, update and delete.

Each function runs one statement, so it is atomic and takes one round trip.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from types import NoneType
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, get_origin

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlmodel import Session, SQLModel

from app.db import etags
from app.db.admission import reads
from app.db.fetch import fetch
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
        array = sa.bindparam("ids", type_=sa.ARRAY(sa.BigInteger))
        json_array = sa.func.json_each(sa.bindparam("ids")).table_valued("value")
        self._select_by_array = self._select.where(row_id == sa.func.any(array))
        self._select_by_json = self._select.where(row_id.in_(sa.select(json_array.c.value)))
        # Clients choose filters and members: a limit keeps the caches small.
        self._list_statement = lru_cache(maxsize=256)(self._build_list)
        self._pages_statement = lru_cache(maxsize=256)(self._build_pages)
        self._count_statement = lru_cache(maxsize=256)(self._build_count)
        self._update_statement = lru_cache(maxsize=256)(self._build_update)
        self._delete_statement = lru_cache(maxsize=2)(self._build_delete)
        self._update_batch = lru_cache(maxsize=256)(self._build_update_batch)
        self._delete_batch = self._build_delete_batch()
        self._insert_batch = self._build_insert_batch()

    def create(self, session: Session, row: Create) -> Record:
        """Insert the row and return it with its id."""
        [record] = self.create_many(session, [row])
        return record

    def create_many(self, session: Session, rows: list[Create]) -> Records:
        """Insert the rows and return them in the same order."""
        values = [row.model_dump() for row in rows]
        names = frozenset(self.create_model.model_fields)
        if self._insert_batch is None or not self._can_batch(session, names):
            found = self._to_records(session.connection().execute(self._insert, values).all())
        else:
            columns = {name: [value[name] for value in values] for name in sorted(names)}
            found = self._records(session, self._insert_batch, columns)
        # The database gives out ids in the order of the rows, but may return them in another one.
        return sorted(found, key=_id)

    @reads
    def list(self, session: Session, page: Page) -> Rows:
        """Return the rows of the page, at most `page.limit`."""
        parameters = {**page.filters, **self._page_parameters(page)}
        statement = self._list_statement(page.sort, frozenset(page.filters), page.position)
        rows = fetch(session, statement, parameters)
        return [dict(zip(self.names, row, strict=True)) for row in rows]

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
            elif position == "start" and _is_dense(same):
                found |= self._list_range(session, same)
            elif self._can_list_together(session, sort, position):
                found |= self._list_same(session, same)
            else:
                found |= {page[:-1]: self.list(session, page) for page in same}
        return [found[page[:-1]] for page in pages]

    def _list_range(self, session: Session, pages: Sequence[Page]) -> dict[Any, Rows]:
        """Return the rows of pages that overlap: read each row once, and cut the range."""
        start = min(page.offset for page in pages)
        end = max(page.offset + page.limit for page in pages)
        rows = self.list(session, Page(end - start, start, pages[0].sort))
        return {page[:-1]: rows[page.offset - start :][: page.limit] for page in pages}

    def _list_same(self, session: Session, pages: Sequence[Page]) -> dict[Any, Rows]:
        """Return the rows of pages that differ only in their parameters, by one statement."""
        each = [self._page_parameters(page) for page in pages]
        parameters = {name: [values[name] for values in each] for name in each[0]}
        statement = self._pages_statement(pages[0].sort, pages[0].position)
        found: dict[Any, Rows] = {page[:-1]: [] for page in pages}
        rows_of = list(found.values())
        for row in fetch(session, statement, parameters):
            # The row ends with the number of its page, for which there is no name.
            rows_of[row[-1] - 1].append(dict(zip(self.names, row, strict=False)))
        return found

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
            records = self._records(session, self._select_by_array, {"ids": distinct})
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
        if not self._can_batch(session, names):
            return [None] * len(items)
        parameters: dict[str, list[Any]] = {"ids": list(changes)}
        optional = frozenset(
            name for name in names if not all(name in change for change in changes.values())
        )
        for name in names:
            parameters[f"new_{name}"] = [change.get(name) for change in changes.values()]
        for name in optional:
            parameters[f"has_{name}"] = [name in change for change in changes.values()]
        records = self._records(session, self._update_batch(names, optional), parameters)
        found = {record.id: record for record in records}
        return [found.pop(row_id, None) for row_id, _ in items]

    def delete_many(self, session: Session, ids: Sequence[int]) -> Sequence[bool]:
        """Delete the rows. Returns False for each row that `update_many` would not write."""
        if not self._can_batch(session, frozenset()):
            return [False] * len(ids)
        parameters = {"ids": list(set(ids))}
        deleted = {row[0]: True for row in fetch(session, self._delete_batch, parameters)}
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
        names, id_index = self.names, self._id_index
        # The row ends with the version, for which there is no name.
        return [Record(row[id_index], row[-1], dict(zip(names, row, strict=False))) for row in rows]

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

    def _can_batch(self, session: Session, names: frozenset[str]) -> bool:
        """Return whether one statement can change many rows: not on SQLite, which has no `unnest`.

        `unnest` would also take the arrays apart that are values of a column.
        """
        types = [self.table.c[name].type for name in names]
        is_scalar = not any(isinstance(each, sa.ARRAY | sa.JSON) for each in types)
        return is_scalar and session.get_bind().dialect.name == "postgresql"

    def _lock(self, columns: Mapping[str, Any]) -> sa.CTE:
        """Return the rows of the arrays whose ids exist. They are locked, or left out if locked."""
        given = _arrays(columns)
        row_id = self.table.c.id
        return (
            sa.select(*given.c)
            .select_from(given.join(self.table, row_id == given.c.ids))
            .order_by(row_id)
            .with_for_update(of=self.table, skip_locked=True)
            .cte("locked")
        )

    def _build_update_batch(self, names: frozenset[str], optional: frozenset[str]) -> sa.Update:
        """Return the statement that writes these columns. Not every row has the optional ones."""
        columns: dict[str, Any] = {"ids": sa.BigInteger()}
        columns |= {f"new_{name}": self.table.c[name].type for name in sorted(names)}
        columns |= {f"has_{name}": sa.Boolean() for name in sorted(optional)}
        locked = self._lock(columns)
        values: dict[str, Any] = {name: locked.c[f"new_{name}"] for name in names}
        for name in optional:
            has = locked.c[f"has_{name}"]
            values[name] = sa.case((has, values[name]), else_=self.table.c[name])
        values["version"] = self.table.c.version + 1
        return self._update.where(self.table.c.id == locked.c.ids).values(values)

    def _build_insert_batch(self) -> Any:
        """Return None if only SQLAlchemy can give a column its default: a Python function."""
        names = sorted(self.create_model.model_fields)
        others = [column for column in self.table.c if column.name not in names]
        if any(column.default and not column.server_default for column in others):
            return None
        given = _arrays({name: self.table.c[name].type for name in names})
        return self._insert.from_select(names, sa.select(*given.c), include_defaults=False)

    def _build_delete_batch(self) -> sa.sql.dml.ReturningDelete[Any]:
        locked = self._lock({"ids": sa.BigInteger()})
        row_id = self.table.c.id
        return sa.delete(self.table).where(row_id == locked.c.ids).returning(row_id)

    def _conditions(self, has_versions: bool) -> Sequence[sa.ColumnElement[bool]]:
        return [self._has_id, self._has_version] if has_versions else [self._has_id]


def _arrays(columns: Mapping[str, Any]) -> sa.TableValuedAlias:
    """Return a table whose columns are parameters, each an array of values of its type."""
    arrays = [sa.bindparam(name, type_=_array(kind)) for name, kind in columns.items()]
    return (
        sa.func.unnest(*arrays)
        .table_valued(*(sa.column(name, kind) for name, kind in columns.items()), name="given")
        .render_derived()
    )


def _is_dense(pages: Sequence[Page]) -> bool:
    """Return whether the range over all pages has no more rows than the pages together."""
    start = min(page.offset for page in pages)
    end = max(page.offset + page.limit for page in pages)
    return end - start <= sum(page.limit for page in pages)


def _array(kind: Any) -> sa.ARRAY[Any]:
    """Return the type of an array of these values. A cast to VARCHAR(5)[] would cut a text."""
    text = getattr(kind, "impl_instance", kind)  # SQLModel's type wraps that of SQLAlchemy.
    is_text = isinstance(text, sa.String) and not isinstance(text, sa.Enum)
    return sa.ARRAY(sa.String(collation=text.collation) if is_text else kind)


def plain_type(annotation: Any) -> Any:
    """Return a field's type without `Annotated` and without None: `int` for `Age | None`."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    types = [each for each in get_args(annotation) if each is not NoneType]
    return plain_type(types[0]) if NoneType in get_args(annotation) else annotation
