"""The command `heroes`, run as a process."""

import csv
import gzip
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, make_url, text

from tests.processes import Ended, run_python
from tests.service import BIN, Service, environment
from tests.test_bulk import HEROES, as_csv, ndjson, rows


def heroes(
    database_url: URL | str, *arguments: str | Path, given: bytes = b"", **env: str
) -> Ended:
    return run_python("-m", "app", *arguments, env=environment(database_url, **env), given=given)


def test_python_dash_m_app_is_the_same_command(tmp_path: Path) -> None:
    helps = [
        subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
        for command in ([BIN / "heroes"], [sys.executable, "-m", "app"])
    ]
    assert helps[0].returncode == helps[1].returncode == 0
    assert helps[0].stdout == helps[1].stdout
    assert all(command in helps[0].stdout for command in ("import", "export", "seed", "doctor"))


def test_files_of_every_format_are_imported_and_exported(
    database_url: URL, database: Engine, tmp_path: Path, service: Service
) -> None:
    """The command and the API export the same."""
    for name, body in (
        ("in.ndjson", ndjson(HEROES)),
        ("in.csv", as_csv(HEROES)),
        ("in.jsonl.gz", gzip.compress(ndjson(HEROES))),
        ("in.csv.gz", gzip.compress(as_csv(HEROES))),
    ):
        (tmp_path / name).write_bytes(body)
        done = heroes(database_url, "import", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert "Imported 8 rows in " in done.stderr
    assert rows(database) == [tuple(hero.values()) for hero in HEROES] * 4

    with service.client() as client:
        for name, read in (
            ("out.ndjson", Path.read_bytes),
            ("out.csv", Path.read_bytes),
            ("out.csv.gz", lambda path: gzip.decompress(path.read_bytes())),
        ):
            done = heroes(database_url, "export", tmp_path / name)
            assert done.returncode == 0, done.stderr
            assert "Exported 32 rows in " in done.stderr
            file_format = name.split(".")[1]
            expected = client.get("/heroes/export", params={"format": file_format}).content
            found = read(tmp_path / name)
            if file_format == "ndjson":
                assert [json.loads(line) for line in found.splitlines()] == [
                    json.loads(line) for line in expected.splitlines()
                ]
            else:
                assert found.endswith(b"\r\n")
                assert list(csv.reader(io.StringIO(found.decode(), newline=""))) == list(
                    csv.reader(io.StringIO(expected.decode(), newline=""))
                )
    assert sorted(path.name for path in tmp_path.glob("*out*")) == [
        "out.csv",
        "out.csv.gz",
        "out.ndjson",
    ]


def test_a_dash_means_standard_input_or_output(database_url: URL, database: Engine) -> None:
    assert heroes(database_url, "import", "-", given=ndjson(HEROES[:2])).returncode == 0
    assert (
        heroes(database_url, "import", "-", "--format", "csv", given=as_csv(HEROES[2:])).returncode
        == 0
    )
    assert rows(database) == [tuple(hero.values()) for hero in HEROES]
    exported = heroes(database_url, "export", "-")
    assert [json.loads(line)["name"] for line in exported.stdout.splitlines()] == [
        hero["name"] for hero in HEROES
    ]
    assert heroes(database_url, "export", "-", "--format", "csv").stdout.startswith(
        "id,name,age\r\n"
    )


def test_an_invalid_file_is_refused_with_its_lines_and_nothing_is_written(
    database_url: URL, database: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.ndjson"
    file.write_bytes(ndjson(HEROES * 1000) + b'{"name": "", "secret_name": "s"}\n{\n')
    done = heroes(database_url, "import", file)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-3].startswith(f"{file}:8001: name: String should have at least 1 character")
    assert lines[-2].startswith(f"{file}:8002: Invalid JSON: EOF while parsing")
    assert lines[-1] == "heroes: nothing was imported"
    assert rows(database) == []


def test_seed_creates_the_same_heroes_each_time(database_url: URL, database: Engine) -> None:
    for _ in range(2):
        assert heroes(database_url, "seed", "1500").returncode == 0
    found = rows(database)
    assert len(found) == 3000
    assert found[:1500] == found[1500:]
    assert len(set(found)) == 1500
    assert {age is None for _, age, _ in found} == {True, False}

    exported = heroes(database_url, "export", "-", "--format", "csv").stdout
    assert exported == "id,name,age\r\n" + "".join(
        f"{number},{name},{'' if age is None else age}\r\n"
        for number, (name, age, _) in enumerate(found, 1)
    )


def test_invalid_arguments_and_settings_exit_with_code_2(tmp_path: Path) -> None:
    url = make_url(f"sqlite:///{tmp_path / 'heroes.db'}")
    for arguments in ((), ("fly",), ("seed", "0"), ("seed", "x"), ("export", "heroes.xml")):
        assert heroes(url, *arguments).returncode == 2, arguments
    wrong = heroes("mysql://heroes", "export", "-")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("heroes: DATABASE_URL must be ")


def test_a_missing_file_is_reported_in_one_line(database_url: URL, tmp_path: Path) -> None:
    missing = heroes(database_url, "import", tmp_path / "missing.csv")
    assert missing.returncode == 1
    assert missing.stderr == f"heroes: {tmp_path}/missing.csv: No such file or directory\n"
    nowhere = heroes(database_url, "export", tmp_path / "missing" / "heroes.csv")
    assert nowhere.returncode == 1
    assert nowhere.stderr.endswith("missing/heroes.csv: No such file or directory\n")


def test_a_database_that_is_down_or_not_migrated_is_exit_code_3_with_one_line(
    empty_database: URL, tmp_path: Path
) -> None:
    behind = heroes(empty_database, "seed", "1")
    assert behind.returncode == 3
    assert behind.stderr == "heroes: the schema is behind, run alembic upgrade head\n"
    down = heroes("postgresql://heroes@127.0.0.1:1/heroes", "export", tmp_path / "heroes.csv")
    assert down.returncode == 3
    assert down.stderr.startswith("heroes: the database failed: connection failed: ")
    assert down.stderr.count("\n") == 1
    assert list(tmp_path.glob("*.csv*")) == []


def test_an_export_into_a_closed_pipe_ends_without_a_traceback(database_url: URL) -> None:
    heroes(database_url, "seed", "20000")
    command = f"{BIN / 'heroes'} export - | head -1"
    piped = subprocess.run(
        ["bash", "-c", command], env=environment(database_url), capture_output=True, text=True
    )
    assert piped.stdout.count("\n") == 1
    assert "Traceback" not in piped.stderr
    assert "Exception" not in piped.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_writes_nothing(
    database_url: URL, database: Engine, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [BIN / "heroes", "import", "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(database_url),
    )
    assert process.stdin
    assert process.stderr
    process.stdin.write(ndjson(HEROES * 13_000))
    process.stdin.flush()
    assert process.stderr.readline() == b"100000 rows\n"  # The import is still running.
    process.send_signal(number)
    process.stdin.close()
    assert process.wait(20) != 0
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert rows(database) == []


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_command_shows_a_progress_bar_on_a_terminal(database_url: URL) -> None:
    terminal, process_end = pty.openpty()
    process = subprocess.Popen(
        [BIN / "heroes", "seed", "20000"],
        stderr=process_end,
        env=environment(database_url, TERM="xterm"),
    )
    os.close(process_end)
    shown = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # Linux raises this when the other end is closed.
            break
    os.close(terminal)
    assert process.wait(10) == 0
    assert b"100%" in shown
    assert b"###" in shown


def test_exports_of_the_command_and_the_api_contain_no_secret_name(
    database_url: URL, service: Service
) -> None:
    secret: dict[str, Any] = {"name": "a", "secret_name": "unsaid"}
    heroes(database_url, "import", "-", given=ndjson([secret]))
    for file_format in ("csv", "ndjson"):
        assert "unsaid" not in heroes(database_url, "export", "-", "--format", file_format).stdout
        with service.client() as client:
            response = client.get("/heroes/export", params={"format": file_format})
            assert b"unsaid" not in response.content


def test_an_error_of_the_database_is_reported_without_the_row(
    database_url: URL, database: Engine
) -> None:
    """The detail of the server's error quotes the row with its secret name."""
    with database.connect() as connection:
        connection.execute(text("CREATE UNIQUE INDEX one_of_a_name ON hero (name)"))
    twice = ndjson([{"name": "a", "secret_name": "unsaid"}] * 2)
    done = heroes(database_url, "import", "-", given=twice)
    assert done.returncode == 3
    assert done.stderr.startswith("heroes: the database failed: ")
    assert "unsaid" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_timeouts_of_the_role_do_not_end_the_command(database_url: URL, database: Engine) -> None:
    """They are for the service's calls. A long export is one statement."""
    with database.connect() as holder, database.connect() as other:
        name = database_url.database
        holder.execute(text(f"ALTER DATABASE {name} SET statement_timeout = '400ms'"))
        holder.execute(text("BEGIN; LOCK TABLE hero"))
        command = subprocess.Popen([BIN / "heroes", "export", "-"], env=environment(database_url))
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        while not other.scalar(waiting):
            assert command.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        holder.execute(text("ROLLBACK"))
        assert command.wait(20) == 0
