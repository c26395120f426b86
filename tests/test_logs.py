"""The log as such: what becomes of its lines on their way out."""

import json
import os
import subprocess
import sys

from tests.service import ROOT


def test_lines_of_many_workers_into_one_pipe_stay_whole() -> None:
    code = """if True:
        from app.logs import Answered, access, configure

        configure("INFO", "json")
        for _ in range(100):
            access([Answered("GET", "/heroes/1", "", 200, 0.001, None, "id")] * 100)
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
