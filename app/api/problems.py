"""Errors to responses, in one table."""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError

from app import errors
from app.database import sqlstate

logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """How an error is answered."""

    status: int
    detail: str
    headers: Mapping[str, str] | None = None


_SOON = MappingProxyType({"Retry-After": "1"})

UNAVAILABLE = Problem(503, "The database is unavailable", _SOON)
BEHIND = Problem(503, "The database's schema is behind: run alembic upgrade head", _SOON)
CONFLICT = Problem(409, "The hero conflicts with what is stored")

PROBLEMS: dict[type[Exception], Problem] = {
    errors.HeroNotFound: Problem(404, "Hero not found"),
    errors.HeroChanged: Problem(412, "The hero has changed"),
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


def invalid(where: str, name: str, message: str) -> RequestValidationError:
    """What FastAPI raises for its own checks, for those that are the service's."""
    return RequestValidationError([{"type": "value_error", "loc": (where, name), "msg": message}])


def _respond(problem: Problem) -> JSONResponse:
    headers = dict(problem.headers) if problem.headers else None
    return JSONResponse({"detail": problem.detail}, problem.status, headers)


async def _known(_: Request, error: Exception) -> JSONResponse:
    problem = PROBLEMS[type(error)]
    if problem is BEHIND:
        logger.warning("%s: %s", problem.detail, error)
    elif problem.status >= 500:
        logger.warning(problem.detail)
    return _respond(problem)


async def _database(_: Request, error: Any) -> JSONResponse:
    state = sqlstate(error.orig)
    problem = SQLSTATES.get(state) or SQLSTATES.get(state and state[:2])
    if problem is None:
        raise error
    # The server's first line alone: its detail quotes the row, secret name included.
    diagnostics = getattr(error.orig, "diag", None)
    reason = getattr(diagnostics, "message_primary", None) or str(error.orig)
    logger.warning("%s: %s", problem.detail, reason, extra={"sqlstate": state})
    return _respond(problem)


async def _invalid(_: Request, error: Any) -> JSONResponse:
    # Without `input` and `ctx`, which repeat what was sent: a secret name, or a NaN that JSON
    # cannot encode.
    detail = [{key: entry[key] for key in ("type", "loc", "msg")} for entry in error.errors()]
    return JSONResponse({"detail": detail}, 422)
