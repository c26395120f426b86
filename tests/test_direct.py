"""Requests that reach their route function without FastAPI get the same responses."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import URL

from app.api.direct import DirectRoutes
from app.api.parameters import get_database
from app.application import create_app
from tests.service import settings

JSON = [(b"content-type", b"application/json")]


class Result(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    is_direct: bool


async def send(
    app: FastAPI,
    method: str,
    path: str,
    *,
    query: bytes = b"",
    headers: list[tuple[bytes, bytes]] | None = None,
    body: bytes = b"",
) -> Result:
    """Send one request without a server."""
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": [(b"host", b"localhost"), (b"x-request-id", b"1"), *(headers or [])],
        "scheme": "http",
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 1),
        "state": {},
    }
    messages: list[Any] = []
    received = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not received:  # A stream waits for the end of the connection.
            await asyncio.Event().wait()
        return received.pop()

    async def respond(message: Any) -> None:
        messages.append(message)

    await app(scope, receive, respond)
    start, *parts = messages
    body = b"".join(part.get("body", b"") for part in parts)
    # FastAPI's router leaves its mark in the scope.
    return Result(start["status"], sorted(start["headers"]), body, "router" not in scope)


def run(app: FastAPI, *arguments: Any, **options: Any) -> Result:
    return asyncio.run(send(app, *arguments, **options))


def handle_by_fastapi(app: FastAPI) -> FastAPI:
    app.dependency_overrides[object] = object
    return app


@pytest.fixture
def apps(database_url: URL, tmp_path: Path) -> Iterator[tuple[FastAPI, FastAPI]]:
    """The service, and the service without direct routes, each with its own SQLite database."""
    copy = tmp_path / "copy.db"
    shutil.copy(str(database_url.database), copy)
    with asyncio.Runner():
        yield (
            create_app(settings(database_url)),
            handle_by_fastapi(create_app(settings(database_url.set(database=str(copy))))),
        )


_IDS = st.one_of(
    st.integers(-3, 5).map(str),
    st.text(max_size=5),
    st.sampled_from(
        ["import", "export", "1_0", " 1", "1.0", "%31", "9" * 19, "9" * 30, "+1", "\u0661"]
    ),
)
_PATHS = st.one_of(
    st.just("/heroes/"),
    st.just("/heroes"),
    st.just("/"),
    _IDS.map("/heroes/{}".format),
    st.just("/heroes/1/"),
    st.just("/heroes//"),
    st.just("/none"),
)
_QUERIES = st.lists(
    st.tuples(
        st.sampled_from(
            ["limit", "offset", "name", "age_min", "age_max", "sort", "total", "after", "x"]
        ),
        st.sampled_from(
            [
                "",
                "0",
                "1",
                "-1",
                "100",
                "101",
                "a",
                "id",
                "-name",
                "true",
                "%00",
                "%F0",
                "1e2",
                "+1",
            ]
        ),
    ).map("=".join),
    max_size=3,
).map(lambda parts: "&".join(parts).encode())
_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2**31),
    st.floats(),
    st.text(max_size=3),
    st.just("\ud800"),
    st.just("\0"),
    st.lists(st.integers(), max_size=1),
)
_OBJECTS = st.dictionaries(
    st.sampled_from(["name", "age", "secret_name", "other"]), _VALUES, max_size=4
)
_BODIES = st.one_of(
    _OBJECTS.map(lambda value: json.dumps(value).encode()),
    _OBJECTS.map(lambda value: json.dumps(value).encode("utf-16")),
    st.just(b'{"name": "a", "secret_name": "b"}'),
    st.sampled_from(
        [b"", b"{", b"null", b"[]", b"\xff", b'{"name":"a","name":"b","secret_name":"c"}']
    ),
    st.binary(max_size=5),
)
_HEADERS = st.lists(
    st.sampled_from(
        [
            (b"content-type", b"application/json"),
            (b"content-type", b"application/json; charset=utf-8"),
            (b"content-type", b"application/problem+json"),
            (b"content-type", b"text/plain"),
            (b"if-match", b'"1"'),
            (b"if-match", b"1"),
            (b"if-none-match", b"*"),
            (b"if-none-match", b"\xff"),
            (b"idempotency-key", b""),
            (b"accept", b"application/problem+json"),
        ]
    ),
    max_size=3,
)


@pytest.mark.parametrize("backend", ["sqlite"])
@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"]),
    path=_PATHS,
    query=_QUERIES,
    headers=_HEADERS,
    body=_BODIES,
)
@example(method="GET", path="/heroes/export", query=b"", headers=[], body=b"")
def test_every_request_gets_the_response_that_fastapi_would_give(
    apps: tuple[FastAPI, FastAPI], **request: Any
) -> None:
    method, path = request.pop("method"), request.pop("path")

    async def both() -> tuple[Result, Result]:
        first = [await send(app, method, path, **request) for app in apps]
        return first[0], first[1]

    direct, usual = asyncio.run(both())
    assert method == "HEAD" or not usual.is_direct  # A HEAD has another scope.
    assert direct.status == usual.status
    assert direct.body == usual.body
    assert direct.headers == usual.headers


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "/heroes/1", {}),
        ("HEAD", "/heroes/1", {}),
        ("GET", "/heroes/1", {"headers": [(b"if-none-match", b'"7"')]}),
        ("GET", "/heroes/", {}),
        ("GET", "/heroes", {"query": b"limit=2&sort=-name"}),
        ("POST", "/heroes/", {"headers": JSON, "body": b'{"name":"a","secret_name":"b"}'}),
        ("PATCH", "/heroes/1", {"headers": JSON, "body": b'{"age":1}'}),
    ],
)
def test_a_well_formed_request_is_direct(
    database_url: URL, method: str, path: str, options: dict[str, Any]
) -> None:
    app = create_app(settings(database_url, root_path="/api"))

    async def create_and_send() -> Result:
        await send(app, "POST", "/heroes/", headers=JSON, body=b'{"name":"a","secret_name":"b"}')
        result = await send(app, method, path, **options)
        await app.state.database.close()
        return result

    result = asyncio.run(create_and_send())
    assert result.status == 200
    assert result.is_direct


@pytest.mark.parametrize("backend", ["sqlite"])
def test_dependency_overrides_apply(database_url: URL) -> None:
    app = create_app(settings(database_url))

    def override() -> None:
        raise HTTPException(418)

    app.dependency_overrides[get_database] = override
    assert run(app, "GET", "/heroes/1").status == 418


class Item(BaseModel):
    name: str


async def tenant(request: Request) -> str:
    return request.headers.get("x-tenant", "none")


async def teapot(request: Request) -> None:
    raise HTTPException(418, request.method)


class OwnRoute(APIRoute):
    """A class of routes, which FastAPI's documentation recommends for own handlers."""

    def get_route_handler(self) -> Any:
        async def handle(request: Request) -> Response:
            return Response(f"own {request.method}")

        return handle


Tenant = Annotated[str, Depends(tenant)]


def _own_app() -> FastAPI:
    """Routes of each kind that is direct, or looks as if it were."""
    app = FastAPI()

    @app.get("/items/{item}")
    async def get(item: str, who: Tenant) -> Response:
        return Response(f"{item} of {who}")

    @app.get("/items/all")
    async def never() -> Response:
        raise AssertionError

    @app.post("/items/")
    async def post(item: Item, x_kind: Annotated[str, Header()]) -> Response:
        return Response(f"{item.name} is {x_kind}")

    @app.get("/aliases")
    async def aliases(
        kind: Annotated[str, Header(alias="X-Kind")],
        x_raw: Annotated[str, Header(convert_underscores=False)],
    ) -> Response:
        return Response(kind + x_raw)

    small = APIRouter(dependencies=[Depends(teapot)])

    @small.get("/teapot")
    async def never_a_teapot() -> Response:
        raise AssertionError

    @app.post("/small", max_body_size=2)
    async def limited(item: Item) -> Response:
        return Response(item.name)

    own = APIRouter(route_class=OwnRoute)

    @own.get("/own")
    async def of_own_class() -> Response:
        return Response("usual")

    app.include_router(small)
    app.include_router(own)

    @app.get("/dict")
    async def of_dict() -> dict[str, int]:
        return {"a": 1}

    @app.get("/thread")
    def in_a_thread() -> Response:
        return Response("thread")

    return _direct(app)


def _direct(app: FastAPI) -> FastAPI:
    app.add_middleware(DirectRoutes, application=app)
    return app


@pytest.mark.parametrize(
    ("arguments", "options", "body", "is_direct"),
    [
        (("GET", "/items/1"), {}, b"1 of none", True),
        (("GET", "/items/1"), {"headers": [(b"x-tenant", b"a")]}, b"1 of a", True),
        (("GET", "/items/all"), {}, b"all of none", False),
        (
            ("POST", "/items/"),
            {"body": b'{"name":"a"}', "headers": [*JSON, (b"x-kind", b"b")]},
            b"a is b",
            True,
        ),
        (("POST", "/items/"), {"body": b'{"name":"a"}', "headers": JSON}, None, False),
        (("GET", "/dict"), {}, b'{"a":1}', False),
        (("GET", "/aliases"), {"headers": [(b"x-kind", b"a"), (b"x_raw", b"b")]}, b"ab", True),
        (("GET", "/own"), {}, b"own GET", False),
        (("GET", "/thread"), {}, b"thread", False),
    ],
)
def test_only_simple_routes_are_direct(
    arguments: tuple[str, str], options: Any, body: bytes | None, is_direct: bool
) -> None:
    result = run(_own_app(), *arguments, **options)
    assert result.is_direct == is_direct
    assert result.status == (422 if body is None else 200)
    if body is not None:
        assert result.body == body


@pytest.mark.parametrize(
    "first", ["/items/{item}/parts", "/items/{item:int}", "/items/{item:path}", "/other"]
)
def test_a_route_with_another_kind_of_path_hides_later_routes(first: str) -> None:
    app = FastAPI()

    @app.get(first)
    async def other() -> Response:
        return Response("first")

    @app.get("/items/{item}")
    async def get(item: str) -> Response:
        return Response(item)

    @app.get("/items/1/parts")
    async def parts() -> Response:
        return Response("never")

    _direct(app)
    paths = ("/items/1", "/items/a", "/items/1/parts", "/items/")
    direct = [run(app, "GET", path).body for path in paths]
    handle_by_fastapi(app)
    assert direct == [run(app, "GET", path).body for path in paths]


def test_a_mount_hides_later_routes() -> None:
    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        await Response("mounted")(scope, receive, send)

    app = FastAPI()
    app.mount("/items", mounted)

    @app.get("/items/1")
    async def never() -> Response:
        return Response("never")

    assert run(_direct(app), "GET", "/items/1").body == b"mounted"


def test_the_dependencies_of_a_router_and_the_limit_of_a_route_apply() -> None:
    app = _own_app()
    assert run(app, "GET", "/teapot").status == 418
    assert run(app, "POST", "/small", headers=JSON, body=b'{"name":"a"}').status == 413


def test_a_body_in_several_parts_is_handled_by_fastapi() -> None:
    parts = [b'{"na', b'me":"a"}']
    messages: list[Any] = []

    async def receive() -> dict[str, Any]:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def respond(message: Any) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/items/",
        "root_path": "",
        "query_string": b"",
        "headers": [*JSON, (b"x-kind", b"b")],
    }
    asyncio.run(_own_app()(scope, receive, respond))
    assert messages[1]["body"] == b"a is b"
