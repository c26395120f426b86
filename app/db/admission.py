"""Which calls get a connection, in which order, and which are refused."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from app.errors import Overloaded

Fn = TypeVar("Fn", bound=Callable[..., Any])


def reads(fn: Fn) -> Fn:
    """Declare that a data function only reads.

    A quarter of the connections is kept for such functions. If one fails, no write is in doubt.
    """
    fn.only_reads = True  # type: ignore[attr-defined]
    return fn


def only_reads(fn: Callable[..., Any]) -> bool:
    """Return whether the function is declared by `reads`."""
    return getattr(fn, "only_reads", False)


class Lane:
    """Lets at most `size` calls in at the same time, in the order of their arrival.

    At most `limit` calls wait. A call that cannot be served within its timeout is refused
    immediately: the lane knows how long the recent calls took.
    """

    def __init__(self, size: int, limit: int) -> None:
        self.waiting = 0
        self._size = size
        self._limit = limit
        self._seconds = 0.0  # The moving average of a call's time.
        self._free = asyncio.Semaphore(size)

    async def enter(self, max_wait_seconds: float) -> None:
        """Wait for the call's turn. Raises `Overloaded` if that may take longer."""
        wait_seconds = self.waiting * self._seconds / self._size
        if self.waiting >= self._limit or wait_seconds > max_wait_seconds:
            raise Overloaded
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1

    def leave(self, seconds: float | None) -> None:
        """Let the next call in. This one took so many seconds, or should not count."""
        if seconds is not None:
            self._seconds += 0.1 * (seconds - self._seconds)
        self._free.release()
