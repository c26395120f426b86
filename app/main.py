"""The application: wiring only."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Security
from fastapi_offline import FastAPIOffline

from app import logs, metrics
from app.api import documentation, heroes, operations, problems, transfer
from app.api.bodies import IMPORT_LIMIT, BodyLimit
from app.api.dependencies import may_write
from app.api.observe import Observe
from app.coalescing import HeroReads
from app.database import Database
from app.revisions import Revisions
from app.settings import Settings, from_environment


async def _sample(database: Database) -> None:
    """Keeps the pool's gauges: a look each second costs less than a count at each statement."""
    while True:
        metrics.pool_connections_in_use.set(database.in_use)
        metrics.pool_waiting.set(database.waiting)
        await asyncio.sleep(1)


def create_app(settings: Settings) -> FastAPI:
    """The service with these settings. Nothing is connected to before the first request."""
    database = Database(
        settings.database_url,
        pool_size=settings.database_pool_size,
        timeout=settings.database_timeout,
    )
    hero_reads = HeroReads(database)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(_sample(database))
        yield
        sampling.cancel()
        await hero_reads.close()
        await database.close()

    # FastAPI whose /docs loads Swagger UI from this service instead of a CDN.
    app = FastAPIOffline(
        title="Heroes",
        redoc_url=None,
        lifespan=lifespan,
        # The redirect to the other form of a path would repeat the request's Host header.
        redirect_slashes=False,
        # OpenTelemetry costs more than a whole request: it is on when an OTEL_* asks for it.
        telemetry={
            "tracing": settings.telemetry,
            "metrics": settings.telemetry,
            "logs": settings.telemetry,
            "auto_configure": settings.telemetry,
        },
    )
    app.state.settings = settings
    app.state.database = database
    app.state.hero_reads = hero_reads
    app.state.revisions = Revisions.of_the_code()
    tokens = [Security(may_write)] if settings.api_tokens else []
    for resource in (transfer, heroes):  # In this order: /heroes/export is no hero's id.
        app.include_router(resource.reads)
        app.include_router(
            resource.writes,
            dependencies=tokens,
            responses=documentation.OF_WRITES if tokens else None,
        )
    app.include_router(operations.router)
    documentation.leave_null_out(app)
    problems.register(app)
    app.add_middleware(BodyLimit, limits={"/heroes/import": IMPORT_LIMIT})
    app.add_middleware(Observe)
    return app


_settings = from_environment()
logs.configure(_settings.log_level, _settings.log_format)
app = create_app(_settings)
