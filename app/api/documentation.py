"""What OpenAPI says of the routes beyond their signatures: headers, codes, errors, examples.

Each constant goes to the decorator of the route that it is named for.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from app import errors
from app.api.problems import CONFLICT, PROBLEM_JSON, PROBLEMS, UNAVAILABLE, Problem

HERO = {"name": "Rusty-Man", "age": 48, "id": 2}
_NEW_HERO = {"name": "Rusty-Man", "age": 48, "secret_name": "Tommy Sharp"}
_ID = "8a6b2f0e9c3d4d5f8a6b2f0e9c3d4d5f"

_HEADERS: dict[str, tuple[str, str | int]] = {
    "X-Request-ID": ("The request's own, or a new one: it is in the service's log", _ID),
    "ETag": ("The hero's version, for If-Match and If-None-Match", '"1"'),
    "Location": ("The path of the new hero", "/heroes/2"),
    "Idempotency-Replayed": ("The hero was made by an earlier request with this key", "true"),
    "Link": (
        'The next page, with rel="next", while there is one (RFC 8288)',
        '</heroes/?limit=2&after=WyJpZCIsMiwyXQ>; rel="next"',
    ),
    "X-Total-Count": ("How many heroes all pages have, if asked for by total", 1042),
    "Content-Disposition": ("A name for the file", 'attachment; filename="heroes.csv"'),
    "Vary": ("That the answer depends on Accept", "Accept"),
    "Retry-After": ("Seconds after which the request may be sent again", 1),
    "WWW-Authenticate": ("How to authenticate (RFC 6750)", "Bearer"),
    "Accept-Encoding": ("The codings that are taken (RFC 9110)", "gzip"),
}


def _headers(*names: str) -> dict[str, Any]:
    return {
        name: {
            "description": description,
            "schema": {"type": "integer" if isinstance(example, int) else "string"},
            "example": example,
        }
        for name, (description, example) in _HEADERS.items()
        if name in ("X-Request-ID", *names)
    }


def _ok(description: str, example: Any, *headers: str) -> dict[str, Any]:
    content = {"application/json": {"example": example}}
    return {"description": description, "headers": _headers(*headers), "content": content}


def leave_null_out(app: FastAPI) -> None:
    """Takes null out of what OpenAPI says of parameters: one may be left out, but none is null."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        for methods in schema["paths"].values():
            for operation in methods.values():
                for parameter in operation["parameters"]:
                    for either in parameter["schema"].pop("anyOf", ()):
                        if either != {"type": "null"}:
                            parameter["schema"] |= either
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


_STRING = {"type": "string"}
_INVALID = [{"type": "int_parsing", "loc": ["query", "limit"], "msg": "Input should be a number"}]
_ENTRY = {
    "type": "object",
    "required": ["type", "loc", "msg"],
    "properties": {
        "type": _STRING,
        "loc": {"type": "array", "items": {"type": ["string", "integer"]}},
        "msg": _STRING,
    },
}


def _error(problem: Problem, *headers: str) -> dict[str, Any]:
    """An error in both of its forms, the second of them RFC 9457's."""
    status, detail, _ = problem
    title = HTTPStatus(status).phrase
    return {
        "description": detail,
        "headers": _headers(*headers),
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["detail"],
                    "properties": {"detail": _STRING},
                },
                "example": {"detail": detail},
            },
            PROBLEM_JSON: {
                "schema": {
                    "type": "object",
                    "required": ["type", "title", "status", "detail"],
                    "properties": {
                        "type": _STRING,
                        "title": {"const": title},
                        "status": {"const": status},
                        "detail": _STRING,
                        "errors": {"type": "array", "items": _ENTRY},
                    },
                },
                "example": {
                    "type": "about:blank",
                    "title": title,
                    "status": status,
                    "detail": detail,
                },
            },
        },
    }


def _invalid() -> dict[str, Any]:
    answer = _error(Problem(422, "The request is not valid"))
    answer["content"]["application/json"] = {
        "schema": {
            "type": "object",
            "required": ["detail"],
            "properties": {"detail": {"type": "array", "items": _ENTRY}},
        },
        "example": {"detail": _INVALID},
    }
    answer["content"][PROBLEM_JSON]["example"]["errors"] = _INVALID
    return answer


_ERRORS: dict[int, dict[str, Any]] = {
    400: _error(Problem(400, "There was an error parsing the body")),
    401: _error(PROBLEMS[errors.NotAuthenticated], "WWW-Authenticate"),
    403: _error(PROBLEMS[errors.NotAuthorized]),
    404: _error(PROBLEMS[errors.HeroNotFound]),
    409: _error(CONFLICT),
    412: _error(PROBLEMS[errors.HeroChanged]),
    413: _error(Problem(413, "The body is longer than 65536 bytes")),
    415: _error(Problem(415, "The Content-Type is not one of these"), "Accept-Encoding"),
    422: _invalid(),
    503: _error(UNAVAILABLE, "Retry-After"),
}

# Where API_TOKENS are set.
OF_WRITES: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (401, 403)}


def _route(answers: Mapping[int, dict[str, Any]], *statuses: int, **extra: Any) -> dict[str, Any]:
    """The arguments for a route's decorator."""
    request_id = {
        "name": "X-Request-ID",
        "in": "header",
        "description": "1 to 128 visible characters that answer and log will have",
        "schema": _STRING,
        "example": _ID,
    }
    return {
        "responses": {**answers} | {status: _ERRORS[status] for status in (*statuses, 422, 503)},
        "openapi_extra": {"parameters": [request_id], **extra},
    }


def _body(**examples: Any) -> dict[str, Any]:
    named = {name: {"value": example} for name, example in examples.items()}
    return {"content": {"application/json": {"examples": named}}}


_NDJSON = '{"name":"Deadpond","age":null,"id":1}\n{"name":"Rusty-Man","age":48,"id":2}\n'
_CSV = "id,name,age\r\n1,Deadpond,\r\n2,Rusty-Man,48\r\n"
_NEW_NDJSON = '{"name":"Deadpond","secret_name":"Dive Wilson"}\n'
_NEW_CSV = "name,age,secret_name\r\nDeadpond,,Dive Wilson\r\n"


def _files(ndjson: str, comma_separated: str) -> dict[str, Any]:
    return {
        "application/x-ndjson": {"schema": _STRING, "example": ndjson},
        "text/csv": {"schema": _STRING, "example": comma_separated},
    }


CREATE = _route(
    {200: _ok("The new hero", HERO, "ETag", "Location", "Idempotency-Replayed")},
    *(400, 409, 413),
    requestBody=_body(
        hero=_NEW_HERO, without_an_age={"name": "Deadpond", "secret_name": "Dive Wilson"}
    ),
)
LIST = _route({200: _ok("A page of heroes", [HERO], "Link", "X-Total-Count")})
READ = _route(
    {
        200: _ok("The hero", HERO, "ETag"),
        304: {"description": "The client has this version", "headers": _headers("ETag")},
    },
    404,
)
UPDATE = _route(
    {200: _ok("The hero as it is now", HERO, "ETag")},
    *(400, 404, 409, 412, 413),
    requestBody=_body(birthday={"age": 49}, no_age={"age": None}),
)
DELETE = _route({200: _ok("There is no such hero any more", {"ok": True})}, 404, 412)
EXPORT = _route(
    {
        200: {
            "description": "A line for each hero",
            "headers": _headers("Content-Disposition", "Vary"),
            "content": _files(_NDJSON, _CSV),
        }
    }
)
IMPORT = _route(
    {200: _ok("How many heroes were created", {"created": 1})},
    *(400, 409, 413, 415),
    requestBody={"required": True, "content": _files(_NEW_NDJSON, _NEW_CSV)},
)
IMPORT["openapi_extra"]["parameters"].append(
    {
        "name": "Content-Encoding",
        "in": "header",
        "description": "That the body is compressed",
        "schema": {"enum": ["gzip", "x-gzip", "identity"]},
        "example": "gzip",
    }
)
