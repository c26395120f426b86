"""What is known of every request from outside of it: its id, its log line and its duration."""

import asyncio
import logging
import re
import time
from functools import cache
from random import getrandbits

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs, metrics
from app.api.problems import respond
from app.logs import Answered, request_id

logger = logging.getLogger(__name__)

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Observe:
    """Gives every answer an `X-Request-ID` (the request's own, if sane), logs and measures it.

    An exception that nothing below has answered is a bug: it is logged with its traceback, and
    answered with a 500 here, so that even this answer has its id, and the connection stays usable.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._in_progress = 0
        self._answered: list[Answered] = []
        self._due = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        start = time.perf_counter()
        self._in_progress += 1
        self._tell_soon()
        current = _given_id(scope) or f"{getrandbits(128):032x}"
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
            self._in_progress -= 1
            client = scope["client"][0] if scope["client"] else None
            path = scope["raw_path"].decode("ascii", "replace")
            route = getattr(scope.get("route"), "path", "none")
            seconds = time.perf_counter() - start
            self._answered.append(
                Answered(scope["method"], path, route, status, seconds, client, current)
            )
            self._tell_soon()
            request_id.reset(token)

    def _tell_soon(self) -> None:
        """Measures and logs at the end of this turn of the event loop.

        What is done for all requests of a turn at once costs a third of what it costs one by one.
        """
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._due = False
        answered, self._answered = self._answered, []
        metrics.requests_in_progress.set(self._in_progress)
        for request in answered:
            method = request.method if request.method in _METHODS else "other"
            status = f"{request.status // 100}xx" if request.status else "none"
            _duration(request.route, method, status).observe(request.seconds)
        if answered:
            logs.access(answered)


# Found once: `labels` takes as long as the observation. No label has a value of a client's making,
# so that no client can make them grow.
_duration = cache(metrics.request_duration.labels)


# What a client may choose as its request's id: it is repeated in a header and in the log.
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode() if _REQUEST_ID.fullmatch(value) else None
    return None
