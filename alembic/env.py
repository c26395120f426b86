"""Runs the migrations on the database that the environment names."""

from typing import Any

from sqlalchemy import Connection, create_engine, event, pool
from sqlmodel import SQLModel

from alembic import context
from app import (
    logs,
    models,  # noqa: F401  (fills SQLModel.metadata)
)
from app.settings import from_environment

settings = from_environment()
logs.configure(settings.log_level, settings.log_format)
# Not through alembic's own configuration, where a % in a password would be an interpolation.
url = settings.migration_database_url or settings.database_url

options: dict[str, Any] = {
    "target_metadata": SQLModel.metadata,
    # SQLite changes a table by making it anew.
    "render_as_batch": url.get_backend_name() == "sqlite",
    "compare_type": True,
    "compare_server_default": True,
    # A failed migration leaves those before it in place and nothing of itself.
    "transaction_per_migration": True,
}


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, **options)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    engine = create_engine(url, poolclass=pool.NullPool)
    if engine.dialect.name == "sqlite":
        # Kept in the file: readers go on while there is a writer. Not by a statement on alembic's
        # connection, which would begin a transaction that alembic then leaves to be rolled back.
        event.listen(engine, "connect", lambda new, _: new.execute("PRAGMA journal_mode = WAL"))
    with engine.connect() as connection:
        migrate(connection)
