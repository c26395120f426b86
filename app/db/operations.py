"""Operations on a table, as a part of a batch where that is possible."""

import time
from typing import Any

from sqlmodel import SQLModel

from app.db.crud import Crud, Record, Rows
from app.db.database import Database
from app.db.pagination import Page

# The database reads and skips so many rows. A page at a greater offset would delay its batch.
_MAX_BATCHED_OFFSET = 1000


async def update_row(
    database: Database, crud: Crud[Any], row_id: int, changes: SQLModel, if_match: str | None
) -> Record:
    """Change a row in a batch, or alone with If-Match or if it is locked. As `Crud.update`."""
    if if_match is None and changes.model_fields_set:
        start = time.monotonic()
        record = await database.run_batched(crud.update_many, (row_id, changes))
        if record:
            return record
        timeout = _remaining(database, start)
        return await database.run(crud.update, row_id, changes, None, timeout=timeout)
    return await database.run(crud.update, row_id, changes, if_match)


async def delete_row(
    database: Database, crud: Crud[Any], row_id: int, if_match: str | None
) -> None:
    """Delete a row in a batch, or alone with If-Match or if it is locked. As `Crud.delete`."""
    if if_match is not None:
        await database.run(crud.delete, row_id, if_match)
        return
    start = time.monotonic()
    if not await database.run_batched(crud.delete_many, row_id):
        await database.run(crud.delete, row_id, None, timeout=_remaining(database, start))


async def list_rows(database: Database, crud: Crud[Any], page: Page) -> Rows:
    """Return the rows of a page, in a batch if it is a short range of an index. As `Crud.list`."""
    if page.offset <= _MAX_BATCHED_OFFSET and not page.filters:
        return await database.run_batched(crud.list_many, page)
    return await database.run(crud.list, page)


def _remaining(database: Database, start: float) -> float:
    """Return the rest of the time of a call: both of its parts together keep to the timeout."""
    return max(0.001, database.timeout - (time.monotonic() - start))
