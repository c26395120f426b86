"""Runs of pytest itself: the PostgreSQL server starts only for a test that needs it."""

import os
import subprocess
import sys

import pytest

from tests.service import ROOT

TEST = "tests/test_heroes.py::test_create_returns_the_public_hero_byte_for_byte"


@pytest.mark.parametrize("processes", ["0", "1"])
def test_a_test_on_sqlite_starts_no_postgresql(processes: str) -> None:
    # Nothing listens there, so every use of the server fails.
    env = os.environ | {"TEST_DATABASE_URL": "postgresql://127.0.0.1:1/none"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", processes, TEST],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # The control: the same test on PostgreSQL needs it.
    assert "1 passed, 1 error" in run.stdout
    assert f"ERROR {TEST}[postgresql]" in run.stdout
