"""Bad input is a 4xx that names the reason. It writes no row and is not repeated."""

import json
import socket
import time
from typing import NamedTuple

from sqlalchemy import Engine, text

from app.api.middleware import MAX_BODY_BYTES
from tests.service import Connection, Service

# Only invalid values contain it. A response that contains it repeats the client's input.
MARK = "unsaid"
GOOD = {"name": MARK, "secret_name": MARK}
JSON = "application/json"


class Request(NamedTuple):
    method: str
    path: str
    body: bytes | None = None
    content_type: str | None = JSON
    status: int = 422


def body(members: object) -> bytes:
    return json.dumps(members).encode()


def raw(age: str) -> bytes:
    """A body whose age is not JSON of Python's making."""
    return f'{{"name": "{MARK}", "secret_name": "{MARK}", "age": {age}}}'.encode()


MEMBERS: dict[str, dict[str, object]] = {
    "age past int4": {"age": 2**31},
    "age past int8": {"age": 2**63},
    "age of a hundred digits": {"age": 10**100},
    "age negative": {"age": -1},
    "age true": {"age": True},
    "age false": {"age": False},
    "age as text": {"age": "42"},
    "age as a fraction": {"age": 1.5},
    "age as an array": {"age": [MARK]},
    "age as an object": {"age": {MARK: 1}},
    "name as a number": {"name": 7},
    "name true": {"name": True},
    "name empty": {"name": ""},
    "name of 201 characters": {"name": "n" * 201},
    "name of 8 KB": {"name": "n" * 8192},
    "name with NUL": {"name": f"{MARK}\0"},
    "name with a lone surrogate": {"name": f"{MARK}\ud800"},
    "name null": {"name": None},
    "secret_name as a number": {"secret_name": 7},
    "secret_name empty": {"secret_name": ""},
    "secret_name of 201 characters": {"secret_name": "n" * 201},
    "secret_name with NUL": {"secret_name": f"{MARK}\0"},
    "secret_name with a lone surrogate": {"secret_name": f"{MARK}\udfff"},
    "secret_name null": {"secret_name": None},
}

BODIES: dict[str, tuple[bytes | None, str | None, int]] = {
    "age NaN": (raw("NaN"), JSON, 422),
    "age Infinity": (raw("Infinity"), JSON, 422),
    "age -Infinity": (raw("-Infinity"), JSON, 422),
    "age 1e400": (raw("1e400"), JSON, 422),
    "age of 5000 digits": (raw("9" * 5000), JSON, 400),
    "no body": (None, None, 422),
    "empty body": (b"", JSON, 422),
    "null": (b"null", JSON, 422),
    "a text": (body(MARK), JSON, 422),
    "a NaN": (b"NaN", JSON, 422),
    "an array": (body([GOOD]), JSON, 422),
    "truncated JSON": (body(GOOD)[:-1], JSON, 422),
    "text after the JSON": (body(GOOD) + b"}", JSON, 422),
    "10,000 nested brackets": (b"[" * 10_000, JSON, 400),
    "100,000 nested brackets": (b"[" * 100_000, JSON, 413),
    "30,000 nested and closed brackets": (b"[" * 30_000 + b"]" * 30_000, JSON, 400),
    "form content type": (body(GOOD), "application/x-www-form-urlencoded", 422),
    "text content type": (body(GOOD), "text/plain", 422),
    "malformed content type": (body(GOOD), ";;=", 422),
    "missing content type": (body(GOOD), None, 422),
    "invalid UTF-8": (b'{"name": "\xff", "secret_name": "s"}', JSON, 400),
    "one byte over the limit": (body(GOOD).ljust(MAX_BODY_BYTES + 1), JSON, 413),
}

QUERIES = [
    "offset=-1",
    "offset=9223372036854775808",
    "offset=x",
    "offset=",
    "offset=1.5",
    "offset=" + "9" * 5000,
    "offset=1&offset=2",
    "limit=0",
    "limit=-1",
    "limit=101",
    "limit=9223372036854775808",
    "limit=x",
    "limit=",
    "limit=NaN",
    "limit=1&limit=1",
]

IDS = ["9223372036854775808", "-9223372036854775809", "9" * 5000, "x", "1.5", "NaN", "%00", "true"]

REQUESTS = (
    {f"POST, {what}": Request("POST", "/heroes/", body(GOOD | m)) for what, m in MEMBERS.items()}
    | {f"PATCH, {what}": Request("PATCH", "/heroes/1", body(m)) for what, m in MEMBERS.items()}
    | {f"POST, {what}": Request("POST", "/heroes/", *sent) for what, sent in BODIES.items()}
    | {f"PATCH, {what}": Request("PATCH", "/heroes/1", *sent) for what, sent in BODIES.items()}
    | {
        f"POST, no {name}": Request(
            "POST", "/heroes/", body({k: v for k, v in GOOD.items() if k != name})
        )
        for name in GOOD
    }
    | {f"GET, {query[:40]}": Request("GET", f"/heroes/?{query}") for query in QUERIES}
    | {
        f"{method}, id {hero_id[:20]}": Request(method, f"/heroes/{hero_id}", body({"age": 1}))
        for method in ("GET", "PATCH", "DELETE")
        for hero_id in IDS
    }
    | {
        "PUT": Request("PUT", "/heroes/1", body(GOOD), status=405),
        "POST to one": Request("POST", "/heroes/1", body(GOOD), status=405),
        "DELETE of all": Request("DELETE", "/heroes/", status=405),
        "another path": Request("GET", "/villains/", status=404),
        "another slash": Request("GET", "/heroes/1/", status=404),
    }
)


def rows(database: Engine) -> list[tuple[object, ...]]:
    with database.connect() as connection:
        return [tuple(row) for row in connection.execute(text("SELECT * FROM hero ORDER BY id"))]


def test_bad_input_is_refused_and_the_connection_goes_on(
    connection: Connection, database: Engine
) -> None:
    """Over one connection, so that each request also is the one after the request before it."""
    assert connection.send("POST", "/heroes/", body(GOOD), Content_Type=JSON).status == 200
    before = rows(database)

    wrong: dict[str, object] = {}
    for what, request in REQUESTS.items():
        headers = {"Content_Type": request.content_type} if request.content_type else {}
        answer = connection.send(request.method, request.path, request.body, **headers)
        good = (
            answer.status == request.status
            and answer.json.keys() == {"detail"}
            and answer.json["detail"]
            and (
                request.status != 422
                or all(entry.keys() == {"type", "loc", "msg"} for entry in answer.json["detail"])
            )
            and MARK.encode() not in answer.body
            and answer.headers["X-Request-ID"]
        )
        if not good:
            wrong[what] = answer.status, answer.body
        if rows(database) != before:
            wrong[what] = answer.status, rows(database)
    assert wrong == {}


def test_a_422_says_where_and_what(connection: Connection) -> None:
    answer = connection.send("POST", "/heroes/", body({"name": "", "age": -1}), Content_Type=JSON)
    assert answer.json == {
        "detail": [
            {
                "type": "string_too_short",
                "loc": ["body", "name"],
                "msg": "String should have at least 1 character",
            },
            {
                "type": "greater_than_equal",
                "loc": ["body", "age"],
                "msg": "Input should be greater than or equal to 0",
            },
            {"type": "missing", "loc": ["body", "secret_name"], "msg": "Field required"},
        ]
    }


def test_thousands_of_query_parameters_take_little_time(connection: Connection) -> None:
    query = "&".join(f"{number:x}" for number in range(6000))
    start = time.process_time()
    assert connection.send("GET", f"/heroes/?{query}").status == 200
    assert connection.send("GET", f"/heroes/export?{query}&0").status == 422
    assert time.process_time() - start < 0.5


def test_a_body_of_the_limit_is_taken(connection: Connection) -> None:
    padded = body(GOOD).ljust(MAX_BODY_BYTES)
    assert connection.send("POST", "/heroes/", padded, Content_Type=JSON).status == 200


def test_a_chunked_body_over_the_limit_is_refused_before_its_end(service: Service) -> None:
    chunk = b"2000\r\n" + b" " * 0x2000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as plain:
        plain.sendall(
            b"POST /heroes/ HTTP/1.1\r\nHost: heroes\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        plain.sendall(chunk * (MAX_BODY_BYTES // 0x2000 + 1))  # And never the end.
        assert plain.recv(4096).startswith(b"HTTP/1.1 413 ")
