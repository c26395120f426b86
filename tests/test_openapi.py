"""OpenAPI and the documentation pages: the tutorial's operations, described in full."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from sqlalchemy import make_url
from sqlmodel import SQLModel

from app.application import create_app
from app.db.pagination import Cursor
from tests.service import Service, serve, settings

# The operations that FastAPI generates for the tutorial's own code.
TUTORIAL = {
    ("/heroes/", "post"): ("create_hero", "Create Hero"),
    ("/heroes/", "get"): ("read_heroes", "Read Heroes"),
    ("/heroes/{hero_id}", "get"): ("read_hero", "Read Hero"),
    ("/heroes/{hero_id}", "patch"): ("update_hero", "Update Hero"),
    ("/heroes/{hero_id}", "delete"): ("delete_hero", "Delete Hero"),
}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    file = tmp_path_factory.mktemp("openapi") / "heroes.db"
    with serve(settings(make_url(f"sqlite:///{file}"))) as service, service.client() as client:
        yield client.get("/openapi.json").json()


def test_the_tutorials_operations_are_part_of_the_document(schema: dict[str, Any]) -> None:
    operations = {
        (path, method): (operation["operationId"], operation["summary"])
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }
    assert operations.items() >= TUTORIAL.items()


def has_example(content: dict[str, Any], document: dict[str, Any]) -> bool:
    """Return whether the content, or the model that it refers to, has an example."""
    model = content["schema"].get("items", content["schema"]).get("$ref", "").rpartition("/")[2]
    return "example" in content or bool(document["components"]["schemas"][model]["examples"])


def test_every_status_parameter_and_header_has_a_description_and_an_example(
    schema: dict[str, Any],
) -> None:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            where = f"{method} {path}"
            assert {"200", "422", "503"} <= set(operation["responses"]), where
            for parameter in operation["parameters"]:
                assert parameter["description"], (where, parameter)
            for status, response in operation["responses"].items():
                assert response["description"] != "Successful Response", (where, status)
                assert "X-Request-ID" in response["headers"], (where, status)
                for header in response["headers"].values():
                    assert header["description"]
                    assert header["example"]
                for content in response.get("content", {}).values():
                    assert has_example(content, schema), (where, status)
                if int(status) >= 400:
                    assert set(response["content"]) == {
                        "application/json",
                        "application/problem+json",
                    }
            for content in operation.get("requestBody", {}).get("content", {}).values():
                assert has_example(content, schema), where


def test_the_limits_of_imports_and_exports_are_documented(schema: dict[str, Any]) -> None:
    responses = schema["paths"]["/heroes/import"]["post"]["responses"]
    assert {"408", "413", "503", "507"} <= set(responses)
    assert "Retry-After" in responses["503"]["headers"]
    assert "507" in schema["paths"]["/heroes/export"]["get"]["responses"]


def test_a_plain_route_without_parameters_is_documented(tmp_path: Path) -> None:
    app = create_app(settings(make_url(f"sqlite:///{tmp_path}/heroes.db")))
    app.add_api_route("/plain", lambda: {"ok": True})
    assert "200" in app.openapi()["paths"]["/plain"]["get"]["responses"]


def test_the_request_id_is_not_a_documented_parameter(schema: dict[str, Any]) -> None:
    """Otherwise Swagger UI would send its example as the id of every request."""
    for methods in schema["paths"].values():
        for operation in methods.values():
            names = [parameter["name"].lower() for parameter in operation.get("parameters", [])]
            assert "x-request-id" not in names


def test_there_are_three_error_schemas(schema: dict[str, Any]) -> None:
    shapes = {
        content["schema"]["$ref"].rpartition("/")[2]
        for methods in schema["paths"].values()
        for operation in methods.values()
        for status, response in operation["responses"].items()
        if int(status) >= 400
        for content in response["content"].values()
    }
    assert shapes == {"Error", "ValidationProblem", "Problem"}
    assert shapes < schema["components"]["schemas"].keys()


@pytest.mark.parametrize("public_reads", [False, True])
def test_operations_that_need_a_token_document_it(tmp_path: Path, public_reads: bool) -> None:
    configured = settings(
        make_url(f"sqlite:///{tmp_path}/heroes.db"),
        api_tokens=f"ops:write:{'0' * 64}",
        api_public_reads=public_reads,
    )
    paths = create_app(configured).openapi()["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            is_write = method != "get"
            assert ("security" in operation) is (is_write or not public_reads), path
            assert ("401" in operation["responses"]) is (is_write or not public_reads), path
            assert ("403" in operation["responses"]) is is_write, path


NEW = {"name": st.sampled_from(["Deadpond", "Rusty-Man"]), "secret_name": st.just("s")}
_LINES = st.lists(st.fixed_dictionaries(NEW, optional={"age": st.integers(0, 99)}), max_size=3)
schemathesis.openapi.media_type(
    "application/x-ndjson",
    _LINES.map(lambda heroes: "".join(f"{json.dumps(hero)}\n" for hero in heroes).encode()),
)
schemathesis.openapi.media_type(
    "text/csv",
    _LINES.map(
        lambda heroes: "".join(
            ["name,secret_name\r\n", *(f"{h['name']},{h['secret_name']}\r\n" for h in heroes)]
        ).encode()
    ),
)


def satisfy_rules_outside_the_schema(case: Any, number: int) -> None:
    """Make a generated request valid where a rule involves more than one parameter."""
    if {"age_min", "age_max"} <= set(case.query):
        case.query["age_min"] = min(case.query["age_min"], case.query["age_max"])
    if "after" in case.query:
        sort = case.query.get("sort", "id")
        is_number = sort.removeprefix("-") in ("id", "age")
        case.query["after"] = str(Cursor(sort, 5 if is_number else "a", 5))
        case.query.pop("offset", None)
    if key := case.headers.get("idempotency-key"):  # A new key, as the body may differ.
        case.headers["idempotency-key"] = f"{number}{key}"[:255]
    case.headers.pop("Content-Encoding", None)
    if isinstance(case.body, dict):
        for name in REFERENCES:  # The row that it refers to may not exist.
            case.body.pop(name, None)


REFERENCES = {
    column.name
    for table in SQLModel.metadata.tables.values()
    for column in table.columns
    if column.foreign_keys
}
# The HTTP server refuses bad values of these headers before the service gets a request.
OF_HTTP = ("Connection", "Content-Length", "Expect", "Host", "Transfer-Encoding", "Upgrade")
EACH = 75  # For 7 operations and 2 modes. Each database gets other requests: 2,100 in total.


@pytest.mark.no_cover  # It would take twice as long.
def test_responses_to_generated_requests_conform_to_the_schema(
    service: Service, figures: list[str], backend: str
) -> None:
    """Valid requests are accepted, invalid ones are refused, and responses match the schema."""
    statuses: Counter[tuple[str, int]] = Counter()
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{service.port}/openapi.json")
    accepted = ["2xx", "304", "404", "412"]
    schema.config.checks.positive_data_acceptance.expected_statuses = accepted
    of_heroes = schema.include(path_regex="^/heroes/").get_all_operations()
    operations = [found.ok() for found in of_heroes if isinstance(found, Ok)]
    assert len(operations) == 7
    with requests.Session() as session:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

                @hypothesis.seed(backend)  # The same requests in each run.
                @hypothesis.settings(
                    max_examples=EACH,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(operation.as_strategy(generation_mode=mode))
                def send(case: Any) -> None:
                    mode = case.meta.generation.mode  # Some operations have no invalid requests.
                    if mode is GenerationMode.POSITIVE:
                        satisfy_rules_outside_the_schema(case, statuses.total())
                    for header in OF_HTTP:
                        case.headers.pop(header, None)
                    response = case.call(session=session)
                    statuses[mode.value, response.status_code] += 1
                    case.validate_response(response)

                send()
    assert statuses.total() >= 1000
    counts = ", ".join(
        f"{mode} {status}: {count}" for (mode, status), count in sorted(statuses.items())
    )
    figures.append(f"requests generated from OpenAPI on {backend}: {statuses.total()} ({counts})")


def test_the_schemas_are_the_tutorials(schema: dict[str, Any]) -> None:
    members = {
        name: (list(model["properties"]), model.get("required", []))
        for name, model in schema["components"]["schemas"].items()
        if name.startswith("Hero")
    }
    assert members == {
        "HeroCreate": (["name", "age", "secret_name"], ["name", "secret_name"]),
        "HeroPublic": (["name", "age", "id"], ["name", "id"]),
        "HeroUpdate": (["name", "age", "secret_name"], []),
    }
    response = schema["paths"]["/heroes/"]["get"]["responses"]["200"]["content"]["application/json"]
    assert response["schema"]["items"] == {"$ref": "#/components/schemas/HeroPublic"}


def test_the_docs_load_no_file_from_another_host(tmp_path: Path) -> None:
    configured = settings(make_url(f"sqlite:///{tmp_path}/heroes.db"))
    with serve(configured) as service, service.client() as client:
        page = client.get("/docs")
        assert page.status_code == 200
        assert "://" not in page.text
        loaded = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        assert len(loaded) >= 3
        for path in loaded:
            assert client.get(path).status_code == 200
