"""README.md and docs/ are true: sessions run as printed, and tables have the names of the code."""

import inspect
import os
import re
import subprocess
from pathlib import Path

import alembic.script.base
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL

from app.api.exception_handlers import SQLSTATES
from app.db import migrations
from app.settings import Settings
from app.telemetry import metrics
from tests.faults.test_helpers import HELPERS
from tests.service import BIN, ROOT, Service, environment

DOCS = [
    *ROOT.glob("*.md"),
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]
README = (ROOT / "README.md").read_text()
MIGRATIONS = (ROOT / "docs" / "migrations.md").read_text()


def exchanges(block: str) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with its output."""
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
        # A response ends without a new line, but the page cannot. Times vary.
        found, said = (
            re.sub(
                r"in [\d.]+ s, [\d,]+ per", "in 0 s, 0 per", output.replace("\r\n", "\n").rstrip()
            )
            for output in (printed.stdout, expected)
        )
        assert found == said, command


def test_the_readmes_curl_session_answers_as_printed(
    service: Service, database_url: URL, tmp_path: Path
) -> None:
    block = re.search(r"<!-- tests/test_docs.py.*?```console\n(.*?)```", README, re.DOTALL)
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


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:app|alembic|deploy|docker|tests|benchmarks)/[\w/.]*)`|\]\(([\w./]+)\)",
        page.read_text(),
    )
    paths = [ROOT / inside if inside else page.parent / linked for inside, linked in named]
    assert [path for path in paths if not path.exists()] == []


def test_the_messages_in_the_table_of_failures_are_those_of_the_code() -> None:
    source = "".join(
        (ROOT / path).read_text()
        for path in ("app/db/migrations.py", "alembic/env.py", *sorted_versions())
    ) + inspect.getsource(alembic.script.base)
    table = MIGRATIONS.partition("| last line |")[2]
    messages = re.findall(r"^\| `(?:FAILED: )?(?!FAILED)([A-Z][^`…:0-9]*)", table, re.MULTILINE)
    assert len(messages) >= 5  # PostgreSQL's own messages have no capital letter.
    # A message may continue on the next line of the source.
    joined = re.sub(r'"\s+f?"', "", source)
    beginnings = [re.split(r" is at| over", message)[0].strip() for message in messages]
    assert [message for message in beginnings if message not in joined] == []


def sorted_versions() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in (ROOT / "alembic" / "versions").glob("*.py")]


def test_the_times_on_the_page_are_those_of_the_code() -> None:
    assert migrations.STATEMENT_TIMEOUT == "15min"
    for time in (
        migrations.LOCK_TIMEOUT.replace("ms", " ms"),
        "15 minutes",
        f"{migrations.LOCK_WAIT_SECONDS} seconds",
        f"{migrations.OTHER_MIGRATOR_WAIT_SECONDS} seconds",
    ):
        assert time in MIGRATIONS


@pytest.mark.parametrize("call", re.findall(r"^(\w+)\(", MIGRATIONS, re.MULTILINE))
def test_the_helpers_on_the_page_are_imported_by_the_template(call: str) -> None:
    assert call in (ROOT / "alembic" / "script.py.mako").read_text()
    assert callable(getattr(migrations, call))


def test_the_table_of_operations_has_each_helper() -> None:
    table = MIGRATIONS.partition("## Safe operations")[2].partition("###")[0]
    assert set(re.findall(r"\| `(\w+)` \| [\d.]+ s \| 0\.[0-6] s \|", table)) >= HELPERS


def test_the_metrics_on_the_page_are_those_of_the_service() -> None:
    page = (ROOT / "docs" / "operations.md").read_text().partition("## Metrics")[2]
    rows = re.findall(r"^\| (`.*?) \|", page.partition("\n## ")[0], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    exposed = text_string_to_metric_families(metrics.exposition(metrics.Facts("", "")).decode())
    suffixes = {"counter": "_total", "info": "_info"}
    # The client library's own metrics of the process.
    foreign = re.compile("process_.*|python_.*|.*_created")
    own = [each for each in exposed if not foreign.fullmatch(each.name)]
    assert named == {each.name + suffixes.get(each.type, "") for each in own}


def test_the_table_of_database_errors_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "operations.md").read_text().partition("## Database errors")[2]
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", page, re.MULTILINE)
    documented = {
        state: int(status) for status, row in rows for state in re.findall(r"`(\w+)`", row)
    }
    assert documented == {
        state: response.status for state, response in SQLSTATES.items() if state is not None
    }
