"""Change the schema of a database in use: one migrator at a time, short locks, safe statements.

For `alembic/env.py` and the revisions. The service does not use it. docs/migrations.md explains
which helper to use when.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, pool
from sqlalchemy.exc import DBAPIError

from app import NAME
from app.db.engine import sqlstate

logger = logging.getLogger(__name__)

# While a statement waits for a lock, every later statement on the table queues after it. Keep the
# wait short.
LOCK_TIMEOUT = "500ms"
# A statement that needs longer must be split.
STATEMENT_TIMEOUT = "15min"
# How long a migrator retries to get a lock, and how long it waits for another migrator.
LOCK_WAIT_SECONDS = 600
OTHER_MIGRATOR_WAIT_SECONDS = 3600
# An arbitrary number, which no other application on the database may use.
_ADVISORY_LOCK = 7_452_308_671

_LOCK_NOT_AVAILABLE = "55P03"
_DEADLOCK_DETECTED = "40P01"
_CHECK_VIOLATION = "23514"
_MAX_LOGGED_KEYS = 20
_POOLER_ROUNDS = 10


def engine(url: URL) -> Engine:
    """Return the engine for migrations. Its sessions start with the timeouts above.

    With an empty `?options=` in the URL, they start with the timeouts of their role instead, as
    `postgresql_engine` documents.
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url)
    # In `options` and not by SET: SET would begin a transaction, which alembic would mistake for
    # its caller's and never commit.
    options = [
        *([str(url.query["options"])] if "options" in url.query else []),
        f"-c lock_timeout={LOCK_TIMEOUT} -c statement_timeout={STATEMENT_TIMEOUT}",
        # The locks of a migrator that was killed or stopped, or whose host is down, must end.
        "-c client_connection_check_interval=1s -c idle_in_transaction_session_timeout=10s",
        "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
    ]
    defaults = {
        "application_name": f"{NAME} migration",
        "client_encoding": "utf8",
        "connect_timeout": 10,
    }
    arguments = {name: value for name, value in defaults.items() if name not in url.query}
    if url.query.get("options") != "":
        arguments["options"] = " ".join(options)
    return create_engine(url, poolclass=pool.NullPool, connect_args=arguments)


def _sqlite_engine(url: URL) -> Engine:
    # The driver would begin a transaction only at the first INSERT, so DDL would be outside of it.
    # With isolation_level None it begins none, and SQLAlchemy begins each one with the write lock.
    engine = create_engine(
        url,
        poolclass=pool.NullPool,
        connect_args={"isolation_level": None, "timeout": LOCK_WAIT_SECONDS},
    )
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


@event.listens_for(sa.Table, "after_parent_attach")
def _use_autoincrement(table: sa.Table, _: object) -> None:
    """Let SQLite not use the id of a deleted row again, in each table that batch mode rebuilds.

    SQLAlchemy does not reflect AUTOINCREMENT, so a rebuild would lose it.
    """
    if table.name.startswith("_alembic_tmp_"):
        table.dialect_options["sqlite"]["autoincrement"] = True


def use_write_ahead_log(engine: Engine) -> None:
    """Let SQLite's readers continue while there is a writer. The file stores the setting."""
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver  # noqa: S101
        try:
            driver.execute("PRAGMA journal_mode = WAL")
        except driver.OperationalError:
            logger.info("The database is busy: another migrator sets its journal mode")


@contextmanager
def only_migrator(engine: Engine) -> Iterator[None]:
    """Hold a lock that keeps other migrators waiting, on all hosts, during the block.

    Raises `CommandError` if another migrator runs for more than `OTHER_MIGRATOR_WAIT_SECONDS`, or
    if the URL leads to a pooler in transaction mode, where the lock would outlive the migrator.
    SQLite needs no such lock: the upgrade is one transaction, which has the write lock.
    """
    if engine.dialect.name != "postgresql":
        yield
        return
    # On a separate connection, and by polling. A migrator that waited within a statement would hold
    # a snapshot, for which the CREATE INDEX CONCURRENTLY of the running migrator would wait.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        _refuse_shared_session(connection)
        deadline = time.monotonic() + OTHER_MIGRATOR_WAIT_SECONDS
        lock = sa.text("SELECT pg_try_advisory_lock(:key)").bindparams(key=_ADVISORY_LOCK)
        is_logged = False
        while not connection.scalar(lock):
            if time.monotonic() > deadline:
                raise CommandError(
                    "Another migrator has been running for over"
                    f" {OTHER_MIGRATOR_WAIT_SECONDS} seconds: end it or wait, then run this again"
                )
            if not is_logged:
                logger.info("Another migrator is running: waiting for it")
                is_logged = True
            time.sleep(random.uniform(0.2, 0.5))  # noqa: S311
        yield


def _refuse_shared_session(connection: Connection) -> None:
    """Raise `CommandError` if other clients use the session of this connection in between."""
    get_pid = sa.select(sa.func.pg_backend_pid())
    pid = connection.scalar(get_pid)
    driver = connection.connection.driver_connection
    if driver and driver.info.backend_pid == pid:
        return  # PostgreSQL sent its pid at the start. A pooler invents one, in each of its modes.
    # In transaction mode, a transaction of another client takes the session that was used last,
    # which is ours, or the session that was idle for longest. Then our next statement takes another
    # session, unless there are two, and the roles are swapped the next time. The number of rounds
    # allows for the statements of other clients.
    for _ in range(_POOLER_ROUNDS):
        with connection.engine.connect() as other:
            if other.scalar(get_pid) == pid or connection.scalar(get_pid) != pid:
                raise CommandError(
                    "The URL leads to a pooler in transaction mode, where migrations cannot lock:"
                    " set MIGRATION_DATABASE_URL to the URL of PostgreSQL itself"
                )


def retry_on_lock_timeout(migrate: Callable[[], None]) -> None:
    """Run `migrate` again, after a pause, while it fails because it did not get a lock.

    Committed work is not repeated: each revision is a transaction, and a revision that cannot be
    one is written so that it can be run again. Raises `CommandError` after `LOCK_WAIT_SECONDS`.
    """
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            return migrate()
        except DBAPIError as error:
            if sqlstate(error.orig) not in (_LOCK_NOT_AVAILABLE, _DEADLOCK_DETECTED):
                raise
        if time.monotonic() > deadline:
            raise CommandError(
                f"Could not acquire a lock within {LOCK_WAIT_SECONDS} seconds:"
                " end the blocking session and run the migration again"
            )
        # Longer than the lock timeout, so that the queued statements of the service run first.
        pause = random.uniform(0.5, 1.5)  # noqa: S311
        logger.info("The table is in use: trying again in %.1f s", pause)
        time.sleep(pause)


def create_index(name: str, table: str, columns: list[str], *, unique: bool = False) -> None:
    """CREATE INDEX CONCURRENTLY, which does not block writes. Can be run again.

    Replaces an invalid index that an interrupted build has left: IF NOT EXISTS alone would accept
    it. Raises `CommandError` if the build ends with an invalid index.
    """
    context = op.get_context()
    if context.dialect.name != "postgresql":
        op.create_index(name, table, columns, unique=unique, if_not_exists=True)
        return
    with context.autocommit_block():
        _without_timeouts()
        if _is_valid(name) is False:
            logger.warning(
                "The index %s is invalid, its build was interrupted: rebuilding it", name
            )
            op.drop_index(name, table, postgresql_concurrently=True)
        op.create_index(
            name, table, columns, unique=unique, if_not_exists=True, postgresql_concurrently=True
        )
        _with_timeouts()
        if _is_valid(name) is False:
            raise CommandError(f"The index {name} is invalid: run the migration again")


def drop_index(name: str, table: str) -> None:
    """DROP INDEX CONCURRENTLY, which does not block reads and writes. Can be run again."""
    context = op.get_context()
    if context.dialect.name != "postgresql":
        op.drop_index(name, table, if_exists=True)
        return
    with context.autocommit_block():
        _without_timeouts()
        op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
        _with_timeouts()


def _without_timeouts() -> None:
    """Switch the timeouts off for a statement that waits without blocking other statements."""
    op.execute("SET lock_timeout = 0")
    op.execute("SET statement_timeout = 0")


def _with_timeouts() -> None:
    op.execute("RESET lock_timeout")
    op.execute("RESET statement_timeout")


def _quote(name: str) -> str:
    """Quote a name that needs it, such as `order` or `user`."""
    return op.get_context().dialect.identifier_preparer.quote(name)


def _is_valid(index: str) -> bool | None:
    """Return whether the index is valid; None if it does not exist, or in offline mode."""
    if op.get_context().as_sql:
        return None
    valid = sa.text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:index)")
    result: bool | None = op.get_bind().scalar(valid, {"index": _quote(index)})
    return result


def add_checks(table: str, checks: Mapping[str, str], *, key: str = "id") -> None:
    """Add CHECK constraints by name, first for new rows only. Can be run again.

    Old rows are checked afterwards, under a lock that does not block writes. Old rows that violate
    a constraint are kept, counted and logged by their `key`. On PostgreSQL the constraint then
    stays NOT VALID until an operator corrects the rows and validates it.
    """
    if op.get_context().dialect.name != "postgresql":
        _add_checks_to_sqlite(table, checks, key)
        return
    for name, condition in checks.items():
        if not _has_constraint(table, name):
            op.execute(
                f"ALTER TABLE {_quote(table)} ADD CONSTRAINT {_quote(name)}"
                f" CHECK ({condition}) NOT VALID"
            )
    with op.get_context().autocommit_block():
        op.execute("SET statement_timeout = 0")
        for name, condition in checks.items():
            try:
                op.execute(f"ALTER TABLE {_quote(table)} VALIDATE CONSTRAINT {_quote(name)}")
            except DBAPIError as error:
                if sqlstate(error.orig) != _CHECK_VIOLATION:
                    raise
                _log_violations(table, name, condition, key)
        op.execute("RESET statement_timeout")


def _add_checks_to_sqlite(table: str, checks: Mapping[str, str], key: str) -> None:
    if not op.get_context().as_sql:
        for name, condition in checks.items():
            _log_violations(table, name, condition, key)
    # SQLite rebuilds the table and copies all rows, also those that violate a constraint.
    op.execute("PRAGMA ignore_check_constraints = ON")
    with op.batch_alter_table(table) as batch:
        for name, condition in checks.items():
            batch.create_check_constraint(op.f(name), sa.text(condition))
    op.execute("PRAGMA ignore_check_constraints = OFF")


def _has_constraint(table: str, name: str) -> bool:
    if op.get_context().as_sql:
        return False
    named = sa.text(
        "SELECT count(*) FROM pg_constraint"
        " WHERE conrelid = to_regclass(:table) AND conname = :name"
    )
    return bool(op.get_bind().scalar(named, {"table": _quote(table), "name": name}))


def _log_violations(table: str, constraint: str, condition: str, key: str) -> None:
    connection: Connection = op.get_bind()
    column = _quote(key)
    violating = f"SELECT {column} FROM {_quote(table)} WHERE NOT ({condition}) ORDER BY {column}"
    keys = connection.execute(sa.text(violating)).scalars().all()
    if keys:
        logger.warning(
            "%d old rows of %s violate %s and are kept: %s %s%s",
            len(keys),
            table,
            constraint,
            key,
            ", ".join(str(value) for value in keys[:_MAX_LOGGED_KEYS]),
            ", …" if len(keys) > _MAX_LOGGED_KEYS else "",
        )


def backfill(table: str, assignments: str, where: str, *, key: str, batch: int = 1000) -> None:
    """UPDATE table SET assignments WHERE where, in transactions of `batch` rows. Can be run again.

    Writes of the same rows wait only for one short transaction. PostgreSQL only: SQLite has one
    writer, so it needs no batches.
    """
    context = op.get_context()
    table, key = _quote(table), _quote(key)
    if context.as_sql:
        op.execute(f"UPDATE {table} SET {assignments} WHERE {where}")
        return
    statement = sa.text(
        f"UPDATE {table} SET {assignments} WHERE ({where}) AND {key} > :after AND {key} <= :upto"
    )
    with context.autocommit_block():
        connection: Connection = op.get_bind()
        upto = sa.text(
            f"SELECT max({key}) FROM (SELECT {key} FROM {table}"
            f" WHERE {key} > :after ORDER BY {key} LIMIT {batch}) AS rows"
        )
        after = connection.scalar(sa.text(f"SELECT min({key}) - 1 FROM {table}"))
        while after is not None and (last := connection.scalar(upto, {"after": after})) is not None:
            connection.execute(statement, {"after": after, "upto": last})
            after = last
