"""Applies the blocks of a page of docs/ to a copy of the repository.

A line in bold names the file of the next block. A diff replaces lines that occur once in the file,
and `@@` divides it into several. A Python block is a new file. A console block is run.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from sqlalchemy import URL

from tests.processes import run_python
from tests.service import BIN, ROOT, environment, environment_of_copy

_BLOCK = re.compile(
    r"(?:^\*\*(?P<path>[\w./-]+)\*\*(?:, new)?\n\n)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_IGNORED = shutil.ignore_patterns(".git", ".venv", "node_modules", "heroes.db*")


def copy_repository(folder: Path) -> Path:
    """Return a copy of the whole repository, which uses the same environment."""
    copy = folder / "repository"
    shutil.copytree(ROOT, copy, ignore=_IGNORED)
    (copy / ".venv").symlink_to(BIN.parent)
    return copy


def apply(page: str, project: Path, url: URL) -> Counter[str]:
    """Apply the blocks of the page. Return the number of new lines by file."""
    lines: Counter[str] = Counter()
    for block in _BLOCK.finditer(page):
        name, kind, body = block.group("path", "kind", "body")
        if kind == "console":
            for command in re.findall(r"^\$ (.*)$", body, re.MULTILINE):
                run(command, project, url)
            continue
        assert name, f"a block without a file: {body[:80]}"
        file = project / name
        if kind == "diff":
            lines[name] += _patch(file, body)
        else:
            assert not file.exists(), name
            file.write_text(body)
            lines[name] += len([line for line in body.splitlines() if line.strip()])
    return lines


def _patch(file: Path, diff: str) -> int:
    """Apply a diff without line numbers. Return the number of new lines that are not blank."""
    source = file.read_text()
    added = 0
    for part in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        rows = [(line[:1] or " ", line[1:]) for line in part.splitlines()]
        old = "".join(f"{text}\n" for sign, text in rows if sign != "+")
        new = "".join(f"{text}\n" for sign, text in rows if sign != "-")
        added += len([text for sign, text in rows if sign == "+" and text.strip()])
        if not old:  # At the end of the file.
            source += new
            continue
        assert source.count(old) == 1, f"{source.count(old)} times in {file}:\n{old}"
        source = source.replace(old, new)
    file.write_text(source)
    return added


def changes(project: Path) -> tuple[int, int, int]:
    """Return the number of new lines, removed lines and files in which the copy differs."""
    found = subprocess.run(
        ["diff", "-r", "-N", "-U0", *_excluded("__pycache__", ".*"), ROOT, project],
        capture_output=True,
        text=True,
    ).stdout
    count = Counter(re.findall(r"^(\+\+\+|[-+])", found, re.MULTILINE))
    return count["+"], count["-"] - count["+++"], count["+++"]


def _excluded(*names: str) -> list[str]:
    return [f"--exclude={name}" for name in (*names, "node_modules", "*.db*", "openapi.json")]


def run(command: str, project: Path, url: URL) -> str:
    """Run a command of a page in the copy. `make` does not renew the environment."""
    if command.startswith("alembic "):
        done = run_python(
            *("-m", *shlex.split(command)), env=environment(url, LOG_FORMAT="console"), cwd=project
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr
    command = re.sub(r"^make ", "make --old-file=install ", command)
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=project,
        env=environment_of_copy(
            url, project, LOG_FORMAT="console", PATH=f"{BIN}:{os.environ['PATH']}"
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}"
    return ended.stdout
