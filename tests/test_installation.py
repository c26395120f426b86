"""The lock file, the wheel, and the command `fastapi`."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sqlalchemy import make_url

from tests.service import BIN, ROOT, environment


def run(*command: str | Path, cwd: Path, env: dict[str, str]) -> str:
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def readiness(command: Sequence[str | Path], cwd: Path, env: dict[str, str], output: Path) -> str:
    """Start the service with the command, and return its response to `/health/ready`."""
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):  # With reload, the port is logged before it is open.
                if found := re.search(r"http://127\.0\.0\.1:[1-9]\d*", output.read_text()):
                    with urllib.request.urlopen(f"{found[0]}/health/ready", timeout=30) as response:
                        return str(response.read(), "utf-8")
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_the_wheel_runs_from_any_folder(tmp_path: Path) -> None:
    """It contains the command, the migrations and gunicorn's configuration."""
    site = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        tmp_path,
        cwd=ROOT,
        env=dict(os.environ),
    )
    [wheel] = tmp_path.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", site, wheel, cwd=tmp_path, env=dict(os.environ))
    # Before the checkout, which is installed in this environment.
    env = environment(
        make_url(f"sqlite:///{tmp_path / 'heroes.db'}"), PYTHONPATH=str(site), PORT=""
    )
    env |= {"WEB_CONCURRENCY": "1"}
    where = run(sys.executable, "-c", "import app; print(app.__file__)", cwd=tmp_path, env=env)
    assert where.startswith(str(site))
    behind = subprocess.run(
        [site / "bin" / "heroes", "seed", "1"], cwd=tmp_path, env=env, capture_output=True
    )
    assert behind.returncode == 3
    run(
        BIN / "alembic",
        "-c",
        site / "app" / "alembic.ini",
        "upgrade",
        "head",
        cwd=tmp_path,
        env=env,
    )
    assert "Created 3 rows" in run(site / "bin" / "heroes", "seed", "3", cwd=tmp_path, env=env)
    command: list[str | Path] = [
        BIN / "gunicorn",
        "--config",
        "python:app.gunicorn_conf",
        "--bind",
        "127.0.0.1:0",
    ]
    assert readiness(command, tmp_path, env, tmp_path / "log") == '{"status":"ready"}'


@pytest.mark.parametrize("command", ["dev", "run"])
def test_the_command_fastapi_finds_the_service(command: str, tmp_path: Path) -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["fastapi"]["entrypoint"]
    assert entry == "app.main:app"
    env = environment(make_url(f"sqlite:///{tmp_path / 'heroes.db'}"), PYTHONPATH=str(ROOT))
    run(BIN / "alembic", "upgrade", "head", cwd=ROOT, env=env)
    started: list[str | Path] = [BIN / "fastapi", command, "--host", "127.0.0.1", "--port", "0"]
    assert readiness(started, ROOT, env, tmp_path / "log") == '{"status":"ready"}'


def test_the_lock_pins_packages_with_their_extras() -> None:
    """pip before 23.3 takes the newest release of `x[extra]` if the lock names only `x`.

    It then refuses that release, which has no hash: the lock could be installed only until the next
    release of x.
    """
    lines = (ROOT / "requirements-dev.txt").read_text().replace("\\\n", "").splitlines()
    pins = [
        Requirement(line.partition(" --hash=")[0]) for line in lines if re.match(r"[a-z0-9]", line)
    ]
    extras = {canonicalize_name(pin.name): pin.extras for pin in pins}
    needed = [
        requirement
        for distribution in distributions()
        if canonicalize_name(distribution.name) in extras
        for requirement in map(Requirement, distribution.requires or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    assert any(requirement.extras for requirement in needed)
    for requirement in needed:
        assert requirement.extras <= extras[canonicalize_name(requirement.name)], requirement
