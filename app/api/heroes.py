"""The routes of heroes: the tutorial's five, import and export."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, model_validator

from app.api import bulk
from app.api.auth import WriteAccess
from app.api.openapi import Deleted
from app.api.parameters import (
    DatabaseDep,
    IdempotencyKey,
    IfMatch,
    IfNoneMatch,
    PageQuery,
    RowId,
    invalid,
    page_of,
)
from app.api.responses import create_once, created, many, one
from app.base import INT4_MAX, Text
from app.db.operations import delete_row, list_rows, update_row
from app.heroes import HeroSort, heroes
from app.models import HeroCreate, HeroPublic, HeroUpdate

router = APIRouter(prefix="/heroes", tags=["heroes"])

_Years = Annotated[int, Field(ge=0, le=INT4_MAX)]


class HeroFilters(BaseModel):
    """The filters that a list and an export share."""

    name: Text | None = Field(None, description="Only heroes with exactly this name")
    age_min: _Years | None = Field(None, description="Only heroes of at least this age")
    age_max: _Years | None = Field(None, description="Only heroes of at most this age")

    @model_validator(mode="after")
    def _check_ages(self) -> "HeroFilters":
        if self.age_min is not None and self.age_max is not None and self.age_min > self.age_max:
            raise invalid("query", "age_min", "Should not be greater than age_max")
        return self


class HeroQuery(PageQuery, HeroFilters):
    """The query parameters of a list."""

    sort: HeroSort = Field("id", description="The sort key, with `-` for descending order")


class HeroExport(bulk.ExportQuery, HeroFilters):
    """The query parameters of an export."""


# The paths without a slash at the end respond in the same way, without a redirect.
@router.post(
    "/",
    response_model=HeroPublic,
    response_description="The new hero",
    dependencies=[WriteAccess],
)
@router.post("", include_in_schema=False, dependencies=[WriteAccess])
async def create_hero(
    request: Request,
    hero: HeroCreate,
    database: DatabaseDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Create a hero."""
    if idempotency_key is not None:
        return await create_once(request, database, heroes, hero, idempotency_key)
    return created(request, await database.run_batched(heroes.create_many, hero))


@router.get("/", response_model=list[HeroPublic], response_description="A page of heroes")
@router.get("", include_in_schema=False)
async def read_heroes(
    request: Request, database: DatabaseDep, query: Annotated[HeroQuery, Query()]
) -> Response:
    """List heroes in a total order, page by page."""
    page = page_of(request, heroes, query)
    rows = await list_rows(database, heroes, page)
    total = await database.run(heroes.count, page.filters) if query.total else None
    return many(request, heroes, page, rows, total)


@router.get("/export", **bulk.export_docs(HeroPublic))
async def export_heroes(
    request: Request, database: DatabaseDep, query: Annotated[HeroExport, Query()]
) -> Response:
    """Stream all heroes that match, ordered by id."""
    return await bulk.export_rows(request, database, heroes, query)


@router.post("/import", **bulk.import_docs(HeroCreate), dependencies=[WriteAccess])
async def import_heroes(request: Request, database: DatabaseDep) -> Response:
    """Create all heroes of the body, or none."""
    return await bulk.import_rows(request, database, heroes)


@router.get("/{hero_id}", response_model=HeroPublic, response_description="The hero")
async def read_hero(
    hero_id: RowId, database: DatabaseDep, if_none_match: IfNoneMatch = None
) -> Response:
    """Get one hero."""
    row = await database.run_batched(heroes.get_many, hero_id)
    if row is None:
        raise heroes.not_found()
    return one(row, if_none_match)


@router.patch(
    "/{hero_id}",
    response_model=HeroPublic,
    response_description="The changed hero",
    dependencies=[WriteAccess],
)
async def update_hero(
    hero_id: RowId, hero: HeroUpdate, database: DatabaseDep, if_match: IfMatch = None
) -> Response:
    """Change the given members of a hero."""
    return one(await update_row(database, heroes, hero_id, hero, if_match))


@router.delete(
    "/{hero_id}",
    response_model=Deleted,
    response_description="The hero is deleted",
    dependencies=[WriteAccess],
)
async def delete_hero(
    hero_id: RowId, database: DatabaseDep, if_match: IfMatch = None
) -> dict[str, bool]:
    """Delete a hero."""
    await delete_row(database, heroes, hero_id, if_match)
    return {"ok": True}
