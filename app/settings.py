"""Settings, read from the environment once."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from app import NAME

# Optional are user:password@ before the hosts, and the rest after them.
_SEVERAL_HOSTS = re.compile(
    r"^(?P<before>[^/]+://(?:[^@/]*@)?)(?P<hosts>[^@/?]*,[^@/?]*)(?P<after>.*)$"
)


def _database_url(value: object) -> URL:
    """Return the URL for SQLAlchemy: with psycopg 3, and several hosts as query parameters."""
    if isinstance(value, URL):
        return value
    text = str(value)
    if several := _SEVERAL_HOSTS.match(text):
        hosts = "&".join(f"host={host}" for host in several["hosts"].split(","))
        after = several["after"]
        text = f"{several['before']}{after}{'&' if '?' in after else '?'}{hosts}"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("not a database URL") from None
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername in ("sqlite", "sqlite+pysqlite") and url.database not in (None, ":memory:"):
        return url
    raise ValueError("not a driver of this service")


class Token(NamedTuple):
    """An entry of `API_TOKENS`. `digest` is the SHA-256 of the token in hexadecimal."""

    name: str
    scope: Literal["read", "write"]
    digest: str


_TOKEN = re.compile(r"([\w.-]+):(read|write):([0-9a-f]{64})", re.ASCII)


def _tokens(value: object) -> tuple[Token, ...]:
    if not isinstance(value, str):
        return tuple(value)  # type: ignore[arg-type]
    entries = [_TOKEN.fullmatch(entry) for entry in value.replace(",", " ").split()]
    if None in entries or not entries:  # Only unset means open to every client.
        raise ValueError("not a token entry")
    return tuple(Token(*entry.groups()) for entry in entries if entry)  # type: ignore[arg-type]


def _usable_cores() -> int:
    """Return the number of cores that this process may use, within a container's CPU limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:  # https://docs.kernel.org/admin-guide/cgroup-v2.html: "max 100000" or "150000 100000"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores or 1, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores or 1


_DATABASE_URL = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
DatabaseURL = Annotated[URL, BeforeValidator(_database_url)]


class Settings(BaseSettings):
    """The settings of the service: see the table in README.md.

    A field's description is what its variable accepts. The message about a wrong value uses it.
    """

    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=True,
        enable_decoding=False,  # No value is JSON.
        extra="ignore",
        frozen=True,
        arbitrary_types_allowed=True,
    )

    database_url: DatabaseURL = Field(make_url(f"sqlite:///{NAME}.db"), description=_DATABASE_URL)
    migration_database_url: DatabaseURL | None = Field(None, description=_DATABASE_URL)
    database_pool_size: int = Field(16, ge=1, le=1000, description="a whole number from 1 to 1000")
    database_timeout: float = Field(
        5, ge=0.1, le=3600, allow_inf_nan=False, description="a number of seconds from 0.1 to 3600"
    )
    api_tokens: Annotated[tuple[Token, ...], BeforeValidator(_tokens)] = Field(
        (),
        description="entries name:scope:sha256 with the scope read or write, separated by commas",
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(lambda value: str(value).upper()),
    ] = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
    log_format: Literal["json", "console"] = Field(
        default_factory=lambda: "console" if sys.stderr.isatty() else "json",
        description="json or console",
    )
    web_concurrency: int = Field(
        default_factory=_usable_cores, ge=1, le=1000, description="a whole number from 1 to 1000"
    )
    # Not a variable. OpenTelemetry itself reads the OTEL_* variables.
    telemetry: Annotated[
        bool, BeforeValidator(lambda _: any(name.startswith("OTEL_") for name in os.environ))
    ] = Field(False, validate_default=True)


def from_environment() -> Settings:
    """Return the settings of this process.

    If a value is wrong, the process ends with exit code 2 and one line per variable on stderr: its
    name and the accepted values. The line does not contain the value, which may be a password.
    """
    try:
        return Settings()
    except ValidationError as error:
        for wrong in error.errors(include_url=False, include_input=False, include_context=False):
            field = str(wrong["loc"][0])
            accepted = Settings.model_fields[field].description
            sys.stderr.write(f"{NAME}: {field.upper()} must be {accepted}\n")
        sys.exit(2)
