"""Sort orders, cursors and the statements of pages (keyset pagination).

Every order ends with the id, so it is total. Rows without a value are last in ascending order and
first in descending order, as in PostgreSQL.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from sqlalchemy import (
    ARRAY,
    BigInteger,
    BindParameter,
    Column,
    Integer,
    Select,
    Table,
    bindparam,
    column,
    func,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.sql.visitors import replacement_traverse

# The ranges of PostgreSQL's integer and bigint.
INT4 = range(-(2**31), 2**31)
INT8 = range(-(2**63), 2**63)

# A cursor contains no longer text, or a Link could exceed the limit on the head of a request. The
# database then looks the value up, in the row with the cursor's id.
MAX_TEXT_LENGTH = 500
LOOK_UP = ()

Position = Literal["start", "after value", "after null", "after row"]


class Order(NamedTuple):
    """A sort key, parsed: `name`, or `-name` for descending order."""

    key: str
    column: Column[Any]
    descending: bool
    values: TypeAdapter[Any]  # Validates values of the column.

    @property
    def by_id(self) -> bool:
        """Whether the id is the only sort column."""
        return self.column.primary_key


class Cursor(NamedTuple):
    """The last row of a page: the value of its sort column, and its id."""

    sort: str
    value: Any
    id: int

    def __str__(self) -> str:
        """Return URL-safe base64 (RFC 4648) of a JSON array. Opaque to clients."""
        return base64.urlsafe_b64encode(to_json(self)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str, order: Order) -> Self:
        """Return the cursor of a page in this order.

        Cursors are not signed: a client may make one. Raises `ValueError` if the text is not a
        cursor, or a cursor of another order.
        """
        try:
            decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            sort, value, row_id = json.loads(decoded)
        except (binascii.Error, UnicodeError, ValueError, TypeError, RecursionError):
            raise ValueError("Not a cursor") from None
        if sort != order.key:
            raise ValueError("A cursor of another order")
        # bool is a subclass of int.
        if type(row_id) is not int or row_id not in INT8 or (order.by_id and value != row_id):
            raise ValueError("Not a cursor")
        return cls(sort, LOOK_UP if value == [] else _comparable(value, order), row_id)


def _comparable(value: object, order: Order) -> Any:
    """Return the JSON value as a value that the database can compare with the sort column."""
    if value is None and order.column.nullable:
        return None
    try:
        # Strict JSON: no string for a number or the reverse, but a string for a date.
        found = order.values.validate_json(json.dumps(value), strict=True)
        if isinstance(found, str):
            found.encode()  # Raises if there are lone surrogates.
    except (ValidationError, UnicodeEncodeError):
        raise ValueError("Not a cursor") from None
    integers = INT8 if isinstance(order.column.type, BigInteger) else INT4
    if (isinstance(found, int) and found not in integers) or (
        isinstance(found, str) and "\0" in found
    ):
        raise ValueError("Not a cursor")
    return found


class Page(NamedTuple):
    """A part of a table: which rows, in which order."""

    limit: int
    offset: int = 0
    sort: str = "id"
    after: Cursor | None = None
    filters: Mapping[str, Any] = MappingProxyType({})

    @property
    def position(self) -> Position:
        """Where the page starts."""
        if self.after is None:
            return "start"
        if self.after.value == LOOK_UP:
            return "after row"
        return "after null" if self.after.value is None else "after value"


def page_statement(
    rows: Select[Any], table: Table, order: Order, position: Position
) -> Select[Any]:
    """Return the statement of a page of the selected rows.

    Its parameters are `limit`, and `offset` at the start, or else `after_value` and `after_id`.
    After a cursor every page is a range of one index, at any depth of the list.
    """
    if position == "start":
        offset = bindparam("offset", type_=BigInteger)
        return _first_rows(rows, order, table.c).offset(offset)

    row_id: Column[Any] = table.c.id
    after_id = bindparam("after_id", type_=BigInteger)
    by_id = row_id < after_id if order.descending else row_id > after_id
    if order.by_id:
        return _first_rows(rows.where(by_id), order, table.c)

    column = order.column
    value: Any = bindparam("after_value", type_=column.type)
    if position == "after row":
        last = table.alias()
        value = select(last.c[column.name]).where(last.c.id == after_id).scalar_subquery()
    here, there = tuple_(column, row_id), tuple_(value, after_id)
    following = rows.where(here < there if order.descending else here > there)
    if position == "after null":
        following = rows.where(column.is_(None), by_id)
    # NULL is outside of the range above. If it comes next in this order, it is a second range, and
    # the page consists of the first rows of both.
    null_comes_later = order.descending == (position == "after null")
    if not (column.nullable and null_comes_later):
        return _first_rows(following, order, table.c)
    rest = rows.where(column.is_not(None) if order.descending else column.is_(None))
    ranges = (_first_rows(part, order, table.c).subquery().select() for part in (following, rest))
    both = union_all(*ranges).subquery()
    return _first_rows(both.select(), order, both.c)


def pages_statement(page: Select[Any], order: Order) -> Select[Any]:
    """Return the statement of many pages, with the number of its page after each row, from 1.

    `page` is the statement of one page. Each of its parameters becomes an array, with a value for
    each page. For PostgreSQL.
    """
    parameters = {name: bind.type for name, bind in page.compile().binds.items()}
    request = (
        func.unnest(*(bindparam(name, type_=ARRAY(kind)) for name, kind in parameters.items()))
        .table_valued(
            *(column(name, kind) for name, kind in parameters.items()), with_ordinality="number"
        )
        .render_derived()
    )

    def replace(element: Any, **_: Any) -> Any:
        return request.c[element.key] if isinstance(element, BindParameter) else None

    rows = cast("Select[Any]", replacement_traverse(page, {}, replace)).lateral()
    return (
        select(*rows.c, request.c.number)
        .select_from(request.join(rows, true()))
        .order_by(request.c.number, *_sort_keys(order, rows.c))
    )


def _first_rows(rows: Select[Any], order: Order, columns: Any) -> Select[Any]:
    return rows.order_by(*_sort_keys(order, columns)).limit(bindparam("limit", type_=Integer))


def _sort_keys(order: Order, columns: Any) -> list[Any]:
    keys = [columns[order.column.name], columns["id"]][order.by_id :]
    sorted_keys = [key.desc() if order.descending else key.asc() for key in keys]
    if order.column.nullable:  # SQLite's default differs from PostgreSQL's.
        first = sorted_keys[0]
        sorted_keys[0] = first.nulls_first() if order.descending else first.nulls_last()
    return sorted_keys
