"""NDJSON (a JSON object per line) and CSV (RFC 4180, with a header line), in UTF-8. Pure.

Both are streamed: only a few rows are in memory.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import NoneType
from typing import IO, Annotated, Any, Literal, NotRequired, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json, to_jsonable_python
from sqlmodel import SQLModel
from typing_extensions import TypedDict

from app.db.crud import plain_type
from app.errors import ImportRefused, ImportTooLarge, LineError

Format = Literal["ndjson", "csv"]
Row = dict[str, Any]

MAX_ERRORS = 100
# Of a line of NDJSON or a record of CSV: the same limit as for the body of a create.
MAX_LINE_BYTES = 64 * 1024


def read_rows(
    model: type[SQLModel],
    file: IO[bytes],
    file_format: Format,
    *,
    gzipped: bool = False,
    max_bytes: int | None = None,
) -> Iterator[Row]:
    """Return the rows of `read_numbered_rows` without their lines."""
    options: dict[str, Any] = {"gzipped": gzipped, "max_bytes": max_bytes}
    return (row for _, row in read_numbered_rows(model, file, file_format, **options))


def read_numbered_rows(
    model: type[SQLModel],
    file: IO[bytes],
    file_format: Format,
    *,
    gzipped: bool = False,
    max_bytes: int | None = None,
) -> Iterator[tuple[int, Row]]:
    """Return the rows in the file, validated as the model validates the body of a create.

    Each has the number of its line.

    After a wrong line no more rows are returned, and the rest of the file is read for more errors.
    Raises `ImportRefused` with the first `MAX_ERRORS`, and `ImportTooLarge` if the file has more
    than `max_bytes`, counted after decompression.
    """
    errors: list[LineError] = []
    lines = _Lines(gzip.GzipFile(fileobj=file, mode="rb") if gzipped else file, max_bytes)
    try:
        for row in (_read_csv if file_format == "csv" else _read_ndjson)(lines, _reader(model)):
            if isinstance(row, list):
                errors += row
                if len(errors) >= MAX_ERRORS:
                    break
            elif not errors:
                yield lines.start, row
    except _Unreadable as unreadable:
        errors += unreadable.errors
    if errors:
        raise ImportRefused(errors[:MAX_ERRORS])


def encode_rows(
    rows: Iterable[Mapping[str, Any]], names: Sequence[str], file_format: Format, *, header: bool
) -> bytes:
    """Return the rows as lines. CSV starts with its header line if `header` is set."""
    if file_format == "ndjson":
        return b"".join(to_json(row, inf_nan_mode="null") + b"\n" for row in rows)
    names = sorted(names, key=lambda name: name != "id")  # The id is the first column.
    text = io.StringIO()
    writer = csv.writer(text)
    if header:
        writer.writerow(names)
    # The same texts as in JSON, without quotes. Null is an empty field.
    for values in to_jsonable_python([[row[name] for name in names] for row in rows]):
        writer.writerow([_BOOLEANS[value] if type(value) is bool else value for value in values])
    return text.getvalue().encode()


_BOOLEANS = {True: "true", False: "false"}


class _Reader:
    """Validates lines as rows of one model."""

    def __init__(self, model: type[SQLModel]) -> None:
        self.fields = model.model_fields
        self.required = [name for name, field in self.fields.items() if field.is_required()]
        annotations = {name: field.annotation for name, field in self.fields.items()}
        self._integers = {name for name in annotations if plain_type(annotations[name]) is int}
        self._nullable = {name for name in annotations if NoneType in get_args(annotations[name])}
        decorators = model.__pydantic_decorators__
        # A model with validators of its own must run them. Otherwise a dictionary with the types of
        # the fields is four times as fast.
        self._is_model = bool(decorators.field_validators or decorators.model_validators)
        self._adapter: TypeAdapter[Any] = TypeAdapter(model if self._is_model else _as_dict(model))

    def from_json(self, line: int, text: bytes) -> Row | list[LineError]:
        return self._validated(line, self._adapter.validate_json, text)

    def from_csv(self, line: int, record: Mapping[str, str]) -> Row | list[LineError]:
        values = {name: self._value(name, record[name]) for name in self.fields if name in record}
        return self._validated(line, self._adapter.validate_python, values)

    def _value(self, name: str, text: str) -> str | int | None:
        """Return the field of a CSV record: null if it is empty, or an integer, or else text."""
        if not text and name in self._nullable:
            return None
        # pydantic would also accept "1_0" and digits of other scripts. More digits than those of an
        # int8 stay a text, which is refused.
        is_integer = name in self._integers and _INTEGER.fullmatch(text)
        return int(text) if is_integer else text

    def _validated(
        self, line: int, validate: Callable[[Any], Any], value: Any
    ) -> Row | list[LineError]:
        try:
            row = validate(value)
        except ValidationError as error:
            return [
                LineError(
                    line,
                    str(wrong["loc"][0]) if wrong["loc"] else None,
                    wrong["type"],
                    # The object starts at line 1, but not of the file.
                    wrong["msg"].replace("at line 1 column", "at column"),
                )
                for wrong in error.errors(
                    include_url=False, include_context=False, include_input=False
                )
            ]
        if self._is_model:
            return dict(row.model_dump())
        found: Row = row
        for name in self.fields.keys() - found.keys():
            found[name] = self.fields[name].get_default(call_default_factory=True)
        return found


_reader = cache(_Reader)
_INTEGER = re.compile(r"-?[0-9]{1,19}")


def _as_dict(model: type[SQLModel]) -> Any:
    """Return a TypedDict with the fields of the model."""
    types: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        # The second None only completes the subscript: pydantic ignores it.
        annotation = Annotated[(field.annotation, *field.metadata, None)]  # type: ignore[name-defined]
        types[name] = annotation if field.is_required() else NotRequired[annotation]
    return TypedDict(model.__name__, types)  # type: ignore[operator]


class _Unreadable(Exception):
    """The rest of the file cannot be divided into rows."""

    def __init__(self, line: int, kind: str, message: str, *fields: str) -> None:
        self.errors = [LineError(line, field, kind, message) for field in fields or (None,)]


class _Lines:
    """The lines of a file, counted, with a limit on the file and on each line."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, max_bytes: int | None) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._size = 0
        self.number = 0
        self.start = 0  # The first line of the current row.

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return a line with its end, or the first `MAX_LINE_BYTES` + 1 bytes of a longer line."""
        line = self._read()
        if not line:
            raise StopIteration
        self.number += 1
        # Spreadsheets start UTF-8 with a byte order mark.
        return line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line

    def skip_rest_of_line(self) -> None:
        """Go to the end of a line that is too long."""
        while (part := self._read()) and not part.endswith(b"\n"):
            pass

    def _read(self) -> bytes:
        try:
            part = self._file.readline(MAX_LINE_BYTES + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise _Unreadable(self.number + 1, "gzip", "Should be complete gzip") from None
        self._size += len(part)
        if self._max_bytes is not None and self._size > self._max_bytes:
            raise ImportTooLarge
        return part


_TOO_LONG = f"Should have at most {MAX_LINE_BYTES} bytes"


def _read_ndjson(lines: _Lines, reader: _Reader) -> Iterator[Row | list[LineError]]:
    # A few blank lines are an error only if another line follows. Many would keep the event loop
    # busy without a row.
    blank: list[LineError] = []
    for line in lines:
        if is_blank := len(line) <= MAX_LINE_BYTES and not line.strip():
            blank.append(LineError(lines.number, None, "blank", "Should not be blank"))
        if blank and (len(blank) == MAX_ERRORS or not is_blank):
            yield blank
            blank = []
        if is_blank:
            continue
        if len(line) <= MAX_LINE_BYTES:
            lines.start = lines.number
            yield reader.from_json(lines.number, line)
            continue
        if not line.endswith(b"\n"):
            lines.skip_rest_of_line()
        yield [LineError(lines.number, None, "too_long", _TOO_LONG)]


def _read_csv(lines: _Lines, reader: _Reader) -> Iterator[Row | list[LineError]]:
    size = 0

    def text() -> Iterator[str]:
        nonlocal size
        for line in lines:
            size += len(line)
            if size > MAX_LINE_BYTES:
                raise _Unreadable(lines.start, "too_long", _TOO_LONG)
            try:
                yield line.decode()
            except UnicodeDecodeError:
                raise _Unreadable(lines.number, "unicode", "Should be UTF-8") from None

    records = csv.reader(text(), strict=True)
    header: list[str] | None = None
    while True:
        lines.start, size = lines.number + 1, 0  # A record may have several lines.
        try:
            record = next(records, None)
        except csv.Error as error:
            raise _Unreadable(lines.start, "csv", f"Should be CSV: {error}") from None
        if header is None:
            header = record or []
            _check_header(header, reader)
        elif record is None:
            return
        elif len(record) != len(header):
            message = f"Should have {len(header)} fields like the header, not {len(record)}"
            yield [LineError(lines.start, None, "fields", message)]
        else:
            yield reader.from_csv(lines.start, dict(zip(header, record, strict=True)))


def _check_header(header: list[str], reader: _Reader) -> None:
    if missing := [name for name in reader.required if name not in header]:
        raise _Unreadable(1, "missing", "Should be a column of the header line", *missing)
    if repeated := [name for name in reader.fields if header.count(name) > 1]:
        raise _Unreadable(1, "repeated", "Should be one column", *repeated)
