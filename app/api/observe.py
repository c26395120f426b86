"""What is known of every request from outside of it: its id, its log line and its duration."""

import logging
import re
import secrets
import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs, metrics
from app.api.problems import respond
from app.logs import request_id

logger = logging.getLogger(__name__)

# What a client may choose as its request's id: it is repeated in a header and in the log.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Observe:
    """Gives every answer an `X-Request-ID` (the request's own, if sane), logs and measures it.

    An exception that nothing below has answered is a bug: it is logged with its traceback, and
    answered with a 500 here, so that even this answer has its id, and the connection stays usable.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        start = time.perf_counter()
        metrics.requests_in_progress.inc()
        current = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(current):
            current = secrets.token_hex(16)
        token = request_id.set(current)
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", current.encode())]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except Exception:
            logger.exception("Unhandled exception")
            if status:  # The answer has begun: all that is left is to break it off.
                raise
            response = respond(Request(scope), 500, "Internal Server Error")
            await response(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - start
            method = scope["method"]
            # No label has a value of a client's making, so that no client can make them grow.
            metrics.request_duration.labels(
                getattr(scope.get("route"), "path", "none"),
                method if method in _METHODS else "other",
                f"{status // 100}xx" if status else "none",
            ).observe(seconds)
            metrics.requests_in_progress.dec()
            path = scope["raw_path"].decode("ascii", "replace")
            client = scope["client"][0] if scope["client"] else None
            logs.access(method, path, status, seconds, client)
            request_id.reset(token)
