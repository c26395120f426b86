"""Processes of the service: its commands, uvicorn and gunicorn."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from sqlalchemy import URL

from tests.service import BIN, ROOT, Answer, Connection, Service, environment_of_copy

# The modules that the commands import.
SERVICE = ("app.cli", "app.models", "app.db.autogenerate", "app.db.migrations")


class Ended(NamedTuple):
    """The result of a command."""

    returncode: int
    stdout: str
    stderr: str


def run_python(
    *arguments: str | Path, env: dict[str, str], cwd: Path = ROOT, given: str | bytes = ""
) -> Ended:
    """Run `python ARGUMENTS`, of the form `-m MODULE ...` or `-c CODE ...`, in a fork.

    Commands that a test stops, or whose installation matters, are processes of their own instead.
    """
    [ended] = run_python_concurrently(1, *arguments, env=env, cwd=cwd, given=given)
    return ended


def run_python_concurrently(
    count: int,
    *arguments: str | Path,
    env: dict[str, str],
    cwd: Path = ROOT,
    given: str | bytes = "",
) -> list[Ended]:
    """Run the same command in `count` forks at the same time."""
    # A copy of the code is not imported before. Nor is the code before `-c`, which may be the
    # tutorial's, with models of the same names.
    imports_app = cwd == ROOT and arguments[0] == "-m"
    forks = _forks(*(SERVICE if imports_app else ()))
    assert forks.stdin
    assert forks.stdout
    with TemporaryDirectory() as name:
        folder = Path(name)
        stdin = folder / "stdin"
        stdin.write_bytes(given if isinstance(given, bytes) else given.encode())
        outputs = [(folder / f"stdout{n}", folder / f"stderr{n}") for n in range(count)]
        request = {
            "arguments": arguments,
            "cwd": cwd,
            "env": env,
            "stdin": stdin,
            "outputs": outputs,
        }
        forks.stdin.write(json.dumps(request, default=str) + "\n")
        forks.stdin.flush()
        codes = json.loads(forks.stdout.readline())
        return [
            Ended(code, *(path.read_bytes().decode() for path in paths))
            for code, paths in zip(codes, outputs, strict=True)
        ]


@cache
def _forks(*modules: str) -> subprocess.Popen[str]:
    """Start tests/forks.py, which ends with this process."""
    forks = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "forks.py", *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(forks.communicate)
    return forks


@contextmanager
def uvicorn_process(database_url: URL, root: Path = ROOT) -> Iterator["Service"]:
    """Run the code in `root` in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"],
        cwd=root,
        env=environment_of_copy(database_url, root, LOG_FORMAT="json"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    try:
        for line in process.stderr:
            assert line.startswith("{"), line + process.stderr.read()
            message = json.loads(line)["message"]
            if "running on" in message:
                break
        yield Service(int(message.split(":")[2].split(" ")[0]), set())
    finally:
        process.terminate()
        process.communicate(timeout=10)


class Gunicorn:
    """The service in its production form: gunicorn with its own configuration."""

    def __init__(
        self,
        database_url: URL,
        folder: Path,
        *arguments: str,
        root: Path = ROOT,
        port: int = 0,
        launcher: Sequence[str] = (),
        **env: str,
    ) -> None:
        self._log = folder / "gunicorn.log"
        self._pidfile = folder / "gunicorn.pid"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *launcher,
                    *(BIN / "gunicorn", "--bind", f"127.0.0.1:{port}"),
                    *("--pid", str(self._pidfile), *arguments),
                ],
                cwd=root,
                env=environment_of_copy(
                    database_url, root, **{"LOG_FORMAT": "json", "WEB_CONCURRENCY": "2"} | env
                ),
                stderr=log,
            )
        self.started = 0
        try:
            self.wait_for_workers(int(env.get("WEB_CONCURRENCY", "2")))
        except BaseException:
            self._process.terminate()
            self._process.wait(40)
            raise
        listening = next(line for line in self.log if "Listening at" in line["message"])
        self.port = int(listening["message"].split(":")[3].split(" ")[0])

    def get(self, path: str) -> Answer:
        """On a connection of its own."""
        with Connection(self.port) as connection:
            return connection.send("GET", path)

    @property
    def lines(self) -> list[str]:
        return self._log.read_text().splitlines()

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def pid(self) -> int:
        """Of the master."""
        return int(self._pidfile.read_text())

    @property
    def children(self) -> list[int]:
        """The master's: its workers, and in a roll the next master."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def wait_for_workers(self, count: int) -> None:
        """Waits until `count` more workers than before serve."""
        self.started += count
        self.wait_for(
            lambda: sum("startup complete" in line for line in self.lines) >= self.started
        )

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "\n".join(
                line for line in self.lines[-200:] if "heroes.access" not in line
            )
            time.sleep(0.05)

    def roll(self, workers: int = 2) -> None:
        """Replace the master by a new one, as in docs/operations.md."""
        old = self.pid
        os.kill(old, signal.SIGUSR2)
        self.wait_for_workers(workers)
        os.kill(old, signal.SIGTERM)
        self.wait_for(lambda: self._pidfile.exists() and self.pid != old)
        self.wait_for(lambda: not alive(old))

    def stop(self) -> None:
        """Stop the current master, and reap the first one."""
        if self._pidfile.exists() and alive(pid := self.pid):
            os.kill(pid, signal.SIGTERM)
            self.wait_for(lambda: not alive(pid), 40)
        self._process.wait(40)


def alive(pid: int) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@contextmanager
def gunicorn(
    database_url: URL,
    folder: Path,
    *arguments: str,
    root: Path = ROOT,
    port: int = 0,
    launcher: Sequence[str] = (),
    **env: str,
) -> Iterator[Gunicorn]:
    server = Gunicorn(
        database_url, folder, *arguments, root=root, port=port, launcher=launcher, **env
    )
    try:
        yield server
    finally:
        server.stop()
