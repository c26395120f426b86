"""docs/add-a-resource.md and docs/make-it-yours.md are true: applied to a copy, they work."""

import json
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, make_url, text

from tests.faults.load import Load
from tests.postgres import Postgres
from tests.processes import gunicorn, run_python, uvicorn_process
from tests.service import ROOT, Service, engine, environment, http_client
from tests.walks import apply, changes, copy_repository, run

ADD_A_RESOURCE = (ROOT / "docs" / "add-a-resource.md").read_text()
MAKE_IT_YOURS = (ROOT / "docs" / "make-it-yours.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", MAKE_IT_YOURS, re.MULTILINE))
postgresql_only = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)

DEADPOND = {"name": "Deadpond", "secret_name": "Dive Wilson"}
LOCK_SECONDS = 1.5
# Twenty lazy loads wait for a lock on `team`, with a pool of four connections.
LAZY_LOADING = """
import asyncio
import json
import sys
import threading
import time

from sqlalchemy import create_engine, event, make_url, text

from app.db.database import Database
from app.heroes import heroes
from app.teams import get_with_heroes
from tests.test_teams import recruit, team_mates

URL, SECONDS = make_url(sys.argv[1]), float(sys.argv[2])


def hold(is_locked: threading.Event) -> None:
    with create_engine(URL).begin() as connection:
        connection.execute(text("LOCK TABLE team IN ACCESS EXCLUSIVE MODE"))
        is_locked.set()
        time.sleep(SECONDS)


async def stall(stop: asyncio.Event) -> float:
    longest = 0.0
    while not stop.is_set():
        start = time.monotonic()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - start)
    return longest


async def measured(work) -> tuple[float, float]:
    stop, start = asyncio.Event(), time.monotonic()
    stalls = asyncio.create_task(stall(stop))
    await asyncio.sleep(0.01)
    await work
    stop.set()
    return time.monotonic() - start, await stalls


async def main() -> dict:
    database = Database(URL, pool_size=4, timeout=20)
    team = await database.run_in_transaction(recruit, ["Deadpond", "Rusty-Man"])
    large = await database.run_in_transaction(recruit, [f"hero {n}" for n in range(50)])
    hero_id = team.heroes[0].id
    _, control = await measured(
        database.run_in_transaction(lambda session: time.sleep(0.4))
    )

    is_locked, served = threading.Event(), 0
    holder = threading.Thread(target=hold, args=(is_locked,))
    holder.start()
    await asyncio.to_thread(is_locked.wait)

    async def calls() -> None:
        nonlocal served
        waiting = [
            asyncio.ensure_future(database.run_in_transaction(team_mates, hero_id))
            for _ in range(20)
        ]
        while holder.is_alive():
            await database.run(heroes.get, hero_id)
            served += 1
            await asyncio.sleep(0.01)
        assert all(names == ["Deadpond", "Rusty-Man"] for names in await asyncio.gather(*waiting))

    seconds, longest = await measured(calls())

    statements = []
    event.listen(database.engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    counts = []
    for each in (team, large):
        statements.clear()
        found = await database.run_in_transaction(get_with_heroes, each.id)
        counts.append((len(found["heroes"]), len(statements)))
    await database.close()
    return {
        "seconds": seconds,
        "stall": longest,
        "control": control,
        "served": served,
        "counts": counts,
    }


print(json.dumps(asyncio.run(main())))
"""


@postgresql_only
def test_a_second_resource_by_the_page(
    database_url: URL,
    empty_database: URL,
    postgres: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figures: list[str],
) -> None:
    """The previous code serves a database with rows while the page's commands migrate it."""
    project = copy_repository(tmp_path)
    # The tests of the copy use the same server.
    monkeypatch.setenv("TEST_DATABASE_URL", postgres.url.render_as_string(hide_password=False))
    with engine(database_url).connect() as connection:
        connection.execute(
            text(
                "INSERT INTO hero (name, age, secret_name)"
                " SELECT 'hero ' || n, n % 90, 's' FROM generate_series(1, 20000) n"
            )
        )
    start = time.monotonic()
    before, commands, after = ADD_A_RESOURCE.partition("```console\n$ alembic")
    lines = apply(before, project, database_url)
    migration, tests, rest = (commands + after).partition("## 5. Tests")
    requests = [
        ("GET", "/heroes/?limit=5", ""),
        ("GET", "/heroes/7", ""),
        ("POST", "/heroes/", '{"name": "Deadpond", "secret_name": "Dive Wilson"}'),
        ("PATCH", "/heroes/3", '{"age": 29}'),
    ]
    with gunicorn(database_url, tmp_path, DATABASE_POOL_SIZE="4") as previous:
        load = Load(previous.port, requests, keep_alive_clients=4, fresh_clients=1)
        with load.running():
            wait_for_load(load, 50)
            lines += apply(migration, project, database_url)
            wait_for_load(load, load.answered + 50)  # On the new schema.
    assert load.lost == []
    generated = sorted(set(versions(project)) - set(versions(ROOT)))
    assert len(generated) == 2

    logs = tmp_path / "logs"  # Not in the copy, where `make test` checks the spelling.
    logs.mkdir()
    with (
        gunicorn(database_url, logs, root=project, WEB_CONCURRENCY="1") as server,
        http_client(server.port) as client,
    ):
        team = client.post("/teams/", json={"name": "Z-Force", "headquarters": "A bar"})
        assert team.json() == {"name": "Z-Force", "headquarters": "A bar", "id": 1}
        seconds = time.monotonic() - start
        assert client.patch("/heroes/7", json={"team_id": 1}).json()["team_id"] == 1
        assert [hero["id"] for hero in client.get("/heroes/?team_id=1").json()] == [7]
        times: dict[str, list[float]] = {"/heroes/7": [], "/teams/1": []}
        for path in list(times) * 300:
            began = time.monotonic()
            assert client.get(path).status_code == 200
            times[path].append(time.monotonic() - began)
    heroes, teams = (statistics.median(each) * 1e6 for each in times.values())
    assert teams < 2 * heroes

    lines += apply(tests + rest, project, empty_database)
    # A rebuild on SQLite keeps old rows that violate a constraint, after the page's revisions too.
    violating = "old_rows_that_violate_a_constraint_are_kept and sqlite"
    run(f"pytest -q tests/test_migrations.py -k '{violating}'", project, empty_database)
    (project / "new.csv").write_text("name,secret_name,team_id\nA,s,1\nB,s,777\n")
    refused = run("python -m app import new.csv 2>&1 || echo $?", project, database_url)
    assert refused.splitlines() == [
        "new.csv:3: team_id: Should be the id of an existing team",
        "heroes: nothing was imported",
        "1",
    ]
    new = make_url(f"sqlite:///{tmp_path}/new.db")
    run("alembic upgrade head", project, new)
    refused = run("python -m app import new.csv 2>&1 || echo $?", project, new)
    assert [line[:18] for line in refused.splitlines()[:2]] == [
        "new.csv:2: team_id",
        "new.csv:3: team_id",
    ]
    measured = lazy_loading(project, database_url)
    assert measured["control"] > 0.39, "control: a function that blocks stalls the event loop"
    assert measured["stall"] < LOCK_SECONDS / 2
    assert measured["seconds"] < LOCK_SECONDS * 2, "calls waited one after the other"
    assert measured["served"] > 10
    assert measured["counts"] == [[2, 2], [50, 2]]

    in_tests = sum(count for path, count in lines.items() if path.startswith("tests/"))
    figures += [
        f"add-a-resource: {sum(lines.values()) - in_tests} lines in {len(lines) - 2} files,"
        f" {in_tests} in 2 files of tests, {len(generated)} generated revisions,"
        f" {seconds:.0f} s to a served team; {dict(lines)}",
        f"upgrade under load: 0 of {load.answered} requests lost, slowest {load.slowest:.2f} s;"
        f" median read of a hero {heroes:.0f} µs, of a team {teams:.0f} µs",
        f"20 lazy loads on 4 connections that wait for a lock of {LOCK_SECONDS} s:"
        f" {measured['seconds']:.2f} s, longest stall {measured['stall'] * 1000:.1f} ms"
        f" (blocking: {measured['control'] * 1000:.0f}), {measured['served']} other reads",
    ]


def wait_for_load(load: Load, count: int) -> None:
    deadline = time.monotonic() + 20
    while load.answered < count:
        assert time.monotonic() < deadline, load
        time.sleep(0.02)


def versions(project: Path) -> list[str]:
    return [path.name for path in (project / "alembic" / "versions").glob("*.py")]


def lazy_loading(project: Path, url: URL) -> dict[str, Any]:
    arguments = (url.render_as_string(hide_password=False), str(LOCK_SECONDS))
    ended = run_python("-c", LAZY_LOADING, *arguments, env=environment(url), cwd=project)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


@contextmanager
def applied(section: str, url: URL, folder: Path, figures: list[str]) -> Iterator[Service]:
    """Apply a section of the page to a copy, check the code and serve it."""
    project = copy_repository(folder)
    apply(SECTIONS[section], project, url)
    for command in ("ruff check app alembic", "ruff format --check app", "lint-imports"):
        run(command, project, url)
    added, removed, files = changes(project)
    figures.append(f"{section}: {added} new lines, {removed} removed, in {files} files")
    with uvicorn_process(url, project) as service:
        yield service


@postgresql_only
def test_the_service_is_renamed(
    database_url: URL, database: Engine, tmp_path: Path, figures: list[str]
) -> None:
    with (
        applied("Rename the service", database_url, tmp_path, figures) as service,
        service.client() as client,
    ):
        assert client.post("/heroes/", json=DEADPOND).status_code == 200
        exposed = client.get("/metrics").text
        assert "roster_build_info{" in exposed
        assert "heroes_" not in exposed
        assert client.get("/openapi.json").json()["info"]["title"] == "Roster"
        with database.connect() as connection:
            mine = (
                "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
            )
            assert "roster" in connection.scalars(text(mine)).all()
    project = tmp_path / "repository"
    assert "Usage: roster " in run("python -m app --help", project, database_url)
    left = run("grep -rhi hero Dockerfile docker* deploy || true", project, database_url)
    assert left == ""


@postgresql_only
def test_the_first_table_is_replaced(
    empty_database: URL,
    postgres: Postgres,
    tmp_path: Path,
    figures: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = postgres.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TEST_DATABASE_URL", url)
    with (
        applied("Replace the first table", empty_database, tmp_path, figures) as service,
        service.client() as client,
    ):
        assert client.post("/agents/", json=DEADPOND).json()["name"] == "Deadpond"
        assert client.get("/heroes/").status_code == 404
    project = tmp_path / "repository"
    assert versions(project) == [next(name for name in versions(project) if "_0001_" in name)]
    run("pytest -q tests/test_contract.py -k 'created_read or statement'", project, empty_database)
    exported = run("python -m app export - 2> /dev/null", project, empty_database)
    assert json.loads(exported)["name"] == "Deadpond"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_import_and_export_are_removed(
    database_url: URL, tmp_path: Path, figures: list[str]
) -> None:
    section = "Remove import and export over HTTP"
    with (
        applied(section, database_url, tmp_path, figures) as service,
        service.client() as client,
    ):
        assert client.post("/heroes/", json=DEADPOND).status_code == 200
        assert client.get("/heroes/export").status_code == 422  # Not an id.
        assert client.post("/heroes/import").status_code == 405
        assert client.get("/heroes/1").json()["name"] == "Deadpond"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_tokens_are_removed(
    database_url: URL, tmp_path: Path, figures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKENS", "not read")
    key = {"Idempotency-Key": "one"}
    with (
        applied("Remove tokens", database_url, tmp_path, figures) as service,
        service.client() as client,
    ):
        assert client.post("/heroes/", json=DEADPOND, headers=key).status_code == 200
        assert client.post("/heroes/", json=DEADPOND, headers=key).json()["id"] == 1
        assert client.patch("/heroes/1", json={"age": 3}).json()["age"] == 3
        assert client.delete("/heroes/1").status_code == 200


@postgresql_only
def test_sqlite_is_refused(database_url: URL, tmp_path: Path, figures: list[str]) -> None:
    with (
        applied("Refuse SQLite", database_url, tmp_path, figures) as service,
        service.client() as client,
    ):
        assert client.get("/health/ready").status_code == 200
    for url in ("sqlite:///heroes.db", ""):
        project = tmp_path / "repository"
        refused = run_python("-m", "app", "doctor", env=environment(url), cwd=project)
        assert refused.returncode == 2
        assert "SQLite is not supported" in refused.stderr
