"""How much of a request's body is read."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LIMIT = 64 * 1024


class BodyLimit:
    """Refuses a body over `LIMIT` bytes with 413, before it has been read whole.

    FastAPI's own `max_body_size` answers in text/plain; this one's error is answered like all
    others are, because it comes from where the body is read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return

        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LIMIT:
                raise HTTPException(413, f"The body is longer than {LIMIT} bytes")
            return message

        await self.app(scope, limited, send)
