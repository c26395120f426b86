"""The files in which gunicorn's workers share their metrics.

By default prometheus_client makes new files for each process and never removes them. Here a new
worker continues the files of an ended one. So the number of files has a limit, and no count is lost
or decreases, also while `/metrics` reads the files.
"""

import logging
from pathlib import Path
from typing import Any

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

logger = logging.getLogger(__name__)

_INITIAL_BYTES = 16 * 1024
_HEADER_BYTES = 8
# The maximum size of a value without its key: a length, the padding and two doubles.
_VALUE_BYTES = 28


def use(number: int) -> None:
    """Store the metrics of this process in the files with this number.

    No other process may use the number at the same time. Call it before `app.telemetry.metrics` is
    imported.
    """
    values.MmapedDict = MetricFile  # type: ignore[assignment, attr-defined]
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]


class MetricFile:
    """Replaces prometheus_client's `MmapedDict`, which needs a file system with free space.

    If a process writes to a mapped page that has no block, and the file system is full, the kernel
    ends the process with SIGBUS. So this class first writes zeros, which allocates the blocks or
    raises `OSError`. Values without a block stay in memory until there is space.
    """

    def __init__(self, filename: str) -> None:
        self._path = Path(filename)
        self._file: Any = None
        self._keys: set[str] = set()
        self._missing: dict[str, tuple[float, float]] = {}
        self._size = 0
        self._free = 0
        self._has_logged = False

    def read_value(self, key: str) -> tuple[float, float]:
        """Return the value and its timestamp. An ended worker may have left them in the file."""
        if self._has_block(key):
            value, timestamp = self._file.read_value(key)
            return value, timestamp
        self._missing[key] = 0.0, 0.0
        return 0.0, 0.0

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        """Store the value, or keep it until there is space."""
        if key in self._keys:
            self._file.write_value(key, value, timestamp)
        else:
            self._missing[key] = value, timestamp
        while self._missing and self._has_block(first := next(iter(self._missing))):
            self._file.write_value(first, *self._missing.pop(first))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _has_block(self, key: str) -> bool:
        try:
            if self._file is None:
                self._open()
            if key not in self._keys:
                self._allocate(_size(key))
                self._keys.add(key)
        except OSError as error:
            if not self._has_logged:
                self._has_logged = True
                logger.warning("Metrics are incomplete: %s: %s", self._path, error)
            return False
        return True

    def _open(self) -> None:
        if not self._path.exists():
            # Renamed when it is complete: /metrics cannot read an empty file.
            new = self._path.with_suffix(".new")
            new.write_bytes(bytes(_INITIAL_BYTES))
            new.rename(self._path)
        self._file = MmapedDict(str(self._path))  # type: ignore[no-untyped-call]
        self._keys = {key for key, _, _ in self._file.read_all_values()}
        self._size = self._path.stat().st_size
        self._free = self._size - _HEADER_BYTES - sum(map(_size, self._keys))

    def _allocate(self, size: int) -> None:
        """Double the file as `MmapedDict` does, but before it writes."""
        if size > self._free:
            with self._path.open("r+b") as file:
                file.seek(self._size)
                file.write(bytes(self._size))
            self._free += self._size
            self._size *= 2
        self._free -= size


def _size(key: str) -> int:
    return len(key.encode()) + _VALUE_BYTES
