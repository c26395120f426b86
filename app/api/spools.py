"""Temporary files with the body of an import or an export, bounded in number, size and time."""

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from fastapi.responses import StreamingResponse
from starlette.types import Send

from app.api.middleware import MAX_IMPORT_BYTES
from app.errors import StorageFull, TooManySpools

logger = logging.getLogger(__name__)

MAX_SPOOLS = 4  # Per worker.
# The time in which the client must send or read the body: enough for 1 GiB at 10 Mbit/s.
SPOOL_TIMEOUT_SECONDS = 900

_MEMORY_BYTES = 1024**2  # More is stored on disk.
# tempfile raises ENOENT if it can write to no folder.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT)
_open = 0


@contextmanager
def open_spool() -> Iterator[IO[bytes]]:
    """Yield a new temporary file.

    Raises `TooManySpools` if `MAX_SPOOLS` are open, and `StorageFull` if the block finds no space.
    """
    global _open
    if _open >= MAX_SPOOLS:
        raise TooManySpools
    _open += 1
    spool = SpooledTemporaryFile(_MEMORY_BYTES)  # noqa: SIM115
    try:
        yield spool
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageFull(error.strerror) from error
        raise
    finally:
        _open -= 1
        with suppress(OSError):  # After a failed write, `close` tries the same write again.
            spool.close()


class SpooledResponse(StreamingResponse):
    """A streamed response with a Content-Length, for HTTP/1.0. It is stored before it is sent.

    uvicorn would send it in chunks, which RFC 9112 (section 6.1) forbids. nginx, for example,
    speaks HTTP/1.0 to its servers by default.
    """

    async def stream_response(self, send: Send) -> None:
        """Store and send. Raises `TooManySpools` or `StorageFull` before the response starts."""
        with open_spool() as spool:
            part: Any
            async for part in self.body_iterator:
                spool.write(part)
                if spool.tell() > MAX_IMPORT_BYTES:
                    raise StorageFull(f"More than {MAX_IMPORT_BYTES} bytes")
            self.headers["Content-Length"] = str(spool.tell())
            spool.seek(0)
            self.body_iterator = _parts(spool)
            try:
                async with asyncio.timeout(SPOOL_TIMEOUT_SECONDS):
                    await super().stream_response(send)
            except TimeoutError:  # uvicorn closes the connection, as the response is incomplete.
                logger.warning("A client took longer than %d s to read", SPOOL_TIMEOUT_SECONDS)


async def _parts(spool: IO[bytes]) -> AsyncIterator[bytes]:
    while part := spool.read(_MEMORY_BYTES):
        yield part
