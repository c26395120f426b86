"""The `alembic` command, and copies of the project for it."""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import URL

from tests.processes import run_python, run_python_concurrently
from tests.service import BIN, ROOT, environment, environment_of_copy


class Migration(NamedTuple):
    returncode: int
    output: str


def migrate(database_url: URL | str, *arguments: str, check: bool = True, **env: str) -> Migration:
    """Run `alembic ARGUMENTS`, as an operator does."""
    ended = run_python("-m", "alembic", *arguments, env=_environment(database_url, **env))
    migration = Migration(ended.returncode, ended.stdout + ended.stderr)
    assert migration.returncode == 0 or not check, migration.output
    return migration


def upgrade_concurrently(count: int, database_url: URL) -> list[Migration]:
    """Run `alembic upgrade head` in `count` processes at the same time."""
    command = ("-m", "alembic", "upgrade", "head")
    return [
        Migration(ended.returncode, ended.stdout + ended.stderr)
        for ended in run_python_concurrently(count, *command, env=_environment(database_url))
    ]


def _environment(database_url: URL | str, **env: str) -> dict[str, str]:
    return {"LOG_FORMAT": "console"} | environment(database_url, **env)


def alembic(
    database_url: URL | str, *arguments: str, root: Path = ROOT, **env: str
) -> subprocess.Popen[str]:
    """The `alembic` command as a process of its own, with the code in `root`."""
    return subprocess.Popen(
        [BIN / "alembic", *arguments],
        cwd=root,
        env=environment_of_copy(database_url, root, **{"LOG_FORMAT": "console"} | env),
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
