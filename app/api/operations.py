"""What operators and their machines ask."""

import contextlib

from fastapi import APIRouter, Request, Response
from sqlalchemy.exc import DBAPIError

from app import metrics, revisions
from app.api.dependencies import database
from app.errors import DatabaseTimeout, Draining

# Not in the API's documentation: it is for clients.
router = APIRouter(include_in_schema=False)


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers; nothing else is touched. When this fails, restart it."""
    return {"status": "live"}


@router.get("/health/ready")
async def ready(request: Request) -> dict[str, str]:
    """The database answers and its schema serves this code. When this fails, send no requests.

    Raises `Draining`, what `Database.statement` raises, or `SchemaBehind`.
    """
    if getattr(request.state, "draining", False):  # Set by app/server.py.
        raise Draining
    of_the_code: revisions.Revisions = request.app.state.revisions
    await database(request).statement(of_the_code.check)
    return {"status": "ready"}


@router.get("/metrics")
async def prometheus(request: Request) -> Response:
    """The metrics of all workers, without the database's revision where that is away."""
    of_the_code: revisions.Revisions = request.app.state.revisions
    current: set[str] = set()
    if not database(request).waiting:  # A look at the revision is not worth a place in the queue.
        with contextlib.suppress(DatabaseTimeout, DBAPIError):
            current = await database(request).statement(revisions.current)
    facts = metrics.Facts(of_the_code.head, ",".join(sorted(current)))
    return Response(metrics.exposition(facts), media_type=metrics.CONTENT_TYPE)
