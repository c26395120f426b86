"""`DATABASE_URL` as libpq reads it, checked completely before anything connects."""

import re
import warnings
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo, PGconn
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, SAWarning

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


def parse_url(value: object) -> URL:
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
    if "," in host:  # Of a cluster, only the primary accepts writes.
        given.setdefault("target_session_attrs", "read-write")
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
