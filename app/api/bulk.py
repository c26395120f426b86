"""Export and import of many rows, for the routes of any resource."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.api.middleware import MAX_IMPORT_BYTES
from app.api.parameters import check_single
from app.api.spools import SPOOL_TIMEOUT_SECONDS, SpooledResponse, open_spool
from app.db.crud import Crud, Rows
from app.db.database import Database
from app.db.engine import is_foreign_key_violation
from app.db.pagination import Page
from app.errors import ImportRefused
from app.transfer.copy import load
from app.transfer.formats import Format, encode_rows, read_numbered_rows, read_rows
from app.transfer.references import find_unknown_references

MEDIA_TYPES: dict[Format, str] = {
    "ndjson": "application/x-ndjson",
    "csv": "text/csv; charset=utf-8; header=present",
}
_FORMATS: dict[str, Format] = {
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "text/csv": "csv",
}
# The time to write the rows of an import, after the service has received all of them.
IMPORT_TIMEOUT_SECONDS = 300
_PAGE_SIZE = 1000


class ExportQuery(BaseModel):
    """The query parameters of an export. A resource adds its filters."""

    format: Format | None = Field(None, description="Overrides the Accept header")


class Imported(BaseModel):
    """The body of the response to an import."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"created": 1}]})

    created: int


async def export_rows(
    request: Request, database: Database, crud: Crud[Any], query: ExportQuery
) -> StreamingResponse:
    """Return a streamed response with all rows that match the filters, ordered by id.

    It reads page by page, so a slow client holds neither a connection nor a snapshot. A row that
    exists during the whole export appears exactly once.
    """
    check_single(request)
    file_format = query.format or _accepted_format(request.headers.get("accept", ""))
    filters = query.model_dump(include=set(crud.filters), exclude_none=True)
    page = Page(_PAGE_SIZE, filters=filters)
    # Before the response starts, so that an error still gets its status.
    rows = await database.run(crud.list, page)
    filename = f"{request.scope['path'].split('/')[-2]}.{file_format}"
    is_http10 = request.scope["http_version"] == "1.0"
    response_class = SpooledResponse if is_http10 else StreamingResponse
    return response_class(
        _lines(database, crud, page, rows, file_format),
        media_type=MEDIA_TYPES[file_format],
        headers={
            "Content-Disposition": f'attachment; filename="{filename}"',
            "Vary": "Accept",
        },
    )


async def _lines(
    database: Database, crud: Crud[Any], page: Page, rows: Rows, file_format: Format
) -> AsyncIterator[bytes]:
    yield encode_rows(rows, crud.names, file_format, header=True)
    while len(rows) == page.limit:
        page = page._replace(after=crud.cursor(rows[-1], page.sort))
        rows = await database.run(crud.list, page)
        yield encode_rows(rows, crud.names, file_format, header=False)


async def import_rows(request: Request, database: Database, crud: Crud[Any]) -> JSONResponse:
    """Create all rows of the body in one transaction.

    The body is stored in a file, and every line is checked, before a connection is used.
    Raises `HTTPException` for an unsupported type or an incomplete body, and `ImportRefused`
    for wrong lines.
    """
    file_format = _content_format(request.headers.get("content-type", ""))
    gzipped = _is_gzip(request.headers.get("content-encoding", "identity"))
    with open_spool() as spool:
        try:
            async with asyncio.timeout(SPOOL_TIMEOUT_SECONDS):
                async for chunk in request.stream():
                    spool.write(chunk)
        except ClientDisconnect:
            raise HTTPException(400, "The body ended early") from None
        except TimeoutError:
            detail = f"The body took longer than {SPOOL_TIMEOUT_SECONDS} seconds"
            raise HTTPException(408, detail, {"Connection": "close"}) from None
        content = (crud.create_model, spool, file_format)
        options: dict[str, Any] = {"gzipped": gzipped, "max_bytes": MAX_IMPORT_BYTES}
        in_transaction = partial(database.run_in_transaction, timeout=IMPORT_TIMEOUT_SECONDS)
        spool.seek(0)
        await asyncio.to_thread(deque, read_rows(*content, **options), 0)  # Checks every line.
        if await request.is_disconnected():
            raise HTTPException(400, "The client closed the connection")
        spool.seek(0)
        try:
            count = await in_transaction(load, crud, read_rows(*content, **options))
        except DBAPIError as error:
            if not is_foreign_key_violation(error.orig):
                raise
            spool.seek(0)
            rows = read_numbered_rows(*content, **options)
            if unknown := await in_transaction(find_unknown_references, crud, rows):
                raise ImportRefused(unknown) from error
            raise
    return JSONResponse({"created": count})


def export_docs(model: type[SQLModel]) -> dict[str, Any]:
    """Return the arguments for the decorator of an export of these rows."""
    return {
        "response_class": StreamingResponse,
        "response_description": "One line per row",
        "responses": {200: {"content": _contents(model)}},
    }


def import_docs(model: type[SQLModel]) -> dict[str, Any]:
    """Return the arguments for the decorator of an import of these rows."""
    encoding = {
        "name": "Content-Encoding",
        "in": "header",
        "description": "Whether the body is compressed",
        "schema": {"type": "string", "enum": ["gzip", "x-gzip", "identity"]},
    }
    body = {"required": True, "content": _contents(model)}
    return {
        "response_model": Imported,
        "response_description": "The number of new rows",
        "openapi_extra": {"parameters": [encoding], "requestBody": body},
    }


def _contents(model: type[SQLModel]) -> dict[str, Any]:
    """Return the example of the model in both formats."""
    [row] = model.model_json_schema()["examples"]
    names = [name for name in model.model_fields if name in row]
    return {
        MEDIA_TYPES[file_format].partition(";")[0]: {
            "schema": {"type": "string"},
            "example": encode_rows([row], names, file_format, header=True).decode(),
        }
        for file_format in MEDIA_TYPES
    }


def _accepted_format(accept: str) -> Format:
    """Return the format that the client prefers (RFC 9110, section 12.5.1), or NDJSON."""
    best: tuple[float, Format] = (0, "ndjson")
    for media_range in accept.split(","):
        media_type, parameters = _media_type(media_range)
        try:
            quality = float(parameters.get("q", "1"))
        except ValueError:
            continue
        if media_type in _FORMATS and quality > best[0]:
            best = (quality, _FORMATS[media_type])
    return best[1]


def _media_type(header: str) -> tuple[str, dict[str, str]]:
    media_type, *parameters = (part.strip() for part in header.lower().split(";"))
    pairs = (parameter.partition("=") for parameter in parameters)
    return media_type, {name: value.strip('"') for name, _, value in pairs}


def _content_format(content_type: str) -> Format:
    media_type, parameters = _media_type(content_type)
    if media_type not in _FORMATS:
        raise HTTPException(415, f"The Content-Type should be one of {', '.join(_FORMATS)}")
    if parameters.get("charset", "utf-8") not in ("utf-8", "utf8", "us-ascii"):
        raise HTTPException(415, "The charset should be utf-8")
    return _FORMATS[media_type]


def _is_gzip(content_encoding: str) -> bool:
    coding = content_encoding.strip().lower()
    if coding not in ("gzip", "x-gzip", "identity"):
        raise HTTPException(
            415, "The Content-Encoding should be gzip or identity", {"Accept-Encoding": "gzip"}
        )
    return coding in ("gzip", "x-gzip")
