"""Run `python` commands in forks of a process that has already imported the libraries.

In a fork, the service's code starts half a second earlier than in a new process. The arguments name
further modules to import. The service's own are not among them if each fork imports another copy.

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
import traceback
from typing import Any, NoReturn

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


def run_as_new_process(request: dict[str, Any], outputs: list[str]) -> NoReturn:
    """Run the command with its own files, environment and folder, and exit with its exit code."""
    signal.alarm(MAX_SECONDS)
    os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdin = os.fdopen(0)  # The previous one may have read further requests.
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    code: Any = 0
    try:
        run(*request["arguments"])
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  (The error must end this fork only.)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)  # To remove all modules would take 50 ms.


for name in (*LIBRARIES, *sys.argv[1:]):
    importlib.import_module(name)
gc.freeze()  # Forks do not collect the libraries' objects.
sys.dont_write_bytecode = True  # As in `environment_of_copy`.
for line in sys.stdin:
    request = json.loads(line)
    forks = []
    for outputs in request["outputs"]:
        if not (fork := os.fork()):
            run_as_new_process(request, outputs)
        forks.append(fork)
    codes = [os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks]
    sys.stdout.write(json.dumps(codes) + "\n")
    sys.stdout.flush()
