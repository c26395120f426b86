"""Settings, read from the environment once."""

import os
import re
import sys
import warnings
from typing import Annotated, Any, Literal, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo, PGconn
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, SAWarning

from app import NAME
from app.limits import default_workers

# The scheme, the part before the parameters and the parameters. libpq splits a URL the same way.
_POSTGRESQL = re.compile(
    r"(postgres|postgresql|postgresql\+psycopg)(://(?:[^@/]*@)?[^?]*)\??(.*)", re.DOTALL
)
# Values that libpq checks only after it has connected a socket, or not at all.
_INTEGER = "-?[0-9]{1,9}"
_VALUES = {
    "connect_timeout": _INTEGER,
    "tcp_user_timeout": _INTEGER,
    "keepalives": _INTEGER,
    "keepalives_idle": _INTEGER,
    "keepalives_interval": _INTEGER,
    "keepalives_count": _INTEGER,
    "client_encoding": "(?i:utf-?8)",
    "prepare_threshold": "[0-9]{1,9}|(?i:none)",  # psycopg's, not libpq's.
}


def _postgresql_url(scheme: str, before: str, query: str) -> URL:
    """Return the URL that libpq reads from the text. Raises `ValueError` with a safe reason."""
    if scheme == "postgresql+psycopg":  # SQLAlchemy's spelling, in which + is a space.
        query = query.replace("+", "%20")
    known = {"ssl", "prepare_threshold", *(key.keyword.decode() for key in Conninfo.get_defaults())}
    parameters = [parameter.partition("=") for parameter in query.split("&") if query]
    names = [name for name, _, _ in parameters]
    for name in names:
        if name not in known and "@" in query:  # The name may be a part of the password.
            raise ValueError("a parameter is unknown: percent-encode / and ? in the password")
        if name not in known:
            raise ValueError(f"the parameter {re.sub('[^a-zA-Z0-9_]', '?', name)} is unknown")
        if names.count(name) > 1:
            raise ValueError(f"the parameter {name} is repeated")
    of_libpq = "&".join("".join(part) for part in parameters if part[0] != "prepare_threshold")
    try:
        given: dict[str, Any] = conninfo_to_dict(
            f"postgresql{before}?{of_libpq}".replace(" ", "%20")
        )
        error = _error_of_libpq(given)
    except psycopg.Error as refused:
        error = str(refused)
    except UnicodeError:
        error = "the text is not UTF-8"
    if error:  # Quotes surround all values.
        error = re.sub(f'"({"|".join(known)})"', r"\1", error)
        raise ValueError(" ".join(re.sub('".*"', '"..."', error, flags=re.DOTALL).split()))
    given |= {name: value for name, _, value in parameters if name == "prepare_threshold"}
    for name, pattern in _VALUES.items():
        if name in given and not re.fullmatch(pattern, given[name]):
            raise ValueError(f"the parameter {name} has a wrong value")
    host = given.get("host", "")
    if "port" in given and given["port"].count(",") != host.count(","):
        raise ValueError("the parameter port needs one port for each host")
    # SQLAlchemy renders a socket's directory and several hosts correctly only as parameters.
    is_plain = re.fullmatch(r"[\w.:-]+", host)
    return URL.create(
        "postgresql+psycopg",
        username=given.pop("user", None),
        password=given.pop("password", None),
        host=given.pop("host") if is_plain else None,
        port=int(given.pop("port", "") or 0) or None if is_plain else None,
        database=given.pop("dbname", None),
        query=given,
    )


def _error_of_libpq(given: dict[str, Any]) -> str:
    """Return libpq's message about a wrong value, or an empty string. It does not connect."""
    host = given.get("host", "")
    # libpq checks the values before the address, which is wrong on purpose. Empty values override
    # the PG* variables.
    addresses = ",".join("-" for _ in (given.get("hostaddr") or host).split(","))
    attempt = {"port": "", **given, "host": host, "hostaddr": addresses}
    connection = PGconn.connect_start(make_conninfo(**attempt).encode())
    error = re.sub("could not parse network address .*", "", connection.get_error_message())
    connection.finish()
    return error.strip()


def _database_url(value: object) -> URL:
    """Return the URL for SQLAlchemy. Raises `ValueError` with a reason that contains no secret."""
    if isinstance(value, URL):
        return value
    text = str(value).strip()
    if "\0" in text:
        raise ValueError("the text contains NUL")
    if postgresql := _POSTGRESQL.fullmatch(text):
        return _postgresql_url(*postgresql.groups())
    if not text.startswith(("sqlite://", "sqlite+pysqlite://")):
        raise ValueError("the scheme is unknown")
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("the URL cannot be parsed") from None
    if url.database in (None, "", ":memory:"):
        raise ValueError("the file is missing")
    try:
        with warnings.catch_warnings(action="error"):
            url.get_dialect()().create_connect_args(url)
    except (ArgumentError, SAWarning, ValueError):
        names = re.sub("[^a-zA-Z0-9_, ]", "?", ", ".join(url.query))
        raise ValueError(f"wrong parameter: {names}" if names else "no host is allowed") from None
    return url


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
    may be a password.
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
