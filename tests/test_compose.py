"""`docker compose up`: the production form, built and run for real."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.db.revisions import Revisions
from app.settings import Settings
from tests.compose import Stack, commands_in, needs_compose
from tests.examples import DEADPOND
from tests.faults.load import Load

pytestmark = needs_compose


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("compose")).started() as stack:
        yield stack


@pytest.fixture
def fresh(stack: Stack, tmp_path: Path) -> Iterator[Stack]:  # noqa: ARG001  (It builds the image.)
    """A project without containers and data."""
    fresh = Stack(tmp_path)
    try:
        yield fresh
    finally:
        fresh.down()


def test_the_contract_holds_through_the_published_port(stack: Stack) -> None:
    with stack.client() as client:
        created = client.post("/heroes/", json=DEADPOND)
        assert created.status_code == 200
        hero = created.json()
        path = f"/heroes/{hero['id']}"
        assert hero == {"name": "Deadpond", "age": None, "id": hero["id"]}
        assert client.get(path).json() == hero
        assert hero in client.get("/heroes/").json()
        assert client.patch(path, json={"age": 48}).json() == hero | {"age": 48}
        assert client.patch(path, json={"age": "x"}).status_code == 422
        assert client.delete(path).json() == {"ok": True}
        assert client.get(path).status_code == 404
        assert client.get("/health/ready").json() == {"status": "ready"}
        assert "heroes_schema_info" in client.get("/metrics").text
        assert client.get("/docs").status_code == 200


def test_an_import_and_the_command_work_in_the_containers(stack: Stack) -> None:
    """A large body is stored in a file, although the root is read-only."""
    line = b'{"name": "Imported", "secret_name": "s"}\n'
    headers = {"Content-Type": "application/x-ndjson"}
    with stack.client() as client:
        before = len(client.get("/heroes/export").content.splitlines())
        imported = client.post("/heroes/import", content=line * 50_000, headers=headers)
        assert imported.json() == {"created": 50_000}
        exported = client.get("/heroes/export").content.splitlines()
        assert len(exported) == before + 50_000
    by_the_command = stack.run("docker compose exec -T api heroes export -")
    assert by_the_command.stdout.encode().splitlines() == exported
    stack.sql("DELETE FROM hero WHERE name = 'Imported'", role="heroes_app")


REFUSED = {
    "CREATE TABLE villain (id int)": "permission denied for schema public",
    "CREATE TEMP TABLE villain (id int)": "permission denied to create temporary tables",
    "CREATE SCHEMA villains": "permission denied for database heroes",
    "CREATE ROLE villain": "permission denied to create role",
    "ALTER TABLE hero ADD COLUMN power text": "must be owner of table hero",
    "CREATE INDEX ON hero (secret_name)": "must be owner of table hero",
    "DROP TABLE hero": "must be owner of table hero",
    "TRUNCATE hero": "permission denied for table hero",
    "INSERT INTO alembic_version VALUES ('x')": "permission denied for table alembic_version",
    "UPDATE alembic_version SET version_num = 'x'": "permission denied for table alembic_version",
    "DELETE FROM alembic_version": "permission denied for table alembic_version",
    "COPY hero TO PROGRAM 'cat'": "permission denied to COPY to or from an external program",
    "COPY hero FROM PROGRAM 'id'": "permission denied to COPY to or from an external program",
    "COPY hero TO '/tmp/heroes'": "permission denied to COPY to a file",
    "SELECT pg_read_file('/etc/passwd')": "permission denied for function pg_read_file",
    "SET ROLE heroes_owner": 'permission denied to set role "heroes_owner"',
}


@pytest.mark.parametrize("statement", REFUSED)
def test_the_services_role_may_only_read_and_write_rows(stack: Stack, statement: str) -> None:
    assert REFUSED[statement] in stack.sql(statement, role="heroes_app")


def test_the_services_role_may_read_and_write_rows(stack: Stack) -> None:
    """The control of the test above."""
    insert = "INSERT INTO hero (name, secret_name) VALUES ('x', 'y') RETURNING name"
    assert stack.sql(insert, role="heroes_app").startswith("x")
    assert (
        stack.sql("SELECT version_num FROM alembic_version", role="heroes_app")
        == Revisions.of_the_code().head
    )


def test_the_containers_can_do_no_more_than_they_must(stack: Stack) -> None:
    inspected = stack.run(
        "docker inspect --format '{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}"
        " {{.HostConfig.SecurityOpt}} {{gt .HostConfig.Memory 0}} {{json .HostConfig.LogConfig}}'"
        " $(docker compose ps -aq)"
    )
    logs = '{"Type":"json-file","Config":{"max-file":"5","max-size":"10m"}}'
    expected = f"true [ALL] [no-new-privileges:true] true {logs}"
    assert inspected.stdout.splitlines() == [expected] * len(stack.config())
    user = "docker compose exec -T api python -c 'import os; print(os.getuid(), os.getgid())'"
    assert stack.run(user).stdout == "10001 10001\n"
    write = stack.run("docker compose exec -T api touch /srv/heroes/x", check=False)
    assert "Read-only file system" in write.stderr
    ports = stack.run("docker compose ps --format '{{.Service}} {{.Ports}}'").stdout
    assert f"api 127.0.0.1:{stack.port}->8000/tcp" in ports
    assert "db 5432/tcp" in ports
    image = stack.run("docker compose exec -T api sh -c 'ls; ls /venv/bin'").stdout.split()
    assert not {"tests", "requirements.txt", "pip", "gcc"} & set(image)


def test_the_doctor_finds_nothing_in_a_new_stack_and_finds_a_grant(stack: Stack) -> None:
    doctor = "docker compose run --rm --no-deps -T api heroes doctor"
    stack.sql("ANALYZE")  # Other tests import thousands of rows.
    assert stack.run(doctor, check=False).stdout == "no findings\n"
    stack.sql("GRANT TRUNCATE ON hero TO heroes_app")
    found = stack.run(doctor, check=False)
    stack.sql("REVOKE TRUNCATE ON hero FROM heroes_app")
    assert found.returncode == 1
    assert found.stdout.startswith("the role heroes_app has TRUNCATE on the table hero, which")


def test_heroes_outlive_restarts_of_the_service_and_of_the_database(stack: Stack) -> None:
    with stack.client() as client:
        before = client.post("/heroes/", json=DEADPOND).json()
    for service in ("api", "db"):
        stack.run(f"docker compose restart {service}")
        stack.run("docker compose up -d --wait")
        with stack.client() as client:
            assert client.get(f"/heroes/{before['id']}").json() == before


def test_a_release_migrates_while_the_old_code_serves(stack: Stack) -> None:
    *before, up = commands_in("### A new release")
    assert len(before) == 2
    with Load(stack.port, keep_alive_clients=4, fresh_clients=2).running() as load:
        for command in before:
            stack.run(command)
    assert load.answered > 50
    assert load.lost == []
    stack.run(up)
    with stack.client() as client:
        assert client.get("/health/ready").status_code == 200


def test_a_restored_backup_is_the_same_database(stack: Stack) -> None:
    for command in commands_in("## Backup and restore"):
        stack.run(command)

    everything = "SELECT json_agg(hero ORDER BY id) FROM hero"
    heroes = stack.sql(everything)
    assert "Dive Wilson" in heroes
    assert stack.sql(everything, database="restored") == heroes
    dump = "docker compose exec -T db pg_dump --username=postgres --schema-only --restrict-key=x"
    schema = stack.run(f"{dump} heroes").stdout
    assert "heroes_app" in schema
    assert stack.run(f"{dump} restored").stdout == schema
    stack.sql("DROP DATABASE restored")


def test_stop_under_load_answers_all_that_was_accepted(stack: Stack, figures: list[str]) -> None:
    with Load(stack.port).running() as load:
        while load.answered < 500:
            assert load.lost == []
        stack.run("docker compose stop api")
    figures.append(f"docker compose stop: {len(load.lost_in_use)} lost of {load.answered} accepted")
    assert load.lost_in_use == []
    assert load.lost != [], "the service did not stop"
    stack.run("docker compose up -d --wait")


def test_the_image_adds_little_to_its_base(stack: Stack, figures: list[str]) -> None:
    def size(image: str) -> int:
        return int(stack.run(f"docker image inspect --format '{{{{.Size}}}}' {image}").stdout)

    added = (size("heroes") - size("python:3.14-slim")) / 1e6
    figures.append(f"image: {added:.0f} MB over its base")
    assert added < 150


def test_every_setting_reaches_the_service(stack: Stack) -> None:
    set_here = {"database_url", "migration_database_url", "telemetry"}
    passed = {name.lower() for name in stack.config()["api"]["environment"]}
    assert set(Settings.model_fields) - set_here - passed == set()


def test_a_proxy_that_is_trusted_names_the_client(stack: Stack) -> None:
    def logged_client() -> str:
        stack.run("docker compose up -d --wait")
        with stack.client() as client:
            response = client.get("/heroes/", headers={"X-Forwarded-For": "192.0.2.1"})
        lines = stack.run("docker compose logs --no-log-prefix api").stdout.splitlines()
        line = next(each for each in lines if response.headers["X-Request-ID"] in each)
        return str(json.loads(line)["client"])

    assert logged_client() != "192.0.2.1"
    stack.env["FORWARDED_ALLOW_IPS"] = "*"
    assert logged_client() == "192.0.2.1"
    del stack.env["FORWARDED_ALLOW_IPS"]


def test_the_image_is_built_once(stack: Stack) -> None:
    config = stack.config()
    assert [name for name, service in config.items() if "build" in service] == ["migrate"]
    assert config["migrate"]["image"] == config["api"]["image"]


@pytest.mark.parametrize(("memory", "workers"), [("300m", 1), ("16g", None)])
def test_the_default_number_of_workers_fits_the_containers_memory(
    stack: Stack, memory: str, workers: int | None
) -> None:
    show = "import app.settings; print(app.settings.Settings().web_concurrency)"
    shown = stack.run(f"docker run --rm --memory {memory} --cpus 2 heroes python -c '{show}'")
    assert int(shown.stdout) == (workers or min(2, os.cpu_count() or 1))


PASSWORDS = {
    "in single quotes": ("'$ecret'", "$ecret"),
    "doubled": ("$$ecret", "$ecret"),
    "spaces": ("a b", "a b"),
    "double quotes": ('"a b"', "a b"),
    "quotes within": ("a'b\"c", "a'b\"c"),
    "a number sign": ("'a #b'", "a #b"),
    "a number sign in a word": ("a#b", "a#b"),
}


@pytest.mark.parametrize(("written", "password"), PASSWORDS.values(), ids=PASSWORDS)
def test_a_password_in_dotenv_reaches_the_containers(
    fresh: Stack, written: str, password: str
) -> None:
    fresh.dotenv(f"OWNER_PASSWORD={written}\nAPP_PASSWORD={written}\n")
    config = fresh.config()
    escaped = password.replace("$", "$$")
    assert config["migrate"]["environment"]["PGPASSWORD"] == escaped
    assert config["api"]["environment"]["PGPASSWORD"] == escaped
    assert config["roles"]["environment"]["OWNER_PASSWORD"] == escaped
    assert config["roles"]["environment"]["APP_PASSWORD"] == escaped


@pytest.mark.parametrize("written", ["", "   ", "$ecret", '"$ecret"'])
@pytest.mark.parametrize(
    "variable", ["POSTGRES_PASSWORD", "OWNER_PASSWORD", "APP_PASSWORD", "API_TOKENS"]
)
def test_an_empty_password_is_refused_before_anything_starts(
    fresh: Stack, variable: str, written: str
) -> None:
    fresh.dotenv(f"{variable}={written}\n")
    up = fresh.run("docker compose up -d --wait", check=False)
    assert up.returncode != 0
    *warnings, error = up.stderr.splitlines()
    assert all('The \\"ecret\\" variable is not set' in warning for warning in warnings)
    assert f"{variable} is missing a value: it is empty. " in error
    assert fresh.run("docker compose ps -aq", check=False).stdout == ""


def test_a_new_password_takes_effect_with_the_next_up(fresh: Stack) -> None:
    def responds(password: str) -> bool:
        """Whether the role may log in from another container."""
        query = "docker compose run --rm --no-deps -T --env PGPASSWORD --entrypoint psql roles"
        command = f"{query} --host=db --username=heroes_app --dbname=heroes --command='SELECT 1'"
        fresh.env["PGPASSWORD"] = password
        return fresh.run(command, check=False).returncode == 0

    fresh.dotenv("")
    fresh.run("docker compose up -d --wait")
    database = fresh.run("docker compose ps -q db").stdout
    assert responds("app"), "unset: the default"

    fresh.dotenv("OWNER_PASSWORD='o$wner'\nAPP_PASSWORD='$ecret'\n")
    fresh.run("docker compose up -d --wait")
    with fresh.client() as client:
        assert client.post("/heroes/", json=DEADPOND).status_code == 200
    assert responds("$ecret")
    assert not responds("app")
    assert fresh.run("docker compose ps -q db").stdout == database


# Lines of initdb and of the image, in this order.
MOMENTS = {
    "in the bootstrap": "running bootstrap script",
    "after the bootstrap": "performing post-bootstrap initialization",
    "after initdb": "waiting for server to start",
    "when the temporary server stops": "waiting for server to shut down",
}


@pytest.mark.parametrize("line", MOMENTS.values(), ids=MOMENTS)
def test_a_first_start_that_was_killed_succeeds_the_next_time(fresh: Stack, line: str) -> None:
    fresh.run("docker compose create db")
    database = fresh.run("docker compose ps -aq db").stdout.strip()
    fresh.run("docker compose start db")
    with subprocess.Popen(
        ["docker", "logs", "--follow", database],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as logs:
        assert logs.stdout
        seen = b""
        while line.encode() not in seen:
            more = os.read(logs.stdout.fileno(), 4096)
            assert more, seen.decode()
            seen += more
        fresh.run(f"docker kill {database}")

    up = fresh.run("docker compose up -d --wait", check=False)
    assert up.returncode == 0, up.stderr + fresh.run("docker compose logs --tail 50").stdout
    with fresh.client() as client:
        assert client.post("/heroes/", json=DEADPOND).status_code == 200


@pytest.mark.parametrize("service", ["roles", "migrate"])
def test_an_up_that_was_interrupted_succeeds_the_next_time(fresh: Stack, service: str) -> None:
    command = ["docker", "compose", "up", "-d", "--wait"]
    with subprocess.Popen(command, env=fresh.env, stderr=subprocess.DEVNULL) as up:
        find = f"docker compose ps -a --format '{{{{.State}}}}' {service}"
        while fresh.run(find, check=False).stdout.strip() in ("", "created") and up.poll() is None:
            time.sleep(0.05)
        fresh.run(f"docker compose kill {service} db", check=False)
        up.wait(timeout=60)
    fresh.run("docker compose up -d --wait")
    with fresh.client() as client:
        assert client.post("/heroes/", json=DEADPOND).status_code == 200
