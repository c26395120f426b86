"""Exceptions to responses, in one table."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from sqlalchemy import ForeignKeyConstraint
from sqlalchemy.exc import StatementError
from sqlalchemy.orm.exc import StaleDataError
from sqlmodel import SQLModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app import errors
from app.api.openapi import PROBLEM_JSON
from app.db.engine import is_foreign_key_violation, sqlstate

logger = logging.getLogger(__name__)


class ErrorResponse(NamedTuple):
    """The response to an exception. Without a detail, its message is the detail."""

    status: int
    detail: Any = None
    headers: Mapping[str, str] | None = None


_RETRY = MappingProxyType({"Retry-After": "1"})
_UNAVAILABLE = ErrorResponse(503, "The database is unavailable", _RETRY)
_BEHIND = ErrorResponse(503, "The database's schema is behind: run alembic upgrade head", _RETRY)
_FORBIDDEN = ErrorResponse(503, "The service's role lacks privileges on the schema", _RETRY)
_CONFLICT = ErrorResponse(409, "The request conflicts with stored data")
_UNKNOWN = "The database did not confirm the write: it may have happened"
_BAD_VALUE = ErrorResponse(
    422, [{"type": "data_exception", "loc": ["body"], "msg": "A value cannot be stored"}]
)

EXCEPTIONS: dict[type[Exception], ErrorResponse] = {
    errors.NotFound: ErrorResponse(404),
    errors.Changed: ErrorResponse(412),
    errors.ImportTooLarge: ErrorResponse(413, "The import is too large"),
    errors.TooManySpools: ErrorResponse(
        503, "Too many imports and exports are in progress", {"Retry-After": "10"}
    ),
    errors.StorageFull: ErrorResponse(507, "There is no space to store the data"),
    errors.NotAuthenticated: ErrorResponse(
        401, "Not authenticated", {"WWW-Authenticate": "Bearer"}
    ),
    errors.NotAuthorized: ErrorResponse(403, "Not authorized"),
    errors.DatabaseTimeout: ErrorResponse(503, "The database did not respond in time", _RETRY),
    errors.DatabaseUnavailable: _UNAVAILABLE,
    errors.Overloaded: ErrorResponse(503, "The database is overloaded", _RETRY),
    errors.SchemaBehind: _BEHIND,
    errors.WrongDatabase: ErrorResponse(503, None, _RETRY),
    errors.Draining: ErrorResponse(503, "This worker is stopping", _RETRY),
    StaleDataError: _CONFLICT,  # The ORM wrote a row that has changed since it was read.
}

# By SQLSTATE, or by its class, the first two characters
# (https://www.postgresql.org/docs/current/errcodes-appendix.html). All other states mean that this
# code sent a wrong statement: a bug, and a 500.
SQLSTATES: dict[str | None, ErrorResponse] = {
    None: _UNAVAILABLE,  # The connection was refused or lost.
    "08": _UNAVAILABLE,  # connection exception
    "22": _BAD_VALUE,  # data exception: the column's type cannot hold the client's value
    "23": _CONFLICT,  # integrity constraint violation
    "25006": _UNAVAILABLE,  # read-only transaction: a standby, or a former primary
    "25P03": _UNAVAILABLE,  # idle in transaction timeout: the server's setting ended the session
    "25P04": _UNAVAILABLE,  # transaction timeout: the same
    "26": _UNAVAILABLE,  # unknown prepared statement: a pooler has switched the connection
    "28": _UNAVAILABLE,  # invalid authorization: the role or its password has changed
    "3D": _UNAVAILABLE,  # invalid catalog name: the database was dropped or renamed
    "3F": _BEHIND,  # invalid schema name: its migrations have not been run
    "40": _UNAVAILABLE,  # transaction rollback: serialization failure, deadlock
    "42501": _FORBIDDEN,  # insufficient privilege
    "42703": _BEHIND,  # undefined column
    "42P01": _BEHIND,  # undefined table
    "42P05": _UNAVAILABLE,  # duplicate prepared statement: a pooler has switched the connection
    "44": _CONFLICT,  # WITH CHECK OPTION violation: a view refuses the row
    "53": _UNAVAILABLE,  # insufficient resources: connections, memory, disk
    "54": _BAD_VALUE,  # program limit exceeded: a value is too long for an index
    "55006": _UNAVAILABLE,  # object in use
    "55P03": _UNAVAILABLE,  # lock not available
    "57": _UNAVAILABLE,  # operator intervention: cancelled, idle timeout, stopping, starting
    "58": _UNAVAILABLE,  # system error: input or output failed
    "72": _UNAVAILABLE,  # snapshot too old
    "F0": _UNAVAILABLE,  # configuration file error
    "HV": _UNAVAILABLE,  # foreign data wrapper: the other server failed
    "P0001": _CONFLICT,  # RAISE EXCEPTION: a trigger refuses the row
    "XX": _UNAVAILABLE,  # internal error: the server has a bug, or its data is corrupted
}


def register(app: FastAPI) -> None:
    """Register the handlers. There is none for `Exception`: the middleware logs it as a bug."""
    for error in EXCEPTIONS:
        app.add_exception_handler(error, _handle)
    app.add_exception_handler(errors.OutcomeUnknown, _handle_unknown_outcome)
    app.add_exception_handler(StatementError, _handle_database_error)
    app.add_exception_handler(RequestValidationError, _handle_invalid)
    app.add_exception_handler(errors.ImportRefused, _handle_refused_import)
    app.add_exception_handler(HTTPException, _handle_http)


def respond(
    request: Request, status: int, detail: Any, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return FastAPI's `{"detail": ...}`, or RFC 9457's form if the client accepts it."""
    headers = {**(headers or {}), "Vary": "Accept"}
    if PROBLEM_JSON not in request.headers.get("accept", ""):
        return JSONResponse({"detail": detail}, status, headers)
    members = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    if isinstance(detail, str):
        members["detail"] = detail
    else:
        members |= {"detail": "The request is not valid", "errors": detail}
    return JSONResponse(members, status, headers, media_type=PROBLEM_JSON)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    response = EXCEPTIONS[type(error)]
    if response.status >= 500:
        logger.warning(": ".join(filter(None, [response.detail, str(error)])))
    return respond(request, response.status, response.detail or str(error), response.headers)


async def _handle_unknown_outcome(request: Request, error: Exception) -> JSONResponse:
    logger.warning("%s: %s", _UNKNOWN, error.__cause__)
    # With a key, the retry gets the response of the first request if it did write.
    has_key = "idempotency-key" in request.headers
    return respond(request, 503, _UNKNOWN, _RETRY if has_key else None)


async def _handle_database_error(request: Request, error: Any) -> JSONResponse:
    state = sqlstate(error.orig)
    if is_foreign_key_violation(error.orig):
        response: ErrorResponse | None = _of_foreign_key(request, error.orig)
    else:
        response = SQLSTATES.get(state) or SQLSTATES.get(state and state[:2])
    if response is None:
        raise error
    # Only the primary message: the server's detail quotes the row, secrets included.
    diagnostics = getattr(error.orig, "diag", None)
    reason = getattr(diagnostics, "message_primary", None) or str(error.orig)
    logger.warning("%s: %s", response.detail, reason, extra={"sqlstate": state})
    return respond(request, *response)


def _of_foreign_key(request: Request, error: Any) -> ErrorResponse:
    """Return 409 for the delete of a row in use, or 422 for a value that refers to no row.

    The value is wrong like any other invalid value, so the response names its member.
    """
    # SQLite does not name the constraint. If there is only one, it is this one.
    name = getattr(getattr(error, "diag", None), "constraint_name", None)
    keys = [
        constraint
        for table in SQLModel.metadata.tables.values()
        for constraint in table.constraints
        if isinstance(constraint, ForeignKeyConstraint) and name in (None, constraint.name)
    ]
    key = keys[0] if len(keys) == 1 else None
    if request.method == "DELETE":
        rows = f"Rows of the table {key.table.name}" if key else "Rows of another table"
        return ErrorResponse(409, f"{rows} refer to this row")
    target = key.referred_table.name if key else "row"
    member = key.column_keys if key else ()
    error_of_member = {
        "type": "foreign_key",
        "loc": ["body", *member],
        "msg": f"Should be the id of an existing {target}",
    }
    return ErrorResponse(422, [error_of_member])


async def _handle_invalid(request: Request, error: Any) -> Response:
    # A route like `/{id}` also matches /import.
    if request.path_params and request.method not in (allowed := _allowed_methods(request)):
        return _refuse_method(request, allowed)
    # `input` and `ctx` repeat the request: a secret, or a NaN that JSON cannot encode.
    detail = [{key: entry[key] for key in ("type", "loc", "msg")} for entry in error.errors()]
    return respond(request, 422, detail)


async def _handle_refused_import(request: Request, error: Any) -> JSONResponse:
    detail = [
        {
            "type": wrong.type,
            "loc": ["body", wrong.line, *filter(None, [wrong.field])],
            "msg": wrong.message,
        }
        for wrong in error.errors
    ]
    return respond(request, 422, detail)


async def _handle_http(request: Request, error: Any) -> Response:
    if error.status_code == 405:
        return _refuse_method(request, _allowed_methods(request) or {"GET", "HEAD"})
    return respond(request, error.status_code, error.detail, error.headers)


def _refuse_method(request: Request, allowed: set[str]) -> Response:
    headers = {"Allow": ", ".join(sorted({*allowed, "OPTIONS"}))}
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    return respond(request, 405, "Method Not Allowed", headers)


def _allowed_methods(request: Request) -> set[str]:
    """Return the methods of all routes with the path of the first route that matches.

    A 405 of FastAPI names the methods of one route. The set is empty for files, which have none.
    """
    methods: set[str] = set()
    path = None
    # Starlette's `Mount` has changed the root path.
    scope = {"app_root_path": request.scope["root_path"], **request.scope}
    scope["root_path"] = scope["app_root_path"]
    for route in iter_route_contexts(request.app.routes):
        if route.matches(scope)[0] is not Match.NONE:
            path = path or route.path
            methods |= (route.methods or set()) if route.path == path else set()
    return methods | {"HEAD"} if "GET" in methods else methods
