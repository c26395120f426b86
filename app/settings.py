"""Settings, read from the environment once."""

import difflib
import functools
import logging
import os
import re
import sys
from ipaddress import ip_network
from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url

from app import NAME
from app.database_url import parse_url
from app.limits import default_workers

logger = logging.getLogger(__name__)


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
        raise ValueError("an entry has another form")
    return tuple(Token(*entry.groups()) for entry in entries if entry)  # type: ignore[arg-type]


# As a browser sends it: with a path or a default port it would never match.
_ORIGIN = re.compile(
    r"(?!http://.*:80$|https://.*:443$)"
    r"[a-z][a-z0-9+.-]*://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?"
)


def _origins(value: object) -> tuple[str, ...]:
    if not isinstance(value, str):
        return tuple(value)  # type: ignore[arg-type]
    origins = value.lower().replace(",", " ").split()
    if origins == ["*"]:
        return ("*",)
    if not origins or not all(map(_ORIGIN.fullmatch, origins)):
        raise ValueError("an entry has another form")
    for origin in origins:
        urlsplit(origin).port  # noqa: B018  (Raises ValueError if it is out of range.)
    return tuple(origins)


def _proxies(value: str) -> str:
    for address in value.split(",") if value != "*" else ():
        try:
            ip_network(address.strip())
        except ValueError:
            raise ValueError("an entry has another form") from None
    return value


_DATABASE_URL = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
DatabaseURL = Annotated[URL, BeforeValidator(parse_url)]
# Docker and Kubernetes mount secrets here: a file per variable.
_SECRETS_FOLDER = "/run/secrets"


class Settings(BaseSettings):
    """The settings of the service: see the table in README.md.

    A field's description is what its variable accepts. The message about a wrong value uses it.
    """

    model_config = SettingsConfigDict(
        env_file=".env",
        secrets_dir=_SECRETS_FOLDER if os.path.isdir(_SECRETS_FOLDER) else None,  # noqa: PTH112
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
    database_queue_size: int = Field(
        500, ge=1, le=100_000, description="a whole number from 1 to 100000"
    )
    api_tokens: Annotated[tuple[Token, ...], BeforeValidator(_tokens)] = Field(
        (),
        description="entries name:scope:sha256 with the scope read or write, separated by commas",
    )
    api_public_reads: bool = Field(False, description="true or false")
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_origins)] = Field(
        (),
        description="* or origins like https://app.example.com, without a path and without the"
        " scheme's default port, separated by commas",
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="a path like /api, with a slash at its start and none at its end",
    )
    forwarded_allow_ips: Annotated[str, AfterValidator(_proxies)] = Field(
        "127.0.0.1,::1",
        description="* or addresses and networks like 10.0.0.0/8, separated by commas",
    )
    keep_alive_seconds: int = Field(
        75, ge=1, le=3600, description="a whole number of seconds from 1 to 3600"
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
        default_factory=default_workers, ge=1, le=1000, description="a whole number from 1 to 1000"
    )
    # Not a variable. OpenTelemetry itself reads the OTEL_* variables.
    telemetry: Annotated[
        bool, BeforeValidator(lambda _: any(name.startswith("OTEL_") for name in os.environ))
    ] = Field(False, validate_default=True)


def from_environment() -> Settings:
    """Return the settings of this process.

    If a value is wrong, the process ends with exit code 2 and one line per variable on stderr: its
    name, the accepted values and, if known, the reason. The line does not contain the value, which
    may be a password. It also ends with one line if a file of settings cannot be read.
    """
    try:
        return Settings()
    except ValidationError as error:
        for wrong in error.errors(include_url=False, include_input=False, include_context=False):
            field = str(wrong["loc"][0])
            accepted = Settings.model_fields[field].description
            # Only the validators of this module raise ValueError. Their texts contain no secret.
            is_own = wrong["type"] == "value_error"
            reason = wrong["msg"].replace("Value error, ", ": ", 1) if is_own else ""
            sys.stderr.write(f"{NAME}: {field.upper()} must be {accepted}{reason}\n")
        sys.exit(2)
    except (OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"{NAME}: Could not read the settings: {error}\n")
        sys.exit(2)


@functools.cache  # gunicorn's workers inherit the cache, so only the master logs.
def log_start(url: URL) -> None:
    """Log the database in use, and warn of variables that look like misspelt settings."""
    # Other parameters may be secret.
    hosts = {name: value for name, value in url.query.items() if name == "host"}
    logger.info("Database: %s", url.set(query=hosts).render_as_string(hide_password=True))
    known = [name.upper() for name in Settings.model_fields]
    unknown = []
    for name in sorted({*os.environ, *dotenv_values(".env")} - {*known}):
        similar = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.85)
        if similar != [name.upper()] and (similar or name.startswith(("API_", "DATABASE_"))):
            unknown.append(f"{name} (is it {similar[0]}?)" if similar else name)
    if unknown:
        logger.warning("These variables are not settings: %s", ", ".join(unknown))
