"""Errors to responses, in one table."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

from app import errors
from app.api.bodies import IMPORT_LIMIT
from app.database import sqlstate

logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """How an error is answered."""

    status: int
    detail: str
    headers: Mapping[str, str] | None = None


PROBLEM_JSON = "application/problem+json"
_SOON = MappingProxyType({"Retry-After": "1"})

UNAVAILABLE = Problem(503, "The database is unavailable", _SOON)
BEHIND = Problem(503, "The database's schema is behind: run alembic upgrade head", _SOON)
CONFLICT = Problem(409, "The hero conflicts with what is stored")

PROBLEMS: dict[type[Exception], Problem] = {
    errors.HeroNotFound: Problem(404, "Hero not found"),
    errors.HeroChanged: Problem(412, "The hero has changed"),
    errors.ImportTooLong: Problem(413, f"The import is longer than {IMPORT_LIMIT} bytes"),
    errors.NotAuthenticated: Problem(401, "Not authenticated", {"WWW-Authenticate": "Bearer"}),
    errors.NotAuthorized: Problem(403, "Not authorized"),
    errors.DatabaseTimeout: Problem(503, "The database did not answer in time", _SOON),
    errors.SchemaBehind: BEHIND,
    errors.Draining: Problem(503, "This worker is stopping", _SOON),
}

# By SQLSTATE, or its class, the first two characters
# (https://www.postgresql.org/docs/current/errcodes-appendix.html). What is not here is a bug.
SQLSTATES: dict[str | None, Problem] = {
    None: UNAVAILABLE,  # The connection was refused or lost.
    "08": UNAVAILABLE,  # connection exception
    "23": CONFLICT,  # integrity constraint violation
    "25006": UNAVAILABLE,  # read-only transaction: a standby, or a primary no longer
    "40": UNAVAILABLE,  # transaction rollback: serialization failure, deadlock
    "42703": BEHIND,  # undefined column
    "42P01": BEHIND,  # undefined table
    "53": UNAVAILABLE,  # insufficient resources
    "55P03": UNAVAILABLE,  # lock not available
    "57": UNAVAILABLE,  # operator intervention: cancelled, shutting down, starting up
    "58": UNAVAILABLE,  # system error
}


def register(app: FastAPI) -> None:
    """Answers the errors of the tables. There is no handler for `Exception`: a bug stays one."""
    for error in PROBLEMS:
        app.add_exception_handler(error, _known)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(errors.ImportRefused, _refused)
    app.add_exception_handler(HTTPException, _http)


def invalid(where: str, name: str, message: str) -> RequestValidationError:
    """What FastAPI raises for its own checks, for those that are the service's."""
    return RequestValidationError([{"type": "value_error", "loc": (where, name), "msg": message}])


def respond(
    request: Request, status: int, detail: Any, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """FastAPI's `{"detail": ...}`, or the same as RFC 9457 where the client asks for that."""
    headers = dict(headers) if headers else None
    if PROBLEM_JSON not in request.headers.get("accept", ""):
        return JSONResponse({"detail": detail}, status, headers)
    members = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    if isinstance(detail, str):
        members["detail"] = detail
    else:
        members |= {"detail": "The request is not valid", "errors": detail}
    return JSONResponse(members, status, headers, media_type=PROBLEM_JSON)


async def _known(request: Request, error: Exception) -> JSONResponse:
    problem = PROBLEMS[type(error)]
    if problem is BEHIND:
        logger.warning("%s: %s", problem.detail, error)
    elif problem.status >= 500:
        logger.warning(problem.detail)
    return respond(request, *problem)


async def _database(request: Request, error: Any) -> JSONResponse:
    state = sqlstate(error.orig)
    problem = SQLSTATES.get(state) or SQLSTATES.get(state and state[:2])
    if problem is None:
        raise error
    # The server's first line alone: its detail quotes the row, secret name included.
    diagnostics = getattr(error.orig, "diag", None)
    reason = getattr(diagnostics, "message_primary", None) or str(error.orig)
    logger.warning("%s: %s", problem.detail, reason, extra={"sqlstate": state})
    return respond(request, *problem)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    # Without `input` and `ctx`, which repeat what was sent: a secret name, or a NaN that JSON
    # cannot encode.
    detail = [{key: entry[key] for key in ("type", "loc", "msg")} for entry in error.errors()]
    return respond(request, 422, detail)


async def _refused(request: Request, error: Any) -> JSONResponse:
    detail = [
        {
            "type": wrong.type,
            "loc": ["body", wrong.line, *filter(None, [wrong.field])],
            "msg": wrong.message,
        }
        for wrong in error.errors
    ]
    return respond(request, 422, detail)


async def _http(request: Request, error: Any) -> JSONResponse:
    return respond(request, error.status_code, error.detail, error.headers)
