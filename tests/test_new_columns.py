"""docs/add-a-column.md is true: applied to a copy, a new column works everywhere."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import URL, Engine, text

from tests.examples import DEADPOND
from tests.migrations import copy_project
from tests.processes import run_python, uvicorn_process
from tests.service import ROOT, environment
from tests.walks import apply

PAGE = (ROOT / "docs" / "add-a-column.md").read_text()
ONE, SORT, TYPES = re.split("^## .*", PAGE, flags=re.MULTILINE)[1:]
KEY = {"Idempotency-Key": "8e03978e"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path)


def command(project: Path, url: URL, *arguments: str, given: bytes = b"") -> bytes:
    """The standard output of the command `heroes`."""
    ended = run_python("-m", "app", *arguments, env=environment(url), cwd=project, given=given)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.encode()


def ndjson(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def test_a_new_column_is_served_everywhere(
    project: Path, database_url: URL, database: Engine, figures: list[str]
) -> None:
    for name, section in (("a column", ONE), ("its sort key and filter", SORT)):
        added = apply(section, project, database_url)
        figures.append(f"add-a-column: {name}: {added.total()} lines; {dict(added)}")
    with uvicorn_process(database_url, project) as service, service.client() as client:
        created = client.post("/heroes/", json=DEADPOND | {"power": "healing"})
        assert created.content == b'{"name":"Deadpond","age":null,"power":"healing","id":1}'
        assert client.get("/heroes/1").json() == created.json()
        assert client.get("/heroes/").json() == [created.json()]
        assert client.get("/heroes/?sort=-power&power=healing").json() == [created.json()]
        assert client.get("/heroes/?power=flight").json() == []
        updated = client.patch("/heroes/1", json={"power": "humour"})
        assert updated.json() == created.json() | {"power": "humour"}
        assert client.patch("/heroes/1", json={"age": 3}).json()["power"] == "humour"

        lines = b'{"name":"a","secret_name":"s","power":"flight"}\n{"name":"b","secret_name":"s"}\n'
        for _ in range(2):
            imported = client.post(
                "/heroes/import", content=lines, headers={"Content-Type": "application/x-ndjson"}
            )
            assert imported.json() == {"created": 2}
        exported = client.get("/heroes/export")
        assert [hero["power"] for hero in ndjson(exported.content)] == [
            *("humour", "flight", None, "flight", None)
        ]
        table = client.get("/heroes/export?format=csv").text
        assert table.startswith("id,name,age,power\r\n1,Deadpond,3,humour\r\n")

        schemas = client.get("/openapi.json").json()["components"]["schemas"]
        for model in ("HeroPublic", "HeroCreate", "HeroUpdate"):
            assert "power" in schemas[model]["properties"]

    assert command(project, database_url, "export", "-") == exported.content
    assert command(project, database_url, "export", "-", "--format", "csv").decode() == table
    new = b"name,power,secret_name\r\nCLI,speed,s\r\n"
    command(project, database_url, "import", "-", "--format", "csv", given=new)
    with database.connect() as connection:
        assert connection.scalar(text("SELECT power FROM hero WHERE name = 'CLI'")) == "speed"


def test_retries_work_across_releases_in_both_directions(project: Path, database_url: URL) -> None:
    body = DEADPOND | {"power": "healing"}  # The previous release ignores the unknown member.
    with uvicorn_process(database_url) as previous, previous.client() as client:
        first = client.post("/heroes/", json=body, headers=KEY)
        assert first.json() == {"name": "Deadpond", "age": None, "id": 1}
        apply(ONE, project, database_url)
        with uvicorn_process(database_url, project) as following, following.client() as newer:
            assert_replayed(first, newer.post("/heroes/", json=body, headers=KEY))
            other = {"Idempotency-Key": "other"}
            second = newer.post("/heroes/", json=body, headers=other)
            assert second.json()["power"] == "healing"
            assert_replayed(second, client.post("/heroes/", json=body, headers=other))


def assert_replayed(first: httpx2.Response, again: httpx2.Response) -> None:
    assert again.headers["idempotency-replayed"] == "true"
    assert (again.status_code, again.content) == (first.status_code, first.content)
    for header in ("etag", "location", "content-type"):
        assert again.headers[header] == first.headers[header]


HEROES: list[dict[str, Any]] = [
    {
        "name": "all",
        "age": 1,
        "alive": True,
        "born": "1991-02-28",
        "fee": "12.50",
        "kind": "mutant",
        "note": 'a "quoted",\\ line\nand another é',
        "ratio": 0.1,
        "seen": "2026-11-25T06:00:00.123456Z",
        "token": "8e03978e-40d5-43dd-bc93-6894a57f9324",
        "wins": -7,
        "active": False,
        "level": 0,
        "rank": "captain",
    },
    {
        "name": "others",
        "age": None,
        "alive": False,
        "born": "0001-01-01",
        "fee": "-0.01",
        "kind": "human",
        "note": "None",
        "ratio": 1e300,
        "seen": "1970-01-01T00:00:00Z",
        "token": "00000000-0000-0000-0000-000000000000",
        "wins": 0,
        "active": True,
        "level": 7,
        "rank": "recruit",
    },
    dict.fromkeys(
        ("name", "age", "alive", "born", "fee", "kind", "note", "ratio", "seen", "token", "wins")
    )
    | {"name": "none", "active": True, "level": 1, "rank": "recruit"},
]


def test_columns_of_every_type_survive_each_way_in_and_out(
    project: Path, database_url: URL, database: Engine
) -> None:
    with database.connect() as connection:
        connection.execute(text("INSERT INTO hero (name, secret_name) VALUES ('old', 's')"))
    apply(TYPES, project, database_url)
    resource = project / "app" / "heroes.py"
    keys = ", ".join(f'"{key}", "-{key}"' for key in HEROES[0] if key != "age")
    resource.write_text(resource.read_text().replace('"name", "-name"', keys, 1))
    # As the previous release writes: without the new columns.
    with database.connect() as connection:
        connection.execute(text("INSERT INTO hero (name, secret_name) VALUES ('previous', 's')"))
        defaults = text("SELECT active, level, rank FROM hero ORDER BY id")
        assert connection.execute(defaults).all() == [(True, 1, "recruit")] * 2
        connection.execute(text("DELETE FROM hero"))

    with uvicorn_process(database_url, project) as service, service.client() as client:
        for hero in HEROES:
            created = client.post("/heroes/", json=hero | {"secret_name": "s"})
            assert created.status_code == 200, created.text
            assert without_id([created.json()]) == [hero]
        assert without_id(client.get("/heroes/").json()) == HEROES
        for key in HEROES[0]:
            for sort in (key, f"-{key}"):
                assert walk(client, sort) == client.get(f"/heroes/?sort={sort}").json()
        first = f"/heroes/{client.get('/heroes/').json()[0]['id']}"
        for name in ("active", "level", "rank"):
            refused = client.patch(first, json={name: None})
            assert refused.json()["detail"][0]["loc"] == ["body", name]
        naive = client.patch(first, json={"seen": "2026-11-25T06:00:00"})
        assert naive.status_code == 422, "a time without a zone cannot be stored"
        if database.dialect.name == "postgresql":
            assert client.patch(first, json={"note": "a\0"}).status_code == 422
        exports = {
            file_format: client.get(f"/heroes/export?format={file_format}").content
            for file_format in ("ndjson", "csv")
        }
        for file_format, exported in exports.items():
            by_command = command(project, database_url, "export", "-", "--format", file_format)
            assert by_command == exported
        assert without_id(ndjson(exports["ndjson"])) == HEROES
        records = list(csv.DictReader(io.StringIO(exports["csv"].decode(), newline="")))
        assert (records[0]["alive"], records[2]["alive"]) == ("true", "")

        for file_format, exported in exports.items():
            lines = with_secrets(exported, file_format)
            empty(database)
            media_type = {"ndjson": "application/x-ndjson", "csv": "text/csv"}[file_format]
            imported = client.post(
                "/heroes/import", content=lines, headers={"Content-Type": media_type}
            )
            assert imported.status_code == 200, imported.text
            assert without_id(client.get("/heroes/").json()) == HEROES
            empty(database)
            command(project, database_url, "import", "-", "--format", file_format, given=lines)
            assert without_id(client.get("/heroes/").json()) == HEROES


def without_id(heroes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in hero.items() if name != "id"} for hero in heroes]


def walk(client: httpx2.Client, sort: str) -> list[dict[str, Any]]:
    """All heroes, by following the links of pages with one hero."""
    found = []
    path = f"/heroes/?sort={sort}&limit=1"
    while path:
        page = client.get(path)
        assert page.status_code == 200, page.text
        found += page.json()
        path = page.headers.get("link", "")[1:].partition(">")[0]
    return found


def with_secrets(exported: bytes, file_format: str) -> bytes:
    """The lines of an export as lines of an import."""
    if file_format == "ndjson":
        return b"".join(
            json.dumps(hero | {"secret_name": "s"}).encode() + b"\n" for hero in ndjson(exported)
        )
    rows = list(csv.reader(io.StringIO(exported.decode(), newline="")))
    text = io.StringIO()
    csv.writer(text).writerows(
        [*row, "s" if number else "secret_name"] for number, row in enumerate(rows)
    )
    return text.getvalue().encode()


def empty(database: Engine) -> None:
    with database.connect() as connection:
        connection.execute(text("DELETE FROM hero"))
