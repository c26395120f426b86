"""The environment, read once; a wrong value is one clear line and exit code 2."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.settings import Settings, from_environment
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
            "postgresql+psycopg://u:p%40ss@/db?host=h1%3A1&host=h2%3A2",
        ),
        (
            "postgres://h1,h2/db?target_session_attrs=read-write",
            "postgresql+psycopg:///db?host=h1&host=h2&target_session_attrs=read-write",
        ),
        (
            "postgresql:///db?host=/run/postgresql",
            "postgresql+psycopg:///db?host=%2Frun%2Fpostgresql",
        ),
        ("sqlite:///heroes.db", "sqlite:///heroes.db"),
    ],
)
def test_every_way_to_write_a_url_means_the_drivers_of_this_service(given: str, meant: str) -> None:
    url = read(database_url=given).database_url
    assert url.render_as_string(hide_password=False) == meant


def test_several_hosts_reach_the_driver_with_their_ports() -> None:
    url = read(database_url="postgresql://u:p@h1:1,h2:2/db").database_url
    _, arguments = url.get_dialect()().create_connect_args(url)
    assert (arguments["host"], arguments["port"]) == ("h1,h2", "1,2")


def test_defaults_serve_development() -> None:
    settings = read()
    assert str(settings.database_url) == "sqlite:///heroes.db"
    assert settings.migration_database_url is None
    assert (settings.database_pool_size, settings.database_timeout) == (16, 5)
    assert settings.api_tokens == ()
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


def test_any_otel_variable_asks_for_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert read().telemetry is True


WRONG = {
    "no URL": ("DATABASE_URL", "hunter2"),
    "no scheme": ("DATABASE_URL", "//u:hunter2@h/db"),
    "an unknown driver": ("DATABASE_URL", "mysql://u:hunter2@h/db"),
    "another driver for PostgreSQL": ("DATABASE_URL", "postgresql+asyncpg://u:hunter2@h/db"),
    "a database in memory": ("DATABASE_URL", "sqlite://"),
    "a port that is no number": ("DATABASE_URL", "postgresql://u:p@h:hunter2/db"),
    "a wrong URL for migrations": ("MIGRATION_DATABASE_URL", "hunter2"),
    "a size that is no number": ("DATABASE_POOL_SIZE", "hunter2"),
    "no connections": ("DATABASE_POOL_SIZE", "0"),
    "a timeout that is no number": ("DATABASE_TIMEOUT", "hunter2"),
    "an endless timeout": ("DATABASE_TIMEOUT", "inf"),
    "an unknown level": ("LOG_LEVEL", "hunter2"),
    "an unknown format": ("LOG_FORMAT", "hunter2"),
    "no workers": ("WEB_CONCURRENCY", "0"),
    "a token without a digest": ("API_TOKENS", "hunter2"),
    "only separators": ("API_TOKENS", " , "),
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
