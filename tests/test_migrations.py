"""Migrations: upgrades and downgrades, equality with the models, and errors."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from hashlib import sha256
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

from app.db import autogenerate, migrations
from app.db.revisions import Revisions
from tests.migrations import copy_project, migrate
from tests.postgres import Postgres
from tests.processes import run_python
from tests.schemas import schema_of
from tests.service import BIN, ROOT, engine, environment, serve, settings

SCRIPTS = ScriptDirectory.from_config(Config(ROOT / "alembic.ini"))
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
def outside(empty_database: URL) -> Iterator[Engine]:
    """An engine for the empty database."""
    outside = engine(empty_database)
    yield outside
    outside.dispose()


def test_there_is_one_head_and_the_files_sort_in_the_order_of_the_revisions() -> None:
    assert SCRIPTS.get_heads() == [HEAD]
    files = sorted(Path(SCRIPTS.versions).glob("*.py"))
    assert [re.split("_", file.name)[3] for file in files] == REVISIONS


def changed_revisions(root: Path) -> list[str]:
    """Return the released revisions whose files differ from the recorded hashes."""
    lines = (root / "alembic" / "released.sha256").read_text().splitlines()
    released = [line.split("  ") for line in lines]
    return [
        path
        for digest, path in released
        if not (file := root / path).exists() or sha256(file.read_bytes()).hexdigest() != digest
    ]


def test_released_revisions_are_not_changed(tmp_path: Path) -> None:
    assert changed_revisions(ROOT) == [], (
        "databases have already run these revisions: restore the files as docs/releases.md"
        " describes, and put the change into a new revision"
    )
    project = copy_project(tmp_path)
    first, second, *_ = sorted((project / "alembic" / "versions").glob("*.py"))
    first.write_text(first.read_text() + "\n")
    second.unlink()
    changed = [str(file.relative_to(project)) for file in (first, second)]
    assert changed_revisions(project) == changed, "control"


def test_the_last_archive_contains_the_released_revisions() -> None:
    archive = max((ROOT / "tests" / "releases").glob("*.tar.gz"), key=version_of)
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if re.fullmatch(r"alembic/versions/.*\.py", name)]
        contents = [tar.extractfile(name) for name in names]
        hashes = [
            f"{sha256(file.read()).hexdigest()}  {name}"
            for file, name in zip(contents, names, strict=True)
            if file
        ]
    recorded = (ROOT / "alembic" / "released.sha256").read_text().splitlines()
    assert sorted(hashes) == sorted(recorded)


def version_of(archive: Path) -> list[int]:
    return [int(part) for part in archive.name.removesuffix(".tar.gz").split(".")]


def test_every_revision_upgrades_downgrades_and_upgrades_again_with_rows(
    empty_database: URL, outside: Engine
) -> None:
    for revision in REVISIONS:
        migrate(empty_database, "upgrade", revision)
        insert(outside)
        before, kept = schema_of(empty_database), rows(outside)
        migrate(empty_database, "downgrade", "-1")
        if revision != REVISIONS[0]:
            assert rows(outside) == kept
        migrate(empty_database, "upgrade", revision)
        assert schema_of(empty_database) == before, revision
        if revision != REVISIONS[0]:
            assert rows(outside) == kept
    migrate(empty_database, "downgrade", "base")
    assert inspect(outside).get_table_names() == ["alembic_version"]


def make_models(url: URL) -> None:
    """Create the schema from the models, without migrations."""
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
def test_the_migrations_create_the_schema_of_the_models(
    database_url: URL, empty_database: URL
) -> None:
    make_models(empty_database)
    assert schema_of(database_url) == schema_of(empty_database)


def test_alembic_check_finds_nothing_to_do(database_url: URL) -> None:
    assert "No new upgrade operations detected." in migrate(database_url, "check").output


DRIFTS = {
    "an additional column": "ALTER TABLE hero ADD COLUMN power text",
    "a missing column": "ALTER TABLE hero DROP COLUMN version",
    "another type": "ALTER TABLE hero ALTER COLUMN age TYPE bigint",
    "another length": "ALTER TABLE hero ALTER COLUMN name TYPE varchar(200)",
    "another collation": 'ALTER TABLE hero ALTER COLUMN name TYPE varchar COLLATE "C"',
    "null allowed": "ALTER TABLE hero ALTER COLUMN secret_name DROP NOT NULL",
    "another default": "ALTER TABLE hero ALTER COLUMN version SET DEFAULT 0",
    "a missing index": "DROP INDEX ix_hero_age_id",
    "an additional index": "CREATE INDEX ix_hero_secret_name ON hero (secret_name)",
    "a partial index": "DROP INDEX ix_hero_age_id;"
    " CREATE INDEX ix_hero_age_id ON hero (age, id) WHERE age > 0",
    "no primary key": "ALTER TABLE hero DROP CONSTRAINT hero_pkey",
    "a missing check": "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check",
    "another check": "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check;"
    " ALTER TABLE hero ADD CONSTRAINT hero_age_not_negative_check CHECK (age > 0)",
    "a check that is not valid": "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check;"
    " ALTER TABLE hero ADD CONSTRAINT hero_age_not_negative_check CHECK (age >= 0) NOT VALID",
    "a grant": "GRANT SELECT ON hero TO PUBLIC",
    "a trigger": "CREATE TRIGGER t BEFORE UPDATE ON hero FOR EACH ROW"
    " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "an additional table": "CREATE TABLE villain (id int)",
    "a smaller sequence": "ALTER SEQUENCE hero_id_seq AS integer",
}


@pytest.mark.filterwarnings("ignore:Can't validate argument 'dialect_options'")
@postgresql_only
def test_every_kind_of_drift_is_detected(
    postgres: Postgres, database_url: URL, templates: dict[str, URL], figures: list[str]
) -> None:
    sound = schema_of(database_url)
    detected_by_alembic = 0
    undetected = []
    for drift, statements in DRIFTS.items():
        name = f"heroes_drift_{uuid.uuid4().hex}"
        url = postgres.create(name, str(templates["postgresql"].database))
        drifted = engine(url)
        with drifted.connect() as connection:
            connection.execute(text(statements))
            context = MigrationContext.configure(connection, opts={"compare_server_default": True})
            detected_by_alembic += bool(compare_metadata(context, SQLModel.metadata))
        drifted.dispose()
        if schema_of(url) == sound:
            undetected.append(drift)
        postgres.drop(name)
    figures.append(
        f"drift: the comparison of dumps detects {len(DRIFTS) - len(undetected)} of {len(DRIFTS)}"
        f" kinds, alembic check detects {detected_by_alembic}"
    )
    assert undetected == []


def tutorials_database(url: URL) -> None:
    """Create the database as the tutorial's own code does."""
    create = "from tests.tutorial import *; SQLModel.metadata.create_all(engine)"
    env = os.environ | {"TUTORIAL_DATABASE_URL": url.render_as_string(hide_password=False)}
    ended = run_python("-c", create, env=env)
    assert ended.returncode == 0, ended.stderr


def test_an_upgrade_of_the_tutorials_database_keeps_its_rows(
    empty_database: URL, outside: Engine, database_url: URL
) -> None:
    tutorials_database(empty_database)
    insert(outside)
    kept = rows(outside)
    migrate(empty_database, "upgrade", "head")
    assert rows(outside) == kept
    with serve(settings(empty_database)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200
        created = client.post("/heroes/", json={"name": "New", "secret_name": "n"}).json()
        assert created["id"] == len(kept) + 1
    if empty_database.get_backend_name() == "postgresql":
        assert schema_of(empty_database) == schema_of(database_url)


OTHER_TABLES = {
    "an additional column": ("ALTER TABLE hero ADD COLUMN power varchar", "power is VARCHAR, not"),
    "a missing column": ("ALTER TABLE hero DROP COLUMN secret_name", "secret_name is missing, not"),
    "an unrelated table": ("DROP TABLE hero; CREATE TABLE hero (id text)", "age is missing"),
}


@pytest.mark.parametrize("change", OTHER_TABLES)
def test_a_different_table_named_hero_is_refused_and_not_changed(
    empty_database: URL, outside: Engine, change: str
) -> None:
    tutorials_database(empty_database)
    statements, difference = OTHER_TABLES[change]
    with outside.connect() as connection:
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


DEPENDENTS = {
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
@pytest.mark.parametrize("change", DEPENDENTS)
def test_a_tutorials_table_with_other_dependents_of_its_id_is_refused(
    empty_database: URL, outside: Engine, change: str
) -> None:
    tutorials_database(empty_database)
    statements, difference = DEPENDENTS[change]
    with outside.connect() as connection:
        connection.execute(text(statements))
    before = schema_of(empty_database)
    refused = migrate(empty_database, "upgrade", "head", check=False)
    assert refused.returncode != 0
    assert difference in refused.output
    assert [s for s in schema_of(empty_database) if "alembic_version" not in s] == before


@postgresql_only
def test_the_migrations_use_the_options_of_the_url(empty_database: URL, outside: Engine) -> None:
    with outside.connect() as connection:
        connection.execute(text("CREATE SCHEMA elsewhere"))
    url = empty_database.update_query_dict({"options": "-c search_path=elsewhere"})
    migrate(url, "upgrade", "head")
    assert inspect(outside).get_table_names() == []
    assert "hero" in inspect(outside).get_table_names(schema="elsewhere")
    with serve(settings(url)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200


@postgresql_only
def test_a_hanging_migrator_loses_its_locks(empty_database: URL) -> None:
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


def test_old_rows_that_violate_a_constraint_are_kept_and_new_ones_are_refused(
    empty_database: URL, outside: Engine
) -> None:
    tutorials_database(empty_database)
    insert(outside)
    with outside.connect() as connection:
        connection.execute(text("INSERT INTO hero (name, secret_name) VALUES ('', 's')"))
        connection.execute(text("INSERT INTO hero (name, secret_name, age) VALUES ('n', 's', -1)"))
    kept = rows(outside)
    upgraded = migrate(empty_database, "upgrade", "head")
    assert rows(outside) == kept
    assert "1 old rows of hero violate hero_name_length_check and are kept: id 4" in upgraded.output
    assert "violate hero_age_not_negative_check and are kept: id 5" in upgraded.output
    for values in ("'', 's', 1", "'n', '', 1", "'n', 's', -1"):
        with outside.connect() as connection, pytest.raises(IntegrityError):
            connection.execute(text(f"INSERT INTO hero (name, secret_name, age) VALUES ({values})"))


@postgresql_only
def test_ids_larger_than_int4_are_assigned_and_found(database_url: URL, database: Engine) -> None:
    with database.connect() as connection:
        connection.execute(text("SELECT setval('hero_id_seq', 3000000000)"))
    with serve(settings(database_url)) as service, service.client() as client:
        hero = client.post("/heroes/", json={"name": "Late", "secret_name": "l"}).json()
        assert hero["id"] == 3_000_000_001
        assert client.get("/heroes/3000000001").json() == hero


def test_the_migration_url_overrides_the_url_of_the_service(
    empty_database: URL, outside: Engine
) -> None:
    given = empty_database.render_as_string(hide_password=False)
    migrate("sqlite:////nowhere/heroes.db", "upgrade", "head", MIGRATION_DATABASE_URL=given)
    assert "hero" in inspect(outside).get_table_names()


@postgresql_only
def test_a_password_may_contain_any_character(postgres: Postgres, empty_database: URL) -> None:
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
def test_offline_sql_creates_the_same_schema(
    database_url: URL, empty_database: URL, outside: Engine
) -> None:
    offline = migrate(database_url, "upgrade", "head", "--sql", LOG_LEVEL="ERROR").output
    with outside.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver
        # One statement at a time, as psql does: several in one message are one transaction.
        for statement in re.split(r";\n\n", offline):
            driver.execute(statement)
    assert schema_of(empty_database) == schema_of(database_url)


# Rules of squawk that do not apply to these revisions, each with the reason.
EVERYWHERE = {
    "require-lock-timeout": "app/db/migrations.py sets it for the session",
    "require-statement-timeout": "app/db/migrations.py sets it for the session",
    "prefer-robust-stmts": "each revision runs in one transaction, or is safe to run again",
    "prefer-bigint-over-int": "ids are bigint, and the models choose the types of other columns",
    "prefer-identity": "SQLAlchemy's default, and that of the tutorial's table",
    "ban-drop-constraint": "the drop changes no row, and autogenerate replaces a CHECK by it",
}
# Rules that a revision with `# safe: reason` may break.
WITH_REASON = {
    *("ban-drop-column", "ban-drop-table"),
    *("changing-column-type", "renaming-column", "renaming-table"),
}
EXCEPTIONS = {
    "0001": {
        "prefer-text-field": "this is the tutorial's table, varchar without a length is text",
    },
    "0005": {
        "adding-not-nullable-field": "the check of 0004 proves it, PostgreSQL scans no rows",
        "ban-drop-column": "the same transaction creates a column with the same name",
        "ban-drop-function": "0003 made it, only the trigger used it",
        "renaming-column": "the new name is that of the column dropped in the same transaction",
    },
}


def squawk(file: Path) -> set[str]:
    linted = subprocess.run(
        [BIN / "squawk", "--pg-version=18", "--reporter=json", file], capture_output=True, text=True
    )
    return {finding["rule_name"] for finding in json.loads(linted.stdout)}


@pytest.mark.parametrize("revision", REVISIONS)
def test_squawk_finds_only_the_listed_exceptions_in_a_revision(
    revision: str, tmp_path: Path
) -> None:
    before = REVISIONS[REVISIONS.index(revision) - 1] if revision != REVISIONS[0] else "base"
    statements = migrate(
        "postgresql://h/db", "upgrade", f"{before}:{revision}", "--sql", LOG_LEVEL="ERROR"
    )
    file = tmp_path / f"{revision}.sql"
    file.write_text(statements.output)
    script = SCRIPTS.get_revision(revision)
    assert script
    with_reason = WITH_REASON if autogenerate.SAFE.search(script.longdoc or script.doc) else set()
    found = squawk(file) - EVERYWHERE.keys() - with_reason
    assert found == EXCEPTIONS.get(revision, {}).keys()


def test_squawk_finds_an_index_that_is_not_built_concurrently(tmp_path: Path) -> None:
    """The control for the previous test."""
    file = tmp_path / "bad.sql"
    file.write_text("CREATE INDEX i ON hero (name);")
    assert "require-concurrent-index-creation" in squawk(file)


# Cases in which the migrations must not change the database.


def test_a_database_of_a_newer_release_is_not_changed_and_the_service_is_ready(
    database_url: URL, database: Engine
) -> None:
    with database.connect() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = schema_of(database_url)
    upgraded = migrate(database_url, "upgrade", "head")
    assert "The database is at 9999, which this code does not know" in upgraded.output
    assert schema_of(database_url) == before
    with serve(settings(database_url)) as service, service.client() as client:
        assert client.get("/health/ready").status_code == 200
    for arguments in (("downgrade", "-1"), ("check",), ("current",)):
        refused = migrate(database_url, *arguments, check=False)
        assert_one_line(refused, "The database is at 9999, which this code does not know")
    migrate(database_url, "stamp", "--purge", HEAD)
    assert HEAD in migrate(database_url, "current").output


@postgresql_only
def test_missing_rights_and_a_read_only_server_are_reported_in_one_line(
    postgres: Postgres, empty_database: URL
) -> None:
    role = f"role_{uuid.uuid4().hex}"
    name = sql.Identifier(role)
    with postgres.connect(empty_database.database) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(name))
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # As in PostgreSQL 15.
        without_rights = empty_database.set(username=role, password="x")
        try:
            denied = migrate(without_rights, "upgrade", "head", check=False)
        finally:
            connection.execute(sql.SQL("DROP ROLE {}").format(name))
        assert_one_line(
            denied,
            "permission denied for schema public:"
            " set MIGRATION_DATABASE_URL to the role that owns the schema",
        )

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


def test_an_unreachable_server_is_reported_in_one_line(tmp_path: Path) -> None:
    nowhere = migrate("postgresql://u:p@127.0.0.1:1/db", "upgrade", "head", check=False)
    assert_one_line(nowhere, "connection failed")
    no_folder = migrate(f"sqlite:///{tmp_path}/nowhere/h.db", "upgrade", "head", check=False)
    assert_one_line(no_folder, "unable to open database file")


# Tests that change a copy of the project.


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path)


def run(project: Path, url: URL, *arguments: str) -> tuple[int, str]:
    env = environment(url, LOG_FORMAT="console")
    ended = run_python("-m", "alembic", *arguments, env=env, cwd=project)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_two_heads_and_a_missing_folder_are_reported_in_one_line(
    project: Path, empty_database: URL
) -> None:
    assert run(project, empty_database, "revision", "-m", "one")[0] == 0
    other = run(project, empty_database, "revision", "-m", "other", "--head", HEAD, "--splice")
    assert other[0] == 0
    assert_one_line(run(project, empty_database, "upgrade", "head"), "Multiple head revisions")
    shutil.rmtree(project / "alembic")
    assert_one_line(run(project, empty_database, "upgrade", "head"), "Path doesn't exist")
    assert make_url(empty_database).database
    assert [s for s in schema_of(empty_database) if "alembic_version" not in s] == []


def test_a_new_column_in_the_model_is_generated_linted_upgraded_and_downgraded(
    project: Path, database_url: URL, database: Engine
) -> None:
    """The steps are those of docs/migrations.md."""
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
