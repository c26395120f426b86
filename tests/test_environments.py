"""Databases and clients that differ from those of a developer."""

import json
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from psycopg import sql
from sqlalchemy import URL, Engine, create_engine, text

from app.api.exception_handlers import SQLSTATES
from tests.examples import DEADPOND
from tests.migrations import copy_project, migrate
from tests.postgres import Postgres
from tests.processes import run_python
from tests.schemas import schema_of
from tests.service import BIN, Service, environment, serve, settings
from tests.test_migrations import tutorials_database

postgresql_only = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)


@contextmanager
def role(postgres: Postgres, url: URL, grants: str) -> Iterator[URL]:
    """The URL for a new role with these grants."""
    name = f"role_{uuid.uuid4().hex}"
    with postgres.connect(url.database) as connection:
        connection.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(name))
        )
        connection.execute(grants.replace("ROLE", name).encode())
        try:
            yield url.set(username=name, password="x")
        finally:
            drop = sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}")
            connection.execute(drop.format(sql.Identifier(name)))


@postgresql_only
def test_a_role_without_privileges_is_a_503_that_says_so(
    database_url: URL, postgres: Postgres
) -> None:
    with (
        role(postgres, database_url, "GRANT USAGE ON SCHEMA public TO ROLE") as url,
        serve(settings(url)) as service,
        service.client() as client,
    ):
        for path in ("/heroes/", "/heroes/1", "/health/ready"):
            refused = client.get(path)
            assert refused.status_code == 503
            detail = "The service's role lacks privileges on the schema"
            assert refused.json() == {"detail": detail}


@postgresql_only
def test_a_role_without_usage_on_the_schema_is_not_told_to_migrate(
    database_url: URL, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    revoke = "REVOKE USAGE ON SCHEMA public FROM PUBLIC"
    with (
        role(postgres, database_url, revoke) as url,
        serve(settings(url)) as service,
        service.client() as client,
    ):
        ready = client.get("/health/ready")
    assert ready.status_code == 503
    assert "no USAGE on a schema" in ready.json()["detail"]
    assert "no USAGE on a schema" in caplog.text


@postgresql_only
def test_a_request_that_the_server_ends_by_its_transaction_timeout_is_a_503(
    database_url: URL, database: Engine
) -> None:
    with database.connect() as holder:
        if int(holder.scalar(text("SHOW server_version_num")) or 0) < 170000:
            pytest.skip("transaction_timeout needs PostgreSQL 17")
        name = database_url.database
        holder.execute(text(f"ALTER DATABASE {name} SET transaction_timeout = '300ms'"))
        with serve(settings(database_url)) as service, service.client() as client:
            holder.execute(text("SET transaction_timeout = 0"))
            holder.execute(text("BEGIN; LOCK TABLE hero"))
            refused = client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": "k"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            holder.execute(text("ROLLBACK"))
            again = client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": "k"})
            assert again.status_code == 200


@postgresql_only
def test_sessions_that_the_server_ends_while_idle_fail_no_request(
    database_url: URL, database: Engine
) -> None:
    with database.connect() as connection:
        name = database_url.database
        connection.execute(text(f"ALTER DATABASE {name} SET idle_session_timeout = '200ms'"))
    with serve(settings(database_url)) as service, service.client() as client:
        for _ in range(3):
            assert client.get("/heroes/").status_code == 200
            time.sleep(0.4)


@postgresql_only
@pytest.mark.parametrize("state", ["25P03", "25P04", "57014", "57P05", "42501", "3D000", "XX000"])
def test_a_state_that_is_not_the_clients_fault_is_a_503(
    service: Service, database: Engine, state: str
) -> None:
    """The server raises the state in a trigger, as it would raise it itself."""
    assert answer_to(service, database, state).status_code == 503


@postgresql_only
@pytest.mark.parametrize(
    ("state", "status"), [("22003", 422), ("54000", 422), ("44000", 409), ("P0001", 409)]
)
def test_a_state_that_the_clients_value_causes_is_a_4xx(
    service: Service, database: Engine, state: str, status: int
) -> None:
    assert answer_to(service, database, state).status_code == status


@postgresql_only
def test_a_state_that_only_a_bug_causes_is_a_500(service: Service, database: Engine) -> None:
    assert "42601" not in SQLSTATES
    assert answer_to(service, database, "42601").status_code == 500


def answer_to(service: Service, database: Engine, state: str) -> httpx2.Response:
    """The response to an update during which the server raises this SQLSTATE."""
    with service.client() as client, database.connect() as connection:
        client.post("/heroes/", json=DEADPOND)
        connection.execute(
            text(
                "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$"
                f" BEGIN RAISE EXCEPTION 'on purpose' USING ERRCODE = '{state}'; END $$"
            )
        )
        connection.execute(
            text("CREATE TRIGGER fail BEFORE UPDATE ON hero EXECUTE FUNCTION fail()")
        )
        return client.patch("/heroes/1", json={"age": 1})


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_with_another_encoding_is_refused_by_one_line(
    postgres: Postgres, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"heroes_test_{uuid.uuid4().hex}"
    with postgres.connect() as connection:
        create = f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
        connection.execute(create.encode())
    url = postgres.url.set(database=name)
    try:
        refused = migrate(url, "upgrade", "head", check=False)
        assert refused.returncode != 0
        [line] = [line for line in refused.output.splitlines() if "FAILED" in line]
        assert "its encoding is not UTF8" in line
        assert "Traceback" not in refused.output
        with serve(settings(url)) as service, service.client() as client:
            assert client.get("/health/ready").status_code == 503
        assert "its encoding is not UTF8" in caplog.text
        command = run_python("-m", "app", "seed", "1", env=environment(url))
        assert command.returncode == 3
        assert command.stderr.startswith("heroes: The database cannot be used: its encoding")
        assert command.stderr.count("\n") == 1
    finally:
        postgres.drop(name)


OTHER_APPLICATIONS = {
    "a table": "CREATE TABLE villain (id int PRIMARY KEY);\n CREATE INDEX i ON villain (id)",
    "a table that refers to ours": "CREATE TABLE villain (hero_id bigint REFERENCES hero)",
    "a table of an extension": "CREATE TABLE spatial_ref_sys (srid int PRIMARY KEY);\n"
    " ALTER EXTENSION plpgsql ADD TABLE spatial_ref_sys",
    "partitions": "CREATE TABLE event (at date, PRIMARY KEY (at)) PARTITION BY RANGE (at);\n"
    " CREATE TABLE event_old PARTITION OF event FOR VALUES FROM (MINVALUE) TO ('2026-01-01');\n"
    " CREATE INDEX ix_event ON event (at)",
    "a child of our table": "CREATE TABLE sidekick (boss int) INHERITS (hero)",
    "a table of the same name in another schema": "CREATE SCHEMA other;\n"
    " CREATE TABLE other.hero (id int);\n CREATE INDEX ix_hero_age_id ON other.hero (id)",
    "views": "CREATE VIEW names AS SELECT name FROM hero;\n"
    " CREATE MATERIALIZED VIEW ages AS SELECT age FROM hero",
}


@postgresql_only
@pytest.mark.parametrize("statements", OTHER_APPLICATIONS.values(), ids=OTHER_APPLICATIONS)
def test_tables_of_other_applications_are_left_out_of_generated_revisions(
    database_url: URL, database: Engine, statements: str
) -> None:
    with database.connect() as connection:
        for statement in statements.split(";\n"):
            connection.execute(text(statement))
        assert "No new upgrade operations detected." in migrate(database_url, "check").output
        connection.execute(text("ALTER TABLE hero ADD COLUMN power text"))
        found = migrate(database_url, "check", check=False)
        assert "New upgrade operations detected" in found.output, "control"


@postgresql_only
@pytest.mark.parametrize("set_by", ["the role", "the URL"])
def test_a_search_path_other_than_public_is_used_by_all_commands(
    empty_database: URL, postgres: Postgres, set_by: str
) -> None:
    """The schema `public` has the tables of another application with the same names."""
    path = "heroes_schema"
    with postgres.connect(empty_database.database) as connection:
        connection.execute(
            f"CREATE SCHEMA {path}; CREATE TABLE hero (id text);"
            " CREATE TABLE alembic_version (version_num text);"
            " INSERT INTO alembic_version VALUES ('other');"
            f" REVOKE ALL ON DATABASE {empty_database.database} FROM PUBLIC".encode()
        )
    grants = f"GRANT CONNECT ON DATABASE {empty_database.database} TO ROLE;"
    if set_by == "the role":
        grants += f"ALTER USER ROLE SET search_path = {path};"
    else:
        empty_database = empty_database.update_query_dict({"options": f"-c search_path={path}"})
    with (
        role(postgres, empty_database, f"{grants} GRANT ALL ON SCHEMA {path} TO ROLE") as owner,
        role(postgres, empty_database, f"{grants} GRANT USAGE ON SCHEMA {path} TO ROLE") as service,
    ):
        migrate(owner, "upgrade", "head")
        assert "No new upgrade operations detected." in migrate(owner, "check").output
        with postgres.connect(empty_database.database) as connection:
            tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
            assert connection.execute(tables).fetchone() == (2,)
            connection.execute(
                f"GRANT SELECT, INSERT, UPDATE, DELETE ON {path}.hero, {path}.idempotency_key"
                f" TO {service.username}; GRANT SELECT ON {path}.alembic_version TO"
                f" {service.username}; GRANT USAGE ON SEQUENCE {path}.hero_id_seq TO"
                f" {service.username}".encode()
            )
        with serve(settings(service)) as running, running.client() as client:
            assert client.get("/health/ready").status_code == 200
            created = client.post("/heroes/", json=DEADPOND, headers={"Idempotency-Key": "k"})
            assert created.status_code == 200
        checked = run_python("-m", "app", "doctor", env=environment(service))
        assert checked.stdout == "no findings\n"


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_path_of_a_checkout_may_contain_a_percent_sign(
    tmp_path: Path, empty_database: URL
) -> None:
    folder = tmp_path / "50%off %(here)s"
    folder.mkdir()
    project = copy_project(folder)
    shutil.copy(BIN.parents[1] / "gunicorn.conf.py", project)
    for arguments in (("upgrade", "head"), ("current",), ("check",)):
        ended = subprocess.run(
            [BIN / "alembic", "-c", project / "alembic.ini", *arguments],
            cwd=tmp_path,
            env=environment(empty_database, PYTHONPATH=str(project)),
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
    loaded = subprocess.run(
        [BIN / "python", "-c", "import app.main; print(app.main.__file__)"],
        cwd=project,
        env=environment(empty_database, PYTHONPATH=str(project)),
        capture_output=True,
        text=True,
    )
    assert loaded.stdout.strip() == str(project / "app" / "main.py"), loaded.stderr


def sent(service: Service, request: str) -> tuple[bytes, bytes]:
    """The head and the body of the response to a raw request, until the server closes."""
    with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
        connection.sendall(request.encode())
        received = b""
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return head.lower(), body


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_export_to_an_http_1_0_client_is_not_chunked(
    service: Service, client: httpx2.Client
) -> None:
    lines = "".join(json.dumps(DEADPOND | {"name": f"hero {n}"}) + "\n" for n in range(3000))
    headers = {"Content-Type": "application/x-ndjson"}
    client.post("/heroes/import", content=lines, headers=headers)
    expected = client.get("/heroes/export").content
    head, body = sent(service, "GET /heroes/export HTTP/1.0\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert f"content-length: {len(expected)}".encode() in head
    assert body == expected
    head, body = sent(service, "GET /heroes/1 HTTP/1.0\r\n\r\n")
    assert b"200 ok" in head
    assert json.loads(body)["name"] == "hero 0"
    head, body = sent(service, 'GET /heroes/1 HTTP/1.0\r\nIf-None-Match: "1"\r\n\r\n')
    assert b"304" in head
    assert b"content-length" not in head
    # The control: HTTP/1.1 gets chunks.
    assert client.get("/heroes/export").headers["transfer-encoding"] == "chunked"


def test_the_id_of_a_deleted_hero_is_not_used_again(client: httpx2.Client) -> None:
    """Otherwise an old ETag would match the next hero."""
    first = client.post("/heroes/", json=DEADPOND)
    client.delete("/heroes/1")
    second = client.post("/heroes/", json=DEADPOND | {"name": "Other"})
    assert second.json()["id"] == 2
    old = {"If-Match": first.headers["etag"]}
    assert client.patch("/heroes/1", json={"age": 1}, headers=old).status_code == 404


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_ids_continue_after_those_of_an_adopted_table(empty_database: URL) -> None:
    tutorials_database(empty_database)
    engine = create_engine(empty_database)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO hero (id, name, secret_name) VALUES (7, 'a', 's')"))
    engine.dispose()
    migrate(empty_database, "upgrade", "head")
    with serve(settings(empty_database)) as service, service.client() as client:
        for expected in (8, 9):
            assert client.post("/heroes/", json=DEADPOND).json()["id"] == expected
            client.delete(f"/heroes/{expected}")


OTHER_HEROES = {
    "a view": (
        "ALTER TABLE hero RENAME TO h; CREATE VIEW hero AS SELECT * FROM h",
        "the primary key is (), not (id)",
    ),
    "a parent of another table": ("CREATE TABLE kid () INHERITS (hero)", "inheritance"),
    "a trigger": (
        "CREATE TRIGGER t BEFORE UPDATE ON hero FOR EACH ROW"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "the trigger t",
    ),
    "a rule": ("CREATE RULE r AS ON DELETE TO hero DO INSTEAD NOTHING", "the rule r"),
    "row security": ("ALTER TABLE hero ENABLE ROW LEVEL SECURITY", "row level security"),
    "an identity with the usual name": (
        "ALTER TABLE hero ALTER id DROP DEFAULT; DROP SEQUENCE hero_id_seq;"
        " ALTER TABLE hero ALTER id ADD GENERATED BY DEFAULT AS IDENTITY",
        "id is an identity",
    ),
    "another name of the key": (
        "ALTER TABLE hero RENAME CONSTRAINT hero_pkey TO pk",
        "the constraint pk",
    ),
    "a constraint with a name of ours": (
        "ALTER TABLE hero ADD CONSTRAINT hero_name_length_check CHECK (length(name) < 9)",
        "the constraint hero_name_length_check",
    ),
    "privileges of the id": ("GRANT SELECT (id) ON hero TO PUBLIC", "id has privileges"),
    "statistics": ("CREATE STATISTICS s ON id, age FROM hero", "depends on id"),
    "a table with a name of ours": (
        "CREATE TABLE idempotency_key (k int)",
        "idempotency_key exists already",
    ),
    "an index with a name of ours": (
        "CREATE INDEX ix_hero_name_id ON hero (secret_name)",
        "ix_hero_name_id exists already",
    ),
    "a function with a name of ours": (
        "CREATE FUNCTION hero_id_bigint() RETURNS int LANGUAGE sql RETURN 1",
        "hero_id_bigint exists already",
    ),
}


@postgresql_only
@pytest.mark.parametrize("difference", OTHER_HEROES)
def test_a_table_that_a_later_revision_could_not_change_is_refused_by_the_first(
    empty_database: URL, difference: str
) -> None:
    tutorials_database(empty_database)
    statements, message = OTHER_HEROES[difference]
    engine = create_engine(empty_database)
    with engine.begin() as connection:
        connection.exec_driver_sql(statements)
    engine.dispose()
    before = schema_of(empty_database)
    refused = migrate(empty_database, "upgrade", "head", check=False)
    assert refused.returncode != 0
    assert "Traceback" not in refused.output
    assert message in refused.output
    after = schema_of(empty_database)
    assert [s for s in after if "alembic_version" not in s] == before


@postgresql_only
def test_a_table_of_another_owner_is_refused(empty_database: URL, postgres: Postgres) -> None:
    tutorials_database(empty_database)
    grants = "GRANT ALL ON SCHEMA public TO ROLE; GRANT ALL ON ALL TABLES IN SCHEMA public TO ROLE"
    with role(postgres, empty_database, grants) as url:
        refused = migrate(url, "upgrade", "head", check=False)
    assert refused.returncode != 0
    assert "its owner is" in refused.output


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_trigger_that_sqlites_rebuild_would_drop_is_refused(empty_database: URL) -> None:
    tutorials_database(empty_database)
    engine = create_engine(empty_database)
    with engine.begin() as connection:
        trigger = "CREATE TRIGGER t AFTER DELETE ON hero BEGIN SELECT 1; END"
        connection.exec_driver_sql(trigger)
    engine.dispose()
    refused = migrate(empty_database, "upgrade", "head", check=False)
    assert refused.returncode != 0
    assert "it has the trigger t" in refused.output


@postgresql_only
@pytest.mark.parametrize(
    "statements",
    [
        "CREATE UNIQUE INDEX one_name ON hero (name)",
        "ALTER TABLE hero ALTER age SET DEFAULT 5",
        "ALTER TABLE hero SET (fillfactor = 70)",
        "COMMENT ON COLUMN hero.id IS 'the id'",
        "CREATE VIEW names AS SELECT name FROM hero",
        "DROP INDEX ix_hero_age",
        "ALTER TABLE hero REPLICA IDENTITY FULL",
    ],
)
def test_a_harmless_difference_is_adopted(empty_database: URL, statements: str) -> None:
    tutorials_database(empty_database)
    engine = create_engine(empty_database)
    with engine.begin() as connection:
        connection.exec_driver_sql(statements)
    engine.dispose()
    migrate(empty_database, "upgrade", "head")
    with serve(settings(empty_database)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200
