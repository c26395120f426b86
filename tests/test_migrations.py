"""The schema: from migrations alone, there and back, and the same that the models say."""

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import URL, Engine, create_engine, inspect, make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlmodel import SQLModel

from app.db import migrations
from app.db.revisions import ALEMBIC_INI, Revisions
from tests.schemas import schema_of
from tests.servers import Postgres
from tests.service import (
    BIN,
    ROOT,
    Migrators,
    alembic,
    copy_project,
    engine,
    serve,
    settings,
)

SCRIPTS = ScriptDirectory.from_config(Config(ALEMBIC_INI))
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()][::-1]
HEAD = REVISIONS[-1]

postgresql_only = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)

ROWS = [("Deadpond", None, "Dive Wilson"), ("Rusty-Man", 48, "Tommy Sharp"), ("é" * 200, 0, "s")]


def insert(database: Engine) -> None:
    with database.connect() as connection:
        for name, age, secret_name in ROWS:
            connection.execute(
                text("INSERT INTO hero (name, age, secret_name) VALUES (:name, :age, :secret)"),
                {"name": name, "age": age, "secret": secret_name},
            )


def rows(database: Engine) -> list[tuple[object, ...]]:
    with database.connect() as connection:
        everything = text("SELECT id, name, age, secret_name FROM hero ORDER BY id")
        return [tuple(row) for row in connection.execute(everything)]


@pytest.fixture
def beside(empty_database: URL) -> Iterator[Engine]:
    """A way into the empty database."""
    beside = engine(empty_database)
    yield beside
    beside.dispose()


def test_there_is_one_head_and_the_order_of_the_files_is_that_of_the_revisions() -> None:
    assert SCRIPTS.get_heads() == [HEAD]
    files = sorted(Path(SCRIPTS.versions).glob("*.py"))
    assert [re.split("_", file.name)[3] for file in files] == REVISIONS


def test_every_revision_goes_up_down_and_up_again_with_rows_in_it(
    empty_database: URL, beside: Engine, migrate: Migrators
) -> None:
    for revision in REVISIONS:
        migrate(empty_database, "upgrade", revision)
        insert(beside)
        before, kept = schema_of(empty_database), rows(beside)
        migrate(empty_database, "downgrade", "-1")
        if revision != REVISIONS[0]:
            assert rows(beside) == kept
        migrate(empty_database, "upgrade", revision)
        assert schema_of(empty_database) == before, revision
        if revision != REVISIONS[0]:
            assert rows(beside) == kept
    migrate(empty_database, "downgrade", "base")
    assert inspect(beside).get_table_names() == ["alembic_version"]


def make_models(url: URL) -> None:
    """The schema that the models say, and nothing but that."""
    models = create_engine(url)
    with models.begin() as connection:
        for table in SQLModel.metadata.sorted_tables:
            connection.execute(CreateTable(table))
            for index in table.indexes:
                connection.execute(CreateIndex(index))
        connection.execute(
            text(
                "CREATE TABLE alembic_version (version_num varchar(32) NOT NULL"
                " CONSTRAINT alembic_version_pkc PRIMARY KEY)"
            )
        )
    models.dispose()


@postgresql_only
def test_the_migrations_make_what_the_models_say(database_url: URL, empty_database: URL) -> None:
    make_models(empty_database)
    assert schema_of(database_url) == schema_of(empty_database)


def test_alembic_check_finds_nothing_to_do(database_url: URL, migrate: Migrators) -> None:
    assert "No new upgrade operations detected." in migrate(database_url, "check").output


DRIFTS = {
    "a column more": "ALTER TABLE hero ADD COLUMN power text",
    "a column less": "ALTER TABLE hero DROP COLUMN version",
    "another type": "ALTER TABLE hero ALTER COLUMN age TYPE bigint",
    "a length": "ALTER TABLE hero ALTER COLUMN name TYPE varchar(200)",
    "a collation": 'ALTER TABLE hero ALTER COLUMN name TYPE varchar COLLATE "C"',
    "null allowed": "ALTER TABLE hero ALTER COLUMN secret_name DROP NOT NULL",
    "another default": "ALTER TABLE hero ALTER COLUMN version SET DEFAULT 0",
    "an index less": "DROP INDEX ix_hero_age_id",
    "an index more": "CREATE INDEX ix_hero_secret_name ON hero (secret_name)",
    "a partial index": "DROP INDEX ix_hero_age_id;"
    " CREATE INDEX ix_hero_age_id ON hero (age, id) WHERE age > 0",
    "no primary key": "ALTER TABLE hero DROP CONSTRAINT hero_pkey",
    "a check less": "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check",
    "another check": "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check;"
    " ALTER TABLE hero ADD CONSTRAINT hero_age_not_negative_check CHECK (age > 0)",
    "a check that is not valid": "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check;"
    " ALTER TABLE hero ADD CONSTRAINT hero_age_not_negative_check CHECK (age >= 0) NOT VALID",
    "a grant": "GRANT SELECT ON hero TO PUBLIC",
    "a trigger": "CREATE TRIGGER t BEFORE UPDATE ON hero FOR EACH ROW"
    " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "a table more": "CREATE TABLE villain (id int)",
    "a smaller sequence": "ALTER SEQUENCE hero_id_seq AS integer",
}


@pytest.mark.filterwarnings("ignore:Can't validate argument 'dialect_options'")
@postgresql_only
def test_every_kind_of_drift_is_seen(
    postgres: Postgres, database_url: URL, templates: dict[str, URL], figures: list[str]
) -> None:
    sound = schema_of(database_url)
    seen_by_alembic = 0
    unseen = []
    for drift, statements in DRIFTS.items():
        name = f"heroes_drift_{uuid.uuid4().hex}"
        url = postgres.create(name, str(templates["postgresql"].database))
        drifted = engine(url)
        with drifted.connect() as connection:
            connection.execute(text(statements))
            context = MigrationContext.configure(connection, opts={"compare_server_default": True})
            seen_by_alembic += bool(compare_metadata(context, SQLModel.metadata))
        drifted.dispose()
        if schema_of(url) == sound:
            unseen.append(drift)
        postgres.drop(name)
    figures.append(
        f"drift: {len(DRIFTS) - len(unseen)} of {len(DRIFTS)} kinds seen as pg_dump writes them,"
        f" {seen_by_alembic} by alembic check"
    )
    assert unseen == []


def tutorials_database(url: URL) -> None:
    """What the tutorial's own code leaves behind."""
    create = "from tests.tutorial import *; SQLModel.metadata.create_all(engine)"
    subprocess.run(
        [sys.executable, "-c", create],
        cwd=ROOT,
        env=os.environ | {"TUTORIAL_DATABASE_URL": url.render_as_string(hide_password=False)},
        check=True,
    )


def test_the_tutorials_database_is_taken_over_with_its_rows(
    empty_database: URL, beside: Engine, migrate: Migrators, database_url: URL
) -> None:
    tutorials_database(empty_database)
    insert(beside)
    kept = rows(beside)
    migrate(empty_database, "upgrade", "head")
    assert rows(beside) == kept
    with serve(settings(empty_database)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200
        created = client.post("/heroes/", json={"name": "New", "secret_name": "n"}).json()
        assert created["id"] == len(kept) + 1
    if empty_database.get_backend_name() == "postgresql":
        assert schema_of(empty_database) == schema_of(database_url)


OTHER_TABLES = {
    "a column more": ("ALTER TABLE hero ADD COLUMN power varchar", "power is VARCHAR, not"),
    "a column less": ("ALTER TABLE hero DROP COLUMN secret_name", "secret_name is missing, not"),
    "another table altogether": ("DROP TABLE hero; CREATE TABLE hero (id text)", "age is missing"),
}


@pytest.mark.parametrize("change", OTHER_TABLES)
def test_another_table_hero_is_refused_and_left_untouched(
    empty_database: URL, beside: Engine, migrate: Migrators, change: str
) -> None:
    tutorials_database(empty_database)
    statements, difference = OTHER_TABLES[change]
    with beside.connect() as connection:
        for statement in statements.split(";"):
            connection.execute(text(statement))
    before = schema_of(empty_database)
    refused = migrate(empty_database, "upgrade", "head", check=False)
    assert refused.returncode != 0
    assert f"The table hero is not the tutorial's: {difference}" in refused.output
    assert "Traceback" not in refused.output
    assert [s for s in schema_of(empty_database) if "alembic_version" not in s] == [
        s for s in before if "alembic_version" not in s
    ]


HANGERS_ON = {
    "a view": ("CREATE VIEW ids AS SELECT id FROM hero", "depends on id"),
    "a foreign key": ("CREATE TABLE sidekick (hero_id int REFERENCES hero)", "depends on id"),
    "an index": ("CREATE INDEX i ON hero (secret_name, id)", "index i depends on id"),
    "a check": ("ALTER TABLE hero ADD CONSTRAINT c CHECK (id > 0)", "constraint c"),
    "an identity": (
        "ALTER TABLE hero ALTER COLUMN id DROP DEFAULT; DROP SEQUENCE hero_id_seq;"
        " ALTER TABLE hero ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (SEQUENCE NAME ids)",
        "id does not use the sequence hero_id_seq",
    ),
}


@postgresql_only
@pytest.mark.parametrize("change", HANGERS_ON)
def test_a_tutorials_table_on_whose_id_more_hangs_is_refused_at_once(
    empty_database: URL, beside: Engine, migrate: Migrators, change: str
) -> None:
    tutorials_database(empty_database)
    statements, difference = HANGERS_ON[change]
    with beside.connect() as connection:
        connection.execute(text(statements))
    before = schema_of(empty_database)
    refused = migrate(empty_database, "upgrade", "head", check=False)
    assert refused.returncode != 0
    assert difference in refused.output
    assert [s for s in schema_of(empty_database) if "alembic_version" not in s] == before


@postgresql_only
def test_the_urls_options_are_the_migrations_too(
    empty_database: URL, beside: Engine, migrate: Migrators
) -> None:
    with beside.connect() as connection:
        connection.execute(text("CREATE SCHEMA elsewhere"))
    url = empty_database.update_query_dict({"options": "-c search_path=elsewhere"})
    migrate(url, "upgrade", "head")
    assert inspect(beside).get_table_names() == []
    assert "hero" in inspect(beside).get_table_names(schema="elsewhere")
    with serve(settings(url)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200


@postgresql_only
def test_a_migrator_that_stands_still_loses_its_locks(empty_database: URL) -> None:
    migrating = migrations.engine(empty_database)
    with migrating.connect() as connection:
        shown = {
            name: connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in (
                "lock_timeout",
                "statement_timeout",
                "idle_in_transaction_session_timeout",
                "client_connection_check_interval",
            )
        }
    assert list(shown.values()) == ["500ms", "15min", "10s", "1s"]


def test_old_rows_that_break_a_constraint_are_kept_and_named_and_new_ones_refused(
    empty_database: URL, beside: Engine, migrate: Migrators
) -> None:
    tutorials_database(empty_database)
    insert(beside)
    with beside.connect() as connection:
        connection.execute(text("INSERT INTO hero (name, secret_name) VALUES ('', 's')"))
        connection.execute(text("INSERT INTO hero (name, secret_name, age) VALUES ('n', 's', -1)"))
    kept = rows(beside)
    upgraded = migrate(empty_database, "upgrade", "head")
    assert rows(beside) == kept
    assert "1 old rows of hero violate hero_name_length_check and are kept: id 4" in upgraded.output
    assert "violate hero_age_not_negative_check and are kept: id 5" in upgraded.output
    for values in ("'', 's', 1", "'n', '', 1", "'n', 's', -1"):
        with beside.connect() as connection, pytest.raises(IntegrityError):
            connection.execute(text(f"INSERT INTO hero (name, secret_name, age) VALUES ({values})"))


@postgresql_only
def test_ids_past_int4_are_given_and_found(database_url: URL, database: Engine) -> None:
    with database.connect() as connection:
        connection.execute(text("SELECT setval('hero_id_seq', 3000000000)"))
    with serve(settings(database_url)) as service, service.client() as client:
        hero = client.post("/heroes/", json={"name": "Late", "secret_name": "l"}).json()
        assert hero["id"] == 3_000_000_001
        assert client.get("/heroes/3000000001").json() == hero


def test_the_migrations_url_goes_before_the_services(
    empty_database: URL, beside: Engine, migrate: Migrators
) -> None:
    given = empty_database.render_as_string(hide_password=False)
    migrate("sqlite:////nowhere/heroes.db", "upgrade", "head", MIGRATION_DATABASE_URL=given)
    assert "hero" in inspect(beside).get_table_names()


@postgresql_only
def test_a_password_may_have_any_character(
    postgres: Postgres, empty_database: URL, migrate: Migrators
) -> None:
    role, password = f"role_{uuid.uuid4().hex}", "a%b@c:d/e?f#g'h\"i$j é%20%(here)s"
    with postgres.connect(empty_database.database) as connection:
        create = sql.SQL("CREATE ROLE {0} LOGIN PASSWORD {1}; GRANT ALL ON SCHEMA public TO {0}")
        connection.execute(create.format(sql.Identifier(role), password))
        try:
            migrate(empty_database.set(username=role, password=password), "upgrade", "head")
        finally:
            drop = sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}")
            connection.execute(drop.format(sql.Identifier(role)))


@postgresql_only
def test_offline_sql_makes_the_same_schema(
    database_url: URL, empty_database: URL, beside: Engine, migrate: Migrators
) -> None:
    offline = migrate(database_url, "upgrade", "head", "--sql", LOG_LEVEL="ERROR").output
    with beside.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver
        # A statement at a time, as psql runs it: several in one message are one transaction.
        for statement in re.split(r";\n\n", offline):
            driver.execute(statement)
    assert schema_of(empty_database) == schema_of(database_url)


# What squawk says of the revisions and is not so here, with the reason.
EVERYWHERE = {
    "require-lock-timeout": "app/db/migrations.py sets it for the session",
    "require-statement-timeout": "app/db/migrations.py sets it for the session",
    "prefer-robust-stmts": "alembic puts each revision into a transaction, or it can be run again",
}
EXCEPTIONS = {
    "0001": {
        "prefer-bigint-over-int": "the tutorial's table as it is; 0005 makes the ids bigint",
        "prefer-identity": "the tutorial's table as it is",
        "prefer-text-field": "the tutorial's table as it is, and varchar without a length is text",
    },
    "0002": {"prefer-bigint-over-int": "nobody writes a row two thousand million times"},
    "0008": {"prefer-bigint-over-int": "an HTTP status has three digits"},
    "0005": {
        "adding-not-nullable-field": "proved by the check of 0004, so that no row is looked at",
        "ban-drop-column": "the column comes back under its name in the same transaction",
        "ban-drop-constraint": "one is of 0004 alone, the other comes back in the same transaction",
        "ban-drop-function": "of 0003, for the trigger alone",
        "renaming-column": "to the name of the column that went in the same transaction",
    },
}


def squawk(file: Path) -> set[str]:
    linted = subprocess.run(
        [BIN / "squawk", "--pg-version=18", "--reporter=json", file], capture_output=True, text=True
    )
    return {finding["rule_name"] for finding in json.loads(linted.stdout)}


@pytest.mark.parametrize("revision", REVISIONS)
def test_squawk_finds_nothing_in_a_revision_but_the_exceptions(
    revision: str, migrate: Migrators, tmp_path: Path
) -> None:
    before = REVISIONS[REVISIONS.index(revision) - 1] if revision != REVISIONS[0] else "base"
    statements = migrate(
        "postgresql://h/db", "upgrade", f"{before}:{revision}", "--sql", LOG_LEVEL="ERROR"
    )
    file = tmp_path / f"{revision}.sql"
    file.write_text(statements.output)
    assert squawk(file) - EVERYWHERE.keys() == EXCEPTIONS.get(revision, {}).keys()


def test_squawk_would_find_an_index_that_is_not_built_concurrently(tmp_path: Path) -> None:
    """The control of the test above."""
    file = tmp_path / "bad.sql"
    file.write_text("CREATE INDEX i ON hero (name);")
    assert "require-concurrent-index-creation" in squawk(file)


# The database is left as it is.


def test_a_database_of_a_newer_release_is_left_alone_and_the_service_is_ready_on_it(
    database_url: URL, database: Engine, migrate: Migrators
) -> None:
    with database.connect() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = schema_of(database_url)
    upgraded = migrate(database_url, "upgrade", "head")
    assert "The database is at 9999, which this code does not know" in upgraded.output
    assert schema_of(database_url) == before
    with serve(settings(database_url)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200
    down = migrate(database_url, "downgrade", "-1", check=False)
    assert down.returncode != 0
    assert "Traceback" not in down.output


@postgresql_only
def test_without_rights_or_on_a_read_only_server_nothing_is_changed_and_one_line_says_so(
    postgres: Postgres, empty_database: URL, migrate: Migrators
) -> None:
    role = f"role_{uuid.uuid4().hex}"
    name = sql.Identifier(role)
    with postgres.connect(empty_database.database) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(name))
        without_rights = empty_database.set(username=role, password="x")
        try:
            denied = migrate(without_rights, "upgrade", "head", check=False)
        finally:
            connection.execute(sql.SQL("DROP ROLE {}").format(name))
        assert_one_line(denied, "permission denied for schema public")

        database = sql.Identifier(str(empty_database.database))
        read_only = sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on")
        connection.execute(read_only.format(database))
        assert_one_line(
            migrate(empty_database, "upgrade", "head", check=False),
            "cannot execute CREATE TABLE in a read-only transaction",
        )
    assert schema_of(empty_database) == []


def assert_one_line(migration: tuple[int, str], expected: str) -> None:
    returncode, output = migration
    assert returncode != 0
    assert "Traceback" not in output
    [line] = [line for line in output.splitlines() if line.startswith("FAILED: ")]
    assert expected in line


def test_a_server_that_is_not_there_is_one_line(migrate: Migrators, tmp_path: Path) -> None:
    nowhere = migrate("postgresql://u:p@127.0.0.1:1/db", "upgrade", "head", check=False)
    assert_one_line(nowhere, "connection failed")
    no_folder = migrate(f"sqlite:///{tmp_path}/nowhere/h.db", "upgrade", "head", check=False)
    assert_one_line(no_folder, "unable to open database file")


# A copy of the project, in which something is changed.


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path)


def run(project: Path, url: URL, *arguments: str) -> tuple[int, str]:
    process = alembic(url, *arguments, root=project)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_two_heads_and_a_missing_folder_are_one_line(project: Path, empty_database: URL) -> None:
    assert run(project, empty_database, "revision", "-m", "one")[0] == 0
    other = run(project, empty_database, "revision", "-m", "other", "--head", HEAD, "--splice")
    assert other[0] == 0
    assert_one_line(run(project, empty_database, "upgrade", "head"), "Multiple head revisions")
    shutil.rmtree(project / "alembic")
    assert_one_line(run(project, empty_database, "upgrade", "head"), "Path doesn't exist")
    assert make_url(empty_database).database
    assert [s for s in schema_of(empty_database) if "alembic_version" not in s] == []


def test_a_column_more_in_the_model_goes_all_the_way(
    project: Path, database_url: URL, database: Engine
) -> None:
    """The model, the generated revision, lint, up, check, down: as docs/migrations.md says."""
    insert(database)
    before, kept = schema_of(database_url), rows(database)
    models = project / "app" / "models.py"
    source = models.read_text()
    field = "    secret_name: str\n"
    assert source.count(field) == 1
    models.write_text(source.replace(field, field + "    power: str | None = None\n"))

    code, output = run(project, database_url, "revision", "--autogenerate", "-m", "Powers")
    assert code == 0, output
    [generated] = (project / "alembic" / "versions").glob("*_powers.py")
    assert re.match(rf"\d{{4}}_\d\d_\d\d_{int(HEAD) + 1:04}_powers\.py", generated.name)
    lint = subprocess.run(
        [BIN / "ruff", "check", generated],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert lint.returncode == 0, lint.stdout

    assert run(project, database_url, "upgrade", "head")[0] == 0
    assert run(project, database_url, "check")[0] == 0
    assert schema_of(database_url) != before
    assert rows(database) == kept
    assert run(project, database_url, "downgrade", "-1")[0] == 0
    assert [s for s in schema_of(database_url) if "TABLE" in s] == [
        s for s in before if "TABLE" in s
    ]
    assert rows(database) == kept


def test_the_code_knows_its_own_head() -> None:
    assert Revisions.of_the_code() == (HEAD, frozenset(REVISIONS))
