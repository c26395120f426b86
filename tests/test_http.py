"""HTTP beyond the routes: HEAD, Allow, OPTIONS, CORS, caching headers and a path prefix."""

import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx2
import pytest
from fastapi import Response
from sqlalchemy import URL, Engine, text
from sqlmodel import Session

from app.application import create_app
from app.db.crud import Rows
from app.db.pagination import Page
from app.heroes import heroes
from tests.examples import DEADPOND
from tests.service import Connection, Service, serve, settings

pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
STATIC = "/static-offline-docs/swagger-ui.css"
PATHS = {
    "/": 307,
    "/docs": 200,
    "/openapi.json": 200,
    STATIC: 200,
    "/heroes/": 200,
    "/heroes": 200,
    "/heroes/?limit=1": 200,
    "/heroes/?limit=0": 422,
    "/heroes/1": 200,
    "/heroes/2": 200,
    "/heroes/99": 404,
    "/heroes/x": 422,
    "/heroes/export": 200,
    "/heroes/export?format=csv": 200,
    "/heroes/export?age_min=x": 422,
    "/heroes/import": 405,
    "/health/live": 200,
    "/health/ready": 200,
    "/metrics": 200,
    "/nowhere": 404,
}


@pytest.fixture
def connection(connection: Connection) -> Connection:
    """A connection to a service with two heroes."""
    for _ in range(2):
        body = b'{"name": "Deadpond", "secret_name": "Dive Wilson"}'
        assert connection.send("POST", "/heroes/", body, Content_Type="application/json").status
    return connection


def test_head_has_the_status_and_the_headers_of_get(connection: Connection) -> None:
    for path, status in PATHS.items():
        # http.client does not read the body of a HEAD, so a body would break the next response.
        head, get = (connection.send(method, path) for method in ("HEAD", "GET"))
        assert (head.status, get.status, head.body) == (status, status, b""), path
        ignored = {"date", "x-request-id", "transfer-encoding"}
        if path == "/metrics" or "Content-Length" not in head.headers:
            ignored.add("content-length")
        headers = [
            sorted((k.lower(), v) for k, v in answer.headers.items() if k.lower() not in ignored)
            for answer in (head, get)
        ]
        assert headers[0] == headers[1], path


def test_head_with_the_current_etag_is_a_304(connection: Connection) -> None:
    assert connection.send("HEAD", "/heroes/1", If_None_Match='"1"').status == 304


def test_head_of_an_export_does_not_read_all_rows(
    service: Service, database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.connect() as rows:
        numbers = "WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n WHERE x < 9000)"
        insert = "INSERT INTO hero (name, secret_name)"
        rows.execute(text(f"{insert} {numbers} SELECT 'x', 's' FROM n"))
    pages = []
    read_page = heroes.list

    def counted(session: Session, page: Page) -> Rows:
        pages.append(page)
        return read_page(session, page)

    monkeypatch.setattr(heroes, "list", counted)
    with service.client() as client:
        assert len(client.get("/heroes/export").text.splitlines()) == 9000
        assert len(pages) == 10
        assert client.head("/heroes/export").status_code == 200
    assert len(pages) <= 12


ALLOWED = {
    "/": "GET, HEAD, OPTIONS",
    "/heroes/": "GET, HEAD, OPTIONS, POST",
    "/heroes": "GET, HEAD, OPTIONS, POST",
    "/heroes/1": "DELETE, GET, HEAD, OPTIONS, PATCH",
    "/heroes/x": "DELETE, GET, HEAD, OPTIONS, PATCH",
    "/heroes/export": "GET, HEAD, OPTIONS",
    "/heroes/import": "OPTIONS, POST",
    "/health/live": "GET, HEAD, OPTIONS",
    "/metrics": "GET, HEAD, OPTIONS",
    "/docs": "GET, HEAD, OPTIONS",
    "/openapi.json": "GET, HEAD, OPTIONS",
    STATIC: "GET, HEAD, OPTIONS",
}


@pytest.mark.parametrize("path", ALLOWED)
def test_each_405_names_every_method_of_the_path(client: httpx2.Client, path: str) -> None:
    allowed = ALLOWED[path].split(", ")
    others = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY"} - set(allowed)
    for method in sorted(others):
        response = client.request(method, path)
        assert (response.status_code, response.headers["allow"]) == (405, ALLOWED[path]), method
        if method != "HEAD":
            assert response.json() == {"detail": "Method Not Allowed"}


@pytest.mark.parametrize("path", ALLOWED)
def test_options_names_every_method_of_the_path(client: httpx2.Client, path: str) -> None:
    response = client.options(path)
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["allow"] == ALLOWED[path]


def test_options_of_an_unknown_path_is_a_404(client: httpx2.Client) -> None:
    assert client.options("/nowhere").status_code == 404


def test_every_response_forbids_sniffing_and_states_how_to_cache_it(client: httpx2.Client) -> None:
    created = client.post("/heroes/", json=DEADPOND)
    responses = [
        created,
        client.patch("/heroes/1", json={"age": 3}),
        client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": "a"}),
        client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": "a"}),
        client.patch("/heroes/1", json={"age": 3}, headers={"If-Match": '"9"'}),
        client.get("/heroes/1", headers={"If-None-Match": "*"}),
        client.options("/heroes/"),
        *(client.get(path) for path in PATHS),
    ]
    assert {response.status_code for response in responses} >= {200, 204, 304, 404, 405, 412, 422}
    for response in responses:
        assert response.headers.get_list("x-content-type-options") == ["nosniff"]
        expected = "no-cache" if "etag" in response.headers else "no-store"
        assert response.headers.get_list("cache-control") == [expected], response.url
    assert created.headers["cache-control"] == "no-cache"


def test_a_route_may_state_how_to_cache_its_responses(database_url: URL) -> None:
    app = create_app(settings(database_url))

    @app.get("/plain")
    async def plain() -> Response:
        return Response(headers={"Cache-Control": "max-age=60"})

    with serve(app) as service, service.client() as client:
        assert client.get("/plain").headers.get_list("cache-control") == ["max-age=60"]


def test_a_body_that_depends_on_accept_says_so(client: httpx2.Client) -> None:
    client.post("/heroes/", json=DEADPOND)
    for path in ("/heroes/99", "/heroes/x", "/heroes/export", "/nowhere"):
        assert client.get(path).headers["vary"] == "Accept", path
    assert client.put("/heroes/1").headers["vary"] == "Accept"
    assert "vary" not in client.get("/heroes/1").headers


# CORS

APP = "https://app.example.com"
EXPOSED = {
    *("etag", "idempotency-replayed", "link", "location", "retry-after", "x-request-id"),
    *("x-total-count", "content-disposition", "allow"),
}


@pytest.fixture
def browser(database_url: URL) -> Iterator[httpx2.Client]:
    """A client of a service that two origins may call from a browser."""
    configured = settings(database_url, cors_origins=f"{APP}, http://localhost:5173")
    with serve(configured) as service, service.client() as client:
        yield client


def preflight(client: httpx2.Client, origin: str, method: str, headers: str) -> httpx2.Response:
    return client.options(
        "/heroes/1",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": headers,
        },
    )


@pytest.mark.parametrize("origin", [APP, "http://localhost:5173"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PATCH", "DELETE"])
def test_a_preflight_of_a_listed_origin_is_allowed(
    browser: httpx2.Client, origin: str, method: str
) -> None:
    wanted = "authorization,content-type,content-encoding,idempotency-key,if-match,x-request-id"
    response = preflight(browser, origin, method, wanted)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert method in response.headers["access-control-allow-methods"].split(", ")
    assert response.headers["access-control-allow-headers"] == wanted
    assert "access-control-allow-credentials" not in response.headers
    assert response.headers["x-request-id"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("origin", ["https://evil.example", f"{APP}.evil.example", "null"])
def test_another_origin_gets_no_access(browser: httpx2.Client, origin: str) -> None:
    refused = preflight(browser, origin, "GET", "x-request-id")
    assert refused.status_code == 400
    assert refused.json() == {"detail": "Disallowed CORS origin"}
    assert "access-control-allow-origin" not in refused.headers
    response = browser.get("/heroes/", headers={"Origin": origin})
    assert "access-control-allow-origin" not in response.headers


def test_a_script_may_read_every_documented_header(browser: httpx2.Client) -> None:
    responses = [
        browser.post("/heroes/", json=DEADPOND, headers={"Origin": APP}),
        *(browser.get(path, headers={"Origin": APP}) for path in PATHS),
        browser.head("/heroes/1", headers={"Origin": APP}),
        browser.put("/heroes/1", headers={"Origin": APP}),
    ]
    for response in responses:
        assert response.headers["access-control-allow-origin"] == APP, response.url
        assert "Origin" in response.headers["vary"].split(", ")
        exposed = response.headers["access-control-expose-headers"].lower().split(", ")
        assert set(exposed) >= EXPOSED
        assert "access-control-allow-credentials" not in response.headers
    assert browser.get("/heroes/99").headers["vary"] == "Accept, Origin"


def test_a_script_may_read_the_response_to_a_bug(
    browser: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(heroes, "get_many", bug)
    response = browser.get("/heroes/1", headers={"Origin": APP})
    assert response.status_code == 500
    assert response.json() == {"detail": "Internal Server Error"}
    assert response.headers["access-control-allow-origin"] == APP
    assert response.headers["vary"] == "Accept, Origin"


def test_every_origin_may_be_allowed(database_url: URL) -> None:
    configured = settings(database_url, cors_origins="*")
    with serve(configured) as service, service.client() as client:
        response = client.get("/heroes/", headers={"Origin": "https://any.example"})
        assert response.headers["access-control-allow-origin"] == "*"
        assert preflight(client, "https://any.example", "PATCH", "if-match").status_code == 200


def test_no_origin_is_allowed_by_default(client: httpx2.Client) -> None:
    response = preflight(client, APP, "GET", "x-request-id")
    assert response.status_code == 204
    for each in (response, client.get("/heroes/", headers={"Origin": APP})):
        assert not [name for name in each.headers if name.startswith("access-control")]


# A path prefix


def behind(app: Any, prefix: str) -> Callable[..., Awaitable[None]]:
    """Return the app behind a proxy that strips the prefix, and refuses every other path."""

    async def proxy(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith(f"{prefix}/"), scope["path"]
            raw_path = scope["raw_path"].removeprefix(prefix.encode())
            scope |= {"path": scope["path"].removeprefix(prefix), "raw_path": raw_path}
        await app(scope, receive, send)

    return proxy


@pytest.mark.parametrize("prefix", ["/api", "/a/b-2", "/heroes"])
def test_every_link_of_the_service_contains_the_prefix(database_url: URL, prefix: str) -> None:
    app = create_app(settings(database_url, root_path=prefix))
    with serve(behind(app, prefix)) as service, service.client() as client:  # type: ignore[arg-type]
        root = client.get(f"{prefix}/")
        assert (root.status_code, root.headers["location"]) == (307, f"{prefix}/docs")
        for number in range(1, 4):
            created = client.post(f"{prefix}/heroes/", json=DEADPOND)
            assert created.headers["location"] == f"{prefix}/heroes/{number}"
            assert client.get(created.headers["location"]).json()["id"] == number
        page = client.get(f"{prefix}/heroes?limit=2")
        link = re.fullmatch('<(.*)>; rel="next"', page.headers["link"])
        assert link
        assert [hero["id"] for hero in client.get(link[1]).json()] == [3]
        docs = client.get(f"{prefix}/docs").text
        loaded = re.findall(r"(?:href|src)=\"([^\"]+)\"|url: '([^']+)'", docs)
        assert len(loaded) >= 4
        for path in (one or other for one, other in loaded):
            assert client.get(path).status_code == 200, path
        assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": prefix}]
        exported = client.get(f"{prefix}/heroes/export")
        assert 'filename="heroes.ndjson"' in exported.headers["content-disposition"]
        assert client.put(f"{prefix}/heroes/export").headers["allow"] == "GET, HEAD, OPTIONS"


def test_the_service_itself_is_reached_without_the_prefix(database_url: URL) -> None:
    """Health checks do not pass the proxy."""
    configured = settings(database_url, root_path="/api")
    with serve(configured) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200
        assert client.get("/api/health/ready").status_code == 404
