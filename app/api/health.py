"""Health checks and metrics, for operators and their tools."""

import contextlib

from fastapi import APIRouter, Request, Response
from sqlalchemy.exc import DBAPIError

from app.api.parameters import DatabaseDep
from app.db import revisions
from app.errors import DatabaseTimeout, DatabaseUnavailable, Draining, Overloaded
from app.telemetry import metrics

# OpenAPI documents only the routes for clients.
router = APIRouter(include_in_schema=False)


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Respond without using anything else. If this fails, restart the process."""
    return {"status": "live"}


@router.get("/health/ready")
async def ready(request: Request, database: DatabaseDep) -> dict[str, str]:
    """Check that this worker can serve reads and writes. If this fails, send no requests.

    A worker with too much load is ready. Otherwise its requests would go to the other workers, and
    then no worker would be ready. Raises `Draining`, `WrongDatabase`, `SchemaBehind`, or the errors
    of `Database.run`.
    """
    if getattr(request.state, "draining", False):  # Set by app/server/worker.py.
        raise Draining
    code: revisions.Revisions = request.app.state.revisions
    try:
        await database.run(code.check_ready)
    except (Overloaded, DatabaseTimeout):
        if not database.has_responded:
            raise
    return {"status": "ready"}


@router.get("/metrics")
async def prometheus(request: Request, database: DatabaseDep) -> Response:
    """Return the metrics of all workers, and the schema's revision unless the database is down."""
    code: revisions.Revisions = request.app.state.revisions
    current: set[str] = set()
    if not database.waiting:  # Requests of clients come first.
        with contextlib.suppress(DatabaseTimeout, DatabaseUnavailable, Overloaded, DBAPIError):
            # Shorter than a scrape waits.
            current = await database.run(revisions.current, timeout=1)
    facts = metrics.Facts(code.head, ",".join(sorted(current)))
    return Response(metrics.exposition(facts), media_type=metrics.CONTENT_TYPE)
