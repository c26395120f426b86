"""The command `heroes doctor`: each finding is seeded into a database without findings."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Column, Engine, ForeignKey, Table, create_engine, text
from sqlmodel import Session, SQLModel

from app.db.doctor import findings
from app.db.revisions import Revisions
from tests.postgres import Postgres
from tests.processes import run_python
from tests.service import environment
from tests.test_environments import role

postgresql_only = pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
HEAD = Revisions.of_the_code().head

# The privileges that docker/roles.sh gives to the service's role.
GRANTS = """
    REVOKE ALL ON DATABASE {database} FROM PUBLIC;
    GRANT CONNECT ON DATABASE {database} TO ROLE;
    REVOKE ALL ON SCHEMA public FROM PUBLIC;
    GRANT USAGE ON SCHEMA public TO ROLE;
    GRANT SELECT, INSERT, UPDATE, DELETE ON hero, idempotency_key TO ROLE;
    GRANT SELECT ON alembic_version TO ROLE;
    GRANT USAGE ON SEQUENCE hero_id_seq TO ROLE;
"""


def doctor(url: URL | str, **env: str) -> tuple[int, list[str], list[str]]:
    """Run the command; return its exit code and the lines of stdout and stderr."""
    ended = run_python("-m", "app", "doctor", env=environment(url, **env))
    return ended.returncode, ended.stdout.splitlines(), ended.stderr.splitlines()


@pytest.fixture
def services_url(backend: str, database_url: URL, postgres: Postgres) -> Iterator[URL]:
    """The URL of the database for a role with the service's privileges."""
    if backend == "sqlite":
        yield database_url
        return
    with role(postgres, database_url, GRANTS.format(database=database_url.database)) as url:
        yield url


@pytest.fixture
def found(services_url: URL) -> Iterator["Found"]:
    service = create_engine(services_url, isolation_level="AUTOCOMMIT")
    yield Found(service)
    service.dispose()


class Found:
    """The findings of the service's role, in which SERVICE replaces the role's name."""

    def __init__(self, service: Engine) -> None:
        self._service = service

    def __call__(self) -> list[str]:
        with Session(self._service) as session:
            name = str(self._service.url.username)
            return [finding.replace(name, "SERVICE") for finding in findings(session)]


def test_a_migrated_database_has_no_findings(services_url: URL) -> None:
    """The control for the tests that seed a finding."""
    assert doctor(services_url) == (0, ["no findings"], [])


@postgresql_only
def test_findings_go_to_stdout_and_end_the_command_with_1(
    services_url: URL, database: Engine
) -> None:
    run(database, "DROP INDEX ix_hero_age_id; ALTER TABLE hero DROP CONSTRAINT hero_pkey")
    assert doctor(services_url) == (
        1,
        [
            "hero: the index ix_hero_age_id is missing: INDEX (age, id)",
            "hero: the primary key is missing: (id)",
        ],
        [],
    )


@postgresql_only
def test_expressions_are_compared_in_their_meaning(database: Engine, found: Found) -> None:
    """The database prints them in another form than the models."""
    run(
        database,
        "ALTER TABLE hero DROP CONSTRAINT hero_name_length_check;\n"
        "ALTER TABLE hero ADD CONSTRAINT hero_name_length_check"
        " CHECK (length(name) >= 1 AND length(name) <= 200)",
    )
    assert found() == []
    run(
        database,
        "ALTER TABLE hero DROP CONSTRAINT hero_name_length_check;\n"
        "ALTER TABLE hero ADD CONSTRAINT hero_name_length_check"
        " CHECK (length(name) BETWEEN 1 AND 200 AND name NOT LIKE '%s : %')",
    )
    assert len(found()) == 1, "control"


@postgresql_only
def test_a_locked_table_is_not_checked(services_url: URL, database: Engine) -> None:
    run(database, "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check")
    run(database, "ALTER TABLE hero ADD CONSTRAINT c CHECK (age > 0) NOT VALID")
    with database.connect() as connection:
        connection.exec_driver_sql("BEGIN; LOCK TABLE hero")
        code, lines, _ = doctor(services_url, DATABASE_TIMEOUT="0.5")
        connection.exec_driver_sql("ROLLBACK")
    assert code == 1
    assert "not checked: canceling statement due to lock timeout" in lines


@sqlite_only
def test_tables_that_refer_to_each_other_are_no_warning(found: Found) -> None:
    lair = Table("lair", SQLModel.metadata, Column("villain_id", ForeignKey("villain.id")))
    villain = Table("villain", SQLModel.metadata, Column("id", ForeignKey("lair.villain_id")))
    try:
        # pytest turns warnings into errors.
        assert found() == ["the table lair is missing", "the table villain is missing"]
    finally:
        SQLModel.metadata.remove(lair)
        SQLModel.metadata.remove(villain)


def test_a_database_that_cannot_be_reached_ends_the_command_with_2(tmp_path: Path) -> None:
    for url in ("postgresql://u:p@127.0.0.1:1/db", f"sqlite:///{tmp_path}/nowhere/heroes.db"):
        code, out, [line] = doctor(url)
        assert (code, out) == (2, [])
        assert line.startswith("heroes: the database failed: ")


def run(database: Engine, statements: str) -> None:
    with database.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver
        for statement in statements.split(";\n"):
            driver.execute(statement)


TEAM = """
    CREATE TABLE team (id bigint PRIMARY KEY);
    GRANT SELECT ON team TO PUBLIC;
    ALTER TABLE hero ADD COLUMN team_id bigint
"""
CHECK = "hero: the constraint hero_age_not_negative_check is"
# Statements, each with the findings that they lead to.
DRIFTS = {
    "an additional column": (
        "ALTER TABLE hero ADD COLUMN power text DEFAULT 'none'",
        ["hero: the column power is not in the models: TEXT DEFAULT 'none'::text"],
    ),
    "a missing column": (
        "ALTER TABLE hero DROP COLUMN version",
        ["hero: the column version is missing: INTEGER NOT NULL DEFAULT '1'"],
    ),
    "another type": (
        "ALTER TABLE hero ALTER COLUMN age TYPE bigint",
        ["hero: the column age is BIGINT, the models have INTEGER"],
    ),
    "another length": (
        "ALTER TABLE idempotency_key ALTER COLUMN body TYPE varchar(200)",
        ["idempotency_key: the column body is VARCHAR(200), the models have VARCHAR"],
    ),
    "another collation": (
        'ALTER TABLE idempotency_key ALTER COLUMN body TYPE varchar COLLATE "C"',
        ['idempotency_key: the column body is VARCHAR COLLATE "C", the models have VARCHAR'],
    ),
    "null allowed": (
        "ALTER TABLE hero ALTER COLUMN secret_name DROP NOT NULL",
        ["hero: the column secret_name is VARCHAR, the models have VARCHAR NOT NULL"],
    ),
    "another default": (
        "ALTER TABLE hero ALTER COLUMN version SET DEFAULT 0",
        [
            "hero: the column version is INTEGER NOT NULL DEFAULT 0,"
            " the models have INTEGER NOT NULL DEFAULT '1'"
        ],
    ),
    "no default": (
        "ALTER TABLE hero ALTER COLUMN version DROP DEFAULT",
        [
            "hero: the column version is INTEGER NOT NULL,"
            " the models have INTEGER NOT NULL DEFAULT '1'"
        ],
    ),
    "no sequence": (
        "ALTER TABLE hero ALTER COLUMN id DROP DEFAULT",
        ["hero: the column id is BIGINT NOT NULL, the models have BIGINT NOT NULL WITH A SEQUENCE"],
    ),
    "a missing index": (
        "DROP INDEX ix_hero_age_id",
        ["hero: the index ix_hero_age_id is missing: INDEX (age, id)"],
    ),
    "an additional index": (
        "CREATE INDEX i ON hero (secret_name)",
        ["hero: the index i is not in the models: INDEX (secret_name)"],
    ),
    "a partial index": (
        "DROP INDEX ix_hero_age_id;\n CREATE INDEX ix_hero_age_id ON hero (age, id) WHERE age > 0",
        [
            "hero: the index ix_hero_age_id is INDEX (age, id) WHERE (age > 0),"
            " the models have INDEX (age, id)"
        ],
    ),
    "a unique index": (
        "DROP INDEX ix_hero_age_id;\n CREATE UNIQUE INDEX ix_hero_age_id ON hero (age, id)",
        ["hero: the index ix_hero_age_id is UNIQUE (age, id), the models have INDEX (age, id)"],
    ),
    "a unique constraint": (
        "ALTER TABLE hero ADD CONSTRAINT one_name UNIQUE (name)",
        ["hero: the constraint one_name is not in the models: UNIQUE (name)"],
    ),
    "no primary key": (
        "ALTER TABLE hero DROP CONSTRAINT hero_pkey",
        ["hero: the primary key is missing: (id)"],
    ),
    "another primary key": (
        "ALTER TABLE hero DROP CONSTRAINT hero_pkey;\n"
        " ALTER TABLE hero ADD CONSTRAINT hero_pkey PRIMARY KEY (id, name)",
        ["hero: the primary key is (id, name), the models have (id)"],
    ),
    "a missing check": (
        "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check",
        [f"{CHECK} missing: CHECK (age >= 0)"],
    ),
    "another check": (
        "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check;\n"
        " ALTER TABLE hero ADD CONSTRAINT hero_age_not_negative_check CHECK (age > 0)",
        [f"{CHECK} CHECK (age > 0), the models have CHECK (age >= 0)"],
    ),
    "a foreign key": (
        f"{TEAM} CONSTRAINT hero_team_id_fkey REFERENCES team ON DELETE CASCADE;\n"
        " CREATE INDEX ix_hero_team_id ON hero (team_id)",
        [
            "hero: the column team_id is not in the models: BIGINT",
            "hero: the constraint hero_team_id_fkey is not in the models:"
            " FOREIGN KEY (team_id) REFERENCES team.id ON DELETE CASCADE",
            "hero: the index ix_hero_team_id is not in the models: INDEX (team_id)",
        ],
    ),
    "a missing table": (
        "DROP TABLE idempotency_key",
        ["the table idempotency_key is missing"],
    ),
}
SEQUENCE = "the sequence hero_id_seq"
OTHERS = {
    "a schema that is behind": (
        "UPDATE alembic_version SET version_num = '0007';\n DROP TABLE idempotency_key",
        [f"the schema is behind, run alembic upgrade head: it is at 0007, the code at {HEAD}"],
    ),
    "a schema without a revision": (
        "DROP TABLE alembic_version",
        ["the schema has no revision, run alembic upgrade head"],
    ),
    "an unknown revision": (
        "UPDATE alembic_version SET version_num = '9999';\n ALTER TABLE hero ADD COLUMN x int",
        ["the database is at 9999, which this code does not know: use the newer release"],
    ),
    "a check that is NOT VALID": (
        "ALTER TABLE hero DROP CONSTRAINT hero_age_not_negative_check;\n"
        "INSERT INTO hero (name, secret_name, age) VALUES ('a', 's', -1), ('b', 's', -2);\n"
        "INSERT INTO hero (name, secret_name, age) VALUES ('c', 's', 1), ('d', 's', NULL);\n"
        "ALTER TABLE hero ADD CONSTRAINT hero_age_not_negative_check CHECK (age >= 0) NOT VALID",
        [
            "the constraint hero_age_not_negative_check of hero is NOT VALID, 2 rows violate it:"
            " correct them, then"
            " ALTER TABLE hero VALIDATE CONSTRAINT hero_age_not_negative_check"
        ],
    ),
    "an invalid index": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_hero_age_id'::regclass",
        [
            "the index ix_hero_age_id of hero is invalid, because its build was interrupted or is"
            " still running: REINDEX INDEX CONCURRENTLY ix_hero_age_id"
        ],
    ),
    "a sequence near its end": (
        f"SELECT setval('hero_id_seq', {2**63 * 815 // 1000})",
        [f"{SEQUENCE} has used 81 % of its numbers, which end at {2**63 - 1}"],
    ),
    "a sequence of another type": (
        "ALTER SEQUENCE hero_id_seq AS integer",
        [f"{SEQUENCE} is integer, its column id is bigint: ALTER SEQUENCE hero_id_seq AS bigint"],
    ),
    "a table without statistics": (
        "ALTER TABLE hero SET (autovacuum_enabled = off);\n"
        "INSERT INTO hero (name, secret_name) SELECT 'hero ' || n, 's'"
        " FROM generate_series(1, 2000) AS n",
        ["the table hero has no statistics: ANALYZE hero"],
    ),
    "a table with statistics": (
        "INSERT INTO hero (name, secret_name) SELECT 'hero ' || n, 's'"
        " FROM generate_series(1, 2000) AS n;\n ANALYZE hero",
        [],
    ),
    "an empty table with statistics": (
        "INSERT INTO hero (name, secret_name) SELECT 'hero ' || n, 's'"
        " FROM generate_series(1, 2000) AS n;\n DELETE FROM hero;\n ANALYZE hero",
        [],
    ),
    "a missing privilege": (
        "REVOKE INSERT, UPDATE ON hero FROM SERVICE",
        ["the role SERVICE lacks INSERT, UPDATE on the table hero"],
    ),
    "no privilege to read": (
        "REVOKE ALL ON hero FROM SERVICE",
        [
            "not checked: permission denied for table hero",
            "the role SERVICE lacks SELECT, INSERT, UPDATE, DELETE on the table hero",
        ],
    ),
    "no privilege on the sequence": (
        "REVOKE ALL ON SEQUENCE hero_id_seq FROM SERVICE",
        ["the role SERVICE lacks USAGE on the sequence hero_id_seq"],
    ),
    "no privilege on the revision": (
        "REVOKE ALL ON alembic_version FROM SERVICE",
        [
            "not checked: permission denied for table alembic_version",
            "the role SERVICE lacks SELECT on the table alembic_version",
        ],
    ),
    "no privilege on the schema": (
        "REVOKE ALL ON SCHEMA public FROM SERVICE",
        ["The database cannot be used: the role has no USAGE on a schema of its search_path"],
    ),
    "the privilege to create tables": (
        "GRANT CREATE ON SCHEMA public TO PUBLIC",
        [
            "the role SERVICE has CREATE on the schema public, which the service does not need:"
            " REVOKE it from the role or PUBLIC"
        ],
    ),
    "the privilege to truncate": (
        "GRANT TRUNCATE, TRIGGER ON hero TO SERVICE",
        [
            "the role SERVICE has TRIGGER, TRUNCATE on the table hero, which the service does not"
            " need: REVOKE it from the role or PUBLIC"
        ],
    ),
    "the privilege to change the revision": (
        "GRANT UPDATE ON alembic_version TO SERVICE",
        [
            "the role SERVICE has UPDATE on the table alembic_version, which the service does not"
            " need: REVOKE it from the role or PUBLIC"
        ],
    ),
    "a table that every role may read": (
        "GRANT SELECT ON hero TO PUBLIC",
        ["the role SERVICE shares SELECT on the table hero with every role: REVOKE it from PUBLIC"],
    ),
    "a role that may create roles": (
        "ALTER ROLE SERVICE CREATEROLE",
        ["the role SERVICE has CREATEROLE: ALTER ROLE SERVICE NOCREATEROLE"],
    ),
    "a superuser": (
        "ALTER ROLE SERVICE SUPERUSER",
        ["the role SERVICE has SUPERUSER: ALTER ROLE SERVICE NOSUPERUSER"],
    ),
    "a member of a role of the server": (
        "GRANT pg_write_server_files TO SERVICE",
        ["the role SERVICE is a member of pg_write_server_files, which the service does not need"],
    ),
    "the owner of a table": (
        "ALTER TABLE hero OWNER TO SERVICE",
        [
            "the role SERVICE may change the table hero, the sequence hero_id_seq, because it is or"
            " may become the owner: give the service a role without DDL"
        ],
    ),
}


@postgresql_only
@pytest.mark.parametrize(("statements", "lines"), DRIFTS.values(), ids=DRIFTS)
def test_a_difference_from_the_models_is_a_finding(
    database: Engine, found: Found, services_url: URL, statements: str, lines: list[str]
) -> None:
    run(database, statements.replace("SERVICE", str(services_url.username)))
    assert found() == lines


@postgresql_only
@pytest.mark.parametrize(("statements", "lines"), OTHERS.values(), ids=OTHERS)
def test_a_state_that_needs_the_operator_is_a_finding(
    database: Engine, found: Found, services_url: URL, statements: str, lines: list[str]
) -> None:
    run(database, statements.replace("SERVICE", str(services_url.username)))
    assert found() == lines


@sqlite_only
def test_findings_on_sqlite(database: Engine, services_url: URL, found: Found) -> None:
    run(
        database,
        "PRAGMA ignore_check_constraints = ON;\n"
        "INSERT INTO hero (name, secret_name, age) VALUES ('a', 's', -1), ('b', 's', -2);\n"
        "DROP INDEX ix_hero_age_id;\n"
        "ALTER TABLE hero ADD COLUMN team_id INTEGER REFERENCES hero (id);\n"
        "UPDATE hero SET team_id = 99 WHERE id = 1",
    )
    assert found() == [
        "hero: the column team_id is not in the models: INTEGER",
        "hero: the constraint is not in the models:"
        " FOREIGN KEY (team_id) REFERENCES hero.id ON DELETE NO ACTION",
        "hero: the index ix_hero_age_id is missing: INDEX (age, id)",
        "hero: the foreign key on (team_id) has no index",
        "CHECK constraint failed in hero (2 times)",
        "hero: the row 1 refers to a row of hero that does not exist",
    ]
    run(database, "DROP TABLE hero")
    assert doctor(services_url)[:2] == (1, ["the table hero is missing"])


@pytest.fixture
def team(database: Engine) -> None:
    """A foreign key on the table, and two rows that violate it."""
    run(
        database,
        "INSERT INTO hero (name, secret_name) VALUES ('a', 's'), ('b', 's'), ('c', 's');\n"
        f"{TEAM};\n"
        "INSERT INTO team VALUES (1);\n"
        "UPDATE hero SET team_id = id WHERE id < 3;\n"
        "INSERT INTO hero (name, secret_name, team_id) VALUES ('d', 's', 4);\n"
        "ALTER TABLE hero ADD CONSTRAINT hero_team_id_fkey"
        " FOREIGN KEY (team_id) REFERENCES team NOT VALID",
    )


@postgresql_only
@pytest.mark.usefixtures("team")
def test_a_foreign_key_without_an_index_and_with_wrong_rows_is_a_finding(
    database: Engine, found: Found
) -> None:
    no_index = "hero: the foreign key on (team_id) has no index"
    not_valid = (
        "the constraint hero_team_id_fkey of hero is NOT VALID, 2 rows violate it: correct them,"
        " then ALTER TABLE hero VALIDATE CONSTRAINT hero_team_id_fkey"
    )
    drift = 2
    assert found()[drift:] == [no_index, not_valid]
    run(database, "CREATE INDEX partial ON hero (team_id) WHERE team_id > 5")
    run(database, "CREATE INDEX other ON hero (age, team_id)")
    assert no_index in found(), "an index that the foreign key cannot use"
    run(database, "CREATE INDEX usable ON hero (team_id, age)")
    assert no_index not in found()
    run(database, "UPDATE hero SET team_id = NULL WHERE team_id > 1")
    run(database, "ALTER TABLE hero VALIDATE CONSTRAINT hero_team_id_fkey")
    assert not_valid not in found()


@postgresql_only
def test_tables_of_other_applications_lead_to_no_finding(database: Engine, found: Found) -> None:
    run(
        database,
        "CREATE TABLE villain (id serial, hero_id bigint REFERENCES hero, age int);\n"
        "INSERT INTO villain (age) SELECT -1 FROM generate_series(1, 10000);\n"
        "ALTER TABLE villain ADD CHECK (age > 0) NOT VALID;\n"
        "GRANT ALL ON villain TO PUBLIC;\n"
        "CREATE INDEX invalid ON villain (age);\n"
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'invalid'::regclass;\n"
        "CREATE SCHEMA other;\n"
        "CREATE TABLE other.hero (id int)",
    )
    assert found() == []


@postgresql_only
def test_a_not_null_constraint_that_is_not_valid_is_a_finding(
    database: Engine, found: Found
) -> None:
    with database.connect() as connection:
        if (connection.dialect.server_version_info or ()) < (18,):
            pytest.skip("needs PostgreSQL 18")
    run(
        database,
        "ALTER TABLE hero ALTER secret_name DROP NOT NULL;\n"
        "INSERT INTO hero (name) VALUES ('a');\n"
        "ALTER TABLE hero ADD CONSTRAINT c NOT NULL secret_name NOT VALID",
    )
    assert found() == [
        "the constraint c of hero is NOT VALID, 1 rows violate it: correct them, then"
        " ALTER TABLE hero VALIDATE CONSTRAINT c"
    ]


@postgresql_only
def test_a_statement_timeout_of_the_role_does_not_end_the_checks(
    database: Engine, found: Found, services_url: URL
) -> None:
    run(
        database,
        f"ALTER ROLE {services_url.username} SET statement_timeout = '500ms';\n"
        "ALTER TABLE hero ADD CONSTRAINT later CHECK (age < 200) NOT VALID;\n"
        "ALTER TABLE hero ALTER COLUMN version SET DEFAULT 0;\n"
        "REVOKE USAGE ON SEQUENCE hero_id_seq FROM PUBLIC, " + str(services_url.username),
    )
    with database.connect() as connection:
        connection.execute(text("BEGIN"))
        connection.execute(text("LOCK TABLE hero"))
        canceled = "not checked: canceling statement due to statement timeout"
        lacks = "the role SERVICE lacks USAGE on the sequence hero_id_seq"
        assert set(found()) == {canceled, lacks}
