"""Import and export of many heroes, streamed: never more than a few of them are in memory.

The formats are NDJSON, a JSON object a line, and CSV (RFC 4180) with a header line, in UTF-8.
"""

import asyncio
import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, Literal, NotRequired

import psycopg
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_
from sqlmodel import Session, SQLModel, select
from typing_extensions import TypedDict

from app.errors import ImportRefused, ImportTooLong, LineError
from app.heroes import HeroRow
from app.models import Age, Hero, Text

Format = Literal["ndjson", "csv"]

MOST_ERRORS = 100
# Of a line of NDJSON or a record of CSV; the body of a create may be as long.
LONGEST = 64 * 1024
_BATCH = 1000


class NewHero(TypedDict):
    """What `HeroCreate` takes; as a dictionary it is checked five times as fast."""

    name: Text
    age: NotRequired[Age | None]
    secret_name: Text


_NEW_HERO = TypeAdapter(NewHero)
_COLUMNS = ("name", "age", "secret_name")
_hero = SQLModel.metadata.tables[str(Hero.__tablename__)]


def heroes_in(
    file: IO[bytes], file_format: Format, *, gzipped: bool = False, at_most: int | None = None
) -> Iterator[NewHero]:
    """The heroes in the file, each checked as the body of a create is.

    Once one was wrong, no more are returned, and the rest is read for more errors. Raises
    `ImportRefused` with the first `MOST_ERRORS` of them, and `ImportTooLong` where the file,
    decompressed, has over `at_most` bytes.
    """
    errors: list[LineError] = []
    lines = _Lines(gzip.GzipFile(fileobj=file, mode="rb") if gzipped else file, at_most)
    try:
        for hero in (_csv if file_format == "csv" else _ndjson)(lines):
            if isinstance(hero, list):
                errors += hero
                if len(errors) >= MOST_ERRORS:
                    break
            elif not errors:
                yield hero
    except _Unreadable as unreadable:
        errors += unreadable.errors
    if errors:
        raise ImportRefused(errors[:MOST_ERRORS])


class _Unreadable(Exception):
    """What comes behind this place cannot be told into heroes any more."""

    def __init__(self, line: int, kind: str, message: str, *fields: str) -> None:
        self.errors = [LineError(line, field, kind, message) for field in fields or (None,)]


class _Lines:
    """The lines of a file, counted, with a bound on the whole and on what is read at once."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, at_most: int | None) -> None:
        self._file = file
        self._at_most = at_most
        self._size = 0
        self.number = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """A line with its end, or the first `LONGEST` bytes and one more of a longer one."""
        line = self._read()
        if not line:
            raise StopIteration
        self.number += 1
        # Spreadsheets put a byte order mark in front of UTF-8.
        return line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line

    def skip_the_rest(self) -> None:
        """Goes to the end of the line that was too long."""
        while (part := self._read()) and not part.endswith(b"\n"):
            pass

    def _read(self) -> bytes:
        try:
            part = self._file.readline(LONGEST + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise _Unreadable(self.number + 1, "gzip", "Should be whole gzip") from None
        self._size += len(part)
        if self._at_most is not None and self._size > self._at_most:
            raise ImportTooLong
        return part


_TOO_LONG = f"Should have at most {LONGEST} bytes"


def _ndjson(lines: _Lines) -> Iterator[NewHero | list[LineError]]:
    for line in lines:
        if len(line) > LONGEST:
            if not line.endswith(b"\n"):
                lines.skip_the_rest()
            yield [LineError(lines.number, None, "too_long", _TOO_LONG)]
        elif not line.strip():
            yield [LineError(lines.number, None, "blank", "Should not be blank")]
        else:
            yield _checked(lines.number, line)


def _csv(lines: _Lines) -> Iterator[NewHero | list[LineError]]:
    start = size = 0

    def text() -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line)
            if size > LONGEST:
                raise _Unreadable(start, "too_long", _TOO_LONG)
            try:
                yield line.decode()
            except UnicodeDecodeError:
                raise _Unreadable(lines.number, "unicode", "Should be UTF-8") from None

    reader = csv.reader(text(), strict=True)
    header: list[str] | None = None
    while True:
        start, size = lines.number + 1, 0  # Where a record begins: it may have several lines.
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise _Unreadable(start, "csv", f"Should be CSV: {error}") from None
        if header is None:
            header = record or []
            _check_header(header)
        elif record is None:
            return
        elif len(record) != len(header):
            message = f"Should have {len(header)} fields, as the header has, not {len(record)}"
            yield [LineError(start, None, "fields", message)]
        else:
            fields = dict(zip(header, record, strict=True))
            hero: dict[str, object] = {name: fields[name] for name in _COLUMNS if name in fields}
            hero["age"] = _age(fields.get("age", ""))
            yield _checked(start, hero)


def _check_header(header: list[str]) -> None:
    if missing := [name for name in ("name", "secret_name") if name not in header]:
        raise _Unreadable(1, "missing", "Should be a column of the header line", *missing)
    if repeated := [name for name in _COLUMNS if header.count(name) > 1]:
        raise _Unreadable(1, "repeated", "Should be one column", *repeated)


def _age(field: str) -> int | str | None:
    """CSV has no numbers and no null: digits are the one, and an empty field is the other."""
    digits = field.removeprefix("-")
    # What has more digits than any integer of the database need not be understood to be refused.
    if digits.isascii() and digits.isdecimal() and len(digits) < 20:
        return int(field)
    return field or None


def _checked(line: int, hero: bytes | dict[str, object]) -> NewHero | list[LineError]:
    try:
        if isinstance(hero, bytes):
            return _NEW_HERO.validate_json(hero)
        return _NEW_HERO.validate_python(hero)
    except ValidationError as error:
        return [
            LineError(
                line,
                str(wrong["loc"][0]) if wrong["loc"] else None,
                wrong["type"],
                # The line is the import's, not the only one of the object.
                wrong["msg"].replace("at line 1 column", "at column"),
            )
            for wrong in error.errors(include_url=False, include_context=False, include_input=False)
        ]


def load(session: Session, heroes: Iterable[NewHero]) -> int:
    """Inserts the heroes and returns how many they were. To be run in a transaction.

    On PostgreSQL by COPY. Raises what the iteration raises, and `DBAPIError`.
    """
    rows = ((hero["name"], hero.get("age"), hero["secret_name"]) for hero in heroes)
    driver: Any = session.connection().connection.driver_connection
    if isinstance(driver, psycopg.AsyncConnection):
        with _as_sqlalchemy_raises():
            return int(await_(_copy_beside_others(driver, rows)))
    if isinstance(driver, psycopg.Connection):
        with _as_sqlalchemy_raises():
            return _copy(driver, rows)
    count = 0
    while batch := [dict(zip(_COLUMNS, row, strict=True)) for row in islice(rows, _BATCH)]:
        session.connection().execute(insert(_hero), batch)
        count += len(batch)
    return count


_COPY_IN = "COPY hero (name, age, secret_name) FROM STDIN"


def _copy(driver: psycopg.Connection[Any], rows: Iterable[tuple[Any, ...]]) -> int:
    with driver.cursor() as cursor:
        with cursor.copy(_COPY_IN) as copy:
            for row in rows:
                copy.write_row(row)
        return cursor.rowcount


async def _copy_beside_others(
    driver: psycopg.AsyncConnection[Any], rows: Iterator[tuple[Any, ...]]
) -> int:
    """The same on the event loop, which is left to others after each batch."""
    async with driver.cursor() as cursor:
        async with cursor.copy(_COPY_IN) as copy:
            while batch := list(islice(rows, _BATCH)):
                for row in batch:
                    await copy.write_row(row)
                await asyncio.sleep(0)
        return cursor.rowcount


@contextmanager
def _as_sqlalchemy_raises() -> Iterator[None]:
    """The errors of the driver, which is used directly here, as all other statements raise them."""
    try:
        yield
    except psycopg.Error as error:
        raise DBAPIError("COPY", None, error, hide_parameters=True) from error


def encode(heroes: Iterable[HeroRow], file_format: Format, *, header: bool) -> bytes:
    """The heroes as lines of this format, for CSV with its header line in front if asked for."""
    if file_format == "ndjson":
        return b"".join(hero.json() + b"\n" for hero in heroes)
    text = io.StringIO()
    writer = csv.writer(text)
    if header:
        writer.writerow(("id", "name", "age"))
    writer.writerows((hero.id, hero.name, hero.age) for hero in heroes)
    return text.getvalue().encode()


def dump(session: Session, file_format: Format) -> Iterator[tuple[int, bytes]]:
    """All heroes by id, as they are at one moment: some of them at a time, how many and the lines.

    On PostgreSQL by COPY, where the server encodes them. Raises `DBAPIError`.
    """
    driver: Any = session.connection().connection.driver_connection
    if isinstance(driver, psycopg.Connection):
        with _as_sqlalchemy_raises():
            yield from _copy_out(driver, file_format)
        return
    columns = (_hero.c[name] for name in HeroRow._fields)
    streamed = session.connection().execution_options(stream_results=True)
    for rows in streamed.execute(select(*columns).order_by(_hero.c.id)).partitions(_BATCH):
        yield len(rows), encode(map(HeroRow._make, rows), file_format, header=False)


_COPY_CSV = "COPY (SELECT id, name, age FROM hero ORDER BY id) TO STDOUT (FORMAT csv)"
_COPY_NDJSON = (
    "COPY (SELECT row_to_json(hero)"
    " FROM (SELECT name, age, id FROM hero ORDER BY id) AS hero) TO STDOUT"
)


def _copy_out(driver: psycopg.Connection[Any], file_format: Format) -> Iterator[tuple[int, bytes]]:
    statement = _COPY_CSV if file_format == "csv" else _COPY_NDJSON
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        # Each line with its end, which is "\n", until there is none. No work of ours on each of
        # them: that would be a third of the time.
        while batch := list(islice(iter(copy.read, b""), _BATCH)):
            lines = b"".join(batch)
            if file_format == "ndjson":
                # COPY doubles the backslashes; what else it would escape, JSON has escaped.
                lines = lines.replace(b"\\\\", b"\\")
            elif lines.count(b"\n") == len(batch):
                lines = lines.replace(b"\n", b"\r\n")
            else:  # The end of a line within a name stays what it is.
                lines = b"".join(bytes(line)[:-1] + b"\r\n" for line in batch)
            yield len(batch), lines
