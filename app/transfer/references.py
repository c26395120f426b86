"""Rows of an import that refer to missing rows of other tables."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlmodel import Session

from app.db.admission import reads
from app.db.crud import Crud
from app.errors import LineError
from app.transfer.formats import MAX_ERRORS, Row

_BATCH_SIZE = 1000


@reads
def find_unknown_references(
    session: Session, crud: Crud[Any], rows: Iterator[tuple[int, Row]]
) -> list[LineError]:
    """Return the first `MAX_ERRORS` values of foreign keys without a row. The rows have lines.

    The database refuses such an import without the line, and checks only after the last row.
    """
    keys = [
        (column.name, key.column)
        for column in crud.table.columns
        for key in column.foreign_keys
        if column.name in crud.create_model.model_fields
    ]
    errors: list[LineError] = []
    while len(errors) < MAX_ERRORS and (batch := list(islice(rows, _BATCH_SIZE))):
        for name, target in keys:
            given = {row[name] for _, row in batch} - {None}
            known = set(session.connection().scalars(sa.select(target).where(target.in_(given))))
            unknown = given - known
            message = f"Should be the id of an existing {target.table.name}"
            errors += [
                LineError(line, name, "foreign_key", message)
                for line, row in batch
                if row[name] in unknown
            ]
    return sorted(errors)[:MAX_ERRORS]
