"""Changes of single rows, as a part of a batch where that is possible."""

from typing import Any

from sqlmodel import SQLModel

from app.db.crud import Crud, Record
from app.db.database import Database


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
