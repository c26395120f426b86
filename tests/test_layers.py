"""The code that serves any table knows none of them."""

import re
import subprocess
import sys
from pathlib import Path

from tests.service import ROOT

WIRING = {"application.py", "cli.py", "__main__.py", "__init__.py"}


def test_only_the_resources_and_their_wiring_name_a_table() -> None:
    sources = {
        str(path.relative_to(ROOT / "app")): path.read_text()
        for path in (ROOT / "app").rglob("*.py")
    }
    named = {
        path: lines
        for path, source in sources.items()
        if (lines := re.findall(r"(?i).*\bhero.*", source))
    }
    resources = {path for path, source in sources.items() if "from app.models import" in source}
    assert named.keys() >= resources >= {"heroes.py", "api/heroes.py"}, "the pattern matches"
    allowed = resources | WIRING | {"models.py"}
    assert {path: named[path] for path in named.keys() - allowed} == {}


def test_a_wrong_setting_does_not_end_an_import_of_create_app(tmp_path: Path) -> None:
    imported = subprocess.run(
        [sys.executable, "-c", "from app.application import create_app"],
        cwd=tmp_path,
        env={"DATABASE_URL": "wrong"},
        capture_output=True,
        text=True,
    )
    assert (imported.returncode, imported.stderr) == (0, "")
