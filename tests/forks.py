"""Run `python` commands in forks of a process that has already imported the libraries.

In a fork, the service's code starts half a second earlier than in a new process. This module does
not import that code, so that each fork can import another copy of it.

Each input line is a JSON object with "arguments" (of `python`), "cwd", "env", "stdin" (a file) and
"outputs" (one pair of files for stdout and stderr for each concurrent fork). The output line is the
array of their exit codes.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from typing import Any

LIBRARIES = (
    "alembic.autogenerate",
    "alembic.config",
    "fastapi.openapi.docs",
    "opentelemetry.sdk.resources",
    "prometheus_client.multiprocess",
    "psycopg_pool",
    "pydantic_settings",
    "pythonjsonlogger.json",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.ext.asyncio",
    "sqlmodel",
    "typer.rich_utils",
    "uvicorn",
)
MAX_SECONDS = 120


def run(option: str, program: str, *arguments: str) -> None:
    """Run `python OPTION PROGRAM ARGUMENTS`."""
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program, {"__name__": "__main__"})


def run_as_new_process(request: dict[str, Any], outputs: list[str]) -> None:
    """Run the command with its own files, environment and folder."""
    signal.alarm(MAX_SECONDS)
    os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdin = os.fdopen(0)  # The previous one may have read further requests.
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    run(*request["arguments"])


for library in LIBRARIES:
    importlib.import_module(library)
gc.freeze()  # Forks do not collect the libraries' objects.
for line in sys.stdin:
    request = json.loads(line)
    forks = []
    for outputs in request["outputs"]:
        if not (fork := os.fork()):
            run_as_new_process(request, outputs)
            sys.exit()
        forks.append(fork)
    codes = [os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks]
    sys.stdout.write(json.dumps(codes) + "\n")
    sys.stdout.flush()
