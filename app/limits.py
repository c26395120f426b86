"""The cores and the memory that this process may use, within the limits of its container."""

import os
import sys
from pathlib import Path

# A container sees its own limits here. The files of version 2 are described in
# https://docs.kernel.org/admin-guide/cgroup-v2.html; version 1 has a folder for each controller.
CGROUPS = Path("/sys/fs/cgroup")

# A worker takes about 75 MB, and more while it handles large requests.
BYTES_PER_WORKER = 128 * 1024**2
# For gunicorn's master, the metrics and the cached files.
BYTES_FOR_THE_REST = 128 * 1024**2


def default_workers(cgroups: Path = CGROUPS) -> int:
    """Return the number of workers for the usable cores and memory, at least 1."""
    fitting = (usable_memory(cgroups) - BYTES_FOR_THE_REST) // BYTES_PER_WORKER
    return max(1, min(usable_cores(cgroups), fitting))


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Return the number of usable cores, at least 1. A part of a core does not count."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = _numbers(cgroups / "cpu.max") or [
        *_numbers(cgroups / "cpu" / "cpu.cfs_quota_us"),
        *_numbers(cgroups / "cpu" / "cpu.cfs_period_us"),
    ]
    if len(limit) == 2 and min(limit) > 0:  # In v1 -1 is no limit.
        return max(1, min(cores or 1, limit[0] // limit[1]))
    return cores or 1


def usable_memory(cgroups: Path = CGROUPS) -> int:
    """Return the number of bytes of usable memory."""
    limit = _numbers(cgroups / "memory.max") or _numbers(
        cgroups / "memory" / "memory.limit_in_bytes"
    )
    machine = sys.maxsize
    if hasattr(os, "sysconf"):
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *limit])


def _numbers(file: Path) -> list[int]:
    """Return the numbers in the file: none if it is missing or contains "max"."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []
