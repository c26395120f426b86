"""What README.md shows is what happens."""

import re
import subprocess

import pytest

from app.settings import Settings
from tests.service import ROOT, Service

README = (ROOT / "README.md").read_text()


def exchanges(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with what it prints."""
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


def assert_printed(service: Service, session: list[tuple[str, str]]) -> None:
    for command, expected in session:
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
        printed = subprocess.run(
            ["bash", "-c", command], check=True, capture_output=True, text=True
        )
        # An answer ends without a new line; the page cannot.
        assert printed.stdout.replace("\r\n", "\n").rstrip() == expected.rstrip(), command


def test_the_readmes_curl_session_answers_as_printed(service: Service) -> None:
    block = re.search(r"<!-- tests/test_readme.py.*?```console\n(.*?)```", README, re.DOTALL)
    assert block
    session = exchanges(block[1])
    assert len(session) >= 8
    assert_printed(service, session)


def test_the_api_pages_sessions_answer_as_printed(service: Service) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    session = [each for block in blocks for each in exchanges(block) if "openssl" not in each[0]]
    assert len(session) >= 12
    assert_printed(service, session)


@pytest.mark.parametrize("field", sorted(set(Settings.model_fields) - {"telemetry"}))
def test_every_setting_is_in_the_table(field: str) -> None:
    assert f"| `{field.upper()}` |" in README


def test_every_path_that_is_named_exists() -> None:
    named = re.findall(r"`((?:app|alembic|tests)/[\w/.]*)`", README)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).exists()] == []
