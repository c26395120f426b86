"""Many rows into and out of a table: COPY on PostgreSQL, batches on SQLite."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import Column, insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_
from sqlmodel import Session

from app.db.crud import Crud, plain_type
from app.transfer.formats import Format, csv_names, encode_rows

_BATCH_SIZE = 1000


def load(session: Session, crud: Crud[Any], rows: Iterable[dict[str, Any]]) -> int:
    """Insert the rows and return their number. Must run in a transaction.

    A row has a value for each field of the crud's create model. Raises the errors of the iteration,
    and `DBAPIError`.
    """
    driver: Any = session.connection().connection.driver_connection
    if isinstance(driver, psycopg.AsyncConnection | psycopg.Connection):
        columns = [crud.table.c[name] for name in crud.create_model.model_fields]
        statement = sql.SQL("COPY {} ({}) FROM STDIN").format(_table(crud), _list(columns))
        values = _driver_values(session, columns, rows)
        with _as_dbapi_error():
            if isinstance(driver, psycopg.Connection):
                return _copy(driver, statement, values)
            return int(await_(_copy_in_turns(driver, statement, values)))
    count = 0
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH_SIZE)):
        session.connection().execute(insert(crud.table), batch)
        count += len(batch)
    return count


def _driver_values(
    session: Session, columns: Sequence[Column[Any]], rows: Iterable[dict[str, Any]]
) -> Iterator[list[Any]]:
    """Return the rows as SQLAlchemy would pass them to the driver, in the order of the columns."""
    dialect = session.get_bind().dialect
    names = [column.name for column in columns]
    found = [column.type.dialect_impl(dialect).bind_processor(dialect) for column in columns]
    processors = [(index, process) for index, process in enumerate(found) if process]
    for row in rows:
        values = [row[name] for name in names]
        for index, process in processors:
            values[index] = process(values[index])
        yield values


def _copy(
    driver: psycopg.Connection[Any], statement: sql.Composed, rows: Iterable[Sequence[Any]]
) -> int:
    with driver.cursor() as cursor:
        with cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
        return cursor.rowcount


async def _copy_in_turns(
    driver: psycopg.AsyncConnection[Any], statement: sql.Composed, rows: Iterator[Sequence[Any]]
) -> int:
    """Copy in batches, and let the event loop run other tasks after each one."""
    async with driver.cursor() as cursor:
        async with cursor.copy(statement) as copy:
            while batch := list(islice(rows, _BATCH_SIZE)):
                for row in batch:
                    await copy.write_row(row)
                await asyncio.sleep(0)
        return cursor.rowcount


@contextmanager
def _as_dbapi_error() -> Iterator[None]:
    """Raise the driver's errors in the form in which SQLAlchemy raises them."""
    try:
        yield
    except psycopg.Error as error:
        raise DBAPIError("COPY", None, error, hide_parameters=True) from error


def dump(session: Session, crud: Crud[Any], file_format: Format) -> Iterator[tuple[int, bytes]]:
    """Return all rows by id, in one snapshot: batches of lines, each with its number of rows.

    Raises `DBAPIError`.
    """
    driver: Any = session.connection().connection.driver_connection
    # The server writes these types as `encode_rows` does, in a fraction of the time.
    is_simple = all(
        plain_type(field.annotation) in (int, str) for field in crud.public.model_fields.values()
    )
    if isinstance(driver, psycopg.Connection) and is_simple:
        with _as_dbapi_error():
            yield from _copy_out(driver, crud, file_format)
        return
    rows = select(*crud.public_columns).order_by(crud.table.c.id)
    streamed = session.connection().execution_options(stream_results=True).execute(rows)
    for batch in streamed.partitions(_BATCH_SIZE):
        lines = [dict(zip(crud.names, row, strict=True)) for row in batch]
        yield len(batch), encode_rows(lines, crud.names, file_format, header=False)


def _copy_out(
    driver: psycopg.Connection[Any], crud: Crud[Any], file_format: Format
) -> Iterator[tuple[int, bytes]]:
    names = csv_names(crud.names) if file_format == "csv" else crud.names
    rows = sql.SQL("SELECT {} FROM {} ORDER BY id").format(
        _list([crud.table.c[name] for name in names]), _table(crud)
    )
    if file_format == "csv":
        statement = sql.SQL("COPY ({}) TO STDOUT (FORMAT csv)").format(rows)
    else:
        statement = sql.SQL("COPY (SELECT row_to_json(row) FROM ({}) AS row) TO STDOUT").format(
            rows
        )
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        # `read` returns a line with its "\n", and nothing at the end. Any work per line would be a
        # third of the time of an export.
        while batch := list(islice(iter(copy.read, b""), _BATCH_SIZE)):
            lines = b"".join(batch)
            if file_format == "ndjson":
                # COPY doubles backslashes. JSON has escaped all other special characters.
                lines = lines.replace(b"\\\\", b"\\")
            elif lines.count(b"\n") == len(batch):
                lines = lines.replace(b"\n", b"\r\n")
            else:  # A line feed within a value stays as it is.
                lines = b"".join(bytes(line)[:-1] + b"\r\n" for line in batch)
            yield len(batch), lines


def _table(crud: Crud[Any]) -> sql.Identifier:
    return sql.Identifier(*filter(None, [crud.table.schema, crud.table.name]))


def _list(columns: Sequence[Column[Any]]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)
