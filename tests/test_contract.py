"""What every table of the API guarantees. A new table needs one entry in `RESOURCES`."""

import asyncio
import csv
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL, event

from app.application import create_app
from tests.service import Service, serve, settings
from tests.test_tokens import TOKENS, bearer


class Resource(NamedTuple):
    """A table of the API: its path, the bodies of some creates, and the body of an update."""

    path: str
    creates: list[dict[str, Any]]
    update: dict[str, Any]


RESOURCES = [
    Resource(
        "/heroes/",
        [
            {"name": "Deadpond", "secret_name": "Dive Wilson"},
            {"name": "Rusty-Man", "secret_name": "Tommy Sharp", "age": 48},
            {"name": "Spider-Boy", "secret_name": "Pedro Parqueador", "age": 16},
        ],
        {"age": 29},
    ),
]
NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture(params=RESOURCES, ids=lambda resource: resource.path.strip("/"))
def resource(request: pytest.FixtureRequest) -> Resource:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def rows(client: httpx2.Client, resource: Resource) -> list[dict[str, Any]]:
    """Rows with equal values too, as clients see them."""
    responses = [client.post(resource.path, json=body) for body in resource.creates * 2]
    assert [response.status_code for response in responses] == [200] * len(responses)
    return [response.json() for response in responses]


@pytest.fixture
def operations(client: httpx2.Client, resource: Resource) -> dict[str, dict[str, Any]]:
    """The operations of the resource in OpenAPI, by the rest of the path."""
    paths = client.get("/openapi.json").json()["paths"]
    return {
        path.removeprefix(resource.path): found
        for path, found in paths.items()
        if path.startswith(resource.path)
    }


def parameters(operation: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each["schema"] for each in operation["parameters"]}


def test_a_row_is_created_read_updated_and_deleted(
    client: httpx2.Client, resource: Resource
) -> None:
    for path in (resource.path, resource.path.rstrip("/")):
        created = client.post(path, json=resource.creates[0])
        assert created.status_code == 200
        location = created.headers["location"]
        assert location == f"{resource.path}{created.json()['id']}"
        sent = resource.creates[0].items() & created.json().items()
        assert sent, "control: members of the body are part of the response"
        assert client.get(location).content == created.content
        assert created.json() in client.get(path).json()
        updated = client.patch(location, json=resource.update)
        assert updated.json() == created.json() | resource.update
        assert client.get(location).content == updated.content
        assert client.delete(location).content == b'{"ok":true}'
        for method in ("GET", "PATCH", "DELETE"):
            missing = client.request(method, location, json=resource.update)
            assert missing.status_code == 404
            assert missing.json()["detail"].endswith(" not found")


def test_pages_in_every_order_contain_each_row_once(
    client: httpx2.Client,
    resource: Resource,
    rows: list[dict[str, Any]],
    operations: dict[str, dict[str, Any]],
) -> None:
    sorts = parameters(operations[""]["get"])["sort"]["enum"]
    assert {"id", "-id"} <= set(sorts)
    for sort in sorts:
        found = list(walk(client, f"{resource.path}?limit=2&sort={sort}"))
        assert found == client.get(resource.path, params={"sort": sort}).json()
        assert sorted(row["id"] for row in found) == [row["id"] for row in rows]
    total = client.get(resource.path, params={"limit": 1, "total": True})
    assert total.headers["x-total-count"] == str(len(rows))


def walk(client: httpx2.Client, path: str) -> Iterator[dict[str, Any]]:
    while path:
        page = client.get(path)
        assert page.status_code == 200, page.text
        yield from page.json()
        path = page.headers.get("link", "")[1:].partition(">")[0]


def test_filters_by_a_member_return_the_rows_with_this_value(
    client: httpx2.Client,
    resource: Resource,
    rows: list[dict[str, Any]],
    operations: dict[str, dict[str, Any]],
) -> None:
    filters = parameters(operations[""]["get"]).keys() & rows[0].keys()
    assert filters
    for name in filters:
        given = {str(row[name]) for row in rows if row[name] is not None}
        for value in given:
            expected = [row for row in rows if str(row[name]) == value]
            assert client.get(resource.path, params={name: value}).json() == expected
            exported = client.get(f"{resource.path}export", params={name: value}).text
            assert [json.loads(line) for line in exported.splitlines()] == expected


def test_etags_and_concurrent_updates(
    service: Service, client: httpx2.Client, resource: Resource
) -> None:
    created = client.post(resource.path, json=resource.creates[0])
    path, etag = created.headers["location"], created.headers["etag"]
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 304

    def update(_: int) -> int:
        with service.client() as other:
            changed = other.patch(path, json=resource.update, headers={"If-Match": etag})
            return changed.status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(update, range(8))) == [200] + [412] * 7
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 200
    assert client.delete(path, headers={"If-Match": etag}).status_code == 412
    assert client.delete(path, headers={"If-Match": '"2"'}).status_code == 200


def test_a_repeated_create_with_a_key_creates_one_row(
    client: httpx2.Client, resource: Resource
) -> None:
    key = {"Idempotency-Key": "one"}
    first, again = (
        client.post(resource.path, json=resource.creates[0], headers=key) for _ in range(2)
    )
    assert again.headers["idempotency-replayed"] == "true"
    assert (again.content, again.headers["etag"]) == (first.content, first.headers["etag"])
    other = client.post(resource.path, json=resource.creates[1], headers=key)
    assert other.json()["detail"][0]["loc"] == ["header", "idempotency-key"]
    assert len(client.get(resource.path).json()) == 1


@pytest.mark.parametrize("file_format", ["ndjson", "csv"])
def test_an_import_creates_all_rows_or_none(
    client: httpx2.Client, resource: Resource, rows: list[dict[str, Any]], file_format: str
) -> None:
    creates = resource.creates * 2
    encode = {"ndjson": as_ndjson, "csv": as_csv}[file_format]
    media_type = {
        "Content-Type": {"ndjson": "application/x-ndjson", "csv": "text/csv"}[file_format]
    }
    required = next(iter(resource.creates[0]))
    wrong = [*creates, creates[0] | {required: "x" * 1000}]
    refused = client.post(f"{resource.path}import", content=encode(wrong), headers=media_type)
    line = len(wrong) + (file_format == "csv")
    assert [each["loc"] for each in refused.json()["detail"]] == [["body", line, required]]
    assert client.get(resource.path).json() == rows

    done = client.post(f"{resource.path}import", content=encode(creates), headers=media_type)
    assert done.json() == {"created": len(creates)}
    exported = client.get(f"{resource.path}export").text
    found = [json.loads(line) for line in exported.splitlines()]
    assert found == client.get(resource.path).json()
    assert without_id(found) == without_id(rows * 2)
    table = client.get(f"{resource.path}export?format=csv").text
    assert len(list(csv.DictReader(io.StringIO(table, newline="")))) == len(found)


def as_ndjson(bodies: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(body).encode() + b"\n" for body in bodies)


def as_csv(bodies: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for body in bodies for name in body)))
    writer.writeheader()
    writer.writerows(bodies)
    return file.getvalue().encode()


def without_id(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "id"} for row in found]


def test_an_invalid_request_is_422_and_names_the_place(
    client: httpx2.Client, resource: Resource
) -> None:
    def refused(method: str, path: str, body: Any = None) -> list[Any]:
        response = client.request(method, f"{resource.path}{path}", json=body)
        assert response.status_code == 422, response.text
        return list(response.json()["detail"][0]["loc"])

    for name in resource.creates[0]:
        body = {key: value for key, value in resource.creates[0].items() if key != name}
        assert refused("POST", "", body) == ["body", name]
        assert refused("POST", "", resource.creates[0] | {name: "a\0"}) == ["body", name]
        created = client.post(resource.path, json=resource.creates[0]).json()
        assert refused("PATCH", str(created["id"]), {name: None}) == ["body", name]
    assert refused("GET", "?limit=0") == ["query", "limit"]
    assert refused("GET", "?after=x") == ["query", "after"]
    assert refused("GET", "?sort=x") == ["query", "sort"]
    assert refused("GET", "x")[0] == "path"
    wrong_method = client.put(resource.path, json=resource.creates[0])
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (
        405,
        "GET, HEAD, OPTIONS, POST",
    )


def test_reads_and_writes_need_a_token_if_tokens_are_set(
    database_url: URL, resource: Resource
) -> None:
    with serve(settings(database_url, api_tokens=TOKENS)) as service, service.client() as client:

        def write(**headers: str) -> list[int]:
            return [
                client.post(resource.path, json=resource.creates[0], headers=headers).status_code,
                client.post(
                    f"{resource.path}import", content=b"", headers=headers | NDJSON
                ).status_code,
                client.patch(
                    f"{resource.path}1", json=resource.update, headers=headers
                ).status_code,
                client.delete(f"{resource.path}1", headers=headers).status_code,
            ]

        assert write() == [401] * 4
        assert write(**bearer("peek")) == [403] * 4
        assert write(**bearer("open-sesame")) == [200] * 4
        assert client.get(resource.path).status_code == 401
        assert client.get(resource.path, headers=bearer("peek")).status_code == 200


def test_the_openapi_document_has_every_operation(
    resource: Resource, operations: dict[str, dict[str, Any]]
) -> None:
    expected = {
        "": {"get": {"422", "503"}, "post": {"409", "413", "422", "503"}},
        "export": {"get": {"422", "503", "507"}},
        "import": {"post": {"409", "413", "415", "422", "503", "507"}},
        "{}": {
            "get": {"304", "404", "422", "503"},
            "patch": {"404", "409", "412", "422", "503"},
            "delete": {"404", "409", "412", "422", "503"},
        },
    }
    by_id = next(path for path in operations if path.startswith("{") and "/" not in path)
    for path, methods in expected.items():
        found = operations[by_id if path == "{}" else path]
        assert found.keys() >= methods.keys()
        for method, statuses in methods.items():
            assert found[method]["responses"].keys() >= statuses | {"200"}, (path, method)
            assert found[method]["tags"] == [resource.path.strip("/")]


def test_the_metrics_have_the_route_and_not_the_id(
    client: httpx2.Client, resource: Resource, rows: list[dict[str, Any]]
) -> None:
    client.get(f"{resource.path}{rows[0]['id']}")
    families = text_string_to_metric_families(client.get("/metrics").text)
    routes = {
        sample.labels["http_route"]
        for family in families
        for sample in family.samples
        if sample.labels.get("http_route", "").startswith(resource.path)
    }
    assert f"{resource.path}{rows[0]['id']}" not in routes
    assert any(route.startswith(f"{resource.path}{{") for route in routes)


def test_an_operation_is_one_statement_and_concurrent_ones_share_it(
    database_url: URL, resource: Resource
) -> None:
    app = create_app(settings(database_url, database_pool_size=4))
    statements: list[str] = []

    async def run() -> list[int]:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://heroes") as client:
            counts = []

            async def counted(count: int, method: str, path: str, body: Any = None) -> None:
                statements.clear()
                requests = (
                    client.request(method, f"{resource.path}{path}", json=body)
                    for _ in range(count)
                )
                for response in await asyncio.gather(*requests):
                    assert response.status_code == 200, response.text
                counts.append(len(statements))

            await counted(1, "GET", "")  # A new connection sends its own statements first.
            engine = app.state.database.engine
            event.listen(engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
            await counted(1, "POST", "", resource.creates[0])
            await counted(1, "GET", "")
            await counted(1, "GET", "1")
            await counted(1, "PATCH", "1", resource.update)
            await counted(1, "DELETE", "1")
            await counted(40, "POST", "", resource.creates[0])
            await counted(40, "GET", "2")
            await app.state.database.close()
            return counts

    first, *single, creates, reads = asyncio.run(run())
    assert (first, single) == (0, [1] * 5)
    assert max(creates, reads) <= 8
