"""One log for the whole process: a JSON object per line, or plain lines on a terminal."""

import contextlib
import logging
import logging.config
import select
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from pydantic_core import to_json
from pythonjsonlogger.core import RESERVED_ATTRS

from app import NAME

# The id of the current request, or an empty string.
request_id: ContextVar[str] = ContextVar("request_id", default="")


class _RequestId(logging.Filter):
    """Adds the id of the current request to every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        if current := request_id.get():
            record.request_id = current
        return True


def configure(level: str, format: Literal["json", "console"]) -> None:  # noqa: A002
    """Send every logger of the process to stderr in one format, from `level` up.

    This includes the loggers that gunicorn, uvicorn and alembic configure themselves.
    """
    logging.config.dictConfig(configuration(level, format))
    _access.update(on=logging.getLogger().isEnabledFor(logging.INFO), json=format == "json")


_access = {"on": False, "json": False}
# The kernel does not mix writes of this size by several workers into one pipe. 512 is the minimum
# of POSIX.
_MAX_WRITE_BYTES = getattr(select, "PIPE_BUF", 512)


class AccessLogEntry(NamedTuple):
    """One request. `route` is the path template, and `principal` the name of the token."""

    method: str
    path: str
    route: str
    status: int
    seconds: float
    client: str | None
    principal: str | None
    request_id: str


def log_requests(entries: list[AccessLogEntry]) -> None:
    """Write a line per entry to stderr, if `configure` was called with INFO or lower.

    The lines look like those of a logger. They bypass `logging`, which would be a fifth of the CPU
    time of a read: docs/decisions/0005-the-access-log-bypasses-logging.md.
    """
    if not _access["on"]:
        return
    line_of = _json_line if _access["json"] else _console_line
    now = datetime.now(UTC)
    time = now.isoformat() if _access["json"] else f"{now.astimezone():%F %T,%f}"[:-3]
    lines = ""
    for entry in entries:
        line = line_of(time, entry)
        if len(lines) + len(line) > _MAX_WRITE_BYTES:
            _write(lines)
            lines = ""
        lines += line
    _write(lines)


def _json_line(time: str, entry: AccessLogEntry) -> str:
    line = {
        "level": "INFO",
        "logger": f"{NAME}.access",
        "message": f"{entry.method} {entry.path} {entry.status}",
        "timestamp": time,
        **entry._asdict(),
        "duration_ms": round(entry.seconds * 1000, 2),
    }
    del line["seconds"]
    return to_json(line).decode() + "\n"


def _console_line(time: str, entry: AccessLogEntry) -> str:
    return f"{time} INFO    {entry.method} {entry.path} {entry.status}\n"


def _write(lines: str) -> None:
    # As in `logging`, an error of the log does not fail the request.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(lines)


def configuration(level: str, format: Literal["json", "console"]) -> dict[str, Any]:  # noqa: A002
    """Return the same for `logging.config` and gunicorn's `logconfig_dict`."""
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
                # uvicorn's message again, with the colours of a terminal.
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
            "alembic.runtime.plugins": {"level": "WARNING"},  # It logs a line per plugin.
            "gunicorn.error": {"level": level, "handlers": [], "propagate": True},
            "uvicorn": {"level": level, "handlers": [], "propagate": True},
            "uvicorn.error": {"level": "NOTSET", "handlers": [], "propagate": True},
            # app/api/middleware.py writes the access log.
            "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
        },
    }
