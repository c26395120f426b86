"""Who may read and write: bearer tokens (RFC 6750)."""

from hashlib import sha256
from typing import Literal

from fastapi import Request, Security
from fastapi.security import HTTPBearer

from app.errors import NotAuthenticated, NotAuthorized
from app.settings import Settings


class BearerToken(HTTPBearer):
    """Requires a token of `API_TOKENS`, if any are set. The scope write includes read.

    Sets `request.state.principal` to the token's name. Raises `NotAuthenticated` or
    `NotAuthorized`.
    """

    def __init__(self, scope: Literal["read", "write"]) -> None:
        super().__init__(scheme_name="HTTPBearer", auto_error=False)
        self.scope = scope

    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        settings: Settings = request.app.state.settings
        if not settings.api_tokens:
            return
        credentials = await super().__call__(request)
        if credentials is None:
            raise NotAuthenticated
        # Comparing digests does not reveal anything about a token by its duration.
        digest = sha256(credentials.credentials.encode()).hexdigest()
        tokens = [token for token in settings.api_tokens if token.digest == digest]
        if not tokens:
            raise NotAuthenticated
        if self.scope == "write" and not any(token.scope == "write" for token in tokens):
            raise NotAuthorized
        request.state.principal = tokens[0].name


ReadAccess = Security(BearerToken("read"))
WriteAccess = Security(BearerToken("write"))


def principal(request: Request) -> str:
    """Return the name of the request's token, or an empty string."""
    return getattr(request.state, "principal", "")
