"""Concurrent calls become one statement.

While a statement is in flight, new calls wait and then share the next one. Under load this costs
the database and this process a fraction per call. An idle service adds no delay.
"""

import asyncio
from asyncio import Future, Task
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from sqlalchemy.exc import StatementError

from app.db.engine import sqlstate
from app.errors import DatabaseTimeout, OutcomeUnknown, Overloaded
from app.telemetry import metrics

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_BATCH_SIZE = 100
# After this time calls stop waiting for the statement in flight, and the next batch is sent.
MAX_WAIT_SECONDS = 0.02
# SQLSTATE classes of errors that one item of a batch may have caused: data exception, integrity
# constraint violation, WITH CHECK OPTION violation, program limit exceeded, a trigger's exception.
_ITEM_ERRORS = ("22", "23", "44", "54", "P0")


class _AllGone(Exception):
    """The callers of all items of a batch have gone."""


class _Call(Generic[Item, Result]):
    """The item of one caller, and its future result. `deadline` is on the event loop's clock."""

    __slots__ = ("deadline", "is_sent", "item", "result")

    def __init__(self, item: Item, deadline: float) -> None:
        self.item = item
        self.deadline = deadline
        self.is_sent = False
        self.result: Future[Result] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class Batcher(Generic[Item, Result]):
    """Collects items into batches, and gives each caller the result of its item.

    `run(take, seconds)` waits for a connection, then runs the batch's function on the items that
    `take` returns. Each call has `timeout` seconds. At most `limit` calls wait for a connection.
    """

    def __init__(
        self,
        operation: str,
        run: Callable[[Callable[[], list[Item]], float], Awaitable[Sequence[Result]]],
        *,
        only_reads: bool,
        timeout: float,
        limit: int,
    ) -> None:
        self._run = run
        self._only_reads = only_reads
        self._timeout = timeout
        self._limit = limit
        self._size = metrics.batch_size.labels(operation)
        self._waiting: deque[_Call[Item, Result]] = deque()
        # The batch that waits for a connection, or was sent less than MAX_WAIT_SECONDS ago.
        self._last: Task[None] | None = None
        self._last_is_sent = False
        # The event loop itself holds only weak references to tasks.
        self._batches: set[Task[None]] = set()

    async def call(self, item: Item) -> Result:
        """Return the result of this item. Raises the error of its batch or its own."""
        if self._last and not self._last_is_sent and len(self._waiting) >= self._limit:
            raise Overloaded
        loop = asyncio.get_running_loop()
        call: _Call[Item, Result] = _Call(item, loop.time() + self._timeout)
        self._waiting.append(call)
        if self._last is None:
            self._start()
        timer = loop.call_at(call.deadline, self._expire, call)
        try:
            return await call.result
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Wait for the batches in progress. Their callers may have gone."""
        if self._batches:
            await asyncio.wait(self._batches)

    def _expire(self, call: _Call[Item, Result]) -> None:
        is_known = self._only_reads or not call.is_sent
        call.fail(DatabaseTimeout() if is_known else OutcomeUnknown())

    def _start(self) -> None:
        self._last_is_sent = False
        batch = self._last = asyncio.create_task(self._send())
        self._batches.add(batch)
        batch.add_done_callback(self._next)
        batch.add_done_callback(self._batches.discard)

    def _next(self, batch: Task[None] | None) -> None:
        """Start the next batch, when this one ends or is slow, whichever comes first."""
        if batch is self._last:
            self._last = None
            if self._waiting:
                self._start()

    async def _send(self) -> None:
        batch: list[_Call[Item, Result]] = []
        this = asyncio.current_task()
        slow: asyncio.TimerHandle | None = None

        def take() -> list[Item]:
            """Take the calls when the statement is about to be sent: later ones join until then."""
            nonlocal slow
            while self._waiting and len(batch) < MAX_BATCH_SIZE:
                call = self._waiting.popleft()
                if not call.result.done():  # Neither cancelled nor expired.
                    call.is_sent = True
                    batch.append(call)
            self._last_is_sent = True
            slow = asyncio.get_running_loop().call_later(MAX_WAIT_SECONDS, self._next, this)
            return self._items(batch)

        try:
            self._resolve(batch, await self._run(take, self._timeout))
        except _AllGone:
            pass
        except DatabaseTimeout as error:  # Without a connection, each call expires by itself.
            self._fail(batch, error)
        except Exception as error:  # noqa: BLE001  (The callers get it.)
            if not batch:  # No connection can be had.
                batch, self._waiting = list(self._waiting), deque()
            if len(batch) > 1 and _may_be_of_one_item(error):
                await asyncio.gather(*(self._send_alone(call) for call in batch))
            else:
                self._fail(batch, error)
        finally:
            if slow:
                slow.cancel()

    async def _send_alone(self, call: _Call[Item, Result]) -> None:
        seconds = call.deadline - asyncio.get_running_loop().time()
        try:
            self._resolve([call], await self._run(lambda: self._items([call]), seconds))
        except _AllGone:
            pass
        except Exception as error:  # noqa: BLE001  (The caller gets it.)
            call.fail(error)

    def _items(self, batch: list[_Call[Item, Result]]) -> list[Item]:
        items = [call.item for call in batch if not call.result.done()]
        if not items:
            raise _AllGone
        self._size.observe(len(items))
        return items

    def _resolve(self, batch: list[_Call[Item, Result]], values: Sequence[Result]) -> None:
        for call, value in list(zip(batch, values, strict=True)):
            if not call.result.done():
                call.result.set_result(value)

    def _fail(self, batch: list[_Call[Item, Result]], error: Exception) -> None:
        for call in batch:
            call.fail(error)


def _may_be_of_one_item(error: Exception) -> bool:
    state = sqlstate(error.orig) if isinstance(error, StatementError) else None
    return state is not None and state[:2] in _ITEM_ERRORS
