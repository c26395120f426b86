"""The tutorial's five operations, and what clients need next: in headers and query parameters."""

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import StringConstraints

from app import etags, heroes, idempotency
from app.api import documentation
from app.api.dependencies import (
    AgeMax,
    AgeMin,
    HeroId,
    Name,
    check_ages,
    database,
    each_query_parameter_once,
    hero_reads,
)
from app.api.problems import invalid
from app.errors import HeroChanged, HeroNotFound, KeyReused
from app.heroes import HeroRow, Listing
from app.models import INT8_MAX, HeroCreate, HeroPublic, HeroUpdate
from app.pages import Cursor, Sort

# Apart, so that a token can be asked for writes alone.
reads = APIRouter(prefix="/heroes")
writes = APIRouter(prefix="/heroes")

_Tags = Annotated[str, StringConstraints(pattern=etags.LIST)]
IfMatch = Annotated[
    _Tags | None,
    Header(description="Only if the hero still has one of these ETags", examples=['"1"', "*"]),
]
IfNoneMatch = Annotated[
    _Tags | None,
    Header(description="Only if the hero has none of these ETags", examples=['"1"']),
]
_Key = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
IdempotencyKey = Annotated[
    _Key | None,
    Header(
        description="A create with the same key and body is made once, for 24 hours",
        examples=["8e03978e-40d5-43dd-bc93-6894a57f9324"],
    ),
]


# Answers are encoded once, from the rows, and returned as they are. `response_model` is for the
# docs: run, it would validate and encode each row again, half of the cost of a small answer.
def _one(row: HeroRow, **headers: str) -> Response:
    headers["ETag"] = etags.of_version(row.version)
    return Response(row.json(), headers=headers, media_type="application/json")


# Each path with and without the slash at its end, without a redirect; the first is the documented.
@writes.post("/", response_model=HeroPublic, **documentation.CREATE)
@writes.post("", include_in_schema=False)
async def create_hero(
    request: Request,
    hero: HeroCreate,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    headers = {}
    if idempotency_key is None:
        row = await database(request).statement(heroes.create, hero)
    else:
        try:
            row, replayed = await database(request).transaction(
                idempotency.create, idempotency_key, hero
            )
        except KeyReused:
            raise invalid("header", "idempotency-key", "Was used with another body") from None
        if replayed:
            headers["Idempotency-Replayed"] = "true"
    return _one(row, Location=f"{request.scope['root_path']}/heroes/{row.id}", **headers)


@reads.get(
    "/",
    response_model=list[HeroPublic],
    **documentation.LIST,
)
@reads.get("", include_in_schema=False)
async def read_heroes(
    request: Request,
    offset: Annotated[
        int, Query(ge=0, le=INT8_MAX, description="How many to skip; not with after")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=100, description="The most that a page has")] = 100,
    name: Name = None,
    age_min: AgeMin = None,
    age_max: AgeMax = None,
    sort: Annotated[Sort, Query(description="The order, which always ends in the id")] = "id",
    after: Annotated[
        str | None,
        Query(description="The cursor in the last page's Link", examples=["WyJpZCIsMiwyXQ"]),
    ] = None,
    total: Annotated[bool, Query(description="Count all pages in X-Total-Count")] = False,
) -> Response:
    each_query_parameter_once(request)
    check_ages(age_min, age_max)
    if after is not None and "offset" in request.query_params:
        raise invalid("query", "after", "Should not be given together with offset")
    cursor = _cursor(after, sort)
    # One more than the page has, to know whether there is another.
    listing = Listing(limit + 1, offset, sort, cursor, name, age_min, age_max)
    rows = await database(request).statement(heroes.read, listing)
    headers = {}
    if len(rows) > limit:
        headers["Link"] = f'<{_next(request, sort, rows[limit - 1])}>; rel="next"'
    if total:
        headers["X-Total-Count"] = str(await database(request).statement(heroes.count, listing))
    body = b",".join(row.json() for row in rows[:limit])
    return Response(b"[%b]" % body, headers=headers, media_type="application/json")


def _cursor(after: str | None, sort: Sort) -> Cursor | None:
    try:
        return None if after is None else Cursor.parse(after, sort)
    except ValueError as error:
        raise invalid("query", "after", str(error)) from None


def _next(request: Request, sort: Sort, last: HeroRow) -> str:
    """The same request for the page behind this hero. Without a host, which the client knows."""
    kept = [
        (name, value)
        for name, value in request.query_params.items()
        if name not in ("after", "offset")
    ]
    cursor = Cursor(sort, getattr(last, sort.removeprefix("-")), last.id)
    return f"{request.scope['path']}?{urlencode([*kept, ('after', str(cursor))])}"


@reads.get("/{hero_id}", response_model=HeroPublic, **documentation.READ)
async def read_hero(
    request: Request, hero_id: HeroId, if_none_match: IfNoneMatch = None
) -> Response:
    row = await hero_reads(request).get(hero_id)
    if not row:
        raise HeroNotFound
    if if_none_match is not None and etags.matches(if_none_match, row.version):
        return Response(status_code=304, headers={"ETag": etags.of_version(row.version)})
    return _one(row)


@writes.patch("/{hero_id}", response_model=HeroPublic, **documentation.UPDATE)
async def update_hero(
    request: Request, hero_id: HeroId, hero: HeroUpdate, if_match: IfMatch = None
) -> Response:
    row = await database(request).statement(heroes.change, hero_id, hero, _versions(if_match))
    if not row:
        raise await _why_not(request, hero_id, if_match)
    return _one(row)


@writes.delete("/{hero_id}", **documentation.DELETE)
async def delete_hero(request: Request, hero_id: HeroId, if_match: IfMatch = None) -> Response:
    if not await database(request).statement(heroes.remove, hero_id, _versions(if_match)):
        raise await _why_not(request, hero_id, if_match)
    return JSONResponse({"ok": True})


def _versions(if_match: str | None) -> frozenset[int] | None:
    return None if if_match is None else etags.versions(if_match)


async def _why_not(request: Request, hero_id: int, if_match: str | None) -> Exception:
    """Why nothing was written: there is no such hero, or it is not as the client knows it."""
    if if_match is None or not await database(request).statement(heroes.get, hero_id):
        return HeroNotFound()
    return HeroChanged()
