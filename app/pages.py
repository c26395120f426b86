"""The orders of a list, and the cursors that say where in one a page ended. Pure.

Every order ends in the id, so that it is total. Heroes without an age are behind all others by
`age` and before them by `-age`, which is PostgreSQL's own place for NULL.
"""

import base64
import binascii
import json
from typing import Literal, NamedTuple, Self, get_args

Sort = Literal["id", "-id", "name", "-name", "age", "-age"]
SORTS: tuple[Sort, ...] = get_args(Sort)

# What the columns can be compared with.
_INT4 = range(-(2**31), 2**31)
_INT8 = range(-(2**63), 2**63)


class Cursor(NamedTuple):
    """The last hero of a page: the value that it was sorted by, and its id."""

    sort: Sort
    value: str | int | None
    id: int

    def __str__(self) -> str:
        """Opaque to clients: URL-safe base64 (RFC 4648) of JSON."""
        text = json.dumps(self, ensure_ascii=False, separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str, sort: Sort) -> Self:
        """The cursor of a page in this order.

        It is not signed: whoever makes one up gets a page that begins where they said. Raises
        `ValueError` for what is no cursor, or one of another order.
        """
        try:
            decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            of_sort, value, hero_id = json.loads(decoded)
        except (binascii.Error, UnicodeError, ValueError, TypeError, RecursionError):
            raise ValueError("Not a cursor") from None
        if of_sort != sort:
            raise ValueError("A cursor of another order") from None
        if not _is_int(hero_id, _INT8) or not _is_value(sort, value, hero_id):
            raise ValueError("Not a cursor")
        return cls(sort, value, hero_id)


def _is_int(value: object, bounds: range) -> bool:
    return type(value) is int and value in bounds  # Not bool, which is an int to isinstance().


def _is_value(sort: Sort, value: object, hero_id: int) -> bool:
    """Whether the database can compare the value with the column that is sorted by."""
    match sort.removeprefix("-"):
        case "id":
            return value == hero_id
        case "age":
            return value is None or _is_int(value, _INT4)
        case _:
            return isinstance(value, str) and "\0" not in value and _is_utf8(value)


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
