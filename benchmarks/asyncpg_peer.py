"""The same API written by hand with FastAPI and asyncpg: no ORM and no production features."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import asyncpg
from fastapi import FastAPI, HTTPException, Query, Request
from pydantic import BaseModel


class HeroPublic(BaseModel):
    name: str
    age: int | None
    id: int


class HeroCreate(BaseModel):
    name: str
    age: int | None = None
    secret_name: str


class HeroUpdate(BaseModel):
    name: str | None = None
    age: int | None = None
    secret_name: str | None = None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    url, size = os.environ["DATABASE_URL"], int(os.environ["DATABASE_POOL_SIZE"])
    async with asyncpg.create_pool(url, min_size=size, max_size=size) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan, telemetry={"tracing": False, "metrics": False, "logs": False})


@app.post("/heroes/", response_model=HeroPublic)
async def create_hero(request: Request, hero: HeroCreate) -> dict[str, Any]:
    row = await request.app.state.pool.fetchrow(
        "INSERT INTO hero (name, age, secret_name) VALUES ($1, $2, $3) RETURNING id, name, age",
        hero.name,
        hero.age,
        hero.secret_name,
    )
    return dict(row)


@app.get("/heroes/", response_model=list[HeroPublic])
async def read_heroes(
    request: Request, offset: int = 0, limit: Annotated[int, Query(le=100)] = 100
) -> list[dict[str, Any]]:
    rows = await request.app.state.pool.fetch(
        "SELECT id, name, age FROM hero ORDER BY id OFFSET $1 LIMIT $2", offset, limit
    )
    return [dict(row) for row in rows]


@app.get("/heroes/{hero_id}", response_model=HeroPublic)
async def read_hero(request: Request, hero_id: int) -> dict[str, Any]:
    row = await request.app.state.pool.fetchrow(
        "SELECT id, name, age FROM hero WHERE id = $1", hero_id
    )
    if row is None:
        raise HTTPException(404, "Hero not found")
    return dict(row)


@app.patch("/heroes/{hero_id}", response_model=HeroPublic)
async def update_hero(request: Request, hero_id: int, hero: HeroUpdate) -> dict[str, Any]:
    changes = hero.model_dump(exclude_unset=True)
    columns = ", ".join(f"{name} = ${number}" for number, name in enumerate(changes, 2))
    row = await request.app.state.pool.fetchrow(
        f"UPDATE hero SET {columns} WHERE id = $1 RETURNING id, name, age",
        hero_id,
        *changes.values(),
    )
    if row is None:
        raise HTTPException(404, "Hero not found")
    return dict(row)
