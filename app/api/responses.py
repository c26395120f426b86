"""Rows to responses: JSON, ETag, Location and Link."""

from typing import Any, TypeVar
from urllib.parse import urlencode

from fastapi import Request, Response
from pydantic_core import to_json
from sqlmodel import Session, SQLModel

from app.api.auth import principal
from app.api.parameters import invalid
from app.db import etags
from app.db.crud import Crud, Record, Rows
from app.db.database import Database
from app.db.idempotency import Key, StoredResponse, fingerprint, run_once
from app.db.pagination import Page
from app.errors import KeyReused

JSON = "application/json"
RowT = TypeVar("RowT", bound=SQLModel)


# Rows are encoded once and returned as a `Response`. `response_model` only documents them: FastAPI
# would validate and encode each row again, for half of the CPU time of a small response.
def one(record: Record, if_none_match: str | None = None) -> Response:
    """Return the response with this row, or 304 if the client has this version of it."""
    headers = {"ETag": etags.from_version(record.version)}
    if if_none_match is not None and etags.matches(if_none_match, record.version):
        return Response(status_code=304, headers=headers)
    return Response(_encode(record.public), headers=headers, media_type=JSON)


def created(request: Request, record: Record) -> Response:
    """Return the response to a create, with the Location of the new row."""
    headers = {
        "ETag": etags.from_version(record.version),
        "Location": f"{request.scope['path'].rstrip('/')}/{record.id}",
    }
    return Response(_encode(record.public), headers=headers, media_type=JSON)


def many(request: Request, crud: Crud[Any], page: Page, rows: Rows, total: int | None) -> Response:
    """Return the response with a page of rows. `rows` has one more if there is a next page.

    That row is not part of the response, which has a Link to the next page instead (RFC 8288).
    """
    headers = {}
    shown = rows[: page.limit - 1]
    if len(rows) > len(shown):
        # Without a host, which the client knows better than the service.
        query = [
            (name, value)
            for name, value in request.query_params.items()
            if name not in ("after", "offset")
        ]
        query.append(("after", str(crud.cursor(shown[-1], page.sort))))
        headers["Link"] = f'<{request.scope["path"]}?{urlencode(query)}>; rel="next"'
    if total is not None:
        headers["X-Total-Count"] = str(total)
    return Response(_encode(shown), headers=headers, media_type=JSON)


async def create_once(
    request: Request, database: Database, crud: Crud[RowT], row: RowT, key: str
) -> Response:
    """Create the row once per idempotency key, and return the response of the first request.

    A key belongs to a route and a token. Raises `RequestValidationError` if the key was used with
    another body.
    """

    def create(session: Session) -> StoredResponse:
        response = created(request, crud.create(session, row))
        headers = dict(response.headers)
        return StoredResponse(response.status_code, headers, bytes(response.body).decode())

    route = f"{request.method} {request.scope['route'].path.rstrip('/')}"
    scoped = Key(route, principal(request), key, fingerprint(await request.json()))
    try:
        stored, is_replay = await database.run_in_transaction(run_once, scoped, create)
    except KeyReused:
        raise invalid("header", "idempotency-key", "Was used with another body") from None
    response = Response(stored.body, stored.status, stored.headers)
    if is_replay:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _encode(value: Any) -> bytes:
    return to_json(value, inf_nan_mode="null")
