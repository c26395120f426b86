"""Many heroes at once: out by GET, in by POST."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app import heroes, transfer
from app.api import documentation
from app.api.bodies import IMPORT_LIMIT
from app.api.dependencies import (
    AgeMax,
    AgeMin,
    Name,
    check_ages,
    database,
    each_query_parameter_once,
)
from app.database import Database
from app.heroes import HeroRow, Listing
from app.pages import Cursor
from app.transfer import Format

# Apart, so that a token can be asked for writes alone.
reads = APIRouter(prefix="/heroes")
writes = APIRouter(prefix="/heroes")

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
# For how long the heroes of an import may be written, once all have come.
_SECONDS = 300
_IN_MEMORY = 1024**2
_PAGE = 1000


@reads.get(
    "/export",
    response_class=Response,
    **documentation.EXPORT,
)
async def export_heroes(
    request: Request,
    file_format: Annotated[
        Format | None, Query(alias="format", description="Goes before Accept")
    ] = None,
    name: Name = None,
    age_min: AgeMin = None,
    age_max: AgeMax = None,
) -> StreamingResponse:
    """All heroes that match, in the order of their ids.

    They are read page by page, so that a slow client holds neither a connection nor a snapshot:
    a hero that is there throughout is in it exactly once.
    """
    each_query_parameter_once(request)
    check_ages(age_min, age_max)
    file_format = file_format or _accepted(request.headers.get("accept", ""))
    listing = Listing(_PAGE, name=name, age_min=age_min, age_max=age_max)
    # Before the answer begins, so that an error can still be one.
    first = await database(request).statement(heroes.read, listing)
    return StreamingResponse(
        _pages(database(request), listing, first, file_format),
        media_type=MEDIA_TYPES[file_format],
        headers={
            "Content-Disposition": f'attachment; filename="heroes.{file_format}"',
            "Vary": "Accept",
        },
    )


async def _pages(
    from_: Database, listing: Listing, page: list[HeroRow], file_format: Format
) -> AsyncIterator[bytes]:
    yield transfer.encode(page, file_format, header=True)
    while len(page) == listing.limit:
        last = page[-1].id
        page = await from_.statement(heroes.read, listing._replace(after=Cursor("id", last, last)))
        yield transfer.encode(page, file_format, header=False)


def _accepted(accept: str) -> Format:
    """The one of the formats that the client prefers (RFC 9110, section 12.5.1), or NDJSON."""
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


@writes.post("/import", **documentation.IMPORT)
async def import_heroes(
    request: Request,
) -> JSONResponse:
    """Creates all heroes of the body, or none of them.

    The body is kept in a file until it is whole and every line of it was checked: neither a slow
    client nor a wrong line costs the database anything.
    """
    file_format = _format(request.headers.get("content-type", ""))
    gzipped = _gzipped(request.headers.get("content-encoding", "identity"))
    with SpooledTemporaryFile(_IN_MEMORY) as spool:
        try:
            async for chunk in request.stream():
                spool.write(chunk)
        except ClientDisconnect:
            raise HTTPException(400, "The body ended early") from None
        checked = partial(
            transfer.heroes_in, spool, file_format, gzipped=gzipped, at_most=IMPORT_LIMIT
        )
        spool.seek(0)
        await asyncio.to_thread(deque, checked(), 0)
        if await request.is_disconnected():
            raise HTTPException(400, "The client did not wait for the answer")
        spool.seek(0)
        created = await database(request).long_transaction(_SECONDS, transfer.load, checked())
    return JSONResponse({"created": created})


def _format(content_type: str) -> Format:
    media_type, parameters = _media_type(content_type)
    if media_type not in _FORMATS:
        raise HTTPException(415, f"The Content-Type should be one of {', '.join(_FORMATS)}")
    if parameters.get("charset", "utf-8") not in ("utf-8", "utf8", "us-ascii"):
        raise HTTPException(415, "The charset should be utf-8")
    return _FORMATS[media_type]


def _gzipped(content_encoding: str) -> bool:
    coding = content_encoding.strip().lower()
    if coding not in ("gzip", "x-gzip", "identity"):
        raise HTTPException(
            415, "The Content-Encoding should be gzip, or none", {"Accept-Encoding": "gzip"}
        )
    return coding in ("gzip", "x-gzip")
