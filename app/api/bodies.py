"""How much of a request's body is read."""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LIMIT = 64 * 1024
# As it is sent, and decompressed; the command `heroes import` knows no limit.
IMPORT_LIMIT = 1024**3


class BodyLimit:
    """Refuses a body that is over its path's limit with 413, before it has been read whole.

    FastAPI's own `max_body_size` answers in text/plain; this one's error is answered like all
    others are, because it comes from where the body is read.
    """

    def __init__(self, app: ASGIApp, limits: Mapping[str, int]) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return

        limit = self.limits.get(scope["path"].removeprefix(scope["root_path"]), LIMIT)
        promised = int(Headers(scope=scope).get("content-length", 0))
        size = 0

        async def limited() -> Message:
            nonlocal size
            if promised <= limit:
                message = await receive()
                size += len(message.get("body", b""))
                if size <= limit:
                    return message
            raise HTTPException(413, f"The body is longer than {limit} bytes")

        await self.app(scope, limited, send)
