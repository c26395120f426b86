"""The load generator wrk (https://github.com/wg/wrk)."""

import os
import subprocess
from pathlib import Path

# For connections that the server does not close when the measurement ends.
_END_SECONDS = 30


def run(script: str, port: int, seconds: float, connections: int, **environment: str) -> str:
    """Keep the connections busy for some seconds. Return the last line that the script prints."""
    done = subprocess.run(
        [
            *("wrk", "--threads", str(min(2, connections)), "--connections", str(connections)),
            *("--duration", f"{seconds}s", "--timeout", "10s"),
            *("--script", script, f"http://127.0.0.1:{port}"),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=seconds + _END_SECONDS,
        cwd=Path(__file__).parent,
        env=os.environ | environment,
    )
    return done.stdout.splitlines()[-1]
