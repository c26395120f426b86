"""What OpenAPI documents beyond the signatures of the routes: errors and headers."""

from collections.abc import Iterable
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

PROBLEM_JSON = "application/problem+json"
_INVALID = [{"type": "int_parsing", "loc": ["query", "limit"], "msg": "Input should be a number"}]


def _example(**members: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [members]})


class Deleted(BaseModel):
    """The body of the response to a delete."""

    model_config = _example(ok=True)
    ok: Literal[True]


class Error(BaseModel):
    """The body of an error."""

    model_config = _example(detail="The database is unavailable")
    detail: str


class InvalidValue(BaseModel):
    """A value that was refused. `loc` is the path to it."""

    type: str
    loc: list[str | int]
    msg: str


class ValidationProblem(BaseModel):
    """The body of a 422."""

    model_config = _example(detail=_INVALID)
    detail: list[InvalidValue]


class Problem(BaseModel):
    """An error in the format of RFC 9457, if the Accept header has application/problem+json."""

    model_config = _example(
        type="about:blank",
        title="Service Unavailable",
        status=503,
        detail="The database is unavailable",
    )
    type: Literal["about:blank"]
    title: str
    status: int
    detail: str
    errors: list[InvalidValue] | None = None


_DESCRIPTIONS = {
    304: "The client has this version",
    400: "The body could not be read",
    401: "The request has no valid token",
    403: "The scope of the token does not allow this",
    404: "No row has this id",
    408: "The body took too long",
    409: "The request conflicts with stored data",
    412: "The row has changed",
    413: "The body is too large",
    415: "The Content-Type or the Content-Encoding is not supported",
    422: "The request is not valid",
    503: "The database is unavailable, or the service is busy",
    507: "The service has no space to store the data",
}
# The errors of every route, for `include_router`.
ERRORS: dict[int | str, dict[str, Any]] = {
    422: {"model": ValidationProblem, "description": _DESCRIPTIONS[422]},
    503: {"model": Error, "description": _DESCRIPTIONS[503]},
}
HEADERS: dict[str, tuple[str, str | int]] = {
    "X-Request-ID": (
        "The request's own id, or a new one. The log contains it.",
        "8a6b2f0e9c3d4d5f",
    ),
    "ETag": ("The version of the row, for If-Match and If-None-Match", '"1"'),
    "Location": ("The path of the new row", "/{table}/2"),
    "Idempotency-Replayed": ("An earlier request with this key created the row", "true"),
    "Link": ("The next page, if there is one (RFC 8288)", '</{table}/?after=WyJ>; rel="next"'),
    "X-Total-Count": ("The number of rows of all pages, if requested by `total`", 1042),
    "Content-Disposition": ("A name for the file", 'attachment; filename="{table}.csv"'),
    "Vary": ("The response depends on the Accept header", "Accept"),
    "Retry-After": ("Seconds after which the client may send the request again", 1),
    "WWW-Authenticate": ("How to authenticate (RFC 6750)", "Bearer"),
    "Accept-Encoding": ("The supported codings (RFC 9110)", "gzip"),
}
_ERROR_HEADERS = {"401": ["WWW-Authenticate"], "415": ["Accept-Encoding"], "503": ["Retry-After"]}
# Parameters by name: the statuses that they add, and the headers of the successful response.
_OF_PARAMETERS: dict[str, tuple[list[int], list[str]]] = {
    "if-match": ([412], ["ETag"]),
    "if-none-match": ([304], ["ETag"]),
    "idempotency-key": ([], ["ETag", "Location", "Idempotency-Replayed"]),
    "after": ([], ["Link", "X-Total-Count"]),
    "format": ([507], ["Content-Disposition", "Vary"]),
    "Content-Encoding": ([408, 415, 507], []),
}


def customize(app: FastAPI, *, has_tokens: bool) -> None:
    """Complete the OpenAPI document that FastAPI generates.

    Each operation gets the statuses and headers that follow from its parameters and its body, and
    each error its form of RFC 9457. Parameters lose null, which no client can send. Security is
    documented only if tokens are set.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = generate()
        components = document.get("components", {})
        schemas = components.get("schemas", {})
        if not has_tokens:
            components.pop("securitySchemes", None)
        if "Error" in schemas:
            schemas["Problem"] = Problem.model_json_schema(ref_template=_REFERENCE)
            schemas["Problem"].pop("$defs")
        tags = {
            tag
            for path in document["paths"].values()
            for each in path.values()
            for tag in each.get("tags", ())
        }
        document["tags"] = [{"name": tag} for tag in sorted(tags)]
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if not has_tokens:
                    operation.pop("security", None)
                _complete(path, method, operation)
        for schema in schemas.values():
            for member in schema.get("properties", {}).values():
                if member.get("default", ...) is None:
                    del member["default"]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


_REFERENCE = "#/components/schemas/{model}"


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    parameters = operation.get("parameters", [])
    statuses = [401] if "security" in operation else []
    statuses += [403] if "security" in operation and method != "get" else []
    statuses += [404] if "{" in path else []
    statuses += [400, 413] if "requestBody" in operation else []
    statuses += [409] if "requestBody" in operation or method == "delete" else []
    headers: list[str] = []
    for parameter in parameters:
        for either in parameter["schema"].pop("anyOf", ()):
            if either != {"type": "null"}:
                parameter["schema"] |= either
        more_statuses, more_headers = _OF_PARAMETERS.get(parameter["name"], ([], []))
        statuses += more_statuses
        headers += more_headers if method != "delete" else []
    responses = operation["responses"]
    for status in statuses:
        responses.setdefault(str(status), {"description": _DESCRIPTIONS[status]})
    for status, response in responses.items():
        if status >= "4":
            model = "ValidationProblem" if status == "422" else "Error"
            response["content"] = {
                "application/json": _content(model),
                PROBLEM_JSON: _content("Problem"),
            }
        own = headers if status < "4" else _ERROR_HEADERS.get(status, [])
        response["headers"] = _headers(["X-Request-ID", *own], path.split("/")[1])


def _content(model: str) -> dict[str, Any]:
    return {"schema": {"$ref": _REFERENCE.format(model=model)}}


def _headers(names: Iterable[str], table: str) -> dict[str, Any]:
    return {
        name: {
            "description": description,
            "schema": {"type": "integer" if isinstance(example, int) else "string"},
            "example": example.replace("{table}", table) if isinstance(example, str) else example,
        }
        for name, (description, example) in ((name, HEADERS[name]) for name in names)
    }
