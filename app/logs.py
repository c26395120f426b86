"""One log for all that runs in the process: a JSON object a line, or plain lines on a terminal."""

import contextlib
import logging
import logging.config
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as encode
from select import PIPE_BUF
from typing import Any, Literal, NamedTuple

from pythonjsonlogger.core import RESERVED_ATTRS

# The id of the request that is being answered, empty outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")


class _RequestId(logging.Filter):
    """Adds the request's id to every record that is written while it is answered."""

    def filter(self, record: logging.LogRecord) -> bool:
        if current := request_id.get():
            record.request_id = current
        return True


def configure(level: str, format: Literal["json", "console"]) -> None:  # noqa: A002
    """Sends every logger of the process to stderr in one format, from `level` up.

    Loggers that gunicorn, uvicorn or alembic have set up by themselves are taken over.
    """
    logging.config.dictConfig(configuration(level, format))
    _access.update(on=logging.getLogger().isEnabledFor(logging.INFO), json=format == "json")


_access = {"on": False, "json": False}


class Answered(NamedTuple):
    """What is known of a request when it has been answered."""

    method: str
    path: str
    route: str
    status: int
    seconds: float
    client: str | None
    request_id: str


def access(requests: list[Answered]) -> None:
    """Writes a line for each, as a logger of the name heroes.access would.

    Straight to stderr and many at once: one by one through `logging` they were a fifth of the cost
    of a read.
    """
    if not _access["on"]:
        return
    line_of = _json_line if _access["json"] else _console_line
    now = datetime.now(UTC)
    time = now.isoformat() if _access["json"] else f"{now.astimezone():%F %T,%f}"[:-3]
    lines = ""
    for request in requests:
        line = line_of(time, request)
        # Up to this size the kernel keeps what workers write into one pipe apart.
        if len(lines) + len(line) > PIPE_BUF:
            _write(lines)
            lines = ""
        lines += line
    _write(lines)


def _json_line(time: str, request: Answered) -> str:
    # What came from outside is escaped; the rest is known to need none of it.
    path, request_id = encode(request.path), encode(request.request_id)
    client = "null" if request.client is None else encode(request.client)
    return (
        f'{{"level": "INFO", "logger": "heroes.access",'
        f' "message": "{request.method} {path[1:-1]} {request.status}",'
        f' "timestamp": "{time}", "method": "{request.method}", "path": {path},'
        f' "status": {request.status}, "duration_ms": {request.seconds * 1000:.2f},'
        f' "client": {client}, "request_id": {request_id}}}\n'
    )


def _console_line(time: str, request: Answered) -> str:
    return f"{time} INFO    {request.method} {request.path} {request.status}\n"


def _write(lines: str) -> None:
    # As with `logging`, a log that cannot be written is no reason to fail a request.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(lines)


def configuration(level: str, format: Literal["json", "console"]) -> dict[str, Any]:  # noqa: A002
    """The same, as `logging.config` and gunicorn's `logconfig_dict` take it."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": _RequestId}},
        "formatters": {
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "format": "%(levelname)s %(name)s %(message)s",
                "rename_fields": {"levelname": "level", "name": "logger"},
                "timestamp": True,
                # uvicorn's message once more, with the colours of a terminal.
                "reserved_attrs": [*RESERVED_ATTRS, "color_message"],
            },
            "console": {"format": "%(asctime)s %(levelname)-7s %(message)s"},
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": format,
                "filters": ["request_id"],
            }
        },
        "root": {"level": level, "handlers": ["stderr"]},
        "loggers": {
            "alembic.runtime.plugins": {"level": "WARNING"},  # A line for each plugin.
            "gunicorn.error": {"level": level, "handlers": [], "propagate": True},
            "uvicorn": {"level": level, "handlers": [], "propagate": True},
            "uvicorn.error": {"level": "NOTSET", "handlers": [], "propagate": True},
            # The app writes the access log itself: see app/api/observe.py.
            "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
        },
    }
