"""Puts the application together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline

from app import NAME, __version__
from app.api import exception_handlers, health, heroes, openapi
from app.api.auth import ReadAccess
from app.api.direct import DirectRoutes
from app.api.middleware import CORS, BodyLimit, Observe, RootPath
from app.db.database import Database
from app.db.revisions import Revisions
from app.settings import Settings
from app.telemetry import metrics


async def _sample(database: Database) -> None:
    """Set the gauges of the connections once a second, which is cheaper than at each statement."""
    while True:
        used, idle = database.connections
        metrics.connection_count.labels("used").set(used)
        metrics.connection_count.labels("idle").set(idle)
        metrics.pending_requests.set(database.waiting)
        await asyncio.sleep(1)


def create_app(settings: Settings) -> FastAPI:
    """Return the application with these settings. It connects on its first request, not here."""
    database = Database(
        settings.database_url,
        pool_size=settings.database_pool_size,
        timeout=settings.database_timeout,
        queue_size=settings.database_queue_size,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(_sample(database))
        yield
        sampling.cancel()
        await database.close()

    # Loads Swagger UI for /docs from this service instead of a CDN.
    app = FastAPIOffline(
        title=NAME.capitalize(),
        version=__version__,
        description="The FastAPI SQL tutorial's API, with pages, ETags and safe retries.",
        contact={"name": f"The operators of {NAME}"},
        servers=[{"url": settings.root_path or "/"}],
        redoc_url=None,
        lifespan=lifespan,
        # The operation ids of OpenAPI are the names of the route functions.
        generate_unique_id_function=lambda route: route.name,
        # The redirect to the path with or without a slash would repeat the Host header.
        redirect_slashes=False,
        # OpenTelemetry costs more than a whole request, so it is off unless an OTEL_* is set.
        telemetry={
            "tracing": settings.telemetry,
            "metrics": settings.telemetry,
            "logs": settings.telemetry,
            "auto_configure": settings.telemetry,
        },
    )
    app.state.settings = settings
    app.state.database = database
    app.state.revisions = Revisions.of_the_code()
    # Not in the router, where the dependency would cost each request 9 µs without tokens too.
    needs_token = settings.api_tokens and not settings.api_public_reads
    access = [ReadAccess] if needs_token else []
    app.include_router(heroes.router, responses=openapi.ERRORS, dependencies=access)
    app.include_router(health.router)

    @app.get("/", include_in_schema=False)
    async def to_the_docs(request: Request) -> RedirectResponse:
        return RedirectResponse(f"{request.scope['root_path']}/docs")

    openapi.customize(app, has_tokens=bool(settings.api_tokens))
    exception_handlers.register(app)
    # The last one is the outermost.
    if not settings.telemetry:
        app.add_middleware(DirectRoutes, application=app)
    app.add_middleware(BodyLimit)
    if settings.cors_origins:
        app.add_middleware(
            CORS,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=sorted({*openapi.HEADERS, "Allow"}),
        )
    app.add_middleware(Observe)
    if settings.root_path:
        app.add_middleware(RootPath, root_path=settings.root_path)
    return app
