"""The schema: from migrations alone, and the same that the models say."""

import uuid

import pytest
from psycopg import sql
from sqlalchemy import URL, Engine, inspect

from app.revisions import Revisions
from tests.servers import Postgres
from tests.service import alembic, engine


def test_upgrade_makes_the_tutorials_table(database: Engine) -> None:
    inspector = inspect(database)
    columns = {
        column["name"]: (str(column["type"]), column["nullable"])
        for column in inspector.get_columns("hero")
    }
    assert columns == {
        "name": ("VARCHAR", False),
        "age": ("INTEGER", True),
        "id": ("INTEGER", False),
        "secret_name": ("VARCHAR", False),
    }
    indexes = {index["name"]: index["column_names"] for index in inspector.get_indexes("hero")}
    assert indexes == {"ix_hero_age": ["age"], "ix_hero_name": ["name"]}
    assert inspector.get_pk_constraint("hero")["constrained_columns"] == ["id"]


def test_the_models_and_the_migrations_agree(database_url: URL) -> None:
    check = alembic(database_url, "check")
    assert "No new upgrade operations detected." in check.stdout + check.stderr


def test_downgrade_leaves_nothing_and_upgrade_begins_anew(empty_database: URL) -> None:
    beside = engine(empty_database)
    for _ in range(2):
        alembic(empty_database, "upgrade", "head")
        assert inspect(beside).get_table_names() == ["alembic_version", "hero"]
        alembic(empty_database, "downgrade", "base")
        assert inspect(beside).get_table_names() == ["alembic_version"]
    beside.dispose()


def test_the_migrations_url_goes_before_the_services(empty_database: URL) -> None:
    given = empty_database.render_as_string(hide_password=False)
    alembic("sqlite:////nowhere/heroes.db", "upgrade", "head", MIGRATION_DATABASE_URL=given)
    beside = engine(empty_database)
    assert "hero" in inspect(beside).get_table_names()
    beside.dispose()


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_password_may_have_any_character(postgres: Postgres, empty_database: URL) -> None:
    role, password = f"role_{uuid.uuid4().hex}", "a%b@c:d/e?f#g'h\"i$j é%20%(here)s"
    with postgres.connect(empty_database.database) as connection:
        connection.execute(
            sql.SQL("CREATE ROLE {0} LOGIN PASSWORD {1}; GRANT ALL ON SCHEMA public TO {0}").format(
                sql.Identifier(role), password
            )
        )
        try:
            alembic(empty_database.set(username=role, password=password), "upgrade", "head")
        finally:
            connection.execute(
                sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role))
            )


def test_offline_sql_is_the_whole_schema(database_url: URL) -> None:
    offline = alembic(database_url, "upgrade", "head", "--sql")
    assert "CREATE TABLE IF NOT EXISTS hero" in offline.stdout
    assert f"VALUES ('{Revisions.of_the_code().head}')" in offline.stdout
