"""The unit in deploy/systemd/, checked by systemd without starting it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service import BIN, ROOT

UNIT = ROOT / "deploy" / "systemd" / "heroes.service"
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="needs systemd-analyze"
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60
    )


def complaints(unit: Path) -> list[str]:
    """Return the lines of systemd about this unit, without those about the machine's units."""
    lines = analyze("verify", "--man=no", unit).stderr.splitlines()
    return [line for line in lines if unit.name in line]


@needs_systemd
def test_the_unit_is_valid(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    # The commands of this environment, because they must exist.
    content = UNIT.read_text().replace("/srv/heroes/.venv/bin", str(BIN))
    unit.write_text(content)
    assert complaints(unit) == []
    # The control: an unknown key is refused.
    unit.write_text(content.replace("KillMode=mixed", "KillMod=mixed"))
    [complaint] = complaints(unit)
    assert "KillMod" in complaint


@needs_systemd
def test_the_service_can_do_no_more_than_it_must() -> None:
    """systemd's own measure is from 0 to 10. Without its restrictions the unit has 9.4."""
    assessed = analyze("security", "--offline=true", "--threshold=20", UNIT)
    assert assessed.returncode == 0, assessed.stdout[-200:]


def test_a_stop_takes_longer_than_draining() -> None:
    shown = subprocess.run(
        [BIN / "gunicorn", "--check-config", "--print-config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    [graceful] = re.findall(r"^graceful_timeout += (\d+)$", shown.stdout, re.MULTILINE)
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert int(stop) > int(graceful)
