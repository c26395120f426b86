"""The code that serves any table knows none of them."""

import re
import subprocess
import sys
from pathlib import Path

from tests.service import ROOT

# The modules of the resource, and those that wire it up.
OF_THE_RESOURCE = {
    *("models.py", "heroes.py", "api/heroes.py"),
    *("application.py", "cli.py", "__main__.py", "__init__.py"),
}


def test_only_the_resource_and_its_wiring_name_it() -> None:
    named = {
        str(path.relative_to(ROOT / "app")): lines
        for path in (ROOT / "app").rglob("*.py")
        if (lines := re.findall(r"(?i).*\bhero.*", path.read_text()))
    }
    assert named.keys() >= {"models.py", "heroes.py", "api/heroes.py"}, "the pattern matches"
    assert {path: named[path] for path in named.keys() - OF_THE_RESOURCE} == {}


def test_a_wrong_setting_does_not_end_an_import_of_create_app(tmp_path: Path) -> None:
    imported = subprocess.run(
        [sys.executable, "-c", "from app.application import create_app"],
        cwd=tmp_path,
        env={"DATABASE_URL": "wrong"},
        capture_output=True,
        text=True,
    )
    assert (imported.returncode, imported.stderr) == (0, "")
