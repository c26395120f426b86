"""Violations that the helpers of migrations log, and the tables and texts that they accept."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import URL, Engine, text

from app.db import migrations
from tests.schemas import schema_of


@contextmanager
def revision(url: URL) -> Iterator[None]:
    """Run the helpers of the block as in a revision."""
    engine = migrations.engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"transactional_ddl": True})
        with context.begin_transaction(), Operations.context(context):
            yield
    engine.dispose()


def run(database: Engine, *statements: str) -> None:
    with database.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


HERO = "INSERT INTO hero (id, name, secret_name) VALUES"


def test_rows_that_refer_to_rows_of_the_same_table_are_compared_with_all_of_them(
    database_url: URL, database: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    run(
        database,
        "ALTER TABLE hero ADD COLUMN rival_id BIGINT",
        f"{HERO} (1, 'a', 's'), (2, 'b', 's'), (3, 'c', 's')",
        "UPDATE hero SET rival_id = CASE id WHEN 1 THEN 2 WHEN 2 THEN 7 END",
    )
    with revision(database_url):
        migrations.add_foreign_key("hero_rival_id_fkey", "hero", ["rival_id"], "hero", ["id"])
    assert "1 old rows of hero violate hero_rival_id_fkey and are kept: id 2" in caplog.text


def test_a_table_without_the_column_id_gets_constraints(
    database_url: URL, database: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    run(
        database,
        "CREATE TABLE ally (hero_id BIGINT, of_id BIGINT, year INTEGER,"
        " CONSTRAINT ally_pkey PRIMARY KEY (hero_id, of_id))",
        f"{HERO} (1, 'a', 's')",
        "INSERT INTO ally VALUES (1, 1, 1999), (1, 2, 2001), (3, 1, 2002)",
    )
    with revision(database_url):
        migrations.add_check("ally_year_check", "ally", "year > 2000")
        migrations.add_foreign_key("ally_hero_id_fkey", "ally", ["hero_id"], "hero", ["id"])
    assert "1 old rows of ally violate ally_year_check and are kept:" in caplog.text
    assert "kept: (hero_id, of_id) (1, 1)\n" in caplog.text
    assert "kept: (hero_id, of_id) (3, 1)\n" in caplog.text
    assert "ally_hero_id_fkey" in str(schema_of(database_url))


def test_a_colon_in_a_backfill_does_not_begin_a_parameter(
    database_url: URL, database: Engine
) -> None:
    run(
        database,
        "ALTER TABLE hero ADD COLUMN note VARCHAR",
        f"{HERO} (1, 'a', 's'), (2, ' :b', 's')",
    )
    with revision(database_url):
        migrations.backfill("hero", "note = '{\"of\":true}'", "name <> ' :b'", key="id")
    with database.connect() as connection:
        notes = connection.scalars(text("SELECT note FROM hero ORDER BY id")).all()
    assert notes == ['{"of":true}', None]
