"""Many rows into and out of a table: COPY on PostgreSQL, batches on SQLite."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_
from sqlmodel import Session

from app.db.crud import Crud
from app.transfer.formats import Format, encode_rows

_BATCH_SIZE = 1000


def load(session: Session, crud: Crud[Any], rows: Iterable[dict[str, Any]]) -> int:
    """Insert the rows and return their number. Must run in a transaction.

    A row has a value for each field of the crud's create model. Raises the errors of the iteration,
    and `DBAPIError`.
    """
    driver: Any = session.connection().connection.driver_connection
    if isinstance(driver, psycopg.AsyncConnection | psycopg.Connection):
        columns = [crud.table.c[name] for name in crud.create_model.model_fields]
        statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
            sql.Identifier(*filter(None, [crud.table.schema, crud.table.name])),
            sql.SQL(", ").join(sql.Identifier(column.name) for column in columns),
        )
        values = _driver_values(session, columns, rows)
        with _as_dbapi_error():
            if isinstance(driver, psycopg.Connection):
                return _copy(driver, statement, values)
            return int(await_(_copy_in_turns(driver, statement, values)))
    count = 0
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH_SIZE)):
        session.connection().execute(sa.insert(crud.table), batch)
        count += len(batch)
    return count


def _driver_values(
    session: Session, columns: Sequence[sa.Column[Any]], rows: Iterable[dict[str, Any]]
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

    Must run in a transaction.
    """
    rows = sa.select(*crud.public_columns).order_by(crud.table.c.id)
    connection = session.connection().execution_options(stream_results=True)
    for batch in connection.execute(rows).partitions(_BATCH_SIZE):
        found = (dict(zip(crud.names, row, strict=True)) for row in batch)
        yield len(batch), encode_rows(found, crud.names, file_format, header=False)
