"""Run the migrations on the database of `DATABASE_URL` or `MIGRATION_DATABASE_URL`.

app/db/migrations.py has the parts that make this safe on a live database.
"""

from typing import Any

from alembic import command, context
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel

# The imports of models and idempotency fill SQLModel.metadata.
from app import models  # noqa: F401
from app.db import autogenerate, idempotency, migrations, revisions  # noqa: F401
from app.db.engine import sqlstate
from app.errors import WrongDatabase
from app.settings import from_environment, log_start
from app.telemetry import logs

settings = from_environment()
logs.configure(settings.log_level, settings.log_format)
# Not in alembic's own configuration, which would interpolate a % in a password.
url = settings.migration_database_url or settings.database_url
log_start(url)
on_sqlite = url.get_backend_name() == "sqlite"
arguments: Any = context.config.cmd_opts
invoked = getattr(arguments, "cmd", [None])[0]


def prepare(migration: Any, revision: Any, scripts: Any) -> None:
    """Make a generated revision safe, and give each revision the next number.

    The operator overrides the number with `--rev-id`.
    """
    if getattr(arguments, "autogenerate", False):
        autogenerate.process(migration, revision, scripts)
    numbers = [int(known) for known in known_revisions() if known.isdigit()]
    given = getattr(arguments, "rev_id", None)
    for position, script in enumerate(scripts):
        script.rev_id = f"{max(numbers, default=0) + 1 + position:04}"
        if given:
            script.rev_id = f"{given}_{position + 1}" if position else given
        if position:
            script.head = scripts[position - 1].rev_id


def known_revisions() -> set[str]:
    """Return all revisions of the code."""
    return {script.revision for script in context.script.walk_revisions()}


def is_ours(name: str | None, kind: str, _: Any) -> bool:
    """Return whether a table of the database belongs to the models."""
    return kind != "table" or name in SQLModel.metadata.tables


options: dict[str, Any] = {
    # For the helpers in app/db/migrations.py.
    "is_upgrade": invoked is command.upgrade,
    "include_name": is_ours,
    "process_revision_directives": prepare,
    "autogenerate_plugins": autogenerate.PLUGINS,
    "target_metadata": SQLModel.metadata,
    "compare_type": autogenerate.compare_type,
    "compare_server_default": True,
    # SQLite changes a column by rebuilding the table, PostgreSQL as without batch mode.
    "render_as_batch": True,
    "transactional_ddl": True,
    # A failed revision is rolled back, and the revisions before it stay. On SQLite the upgrade is
    # one transaction, whose write lock also keeps other migrators waiting.
    "transaction_per_migration": not on_sqlite,
}


def needs_no_database() -> bool:
    """Return whether the command only reads and writes revision files.

    `revision_environment` in alembic.ini runs this file for such commands too. With a connection,
    they would fail if the database is down, and alembic would create its version table.
    """
    if invoked is command.history:
        return not arguments.indicate_current and "current" not in (arguments.rev_range or "")
    return invoked is command.merge or (invoked is command.revision and not arguments.autogenerate)


def run_offline() -> None:
    """Write the SQL instead of running it: `alembic upgrade head --sql`."""
    context.configure(url=url, literal_binds=True, dialect_opts={"paramstyle": "named"}, **options)
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    """Run the migrations as the only migrator, and again after a lock timeout."""
    engine = migrations.engine(url)
    if on_sqlite:
        migrations.use_write_ahead_log(engine)

    def run() -> None:
        with engine.connect() as connection:
            context.configure(connection=connection, **options)
            with context.begin_transaction():
                if not is_newer():
                    context.run_migrations()

    with engine.connect() as connection:
        revisions.check_database(connection)
    with migrations.only_migrator(engine):
        migrations.retry_on_lock_timeout(run)


def is_newer() -> bool:
    """Return whether a newer release has upgraded the database. Then `upgrade` does nothing.

    This makes it possible to go back to the previous release: its code works on the newer schema.
    Raises `WrongDatabase` for the other commands, except `stamp`, which can correct the revision.
    """
    newer = set(context.get_context().get_current_heads()) - known_revisions()
    if not newer or invoked is command.stamp:
        return False
    message = (
        f"The database is at {', '.join(sorted(newer))}, which this code does not know:"
        " a newer release has upgraded it"
    )
    if invoked is not command.upgrade:
        raise WrongDatabase(message)
    migrations.logger.warning(message)
    return True


try:
    if needs_no_database():
        context.configure(url=url, as_sql=True, **options)
        context.run_migrations()
    elif context.is_offline_mode():
        run_offline()
    else:
        run_online()
except DBAPIError as error:
    # One line instead of a traceback, because the code is not the cause.
    line = str(error.orig).splitlines()[0]
    if sqlstate(error.orig) == "42501":
        line += ": set MIGRATION_DATABASE_URL to the role that owns the schema"
    raise CommandError(line) from error
except WrongDatabase as error:
    raise CommandError(str(error)) from error
