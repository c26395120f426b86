"""`make compare`: lines of code, tables, and the processes that it starts."""

import os
from pathlib import Path

import pytest

from benchmarks import comparison
from benchmarks.comparison import lines_of_code
from benchmarks.processes import tree
from benchmarks.tables import replace_section, table

SOURCE = '''\
"""Items."""

from app.models import Item


class Order:
    id: int


@router.get(
    "/orders/",
)
def list_items() -> list[str]:

    return []


router.include(items)
'''


def test_lines_of_other_tables_do_not_count() -> None:
    docstring, imported, function, included = 1, 1, 5, 1
    counted = lines_of_code(SOURCE, "item", named=False)
    assert counted == docstring + imported + function + included


def test_all_lines_of_a_file_named_for_the_table_count_except_blank_ones() -> None:
    assert lines_of_code(SOURCE, "item", named=True) == 10


def test_a_table_replaces_the_previous_one(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- begin -->\nold\n<!-- to here -->\nafter\n")
    replace_section(readme, "<!-- begin -->", table(["", "a"], [["rate", "1"]]))
    assert readme.read_text() == (
        "before\n<!-- begin -->\n|  | a |\n| --- | --- |\n| rate | 1 |\n<!-- to here -->\nafter\n"
    )


@pytest.mark.parametrize("text", ["no markers", "<!-- begin -->", "<!-- to here -->"])
def test_a_readme_without_both_markers_is_not_changed(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="has no section"):
        replace_section(readme, "<!-- begin -->", "")
    assert readme.read_text() == text


def test_a_server_that_does_not_start_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "START_SECONDS", 3)
    project = comparison.tutorial("postgresql://nowhere")
    project.folder, project.module = tmp_path, "broken.py"
    (tmp_path / "broken.py").write_text("from fastapi import FastAPI\napp = FastAPI()\n1 / 0\n")
    before = tree(os.getpid())
    with pytest.raises(OSError, match="refused"), comparison.running(project, tmp_path):
        pass
    assert set(tree(os.getpid())) <= set(before)
    assert "ZeroDivisionError" in capfd.readouterr().err
