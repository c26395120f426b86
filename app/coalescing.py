"""Many waiting reads of single heroes become one query.

While a query is in flight, the reads that come wait and share the next one: under load there are
batches, which cost the database and this process a fraction, and an idle service adds no delay.
"""

import asyncio
from asyncio import Future, Task

from app import heroes, metrics
from app.database import Database
from app.heroes import HeroRow

# Of one query.
MOST = 100
# For so many seconds reads wait for the query that is in flight. When one takes longer, for
# whatever reason, the others get a query beside it.
PATIENCE = 0.02


class HeroReads:
    """Reads of single heroes by id.

    A read joins only a query that has not been sent, so that it sees every write that was
    answered before it began. What becomes of one reader is nothing to the others of its query;
    when the query fails, each of them has its error.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[tuple[int, Future[HeroRow | None]]] = []
        self._last: Task[None] | None = None
        self._queries: set[Task[None]] = set()  # The event loop itself keeps no task alive.

    async def get(self, hero_id: int) -> HeroRow | None:
        """The hero with this id, or None. Raises what `Database.statement` raises."""
        found: Future[HeroRow | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((hero_id, found))
        if self._last is None:
            self._send()
        return await found

    async def close(self) -> None:
        """Waits for the queries whose readers have all gone away: their connections are in use."""
        if self._queries:
            await asyncio.wait(self._queries)

    def _send(self) -> None:
        batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        query = self._last = asyncio.create_task(self._query(batch))
        self._queries.add(query)
        query.add_done_callback(self._next)
        query.add_done_callback(self._queries.discard)
        asyncio.get_running_loop().call_later(PATIENCE, self._next, query)

    def _next(self, query: Task[None]) -> None:
        """Called when the query is done, and when it is late: what comes first counts."""
        if query is self._last:
            self._last = None
            if self._waiting:
                self._send()

    async def _query(self, batch: list[tuple[int, Future[HeroRow | None]]]) -> None:
        # Whoever has gone away meanwhile asks no more.
        batch = [(hero_id, found) for hero_id, found in batch if not found.done()]
        if not batch:
            return
        ids = list({hero_id for hero_id, _ in batch})
        metrics.hero_read_batch.observe(len(batch))
        try:
            rows = await self._database.statement(heroes.get_all, ids)
        except Exception as error:  # noqa: BLE001  (It is the readers', whatever it is.)
            for _, found in batch:
                if not found.done():
                    found.set_exception(error)
            return
        by_id = {row.id: row for row in rows}
        for hero_id, found in batch:
            if not found.done():
                found.set_result(by_id.get(hero_id))
