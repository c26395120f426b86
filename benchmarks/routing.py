"""The CPU time of FastAPI's routing and parameters, without a server or a database.

python -m benchmarks.routing

The route has a path parameter, a header and a dependency, and returns a `Response`.
"""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Request, Response

from app.api.direct import DirectRoutes

REQUESTS = 5_000
ROUNDS = 5
# As many as the service has.
ROUTES_BEFORE = 8


async def dependency(request: Request) -> object:
    return request.app


def _router() -> APIRouter:
    router = APIRouter(prefix="/heroes")
    for number in range(ROUTES_BEFORE):

        @router.get(f"/{number}/other")
        async def other() -> Response:
            return Response()

    @router.get("/{hero_id}")
    async def read(
        hero_id: Annotated[int, Path(ge=0)],
        database: Annotated[object, Depends(dependency)],
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        return Response(f"{hero_id} {database is None} {if_none_match}")

    return router


def _app() -> FastAPI:
    return FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})


def _apps() -> dict[str, FastAPI]:
    included, flat, direct = _app(), _app(), _app()
    included.include_router(_router())
    flat.router.routes.extend(_router().routes)
    direct.include_router(_router())
    direct.add_middleware(DirectRoutes, application=direct)
    return {"routes on the app itself": flat, "included router": included, "direct": direct}


async def _microseconds(app: FastAPI) -> float:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    start = time.process_time()
    for _ in range(REQUESTS):
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/heroes/1",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }
        await app(scope, receive, send)
    return (time.process_time() - start) / REQUESTS * 1e6


def main() -> None:
    """Print the smallest time of each app over the rounds."""
    apps = _apps()
    best = dict.fromkeys(apps, float("inf"))
    for _ in range(ROUNDS):
        for name, app in apps.items():
            best[name] = min(best[name], asyncio.run(_microseconds(app)))
    for name, microseconds in best.items():
        print(f"{name}: {microseconds:.0f} µs")


if __name__ == "__main__":
    main()
