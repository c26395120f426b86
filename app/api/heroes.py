"""The tutorial's five operations."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse

from app import heroes
from app.api.dependencies import DatabaseDep, HeroId, each_query_parameter_once
from app.errors import HeroNotFound
from app.heroes import HeroRow
from app.models import INT8_MAX, HeroCreate, HeroPublic, HeroUpdate

# Apart, so that a token can be asked for writes alone.
reads = APIRouter(prefix="/heroes")
writes = APIRouter(prefix="/heroes")


def _public(row: HeroRow) -> dict[str, Any]:
    """The row as `HeroPublic` writes it.

    Responses are encoded from this directly. `response_model` is for the docs: run, it would
    validate and encode each row a second time, half of the cost of a small answer.
    """
    return {"name": row.name, "age": row.age, "id": row.id}


# Each path with and without the slash at its end, without a redirect; the first is the documented.
@writes.post("/", response_model=HeroPublic)
@writes.post("", include_in_schema=False)
async def create_hero(hero: HeroCreate, database: DatabaseDep) -> JSONResponse:
    row = await database.statement(heroes.create, hero)
    return JSONResponse(_public(row))


@reads.get("/", response_model=list[HeroPublic], dependencies=[Depends(each_query_parameter_once)])
@reads.get("", include_in_schema=False, dependencies=[Depends(each_query_parameter_once)])
async def read_heroes(
    database: DatabaseDep,
    offset: Annotated[int, Query(ge=0, le=INT8_MAX)] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
) -> JSONResponse:
    rows = await database.statement(heroes.read, offset, limit)
    return JSONResponse([_public(row) for row in rows])


@reads.get("/{hero_id}", response_model=HeroPublic)
async def read_hero(hero_id: HeroId, database: DatabaseDep) -> JSONResponse:
    row = await database.statement(heroes.get, hero_id)
    if not row:
        raise HeroNotFound
    return JSONResponse(_public(row))


@writes.patch("/{hero_id}", response_model=HeroPublic)
async def update_hero(hero_id: HeroId, hero: HeroUpdate, database: DatabaseDep) -> JSONResponse:
    row = await database.statement(heroes.change, hero_id, hero)
    if not row:
        raise HeroNotFound
    return JSONResponse(_public(row))


@writes.delete("/{hero_id}")
async def delete_hero(hero_id: HeroId, database: DatabaseDep) -> JSONResponse:
    if not await database.statement(heroes.remove, hero_id):
        raise HeroNotFound
    return JSONResponse({"ok": True})
