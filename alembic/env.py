"""Runs the migrations on the database that the environment names. What it takes to do so on a live
one is in app/migrations.py."""

from typing import Any

from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel

from alembic import command, context
from app import (
    logs,
    migrations,
    models,  # noqa: F401  (fills SQLModel.metadata)
)
from app.settings import from_environment

settings = from_environment()
logs.configure(settings.log_level, settings.log_format)
# Not through alembic's own configuration, where a % in a password would be an interpolation.
url = settings.migration_database_url or settings.database_url
on_sqlite = url.get_backend_name() == "sqlite"

options: dict[str, Any] = {
    "target_metadata": SQLModel.metadata,
    # SQLite changes a table by making it anew, which is safe in a transaction.
    "render_as_batch": on_sqlite,
    "transactional_ddl": True,
    # A failed revision leaves nothing of itself and those before it in place. On SQLite all of an
    # upgrade is one transaction, whose write lock also holds off other migrators.
    "transaction_per_migration": not on_sqlite,
}


def run_offline() -> None:
    """Writes the SQL instead of running it: `alembic upgrade head --sql`."""
    context.configure(url=url, literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Runs the migrations, alone and again where a lock was not to be had."""
    engine = migrations.engine(url)
    if on_sqlite:
        migrations.use_write_ahead_log(engine)

    def run() -> None:
        with engine.connect() as connection:
            context.configure(connection=connection, **options)
            with context.begin_transaction():
                if not is_newer():
                    context.run_migrations()

    with migrations.only_migrator(engine):
        migrations.with_short_locks(run)


def is_newer() -> bool:
    """Whether a release newer than this code has upgraded the database: then it is left alone.

    So that going back to the release before is possible: its `alembic upgrade head` has nothing to
    do, and its code works on the newer schema.
    """
    if getattr(context.config.cmd_opts, "cmd", [None])[0] is not command.upgrade:
        return False
    known = {script.revision for script in context.script.walk_revisions()}
    newer = set(context.get_context().get_current_heads()) - known
    if newer:
        migrations.logger.warning(
            "The database is at %s, which this code does not know: it is left to the newer release",
            ", ".join(sorted(newer)),
        )
    return bool(newer)


try:
    if context.is_offline_mode():
        run_offline()
    else:
        run_online()
except DBAPIError as error:
    # One line instead of a traceback: it is the database's doing, not the code's.
    raise CommandError(str(error.orig).splitlines()[0]) from error
