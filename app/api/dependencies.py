"""What routes ask for."""

from hashlib import sha256
from typing import Annotated

from fastapi import Path, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import Field

from app.api.problems import invalid
from app.coalescing import HeroReads
from app.database import Database
from app.errors import NotAuthenticated, NotAuthorized
from app.models import INT4_MAX, INT8_MAX, Text
from app.settings import Settings

HeroId = Annotated[
    int, Path(ge=-INT8_MAX - 1, le=INT8_MAX, description="The hero's id", examples=[2])
]
# The filters of a list and of an export.
Name = Annotated[Text | None, Query(description="Only heroes of exactly this name")]
_Years = Annotated[int, Field(ge=0, le=INT4_MAX)]
AgeMin = Annotated[_Years | None, Query(description="Only heroes of at least this age")]
AgeMax = Annotated[_Years | None, Query(description="Only heroes of at most this age")]


def check_ages(age_min: int | None, age_max: int | None) -> None:
    """Raises `RequestValidationError` where no age is between the two."""
    if age_min is not None and age_max is not None and age_min > age_max:
        raise invalid("query", "age_min", "Should not be greater than age_max")


# Plain functions, to be called with the request. Each would cost as much as the access log, were it
# one of FastAPI's dependencies, and none of them has anything to be resolved or cleaned up.
def database(request: Request) -> Database:
    """The service's database."""
    found: Database = request.app.state.database
    return found


def hero_reads(request: Request) -> HeroReads:
    """The reads of single heroes, which all requests share."""
    found: HeroReads = request.app.state.hero_reads
    return found


def each_query_parameter_once(request: Request) -> None:
    """Raises `RequestValidationError` where a parameter is repeated: which one was meant?"""
    names = [name for name, _ in request.query_params.multi_items()]
    if len(names) > len(set(names)):
        raise RequestValidationError(
            [
                {"type": "repeated", "loc": ("query", name), "msg": "Should be given once"}
                for name in dict.fromkeys(names)
                if names.count(name) > 1
            ]
        )


async def may_write(
    request: Request,
    credentials: Annotated[
        HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))
    ],
) -> None:
    """Lets a request pass whose bearer token (RFC 6750) is in `API_TOKENS` with the scope write.

    Raises `NotAuthenticated` or `NotAuthorized`.
    """
    if credentials is None:
        raise NotAuthenticated
    settings: Settings = request.app.state.settings
    # Digests are compared, so that how long it takes says nothing about any token.
    digest = sha256(credentials.credentials.encode()).hexdigest()
    scopes = {token.scope for token in settings.api_tokens if token.digest == digest}
    if not scopes:
        raise NotAuthenticated
    if "write" not in scopes:
        raise NotAuthorized
