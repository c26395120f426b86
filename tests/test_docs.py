"""What docs/ says by name is there."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import metrics, migrations
from tests.service import ROOT

DOCS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")]
MIGRATIONS = (ROOT / "docs" / "migrations.md").read_text()


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:app|alembic|docker|tests|benchmarks)/[\w/.]*)`|\]\(([\w./]+)\)", page.read_text()
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


def test_the_metrics_that_the_page_names_are_the_ones_there_are() -> None:
    page = (ROOT / "docs" / "operations.md").read_text().partition("## Metrics")[2]
    rows = re.findall(r"^\| (`.*?) \|", page.partition("\n## ")[0], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    exposed = text_string_to_metric_families(metrics.exposition(metrics.Facts("", "")).decode())
    suffixes = {"counter": "_total", "info": "_info"}
    # What the client library says of the process itself is its own.
    foreign = re.compile("process_.*|python_.*|.*_created")
    own = [each for each in exposed if not foreign.fullmatch(each.name)]
    assert named == {each.name + suffixes.get(each.type, "") for each in own}
