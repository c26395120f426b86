"""Run `alembic` commands in forks of a process that has already imported everything.

Forks start fast. Each input line is a JSON object with "argv", "env", "count" and "output". The
process runs `count` concurrent migrators, each with its output in the file `output`.N, and writes
their exit codes as a JSON array.
"""

import json
import os
import sys
import traceback
from typing import Any

import psycopg  # noqa: F401
from alembic.config import CommandLine

from app import models, settings  # noqa: F401
from app.db import database, migrations  # noqa: F401


def run(argv: list[str], env: dict[str, str], output: str) -> None:
    """Run the command in this process and exit with its exit code."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    code: Any = 0
    try:
        CommandLine("alembic").main(argv)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  (the error must end this fork only)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


for line in sys.stdin:
    request = json.loads(line)
    children = []
    for number in range(request["count"]):
        if not (child := os.fork()):
            run(request["argv"], request["env"], f"{request['output']}.{number}")
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.stdout.write(json.dumps(codes) + "\n")
    sys.stdout.flush()
