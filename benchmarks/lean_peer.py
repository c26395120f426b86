"""The same API written by hand with Starlette, asyncpg and pydantic: no FastAPI and no ORM."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, NotRequired

import asyncpg
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from typing_extensions import TypedDict


class HeroCreate(TypedDict):
    name: str
    age: NotRequired[int | None]
    secret_name: str


class HeroUpdate(TypedDict, total=False):
    name: str
    age: int | None
    secret_name: str


class HeroQuery(TypedDict):
    offset: NotRequired[Annotated[int, Field(ge=0)]]
    limit: NotRequired[Annotated[int, Field(le=100)]]


CREATE, UPDATE = TypeAdapter(HeroCreate), TypeAdapter(HeroUpdate)
QUERY, ID = TypeAdapter(HeroQuery), TypeAdapter(int)


async def keep(connection: Any) -> None:
    """Return a connection to the pool as it is: no request changes its state."""


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    size = int(os.environ["DATABASE_POOL_SIZE"])
    async with asyncpg.create_pool(
        os.environ["DATABASE_URL"], min_size=size, max_size=size, reset=keep
    ) as app.state.pool:
        yield


def json(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


def one(row: Any) -> Response:
    if row is None:
        raise HTTPException(404, "Hero not found")
    return json(dict(row))


async def create_hero(request: Request) -> Response:
    hero = CREATE.validate_json(await request.body())
    return one(
        await request.app.state.pool.fetchrow(
            "INSERT INTO hero (name, age, secret_name) VALUES ($1, $2, $3) RETURNING name, age, id",
            hero["name"],
            hero.get("age"),
            hero["secret_name"],
        )
    )


async def read_heroes(request: Request) -> Response:
    query = QUERY.validate_python(request.query_params)
    rows = await request.app.state.pool.fetch(
        "SELECT name, age, id FROM hero ORDER BY id OFFSET $1 LIMIT $2",
        query.get("offset", 0),
        query.get("limit", 100),
    )
    return json([dict(row) for row in rows])


async def read_hero(request: Request) -> Response:
    return one(
        await request.app.state.pool.fetchrow(
            "SELECT name, age, id FROM hero WHERE id = $1",
            ID.validate_python(request.path_params["hero_id"]),
        )
    )


async def update_hero(request: Request) -> Response:
    changes = UPDATE.validate_json(await request.body())
    if not changes:
        return await read_hero(request)
    columns = ", ".join(f"{name} = ${number}" for number, name in enumerate(changes, 2))
    return one(
        await request.app.state.pool.fetchrow(
            f"UPDATE hero SET {columns} WHERE id = $1 RETURNING name, age, id",
            ID.validate_python(request.path_params["hero_id"]),
            *changes.values(),
        )
    )


async def refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    return json({"detail": error.errors(include_url=False, include_context=False)}, 422)


async def failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return json({"detail": error.detail}, error.status_code)


app = Starlette(
    routes=[
        Route("/heroes/", create_hero, methods=["POST"]),
        Route("/heroes/", read_heroes),
        Route("/heroes/{hero_id}", read_hero),
        Route("/heroes/{hero_id}", update_hero, methods=["PATCH"]),
    ],
    exception_handlers={ValidationError: refused, HTTPException: failed},
    lifespan=lifespan,
)
