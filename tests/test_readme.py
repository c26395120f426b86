"""What README.md shows is what happens."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import URL

from app.settings import Settings
from tests.service import BIN, ROOT, Service, environment

README = (ROOT / "README.md").read_text()


def exchanges(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what it prints."""
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


def assert_printed(
    service: Service, database_url: URL, folder: Path, session: list[tuple[str, str]]
) -> None:
    path = f"{BIN}:{os.environ['PATH']}"
    for command, expected in session:
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
        printed = subprocess.run(
            ["bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment(database_url, PATH=path),
        )
        # An answer ends without a new line; the page cannot. Times are their own.
        found, said = (
            re.sub(r"in [\d.]+ s, [\d,]+ a", "in 0 s, 0 a", output.replace("\r\n", "\n").rstrip())
            for output in (printed.stdout, expected)
        )
        assert found == said, command


def test_the_readmes_curl_session_answers_as_printed(
    service: Service, database_url: URL, tmp_path: Path
) -> None:
    block = re.search(r"<!-- tests/test_readme.py.*?```console\n(.*?)```", README, re.DOTALL)
    assert block
    session = exchanges(block[1])
    assert len(session) >= 8
    assert_printed(service, database_url, tmp_path, session)


def test_the_api_pages_sessions_answer_as_printed(
    service: Service, database_url: URL, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    session = [each for block in blocks for each in exchanges(block) if "openssl" not in each[0]]
    assert len(session) >= 18
    assert_printed(service, database_url, tmp_path, session)


@pytest.mark.parametrize("field", sorted(set(Settings.model_fields) - {"telemetry"}))
def test_every_setting_is_in_the_table(field: str) -> None:
    assert f"| `{field.upper()}` |" in README


def test_every_path_that_is_named_exists() -> None:
    named = re.findall(r"`((?:app|alembic|tests)/[\w/.]*)`", README)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).exists()] == []
