"""What OpenAPI documents beyond the signatures of the routes: errors, headers and examples."""

from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from app import NAME

PROBLEM_JSON = "application/problem+json"


class Deleted(BaseModel):
    """The body of the response to a delete."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"ok": True}]})

    ok: Literal[True]


class Error(BaseModel):
    """The body of an error."""

    detail: str


class InvalidValue(BaseModel):
    """A value that was refused. `loc` is the path to it."""

    type: str
    loc: list[str | int]
    msg: str


class ValidationProblem(BaseModel):
    """The body of a 422."""

    detail: list[InvalidValue]


class Problem(BaseModel):
    """An error in the format of RFC 9457, if the Accept header has application/problem+json."""

    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    errors: list[InvalidValue] | None = None


_ERRORS = {
    400: "The body could not be read",
    401: "The request has no valid token",
    403: "The scope of the token does not allow this",
    404: "No row has this id",
    409: "The request conflicts with stored data",
    412: "The row has changed",
    413: "The body is too large",
    415: "The Content-Type or the Content-Encoding is not supported",
    422: "The request is not valid",
    503: "The database is unavailable",
}
_ERROR_HEADERS = {
    401: ["WWW-Authenticate"],
    415: ["Accept-Encoding"],
    503: ["Retry-After"],
}
_INVALID = [{"type": "int_parsing", "loc": ["query", "limit"], "msg": "Input should be a number"}]
_HEADERS: dict[str, tuple[str, str | int]] = {
    "X-Request-ID": (
        "The request's own X-Request-ID, or a new one. The log contains it.",
        "8a6b2f0e9c3d4d5f8a6b2f0e9c3d4d5f",
    ),
    "ETag": ("The version of the row, for If-Match and If-None-Match", '"1"'),
    "Location": ("The path of the new row", f"/{NAME}/2"),
    "Idempotency-Replayed": ("An earlier request with this key created the row", "true"),
    "Link": (
        'The next page, with rel="next", if there is one (RFC 8288)',
        f'</{NAME}/?limit=2&after=WyJpZCIsMiwyXQ>; rel="next"',
    ),
    "X-Total-Count": ("The number of rows of all pages, if requested by `total`", 1042),
    "Content-Disposition": ("A name for the file", f'attachment; filename="{NAME}.csv"'),
    "Vary": ("The response depends on the Accept header", "Accept"),
    "Retry-After": ("Seconds after which the client may send the request again", 1),
    "WWW-Authenticate": ("How to authenticate (RFC 6750)", "Bearer"),
    "Accept-Encoding": ("The supported codings (RFC 9110)", "gzip"),
}


def responses(
    *statuses: int, headers: Sequence[str] = (), content: Mapping[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return `responses=` for a route: its headers and content on success, and its other statuses.

    Every route can respond with 422 and 503.
    """
    ok: dict[str, Any] = {"headers": _headers(headers)} | ({"content": content} if content else {})
    found: dict[int | str, dict[str, Any]] = {200: ok}
    for status in (*statuses, 422, 503):
        if status == 304:
            found[status] = {
                "description": "The client has this version",
                "headers": _headers(headers),
            }
        else:
            model = ValidationProblem if status == 422 else Error
            found[status] = {"model": model, "description": _ERRORS[status]}
    return found


def customize(app: FastAPI, *, has_tokens: bool) -> None:
    """Complete the OpenAPI document that FastAPI generates.

    Each response gets its common headers and an example. Each error gets its form of RFC 9457.
    Parameters lose null, which no client can send. Security is documented if tokens are set.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = generate()
        schemas = document.get("components", {}).get("schemas", {})
        for operation in _operations(document):
            _complete(operation, schemas, has_tokens=has_tokens)
        if not has_tokens:
            document.get("components", {}).pop("securitySchemes", None)
        if "Error" in schemas:
            schemas["Problem"] = Problem.model_json_schema(ref_template=_REFERENCE)
            schemas["Problem"].pop("$defs")
        for schema in schemas.values():
            for member in schema.get("properties", {}).values():
                if member.get("default", ...) is None:
                    del member["default"]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


_REFERENCE = "#/components/schemas/{model}"


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def _complete(operation: dict[str, Any], schemas: dict[str, Any], *, has_tokens: bool) -> None:
    for parameter in operation.get("parameters", ()):
        for either in parameter["schema"].pop("anyOf", ()):
            if either != {"type": "null"}:
                parameter["schema"] |= either
    if "security" in operation and not has_tokens:
        del operation["security"]
    elif "security" in operation:
        for status in (401, 403):
            schema = {"$ref": _REFERENCE.format(model="Error")}
            content = {"application/json": {"schema": schema}}
            operation["responses"][str(status)] = {
                "description": _ERRORS[status],
                "content": content,
            }
    for status, response in operation["responses"].items():
        code = int(status) if status.isdigit() else 0
        response.setdefault("headers", {}).update(
            _headers(["X-Request-ID", *_ERROR_HEADERS.get(code, ())])
        )
        if code >= 400:
            _complete_error(code, response)
        else:
            _add_examples(response, schemas)
    _add_examples(operation.get("requestBody", {}), schemas)


def _complete_error(status: int, response: dict[str, Any]) -> None:
    detail = response["description"]
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if status == 422:
        problem["errors"] = _INVALID
    content = response["content"]
    content["application/json"]["example"] = {"detail": _INVALID if status == 422 else detail}
    reference = {"$ref": _REFERENCE.format(model="Problem")}
    content[PROBLEM_JSON] = {"schema": reference, "example": problem}


def _add_examples(body: dict[str, Any], schemas: dict[str, Any]) -> None:
    for content in body.get("content", {}).values():
        example = _example(content.get("schema", {}), schemas)
        if example is not None:
            content.setdefault("example", example)


def _example(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """Return the example of the schema's model, or an array with it."""
    if schema.get("type") == "array":
        example = _example(schema["items"], schemas)
        return None if example is None else [example]
    model = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
    return model.get("examples", [None])[0]


def _headers(names: Sequence[str]) -> dict[str, Any]:
    return {
        name: {
            "description": _HEADERS[name][0],
            "schema": {"type": "integer" if isinstance(_HEADERS[name][1], int) else "string"},
            "example": _HEADERS[name][1],
        }
        for name in names
    }
