"""What README.md shows is what happens."""

import re
import subprocess

import pytest

from app.settings import Settings
from tests.service import ROOT, Service

README = (ROOT / "README.md").read_text()


def test_the_curl_session_answers_as_printed(service: Service) -> None:
    session = re.search(r"<!-- tests/test_readme.py.*?```console\n(.*?)```", README, re.DOTALL)
    assert session
    exchanges = re.findall(r"^\$ (.*)\n(.*)\n", session[1], re.MULTILINE)
    assert len(exchanges) >= 8
    for command, expected in exchanges:
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
        printed = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
        assert printed.stdout == expected, command


@pytest.mark.parametrize("field", sorted(set(Settings.model_fields) - {"telemetry"}))
def test_every_setting_is_in_the_table(field: str) -> None:
    assert f"| `{field.upper()}` |" in README


def test_every_path_that_is_named_exists() -> None:
    named = re.findall(r"`((?:app|alembic|tests)/[\w/.]*)`", README)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).exists()] == []
