"""Operations on a table, as a part of a batch where that is possible."""

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
        record = await database.run_batched(crud.update_many, (row_id, changes))
        if record:
            return record
    return await database.run(crud.update, row_id, changes, if_match)


async def delete_row(
    database: Database, crud: Crud[Any], row_id: int, if_match: str | None
) -> None:
    """Delete a row in a batch, or alone with If-Match or if it is locked. As `Crud.delete`."""
    if if_match is None and await database.run_batched(crud.delete_many, row_id):
        return
    await database.run(crud.delete, row_id, if_match)


async def list_rows(database: Database, crud: Crud[Any], page: Page) -> Rows:
    """Return the rows of a page, in a batch if it is a short range of an index. As `Crud.list`."""
    if page.offset <= _MAX_BATCHED_OFFSET and not page.filters:
        return await database.run_batched(crud.list_many, page)
    return await database.run(crud.list, page)
