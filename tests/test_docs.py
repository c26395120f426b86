"""What docs/ says by name is there."""

import re
from pathlib import Path

import pytest

from app import migrations
from tests.service import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
MIGRATIONS = (ROOT / "docs" / "migrations.md").read_text()


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:app|alembic|docker|tests)/[\w/.]*)`|\]\(([\w./]+)\)", page.read_text()
    )
    paths = [ROOT / inside if inside else page.parent / linked for inside, linked in named]
    assert [path for path in paths if not path.exists()] == []


def test_the_messages_that_an_operator_looks_up_are_the_ones_that_are_said() -> None:
    source = "".join(
        (ROOT / path).read_text()
        for path in ("app/migrations.py", "alembic/env.py", *sorted_versions())
    )
    said = re.findall(
        r"\| `(?:FAILED: )?((?:The|Another|A) [\w' ]+?)(?: for| …|:|,| \d)", MIGRATIONS
    )
    assert len(said) >= 5
    assert [message for message in said if message.split(" is at")[0] not in source] == []


def sorted_versions() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / "alembic" / "versions").glob("*.py")]


def test_the_times_that_the_page_names_are_the_ones_that_hold() -> None:
    assert migrations.LOCK_TIMEOUT.removesuffix("ms") + " ms for its lock" in MIGRATIONS
    assert migrations.STATEMENT_TIMEOUT == "15min"
    assert "run for 15 minutes" in MIGRATIONS
    assert (migrations.PATIENCE, migrations.OTHER_MIGRATOR) == (600, 3600)
    assert "for 600 seconds" in MIGRATIONS
    assert "over 3600 seconds" in MIGRATIONS


@pytest.mark.parametrize("call", re.findall(r"^(\w+)\(", MIGRATIONS, re.MULTILINE))
def test_the_helpers_that_are_shown_are_at_hand_in_the_template(call: str) -> None:
    assert call in (ROOT / "alembic" / "script.py.mako").read_text()
    assert callable(getattr(migrations, call))
