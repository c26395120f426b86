"""The files of the revisions form one chain, also after a merge of two branches of the code."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.service import ROOT

VERSIONS = ROOT / "alembic" / "versions"


def conflict(versions: Path) -> str | None:
    """Return how two revisions conflict and how to correct it; None if the files form a chain.

    Reads the files as text: Alembic cannot load two revisions with the same number.
    """
    files = {file.name: file.read_text() for file in sorted(versions.glob("*.py"))}
    numbers = {
        name: re.findall(r'^revision = "(\w+)"', files[name], re.MULTILINE)[0] for name in files
    }
    parents = {
        number: re.findall(
            r'"(\w+)"', re.findall(r"^down_revision = (.*)", files[name], re.MULTILINE)[0]
        )
        for name, number in numbers.items()
    }
    following = f"{max(int(number) for number in numbers.values() if number.isdigit()) + 1:04}"
    [(number, count)] = Counter(numbers.values()).most_common(1)
    if count > 1:
        first, *_, last = (name for name in numbers if numbers[name] == number)
        return (
            f"{first} and {last} have the same number. Renumber the file that is not released:"
            f" call it {last.replace(f'_{number}_', f'_{following}_')}, with revision ="
            f' "{following}" and down_revision = "{number}".'
        )
    heads = sorted(set(numbers.values()) - {each for below in parents.values() for each in below})
    if len(heads) > 1:
        return (
            f"There are two heads: {' and '.join(heads)}. If {heads[-1]} is not released, set its"
            f' down_revision to "{heads[0]}". Otherwise run: alembic merge --rev-id {following}'
            f' -m "Merge" {" ".join(heads)}'
        )
    return None


def test_the_revisions_form_one_chain() -> None:
    assert conflict(VERSIONS) is None, conflict(VERSIONS)


REVISION = 'revision = "{}"\ndown_revision = "{}"\n'


@pytest.fixture
def versions(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VERSIONS, tmp_path / "versions"))


def head(versions: Path) -> int:
    return max(int(file.name.split("_")[3]) for file in versions.glob("*.py"))


def test_two_branches_with_the_same_number_are_reported_with_the_correction(
    versions: Path,
) -> None:
    last = head(versions)
    number, following = f"{last + 1:04}", f"{last + 2:04}"
    for name in ("powers", "teams"):
        file = versions / f"2026_11_25_{number}_{name}.py"
        file.write_text(REVISION.format(number, f"{last:04}"))
    message = conflict(versions)
    assert message
    assert "have the same number" in message

    file.rename(versions / f"2026_11_25_{following}_teams.py")
    (versions / f"2026_11_25_{following}_teams.py").write_text(REVISION.format(following, number))
    assert f"call it 2026_11_25_{following}_teams.py" in message
    assert conflict(versions) is None


def test_two_heads_are_reported_with_the_command_that_merges_them(versions: Path) -> None:
    last = head(versions)
    one, two, following = (f"{last + step:04}" for step in (1, 2, 3))
    for number in (one, two):
        (versions / f"2026_11_25_{number}_x.py").write_text(REVISION.format(number, f"{last:04}"))
    message = conflict(versions)
    assert message
    assert f'alembic merge --rev-id {following} -m "Merge" {one} {two}' in message

    merge = f'revision = "{following}"\ndown_revision = ("{one}", "{two}")\n'
    (versions / f"2026_11_25_{following}_merge.py").write_text(merge)
    assert conflict(versions) is None
