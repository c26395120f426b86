"""CPU time and memory of processes, from /proc (https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html)."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

# The process can end before the read or during it.
_GONE = (FileNotFoundError, ProcessLookupError)
_TICK = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    # The name is in parentheses and may contain spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def tree(root: int) -> list[int]:
    """The process and all its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(_stat(int(folder.name))[1])
        except _GONE:
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def kill(root: int) -> None:
    """End the process and all its descendants with SIGKILL."""
    for pid in tree(root):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def cpu_seconds(root: int) -> float:
    """User and system time of the process, its descendants, and the children it has reaped."""
    total = 0
    for pid in tree(root):
        try:
            stat = _stat(pid)
        except _GONE:
            continue
        # utime and stime. For the root also cutime and cstime, the time of its reaped children.
        total += sum(int(ticks) for ticks in stat[11 : 15 if pid == root else 13])
    return total / _TICK


def wait_until_idle(root: int, seconds: float = 10) -> None:
    """Wait until the process and its descendants use less than a fifth of a core."""
    deadline = time.monotonic() + seconds
    after = cpu_seconds(root)
    while time.monotonic() < deadline:
        before = after
        time.sleep(0.1)
        after = cpu_seconds(root)
        if after - before < 0.02:
            return


def memory(pid: int) -> int:
    """The proportional set size (PSS) of the process in bytes."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.split("\nPss:")[1].split()[0]) * 1024
