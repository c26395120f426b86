"""What operators and their machines ask."""

from fastapi import APIRouter, Request

from app.api.dependencies import DatabaseDep
from app.revisions import Revisions

# Not in the API's documentation: it is for clients.
router = APIRouter(include_in_schema=False)


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers; nothing else is touched. When this fails, restart it."""
    return {"status": "live"}


@router.get("/health/ready")
async def ready(request: Request, database: DatabaseDep) -> dict[str, str]:
    """The database answers and its schema serves this code. When this fails, send no requests."""
    revisions: Revisions = request.app.state.revisions
    await database.statement(revisions.check)
    return {"status": "ready"}
