"""ASGI middleware: request id, access log and metrics; a limit on the size of bodies."""

import asyncio
import logging
import re
import time
from functools import cache, partial
from random import getrandbits

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.exception_handlers import respond
from app.telemetry import logs, metrics
from app.telemetry.logs import AccessLogEntry, request_id

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
# As sent, and after decompression. The command `import` has no limit.
MAX_IMPORT_BYTES = 1024**3

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# Valid ids that a client may choose for its request. The response and the log contain them.
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_NOSNIFF = (b"x-content-type-options", b"nosniff")
_NO_STORE = ((b"cache-control", b"no-store"),)
_NO_CACHE = ((b"cache-control", b"no-cache"),)  # Caches must check the ETag each time.
_ACTIVE_SECONDS = 0.1
# Cached, because `labels` costs as much as the observation. No value of a label comes from the
# client, so clients cannot make the cache grow.
_request_duration = cache(metrics.request_duration.labels)


class Observe:
    """Gives every response its common headers, and logs and measures every request.

    HEAD is routed as GET, and its response ends after the headers.

    An exception that no handler has handled is a bug. It is logged with its traceback and becomes a
    500 here: so the response has its id, and the connection stays usable.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._active = 0
        self._entries: list[AccessLogEntry] = []
        self._is_scheduled = False
        self._active_is_scheduled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}
        start = time.perf_counter()
        self._active += 1
        self._schedule_active()
        current = _client_request_id(scope) or f"{getrandbits(128):032x}"
        token = request_id.set(current)
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                message["headers"] = [
                    *headers,
                    (b"x-request-id", current.encode()),
                    _NOSNIFF,
                    *_cache_control(headers),
                ]
                await send(message)
                if method == "HEAD":
                    await send({"type": "http.response.body"})
            elif method != "HEAD":
                await send(message)

        try:
            await self.app(scope, receive, observed)
        except Exception:
            logger.exception("Unhandled exception")
            if status:  # The response has started. Closing the connection marks it as incomplete.
                raise
            request = Request(scope)
            response = respond(request, 500, "Internal Server Error")
            last_send: Send = observed
            if isinstance(self.app, CORS):  # The exception has passed it.
                last_send = partial(self.app.send, send=observed, request_headers=request.headers)
            await response(scope, receive, last_send)
        finally:
            self._active -= 1
            self._schedule_active()
            self._entries.append(
                AccessLogEntry(
                    method=method,
                    path=scope["raw_path"].decode("ascii", "replace"),
                    route=getattr(scope.get("route"), "path", "none"),
                    status=status,
                    seconds=time.perf_counter() - start,
                    client=scope["client"][0] if scope["client"] else None,
                    principal=scope.get("state", {}).get("principal"),
                    request_id=current,
                )
            )
            self._schedule()
            request_id.reset(token)

    def _schedule(self) -> None:
        """Record at the end of this turn of the event loop.

        Recording all requests of a turn together costs a third of recording each one.
        """
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._record)

    def _schedule_active(self) -> None:
        """Write the number of active requests ten times a second at most."""
        if not self._active_is_scheduled:
            self._active_is_scheduled = True
            asyncio.get_running_loop().call_later(_ACTIVE_SECONDS, self._record_active)

    def _record_active(self) -> None:
        self._active_is_scheduled = False
        metrics.active_requests.set(self._active)

    def _record(self) -> None:
        self._is_scheduled = False
        entries, self._entries = self._entries, []
        for entry in entries:
            method = entry.method if entry.method in _METHODS else "_OTHER"
            _request_duration(method, entry.route, str(entry.status)).observe(entry.seconds)
        # A probe comes every few seconds.
        logged = [each for each in entries if not _is_successful_probe(each)]
        if logged:
            logs.log_requests(logged)


def _is_successful_probe(entry: AccessLogEntry) -> bool:
    return entry.status == 200 and entry.route.startswith("/health/")


def _cache_control(headers: list[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
    """Return the response's `Cache-Control`, unless the route has set it."""
    caching = _NO_STORE
    for name, _ in headers:
        if name == b"cache-control":
            return ()
        if name == b"etag":
            caching = _NO_CACHE
    return caching


def _client_request_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return value.decode() if _REQUEST_ID.fullmatch(value) else None
    return None


class CORS(CORSMiddleware):
    """Starlette's, with a refused preflight in the form of all errors."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        del response.headers["content-length"], response.headers["content-type"]
        detail = bytes(response.body).decode()
        return JSONResponse({"detail": detail}, response.status_code, response.headers)


class RootPath:
    """Restores the path prefix that a proxy has stripped, as uvicorn's `--root-path` does.

    So `Location`, `Link`, the docs and the redirect to them contain the prefix.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self.root_path
            scope["path"] = self.root_path + scope["path"]
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses a body that is too large with 413, before it has been read whole.

    FastAPI's own `max_body_size` responds in text/plain. This error is raised where the body is
    read, so it gets the same response as all other errors.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return

        limit = MAX_IMPORT_BYTES if scope["path"].endswith("/import") else MAX_BODY_BYTES
        content_length = int(Headers(scope=scope).get("content-length", 0))
        size = 0

        async def limited() -> Message:
            nonlocal size
            if content_length <= limit:
                message = await receive()
                size += len(message.get("body", b""))
                if size <= limit:
                    return message
            raise HTTPException(413, f"The body is longer than {limit} bytes")

        await self.app(scope, limited, send)
