"""Writing of log lines."""

import json
import os
import subprocess
import sys

from tests.service import ROOT


def test_lines_of_several_workers_in_one_pipe_are_not_mixed() -> None:
    code = """if True:
        from app.telemetry.logs import AccessLogEntry, configure, log_requests

        configure("INFO", "json")
        for _ in range(100):
            entry = AccessLogEntry("GET", "/heroes/1", "", 200, 0.001, None, None, "id")
            log_requests([entry] * 100)
    """
    reads, writes = os.pipe()
    workers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=writes) for _ in range(2)
    ]
    os.close(writes)
    with os.fdopen(reads) as pipe:
        paths = [json.loads(line)["path"] for line in pipe]
    assert paths == ["/heroes/1"] * 20_000
    assert [worker.wait() for worker in workers] == [0, 0]


def test_the_log_works_on_a_platform_without_pipe_buf() -> None:
    """On Windows, `select` has no PIPE_BUF."""
    code = "import select; del select.PIPE_BUF; import app.telemetry.logs as logs; print(logs)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert imported.returncode == 0, imported.stderr
