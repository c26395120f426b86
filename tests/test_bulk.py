"""Bulk import and export: `POST /heroes/import` and `GET /heroes/export`."""

import contextlib
import csv
import gzip
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import URL, Engine, text

from app.api.middleware import MAX_BODY_BYTES, MAX_IMPORT_BYTES
from app.errors import ImportRefused
from app.models import HeroCreate
from app.transfer.formats import MAX_LINE_BYTES, read_rows
from tests.processes import gunicorn
from tests.service import Service, serve, settings
from tests.test_bad_input import MARK, MEMBERS

NDJSON = {"Content-Type": "application/x-ndjson"}
CSV = {"Content-Type": "text/csv"}
# Both formats must escape some of these characters.
NAMES = [
    "Deadpond",
    'Say "hi", twice',
    "two\nlines",
    "back\\slash\ttab",
    "Ünïcödé ✓",
    " ",
    "\r",
    "'",
]
HEROES = [
    {"name": name, "age": None if n % 3 == 0 else n, "secret_name": f"Secret {n}"}
    for n, name in enumerate(NAMES)
]


def ndjson(heroes: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(hero).encode() + b"\n" for hero in heroes)


def as_csv(heroes: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["name", "age", "secret_name"])
    writer.writeheader()
    writer.writerows(heroes)
    return file.getvalue().encode()


def rows(database: Engine) -> list[tuple[Any, ...]]:
    with database.connect() as connection:
        statement = text("SELECT name, age, secret_name FROM hero ORDER BY id")
        return [tuple(row) for row in connection.execute(statement)]


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize(("headers", "body"), [(NDJSON, ndjson(HEROES)), (CSV, as_csv(HEROES))])
def test_an_import_creates_every_hero_in_the_order_of_the_file(
    client: httpx2.Client, database: Engine, headers: dict[str, str], body: bytes, gzipped: bool
) -> None:
    if gzipped:
        headers, body = headers | {"Content-Encoding": "gzip"}, gzip.compress(body)
    response = client.post("/heroes/import", content=body, headers=headers)
    assert (response.status_code, response.json()) == (200, {"created": len(HEROES)})
    assert rows(database) == [tuple(hero.values()) for hero in HEROES]


def test_an_export_contains_the_imported_heroes_without_the_secret_names(
    client: httpx2.Client,
) -> None:
    client.post("/heroes/import", content=ndjson(HEROES), headers=NDJSON)
    exported = client.get("/heroes/export")
    assert exported.headers["content-type"] == "application/x-ndjson"
    assert exported.headers["content-disposition"] == 'attachment; filename="heroes.ndjson"'
    found = [json.loads(line) for line in exported.content.splitlines()]
    expected = [
        {"id": n, "name": hero["name"], "age": hero["age"]} for n, hero in enumerate(HEROES, 1)
    ]
    assert found == expected

    exported = client.get("/heroes/export", params={"format": "csv"})
    assert exported.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert exported.content.startswith(b"id,name,age\r\n1,Deadpond,\r\n")
    records = list(csv.DictReader(io.StringIO(exported.text, newline=""), strict=True))
    assert [
        {
            "id": int(hero["id"]),
            "name": hero["name"],
            "age": int(hero["age"]) if hero["age"] else None,
        }
        for hero in records
    ] == expected


@pytest.mark.parametrize(
    ("accept", "found"),
    [
        ("*/*", "application/x-ndjson"),
        ("text/csv", "text/csv"),
        ("text/csv;q=0.5, application/x-ndjson", "application/x-ndjson"),
        ("text/csv, application/x-ndjson;q=0.5", "text/csv"),
        ("text/csv;q=0", "application/x-ndjson"),
        ("text/csv;q=x, text/html", "application/x-ndjson"),
        ("application/problem+json, TEXT/CSV;q=0.1", "text/csv"),
    ],
)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_format_follows_the_accept_header(
    client: httpx2.Client, accept: str, found: str
) -> None:
    response = client.get("/heroes/export", headers={"Accept": accept})
    assert response.headers["content-type"].startswith(found)
    assert response.headers["vary"] == "Accept"
    both = client.get("/heroes/export?format=csv", headers={"Accept": accept})
    assert both.headers["content-type"].startswith("text/csv")


def test_an_export_accepts_the_filters_of_the_list(client: httpx2.Client) -> None:
    client.post("/heroes/import", content=ndjson(HEROES), headers=NDJSON)
    for filters in ({"name": "Deadpond"}, {"age_min": 2, "age_max": 5}, {"age_max": 0}):
        exported = client.get("/heroes/export", params=filters).content.splitlines()
        assert [json.loads(line) for line in exported] == client.get(
            "/heroes/", params=filters
        ).json()
    for wrong in ("age_min=3&age_max=2", "format=xml", "age_min=1&age_min=2", "age_min=-1"):
        assert client.get(f"/heroes/export?{wrong}").status_code == 422


def test_an_export_of_many_pages_contains_each_hero_once(
    client: httpx2.Client, database: Engine
) -> None:
    many = [{"name": f"n{n}", "secret_name": "s"} for n in range(2500)]
    client.post("/heroes/import", content=ndjson(many), headers=NDJSON)
    for format_, expected in (("ndjson", 2500), ("csv", 2501)):
        lines = client.get("/heroes/export", params={"format": format_}).content.splitlines()
        assert len(lines) == len(set(lines)) == expected
    with database.connect() as connection:  # Exactly two pages are left.
        connection.execute(text("DELETE FROM hero WHERE id > 2000"))
    assert len(client.get("/heroes/export").content.splitlines()) == 2000
    with database.connect() as connection:
        connection.execute(text("DELETE FROM hero"))
    assert client.get("/heroes/export").content == b""
    assert client.get("/heroes/export?format=csv").content == b"id,name,age\r\n"


GOOD_LINE = b'{"name": "a", "secret_name": "b"}\n'
GOOD_CSV = b"name,secret_name\na,b\n"
BOMB = gzip.compress(b" " * 2**20)

# The headers, the body, and the expected errors: the line, and the field if there is one.
WRONG: dict[str, tuple[dict[str, str], bytes, list[list[Any]]]] = {
    "ndjson blank line": (NDJSON, GOOD_LINE + b"\n" + GOOD_LINE, [[2]]),
    "ndjson blank lines": (NDJSON, b"\n  \r\n" + GOOD_LINE, [[1], [2]]),
    "ndjson a hundred blank lines": (NDJSON, GOOD_LINE + b"\n" * 999, [[n] for n in range(2, 102)]),
    "ndjson truncated line": (NDJSON, GOOD_LINE + b'{"name": "a", "secret_na', [[2]]),
    "ndjson not an object": (NDJSON, b"[]\n7\nnull\n" + GOOD_LINE, [[1], [2], [3]]),
    "ndjson two objects on one line": (NDJSON, GOOD_LINE.strip() + GOOD_LINE, [[1]]),
    "ndjson an array of heroes": (NDJSON, b"[" + GOOD_LINE.strip() + b"]", [[1]]),
    "ndjson pretty printed": (NDJSON, b'{\n"name": "a"}', [[1], [2]]),
    "ndjson not utf-8": (NDJSON, GOOD_LINE + GOOD_LINE.replace(b"a", b"\xe9", 2), [[2]]),
    "ndjson utf-16": (NDJSON, GOOD_LINE.decode().encode("utf-16-le"), [[1], [2]]),
    "ndjson nested": (NDJSON, b"[" * 50_000 + b"\n", [[1]]),
    "ndjson long line": (
        NDJSON,
        GOOD_LINE + b"x" * 300_000 + b"\n{}\n",
        [[2], [3, "name"], [3, "secret_name"]],
    ),
    "ndjson fields of several lines": (
        NDJSON,
        b'{"name": "", "secret_name": "s", "age": "4"}\n' + GOOD_LINE + b'{"age": -1}\n',
        [[1, "name"], [1, "age"], [3, "name"], [3, "age"], [3, "secret_name"]],
    ),
    "csv empty": (CSV, b"", [[1, "name"], [1, "secret_name"]]),
    "csv missing column": (CSV, b"name,age\na,1\n", [[1, "secret_name"]]),
    "csv repeated column": (CSV, b"name,secret_name,name\na,b,c\n", [[1, "name"]]),
    "csv header in capitals": (CSV, b"Name,Secret_name\na,b\n", [[1, "name"], [1, "secret_name"]]),
    "csv too few fields": (CSV, GOOD_CSV + b"a\n", [[3]]),
    "csv too many fields": (CSV, GOOD_CSV + b"a,b,c\na,b\n", [[3]]),
    "csv blank line": (CSV, GOOD_CSV + b"\na,b\n", [[3]]),
    "csv error after a quoted newline": (CSV, GOOD_CSV + b'"a\nb",c\n,d\n', [[5, "name"]]),
    "csv open quote": (CSV, GOOD_CSV + b'"a,b\n', [[3]]),
    "csv stray quote": (CSV, GOOD_CSV + b'"a"x,b\n', [[3]]),
    "csv semicolons": (CSV, b"name;secret_name\na;b\n", [[1, "name"], [1, "secret_name"]]),
    "csv latin-1": (CSV, GOOD_CSV + b"\xe9,b\n", [[3]]),
    "csv utf-16": (CSV, GOOD_CSV.decode().encode("utf-16"), [[1]]),
    "csv lone carriage returns": (CSV, b"name,secret_name\ra,b\r", [[1]]),
    "csv long record": (CSV, GOOD_CSV + b'"' + b"x\n" * MAX_LINE_BYTES, [[3]]),
    "csv NUL": (CSV, GOOD_CSV + b"a\0,b\n", [[3, "name"]]),
    "csv ages": (
        CSV,
        b"name,age,secret_name\na,1.0,b\na,-1,b\na,x,b\na,99999999999,b\na,1_0,b\na,"
        + "٣".encode()
        + b",b\na,"
        + b"9" * 5000
        + b",b\n",
        [[n, "age"] for n in range(2, 9)],
    ),
    "gzip header on plain text": (NDJSON | {"Content-Encoding": "gzip"}, GOOD_LINE, [[1]]),
    "gzip truncated": (NDJSON | {"Content-Encoding": "gzip"}, gzip.compress(GOOD_LINE)[:-8], [[2]]),
    "gzip bomb": (NDJSON | {"Content-Encoding": "gzip"}, BOMB, [[1]]),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_invalid_import_is_refused_with_line_and_field_and_writes_nothing(
    client: httpx2.Client, database: Engine, name: str
) -> None:
    headers, body, where = WRONG[name]
    response = client.post("/heroes/import", content=body, headers=headers)
    assert response.status_code == 422
    assert [entry["loc"] for entry in response.json()["detail"]] == [["body", *at] for at in where]
    assert all(set(entry) == {"type", "loc", "msg"} for entry in response.json()["detail"])
    assert rows(database) == []


def test_an_invalid_last_line_undoes_the_whole_import(
    client: httpx2.Client, database: Engine
) -> None:
    response = client.post("/heroes/import", content=GOOD_LINE * 5000 + b"{}\n", headers=NDJSON)
    assert [entry["loc"] for entry in response.json()["detail"]] == [
        ["body", 5001, "name"],
        ["body", 5001, "secret_name"],
    ]
    assert rows(database) == []


def test_an_import_with_many_errors_returns_the_first_hundred(client: httpx2.Client) -> None:
    response = client.post("/heroes/import", content=b"7\n" * 1000, headers=NDJSON)
    assert [entry["loc"][1] for entry in response.json()["detail"]] == list(range(1, 101))


GOOD: dict[str, tuple[dict[str, str], bytes, int]] = {
    "ndjson empty": (NDJSON, b"", 0),
    "ndjson blank lines at the end": (NDJSON, GOOD_LINE + b"\n  \r\n\n", 1),
    "ndjson blank lines only": (NDJSON, b"\n\n", 0),
    "ndjson without its last newline": (NDJSON, GOOD_LINE + GOOD_LINE.rstrip(), 2),
    "ndjson CRLF": (NDJSON, GOOD_LINE.replace(b"\n", b"\r\n"), 1),
    "ndjson BOM": (NDJSON, b"\xef\xbb\xbf" + GOOD_LINE, 1),
    "ndjson unknown members": (NDJSON, b'{"id": 7, "name": "a", "secret_name": "b", "x": {}}', 1),
    "ndjson with another media type": ({"Content-Type": "application/jsonl"}, GOOD_LINE, 1),
    "csv header only": (CSV, b"name,secret_name\r\n", 0),
    "csv with reordered and additional columns": (CSV, b"x,secret_name,id,name\r\nx,b,7,a\r\n", 1),
    "csv BOM": (CSV, b"\xef\xbb\xbf" + GOOD_CSV, 1),
    "csv BOM and quotes": (CSV, b'\xef\xbb\xbf"name","secret_name"\r\n"a","b"', 1),
    "csv with parameters": (
        {"Content-Type": 'Text/CSV; charset="UTF-8"; header=present'},
        GOOD_CSV,
        1,
    ),
    "csv with the encoding x-gzip": (
        CSV | {"Content-Encoding": "X-Gzip"},
        gzip.compress(GOOD_CSV),
        1,
    ),
    "two gzip members": (
        NDJSON | {"Content-Encoding": "gzip"},
        gzip.compress(GOOD_LINE) + gzip.compress(GOOD_LINE),
        2,
    ),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_files_from_other_programs_are_accepted(
    client: httpx2.Client, database: Engine, name: str
) -> None:
    headers, body, count = GOOD[name]
    response = client.post("/heroes/import", content=body, headers=headers)
    assert (response.status_code, response.json()) == (200, {"created": count})
    assert rows(database) == [("a", None, "b")] * count


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, "application/x-ndjson"),
        ({"Content-Type": "application/json"}, "application/x-ndjson"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "text/csv"),
        ({"Content-Type": "text/csv; charset=latin-1"}, "utf-8"),
        (NDJSON | {"Content-Encoding": "br"}, "gzip"),
        (NDJSON | {"Content-Encoding": "gzip, gzip"}, "gzip"),
    ],
)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_import_with_an_unsupported_type_or_encoding_is_415(
    client: httpx2.Client, database: Engine, headers: dict[str, str], expected: str
) -> None:
    response = client.post("/heroes/import", content=GOOD_LINE, headers=headers)
    assert response.status_code == 415
    assert expected in response.json()["detail"]
    assert rows(database) == []


@pytest.mark.parametrize("name", MEMBERS)
def test_an_import_refuses_the_same_heroes_as_a_create(name: str) -> None:
    hero = {"name": MARK, "secret_name": MARK} | MEMBERS[name]
    with pytest.raises(ImportRefused) as refused:
        list(read_rows(HeroCreate, io.BytesIO(json.dumps(hero).encode()), "ndjson"))
    with pytest.raises(ValidationError) as of_a_create:
        HeroCreate.model_validate_json(json.dumps(hero))
    assert MARK not in str(refused.value)
    [wrong] = refused.value.errors
    [expected] = of_a_create.value.errors()
    assert (wrong.type, wrong.field) == (expected["type"], next(iter(expected["loc"]), None))


any_text = st.text(min_size=1, max_size=200).filter(lambda text: "\0" not in text)


@given(st.lists(st.tuples(any_text, st.none() | st.integers(0, 2**31 - 1), any_text), max_size=5))
def test_both_formats_preserve_every_valid_hero(found: list[tuple[Any, ...]]) -> None:
    heroes = [dict(zip(("name", "age", "secret_name"), hero, strict=True)) for hero in found]
    assert list(read_rows(HeroCreate, io.BytesIO(ndjson(heroes)), "ndjson")) == heroes
    assert list(read_rows(HeroCreate, io.BytesIO(as_csv(heroes)), "csv")) == heroes


@given(st.binary(max_size=500) | st.text(alphabet='a,"\n\r{}:', max_size=50).map(str.encode))
def test_any_bytes_are_read_as_heroes_or_refused(body: bytes) -> None:
    for body_, gzipped in ((body, False), (body, True), (gzip.compress(body), True)):
        for start, file_format in ((b"", "ndjson"), (b"", "csv"), (b"name,secret_name\n", "csv")):
            file = io.BytesIO(body_ if gzipped else start + body_)
            with contextlib.suppress(ImportRefused):
                list(read_rows(HeroCreate, file, file_format, gzipped=gzipped))  # type: ignore[arg-type]


HEAD = b"POST /heroes/import HTTP/1.1\r\nHost: heroes\r\nContent-Type: application/x-ndjson\r\n"


def test_a_content_length_of_five_gigabytes_is_refused_immediately(service: Service) -> None:
    for path, limit in ((b"/heroes/import", MAX_IMPORT_BYTES), (b"/heroes/", MAX_BODY_BYTES)):
        with socket.create_connection(("127.0.0.1", service.port), 30) as connection:
            head = HEAD.replace(b"/heroes/import", path)
            connection.sendall(head + b"Content-Length: 5000000000\r\n\r\n12345")
            response = b""
            while not response.endswith(b"}"):
                response += connection.recv(65536)
        assert response.startswith(b"HTTP/1.1 413 ")
        assert b"The body is longer than %d bytes" % limit in response


def test_an_import_with_a_lost_connection_writes_nothing(
    service: Service, database: Engine
) -> None:
    body = GOOD_LINE * 3000
    for framing_and_body in (
        b"Content-Length: %d\r\n\r\n" % (len(body) + 1) + body,
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n",
    ):
        with socket.create_connection(("127.0.0.1", service.port), 30) as connection:
            connection.sendall(HEAD + framing_and_body)
    with service.client() as client:
        assert client.post("/heroes/import", content=GOOD_LINE, headers=NDJSON).status_code == 200
    assert len(rows(database)) == 1


def test_a_slow_import_holds_no_database_connection(database_url: URL) -> None:
    """With a pool of one connection, other requests succeed during the import."""
    with serve(settings(database_url, database_pool_size=1)) as service, service.client() as client:
        release = threading.Event()

        def slowly() -> Iterator[bytes]:
            yield GOOD_LINE * 100
            release.wait(20)
            yield GOOD_LINE

        with service.client() as importing:
            responses: list[httpx2.Response] = []
            thread = threading.Thread(
                target=lambda: responses.append(
                    importing.post("/heroes/import", content=slowly(), headers=NDJSON)
                )
            )
            thread.start()
            assert client.get("/heroes/").json() == []
            assert client.post("/heroes/", json=json.loads(GOOD_LINE)).status_code == 200
            release.set()
            thread.join(20)
        assert responses[0].json() == {"created": 101}


def test_an_export_is_aborted_if_the_database_fails_midway(
    service: Service, database: Engine
) -> None:
    """A client detects the incomplete export, because the final chunk is missing."""
    with service.client() as client:
        client.post("/heroes/import", content=GOOD_LINE * 40_000, headers=NDJSON)
        with client.stream("GET", "/heroes/export") as response:
            assert response.status_code == 200
            lines = response.iter_raw(1000)
            next(lines)
            with database.connect() as connection:
                connection.execute(text("ALTER TABLE hero RENAME TO gone"))
            with pytest.raises(httpx2.RemoteProtocolError):
                list(lines)
        assert client.get("/heroes/export").status_code == 503


def peak_memory(pid: int) -> int:
    """The largest resident set so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_bulk_import_and_export_use_constant_memory(
    database_url: URL, tmp_path: Path, figures: list[str]
) -> None:
    count = 200_000
    with gunicorn(database_url, tmp_path, WEB_CONCURRENCY="1") as server:
        [worker] = server.children

        def post(lines: int) -> None:
            body = (GOOD_LINE * 1000 for _ in range(lines // 1000))
            response = httpx2.post(f"{url}/heroes/import", content=body, headers=NDJSON, timeout=60)
            assert response.json() == {"created": lines}

        def export() -> int:
            with httpx2.stream("GET", f"{url}/heroes/export", timeout=60) as response:
                return sum(part.count(b"\n") for part in response.iter_raw())

        url = f"http://127.0.0.1:{server.port}"
        post(2000)
        assert export() == 2000
        before = peak_memory(worker)
        start = time.monotonic()
        post(count)
        import_seconds = time.monotonic() - start
        assert export() == count + 2000
        export_seconds = time.monotonic() - start - import_seconds
        more = peak_memory(worker) - before
        # All heroes as objects take 100 MB, and their lines 7 MB in each direction.
        assert more < 5_000_000
        figures.append(
            f"{count:,} heroes over HTTP: {count / import_seconds:,.0f} per second imported,"
            f" {count / export_seconds:,.0f} exported, peak memory of the worker"
            f" {more / 1e6:.1f} MB higher than for 2,000"
        )
