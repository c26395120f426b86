"""The `alembic` command, and copies of the project for it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import URL

from tests.service import BIN, ROOT, environment


class Migration(NamedTuple):
    returncode: int
    output: str


class Migrators:
    """The `alembic` command, run by tests/migrator.py."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.migrator"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, database_url: URL | str, *arguments: str, check: bool = True, **env: str
    ) -> Migration:
        """`alembic ARGUMENTS`, as an operator runs it."""
        [migration] = self.at_once(1, database_url, *arguments, **env)
        assert migration.returncode == 0 or not check, migration.output
        return migration

    def at_once(
        self, count: int, database_url: URL | str, *arguments: str, **env: str
    ) -> list[Migration]:
        """The same by `count` migrators at the same time."""
        assert self._process.stdin
        assert self._process.stdout
        request = {
            "argv": arguments,
            "env": {"LOG_FORMAT": "console"} | environment(database_url, **env),
            "count": count,
            "output": str(self._output),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return [
            Migration(code, Path(f"{self._output}.{number}").read_text())
            for number, code in enumerate(codes)
        ]

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


def alembic(
    database_url: URL | str, *arguments: str, root: Path = ROOT, **env: str
) -> subprocess.Popen[str]:
    """The `alembic` command as a process of its own, with the code in `root`."""
    return subprocess.Popen(
        [BIN / "alembic", *arguments],
        cwd=root,
        env=environment(database_url, **{"LOG_FORMAT": "console", "PYTHONPATH": str(root)} | env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def copy_project(folder: Path) -> Path:
    """Return a copy of the project without its tests, in which a test can change something."""
    copy = folder / "project"
    copy.mkdir()
    for part in ("app", "alembic", "alembic.ini", "pyproject.toml"):
        copy_part = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy_part(ROOT / part, copy / part)
    return copy
