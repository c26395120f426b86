"""Concurrent calls become one statement.

While a statement is in flight, new calls wait and then share the next one. Under load this costs
the database and this process a fraction per call. An idle service adds no delay.
"""

import asyncio
from asyncio import Future, Task
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from sqlalchemy.exc import StatementError

from app.db.engine import sqlstate
from app.errors import DatabaseTimeout
from app.telemetry import metrics

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_BATCH_SIZE = 100
# After this time calls stop waiting for the statement in flight, and the next batch is sent.
MAX_WAIT_SECONDS = 0.02
# SQLSTATE classes of errors that one item of a batch may have caused: data exception, integrity
# constraint violation, WITH CHECK OPTION violation, program limit exceeded, a trigger's exception.
_ITEM_ERRORS = ("22", "23", "44", "54", "P0")


class Batcher(Generic[Item, Result]):
    """Collects items into batches, and gives each caller the result of its item."""

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        operation: str,
        timeout: float,
    ) -> None:
        self._run = run
        self._timeout = timeout
        self._size = metrics.batch_size.labels(operation)
        self._waiting: list[tuple[Item, Future[Result]]] = []
        self._last: Task[None] | None = None
        # The event loop itself holds only weak references to tasks.
        self._batches: set[Task[None]] = set()

    async def call(self, item: Item) -> Result:
        """Return the result of this item. Raises the error of its batch or its own."""
        result: Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        if self._last is None:
            self._start()
        return await result

    async def close(self) -> None:
        """Wait for the batches in progress. Their callers may have gone."""
        if self._batches:
            await asyncio.wait(self._batches)

    def _start(self) -> None:
        batch = self._last = asyncio.create_task(self._send())
        self._batches.add(batch)
        batch.add_done_callback(self._next)
        batch.add_done_callback(self._batches.discard)
        asyncio.get_running_loop().call_later(MAX_WAIT_SECONDS, self._next, batch)

    def _next(self, batch: Task[None]) -> None:
        """Start the next batch, when this one ends or is slow, whichever comes first."""
        if batch is self._last:
            self._last = None
            if self._waiting:
                self._start()

    async def _send(self) -> None:
        # Taken here and not in `_start`: calls of the same turn of the event loop join.
        batch, self._waiting = self._waiting[:MAX_BATCH_SIZE], self._waiting[MAX_BATCH_SIZE:]
        deadline = asyncio.get_running_loop().time() + self._timeout
        await self._resolve(batch, deadline)

    async def _resolve(self, batch: list[tuple[Item, Future[Result]]], deadline: float) -> None:
        batch = [(item, result) for item, result in batch if not result.done()]  # Not cancelled.
        if not batch:
            return
        self._size.observe(len(batch))
        try:
            values = await self._run([item for item, _ in batch])
            pairs = list(zip(batch, values, strict=True))
        except Exception as error:  # noqa: BLE001  (The callers get it.)
            if len(batch) > 1 and _may_be_of_one_item(error):
                try:
                    async with asyncio.timeout_at(deadline):
                        await asyncio.gather(*(self._resolve([one], deadline) for one in batch))
                    return
                except TimeoutError:
                    error = DatabaseTimeout()
            for _, result in batch:
                if not result.done():
                    result.set_exception(error)
            return
        for (_, result), value in pairs:
            if not result.done():
                result.set_result(value)


def _may_be_of_one_item(error: Exception) -> bool:
    state = sqlstate(error.orig) if isinstance(error, StatementError) else None
    return state is not None and state[:2] in _ITEM_ERRORS
