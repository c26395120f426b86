"""The environment, read once; a wrong value is one clear line and exit code 2."""

import asyncio
import contextlib
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict
from pydantic import ValidationError
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from app.db import migrations
from app.db.pool import ConnectionPool, PooledConnection
from app.errors import DatabaseUnavailable
from app.server.worker import log_connection_budget
from app.settings import Settings, from_environment, log_start
from tests.postgres import EmbeddedPostgres, Postgres
from tests.service import BIN, ROOT, environment

SHA256 = "0" * 64


def read(**variables: Any) -> Settings:
    return Settings(_env_file=None, **variables)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("postgres://u:p@h/db", "postgresql+psycopg://u:p@h/db"),
        ("postgresql://u:p@h:5433/db", "postgresql+psycopg://u:p@h:5433/db"),
        ("postgresql+psycopg://h/db", "postgresql+psycopg://h/db"),
        (
            "postgresql://u:p%40ss@h1:1,h2:2/db",
            "postgresql+psycopg://u:p%40ss@/db?host=h1%2Ch2&port=1%2C2"
            "&target_session_attrs=read-write",
        ),
        (
            "postgres://h1,h2/db?target_session_attrs=read-write",
            "postgresql+psycopg:///db?host=h1%2Ch2&port=%2C&target_session_attrs=read-write",
        ),
        (
            "postgresql:///db?host=/run/postgresql",
            "postgresql+psycopg:///db?host=%2Frun%2Fpostgresql",
        ),
        ("sqlite:///heroes.db", "sqlite:///heroes.db"),
        (" sqlite:///heroes.db\n", "sqlite:///heroes.db"),
        (
            "sqlite:///file:heroes.db?uri=true&mode=rw",
            "sqlite:///file%3Aheroes.db?mode=rw&uri=true",
        ),
    ],
)
def test_every_way_to_write_a_url_means_the_drivers_of_this_service(given: str, meant: str) -> None:
    url = read(database_url=given).database_url
    assert url.render_as_string(hide_password=False) == meant


def connect_arguments(url: URL) -> dict[str, str]:
    """The arguments of psycopg's `connect` for this URL."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    return {name: str(value) for name, value in arguments.items()}


MEANT_AS_IN_LIBPQ = [
    "",
    "/",
    "/db",
    "@/",
    "u@",
    "h",
    "h/",
    "h?",
    ":5433",
    "u:pa,ss@host/db",
    "u:12,word@host",
    "u:p?a#s,s@h1,h2/db",
    "u:p%40%2F%3F%23%25%2C+%20%C3%A9@h/d%25b",
    "ü:pä@hö/dß",
    "u:p:p@h/db",
    "localhost,",
    "h1,h2",
    "h1:5432,h2",
    "h1,h2:5433/db",
    "[::1]",
    "[::1]:5433/db",
    "[::1],[::2]:5433/db",
    "[fe80::1%25eth0]/db",
    "@%2Fvar%2Frun%2Fpostgresql/db",
    "u:p@%2Fvar%2Frun%2Fpostgresql:5433/db",
    "%2Ftmp,%2Fvar%2Frun:5433/db",
    "/?host=/run&port=5433",
    "/?host=::1",
    "/?host=h1,h2&port=1,2",
    "/?host=",
    "/?user=u&password=p%26&dbname=db",
    "/?hostaddr=127.0.0.1",
    "h/db?sslmode=verify-full&sslrootcert=/etc/ca%20.crt",
    "h/db?ssl=true",
    "h/db?options=",
    "h/db?options=-c%20geqo%3Doff&application_name=a%2Bb&connect_timeout=3&keepalives=0",
    "h/db?require_auth=scram-sha-256,none&target_session_attrs=read-write",
]


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
@pytest.mark.parametrize("rest", MEANT_AS_IN_LIBPQ)
def test_a_postgresql_url_means_what_libpq_means_by_it(scheme: str, rest: str) -> None:
    url = read(database_url=f" {scheme}://{rest}\r\n").database_url
    meant = conninfo_to_dict(f"postgresql://{rest}")
    if "," in str(meant.get("host")):  # The service's own default: the primary of a cluster.
        meant.setdefault("target_session_attrs", "read-write")
    assert connect_arguments(url) == meant
    assert read(database_url=url.render_as_string(hide_password=False)).database_url == url


def test_a_plus_in_a_query_is_a_space_only_where_sqlalchemy_writes_it() -> None:
    query = "/db?application_name=a+b"
    assert (
        read(database_url=f"postgresql://{query}").database_url.query["application_name"] == "a+b"
    )
    of_sqlalchemy = read(database_url=f"postgresql+psycopg://{query}").database_url
    assert of_sqlalchemy.query["application_name"] == "a b"


def test_a_space_in_a_password_needs_no_percent_encoding() -> None:
    assert read(database_url="postgresql://u:p w@h/db").database_url.password == "p w"


def test_a_service_of_libpq_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").write_text("[mine]\nhost=h1,h2\nport=1,2\ndbname=db\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    url = read(database_url="postgresql://?service=mine").database_url
    assert connect_arguments(url) == {"service": "mine"}


def test_libpqs_variables_do_not_change_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "h1,h2")
    monkeypatch.setenv("PGPORT", "1,2")
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1,127.0.0.2")
    assert connect_arguments(read(database_url="postgresql:///db").database_url) == {"dbname": "db"}


def test_tokens_may_be_surrounded_by_whitespace() -> None:
    [token] = read(api_tokens=f" ci:read:{SHA256}\r\n").api_tokens
    assert token.name == "ci"


@pytest.fixture
def startup() -> Iterator[tuple[int, list[dict[str, str]]]]:
    """The port of a server that refuses everyone, and the parameters that each client sent."""
    received: list[dict[str, str]] = []

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                (length,) = struct.unpack("!I", client.recv(4, socket.MSG_WAITALL))
                packet = client.recv(length - 4, socket.MSG_WAITALL)
                texts = packet[4:].decode().split("\0")
                received.append(dict(zip(texts[::2], texts[1::2], strict=False)))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], received
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


async def connect_once(url: URL) -> Any:
    """Let the service connect once. Returns the connection's `prepare_threshold`."""
    failed = asyncio.Event()
    pool = ConnectionPool(url, 1, 5, failed.set)
    tasks = [asyncio.create_task(pool.acquire()), asyncio.create_task(failed.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if failed.is_set():
            raise DatabaseUnavailable
        connection = tasks[0].result()
        assert isinstance(connection, PooledConnection)
        await pool.release(connection)
        return connection.prepare_threshold
    finally:
        for task in tasks:
            task.cancel()
        await pool.close()


def test_empty_options_are_not_sent_to_a_pooler(
    startup: tuple[int, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, received = startup
    monkeypatch.setenv("PGOPTIONS", "-c geqo=off")
    for query in ("sslmode=disable", "sslmode=disable&options="):
        url = read(database_url=f"postgresql://u:p@127.0.0.1:{port}/db?{query}").database_url
        with contextlib.suppress(DatabaseUnavailable):
            asyncio.run(connect_once(url))
        with contextlib.suppress(OperationalError):
            migrations.engine(url).connect()
    sent = [parameters.get("options", "") for parameters in received]
    assert "-c statement_timeout=4500 -c lock_timeout=2500" in sent[0]
    assert "-c lock_timeout=500ms" in sent[1]
    assert sent[2:] == ["", ""]
    assert all("options" not in parameters for parameters in received[2:])
    assert all(parameters["database"] == "db" for parameters in received)


@pytest.mark.parametrize(("given", "meant"), [("0", 0), ("7", 7), ("none", None), ("None", None)])
def test_prepare_threshold_is_psycopgs(
    postgres: Postgres, given: str, meant: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres.url.update_query_dict({"prepare_threshold": given})
    settings = read(database_url=url.render_as_string(hide_password=False))
    assert asyncio.run(connect_once(settings.database_url)) == meant
    for engine in (create_engine(settings.database_url), migrations.engine(settings.database_url)):
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
            assert connection.connection.driver_connection.prepare_threshold == meant  # type: ignore[union-attr]
        engine.dispose()
    log_connection_budget(settings, 1)
    assert "Could not read" not in caplog.text


@pytest.fixture(scope="module")
def on_a_socket() -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres()
    yield server
    server.remove()


def test_a_socket_may_be_a_percent_encoded_host(
    on_a_socket: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    host = str(on_a_socket.url.query["host"]).replace("/", "%2F")
    for hosts in (host, f"127.0.0.1:1,{host}"):
        url = f"postgres://postgres@{hosts}/postgres?options=-c%20geqo%3Doff"
        settings = read(database_url=url)
        asyncio.run(connect_once(settings.database_url))
        log_connection_budget(settings, 1)
        assert "Could not read" not in caplog.text


def test_defaults_serve_development() -> None:
    settings = read()
    assert str(settings.database_url) == "sqlite:///heroes.db"
    assert settings.migration_database_url is None
    assert (settings.database_pool_size, settings.database_timeout) == (16, 5)
    assert (settings.api_tokens, settings.api_public_reads) == ((), False)
    assert settings.cors_origins == ()
    assert (settings.root_path, settings.keep_alive_seconds) == ("", 75)
    assert settings.telemetry is False


def test_settings_are_frozen_and_hide_the_password() -> None:
    settings = read(database_url="postgresql://u:hunter2@h/db")
    assert "hunter2" not in repr(settings)
    with pytest.raises(ValidationError):
        settings.log_level = "DEBUG"  # type: ignore[misc]


def test_a_dotenv_file_is_read_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("DATABASE_POOL_SIZE=3\nDATABASE_TIMEOUT=2\nUNRELATED=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_TIMEOUT", "7")
    settings = Settings()
    assert (settings.database_pool_size, settings.database_timeout) == (3, 7)


def test_files_in_the_secrets_folder_are_read_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "api_tokens").write_text(f"ops:write:{SHA256}\n")
    (tmp_path / "database_url").write_text("postgresql://u:hunter2@h/db\n")
    (tmp_path / "database_timeout").write_text("2")
    monkeypatch.setitem(Settings.model_config, "secrets_dir", tmp_path)
    monkeypatch.setenv("DATABASE_TIMEOUT", "7")
    found = from_environment()
    assert [token.name for token in found.api_tokens] == ["ops"]
    assert found.database_url.password == "hunter2"
    assert found.database_timeout == 7


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare, of Linux")
def test_the_secrets_folder_is_that_of_containers() -> None:
    read_timeout = "from app.settings import Settings; print(Settings().database_timeout)"
    script = f"""
        mount -t tmpfs tmpfs /run || exit 77
        mkdir /run/secrets && echo 3 > /run/secrets/DATABASE_TIMEOUT
        exec {sys.executable} -c '{read_timeout}'
    """
    found = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if "Operation not permitted" in found.stderr or found.returncode == 77:
        pytest.skip(f"needs the right to mount: {found.stderr.strip()}")
    assert found.stdout == "3.0\n", found.stderr


def test_a_settings_file_that_cannot_be_read_ends_the_process_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://u:hunter2@h/db", "utf-16")
    with pytest.raises(SystemExit, match="2"):
        from_environment()
    said = capsys.readouterr().err
    assert said.startswith("heroes: Could not read the settings: ")
    assert said.count("\n") == 1
    assert "hunter2" not in said


def test_any_otel_variable_asks_for_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert read().telemetry is True


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("*", ["*"]),
        ("https://a.example", ["https://a.example"]),
        (" https://A.example , http://b:8080\n", ["https://a.example", "http://b:8080"]),
        ("http://[::1]:5173,capacitor://localhost", ["http://[::1]:5173", "capacitor://localhost"]),
        ("https://a.example:80 http://a:443", ["https://a.example:80", "http://a:443"]),
    ],
)
def test_origins_are_those_that_a_browser_sends(given: str, meant: list[str]) -> None:
    assert read(cors_origins=given).cors_origins == tuple(meant)


WRONG = {
    "no URL": ("DATABASE_URL", "hunter2"),
    "no scheme": ("DATABASE_URL", "//u:hunter2@h/db"),
    "an unknown driver": ("DATABASE_URL", "mysql://u:hunter2@h/db"),
    "another driver for PostgreSQL": ("DATABASE_URL", "postgresql+asyncpg://u:hunter2@h/db"),
    "a database in memory": ("DATABASE_URL", "sqlite://"),
    "a port that is no number": ("DATABASE_URL", "postgresql://u:p@h:hunter2/db"),
    "an uppercase scheme": ("DATABASE_URL", "POSTGRESQL://u:hunter2@h/db"),
    "quotes": ("DATABASE_URL", '"postgresql://u:hunter2@h/db"'),
    "only whitespace": ("DATABASE_URL", " \n"),
    "a host for SQLite": ("DATABASE_URL", "sqlite://hunter2/heroes.db"),
    "a host and port for SQLite": ("DATABASE_URL", "sqlite://h:hunter2/heroes.db"),
    "a parameter with a newline": ("DATABASE_URL", "sqlite:///heroes.db?a%0Ab=hunter2"),
    "a parameter with an escape": ("DATABASE_URL", "postgresql://h/db?a\x1b\nb=hunter2"),
    "no file": ("DATABASE_URL", "sqlite:///"),
    "a percent sign in a password": ("DATABASE_URL", "postgresql://u:%hunter2@h/db"),
    "a slash in a password": ("DATABASE_URL", "postgresql://u:hun/hunter2@h/db"),
    "a slash and a question mark": ("DATABASE_URL", "postgresql://u:1/2?hunter2@h/db"),
    "a slash, a question mark and =": ("DATABASE_URL", "postgresql://u:1/2?hunter2=1@h/db"),
    "a password that is no UTF-8": ("DATABASE_URL", "postgresql://u:%FFhunter2@h/db"),
    "a value that is no UTF-8": ("DATABASE_URL", "postgresql://u:hunter2\udcff@h/db"),
    "an escaped NUL": ("DATABASE_URL", "postgresql://u:hunter2%00@h/db"),
    "an open bracket": ("DATABASE_URL", "postgresql://u:hunter2@[::1/db"),
    "text after a bracket": ("DATABASE_URL", "postgresql://u:hunter2@[::1]x/db"),
    "a port out of range": ("DATABASE_URL", "postgresql://u:hunter2@h:65536/db"),
    "the port zero": ("DATABASE_URL", "postgresql://u:hunter2@h1:1,h2:0/db"),
    "a wrong URL for migrations": ("MIGRATION_DATABASE_URL", "hunter2"),
    "a size that is no number": ("DATABASE_POOL_SIZE", "hunter2"),
    "no connections": ("DATABASE_POOL_SIZE", "0"),
    "a timeout that is no number": ("DATABASE_TIMEOUT", "hunter2"),
    "an endless timeout": ("DATABASE_TIMEOUT", "inf"),
    "an unknown level": ("LOG_LEVEL", "hunter2"),
    "an unknown format": ("LOG_FORMAT", "hunter2"),
    "no workers": ("WEB_CONCURRENCY", "0"),
    "a token without a digest": ("API_TOKENS", "hunter2"),
    "a switch with another value": ("API_PUBLIC_READS", "hunter2"),
    "only separators": ("API_TOKENS", " , "),
    "an origin with a path": ("CORS_ORIGINS", "https://hunter2.example/app"),
    "an origin with a slash at its end": ("CORS_ORIGINS", "https://hunter2.example/"),
    "an origin without a scheme": ("CORS_ORIGINS", "https://a.example, hunter2.example"),
    "an origin with the default port": ("CORS_ORIGINS", "https://hunter2.example:443"),
    "an origin with a user": ("CORS_ORIGINS", "https://hunter2@a.example"),
    "an origin with a query": ("CORS_ORIGINS", "https://a.example?hunter2"),
    "an origin with a wrong port": ("CORS_ORIGINS", "https://hunter2.example:65536"),
    "an origin with a wildcard": ("CORS_ORIGINS", "https://*.hunter2.example"),
    "every origin and another": ("CORS_ORIGINS", "*, https://hunter2.example"),
    "only commas as origins": ("CORS_ORIGINS", ","),
    "a prefix without a slash": ("ROOT_PATH", "hunter2"),
    "a prefix with a slash at its end": ("ROOT_PATH", "/hunter2/"),
    "only a slash as a prefix": ("ROOT_PATH", "/"),
    "a prefix that is a URL": ("ROOT_PATH", "https://hunter2.example/api"),
    "a prefix with a space": ("ROOT_PATH", "/hun hunter2"),
    "a proxy that is no address": ("FORWARDED_ALLOW_IPS", "127.0.0.1, hunter2"),
    "a proxy with a port": ("FORWARDED_ALLOW_IPS", "10.0.0.1:80"),
    "a network with host bits": ("FORWARDED_ALLOW_IPS", "10.0.0.1/8"),
    "every proxy and another": ("FORWARDED_ALLOW_IPS", "*,10.0.0.1"),
    "a negative keep-alive": ("KEEP_ALIVE_SECONDS", "-1"),
    "no keep-alive": ("KEEP_ALIVE_SECONDS", "0"),
    "a keep-alive that is no number": ("KEEP_ALIVE_SECONDS", "hunter2"),
    "an unknown scope": ("API_TOKENS", f"hunter2:all:{SHA256}"),
}


@pytest.mark.parametrize(("name", "value"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_ends_the_process_with_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        from_environment()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith(f"heroes: {name} must be ")
    assert said.count("\n") == 1
    assert "hunter2" not in said


WRONG_PARAMETERS = {
    "pgbouncer": "h/db?pgbouncer=true",
    "schema": "h/db?sslmode=prefer&schema=public",
    "prepared_statements": "h/db?prepared_statements=false",
    "ssl": "h/db?ssl=hunter2",
    "sslmode": "h/db?sslmode=hunter2",
    "ssl_min_protocol_version": "h/db?ssl_min_protocol_version=hunter2",
    "sslmode ": "h/db?sslnegotiation=direct&sslmode=disable",
    "channel_binding": "h/db?channel_binding=hunter2",
    "gssencmode": "h/db?gssencmode=hunter2",
    "target_session_attrs": "h/db?target_session_attrs=hunter2",
    "load_balance_hosts": "h/db?load_balance_hosts=hunter2",
    "require_auth": "h/db?require_auth=none,hunter2",
    "connect_timeout": "h/db?connect_timeout=hunter2",
    "keepalives_idle": "h/db?keepalives_idle=",
    "tcp_user_timeout": "h/db?tcp_user_timeout=9999999999",
    "client_encoding": "h/db?client_encoding=latin1",
    "prepare_threshold": "h/db?prepare_threshold=hunter2",
    "service": "h/db?service=hunter2",
    "port": "h1,h2/db?port=5433",
    "port ": "h1:1,h2:2/db?port=1,2,3",
    "port  ": "h/db?port=hunter2",
    "host": "/db?host=h1:1&host=h2:2",
    "hostaddr": "h1,h2/db?hostaddr=127.0.0.1",
    "application_name": "h/db?application_name",
}


@pytest.mark.parametrize("variable", ["DATABASE_URL", "MIGRATION_DATABASE_URL"])
@pytest.mark.parametrize(("name", "rest"), WRONG_PARAMETERS.items(), ids=WRONG_PARAMETERS)
def test_a_wrong_parameter_is_named(
    variable: str,
    name: str,
    rest: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        monkeypatch.setenv(variable, f"{scheme}://u:hunter2@{rest}")
        with pytest.raises(SystemExit) as end:
            from_environment()
        said = capsys.readouterr().err
        assert end.value.code == 2
        accepted, reason = said.removeprefix(f"heroes: {variable} must be ").split("DATABASE: ")
        assert accepted == "sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/"
        assert name.strip() in reason.split('"')[0] + reason.split('"')[-1]
        assert said.count("\n") == 1
        assert "hunter2" not in said


def test_a_parameter_that_sqlite_does_not_have_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for query in ("schema=public", "timeout=x"):
        monkeypatch.setenv("DATABASE_URL", f"sqlite:///heroes.db?{query}")
        with pytest.raises(SystemExit):
            from_environment()
        said = capsys.readouterr().err
        assert query.split("=", maxsplit=1)[0] in said.split("DATABASE: ")[1]
        assert said.count("\n") == 1


@pytest.mark.parametrize("url", ["postgresql://u:hunter2\0@h/db", "sqlite:///a\0b"])
def test_a_url_with_a_nul_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_text(f"DATABASE_URL={url}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        from_environment()
    assert capsys.readouterr().err.endswith("DATABASE: the text contains NUL\n")


COMMANDS = {
    "uvicorn": ["uvicorn", "app.main:app", "--port", "0"],
    "gunicorn": ["gunicorn", "--bind", "127.0.0.1:0"],
    "alembic": ["alembic", "upgrade", "head"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_wrong_value_ends_every_command_the_same_way(command: list[str]) -> None:
    ended = subprocess.run(
        [BIN / command[0], *command[1:]],
        cwd=ROOT,
        env=environment("mysql://u:hunter2@h/db"),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("heroes: DATABASE_URL must be ")
    assert (ended.stdout + ended.stderr).count("\n") == 1


STARTS = {
    "sqlite:///heroes.db": "sqlite:///heroes.db",
    "postgresql://u:hunter2@h:5433/db?sslpassword=hunter2": "postgresql+psycopg://u:***@h:5433/db",
    "postgresql://u:hunter2@h1,h2/db": "postgresql+psycopg://u:***@/db?host=h1%2Ch2",
}


@pytest.mark.parametrize(("given", "logged"), STARTS.items())
def test_the_start_logs_the_database_without_secrets(
    given: str, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "app.settings")
    for _ in range(2):  # Only once in a process and its forks.
        log_start(read(database_url=given).database_url)
    assert caplog.messages == [f"Database: {logged}"]


def test_the_start_warns_of_misspelt_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABSE_URL", "postgresql://u:hunter2@h/db")
    monkeypatch.setenv("database_timeout", "3")
    monkeypatch.setenv("WORKSPACE", "no setting resembles this")
    (tmp_path / ".env").write_text("API_KEYS=hunter2\nPOSTGRES_PASSWORD=hunter2\nLOG_LEVEL=INFO\n")
    log_start(make_url("sqlite:///misspelt.db"))
    warnings = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert warnings == [
        "These variables are not settings: API_KEYS, DATABSE_URL (is it DATABASE_URL?)"
    ]
