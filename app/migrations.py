"""How a schema is changed while it is in use: one migrator at a time, short waits, safe statements.

For `alembic/env.py` and the revisions; the service does not use it. docs/migrations.md says when to
use which.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, pool
from sqlalchemy.exc import DBAPIError

from alembic import op
from app.database import sqlstate

logger = logging.getLogger(__name__)

# A statement that waits for its lock makes all later ones on the table wait behind it: so not long.
LOCK_TIMEOUT = "500ms"
# A statement that runs longer is one that should have been done another way.
STATEMENT_TIMEOUT = "15min"
# The seconds in which a lock is tried for, again and again, and in which another migrator may work.
PATIENCE = 600
OTHER_MIGRATOR = 3600
# An arbitrary number, which only has to be this project's own.
_ADVISORY_LOCK = 7_452_308_671

_LOCK_NOT_AVAILABLE = "55P03"
_DEADLOCK_DETECTED = "40P01"
_CHECK_VIOLATION = "23514"
_NAMED_ROWS = 20


def engine(url: URL) -> Engine:
    """The engine that migrations run on. Its sessions begin with the timeouts above."""
    if url.get_backend_name() == "sqlite":
        return _sqlite(url)
    # By options and not by SET, which would begin a transaction that alembic then takes for its
    # caller's, and never commits.
    options = [
        *([str(url.query["options"])] if "options" in url.query else []),
        f"-c lock_timeout={LOCK_TIMEOUT} -c statement_timeout={STATEMENT_TIMEOUT}",
        # A migrator that was killed, was stopped, or whose host is gone must not hold its locks.
        "-c client_connection_check_interval=1s -c idle_in_transaction_session_timeout=10s",
        "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
    ]
    defaults = {"application_name": "heroes migration", "connect_timeout": 10}
    return create_engine(
        url,
        poolclass=pool.NullPool,
        connect_args={name: value for name, value in defaults.items() if name not in url.query}
        | {"options": " ".join(options)},
    )


def _sqlite(url: URL) -> Engine:
    # The driver begins its transactions only at the first INSERT, which would leave DDL outside.
    # So it begins none (isolation_level None), and SQLAlchemy begins all, each with the write lock.
    engine = create_engine(
        url, poolclass=pool.NullPool, connect_args={"isolation_level": None, "timeout": PATIENCE}
    )
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def use_write_ahead_log(engine: Engine) -> None:
    """Lets SQLite's readers go on while there is a writer. The file keeps it."""
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver  # noqa: S101
        try:
            driver.execute("PRAGMA journal_mode = WAL")
        except driver.OperationalError:
            logger.info("The database is busy: its journal mode is left to the other migrator")


@contextmanager
def only_migrator(engine: Engine) -> Iterator[None]:
    """Holds off other migrators, on all hosts, for the length of the block.

    Raises `CommandError` when another one is at work for over `OTHER_MIGRATOR` seconds. SQLite
    needs none of this: its transaction is the whole upgrade and has the write lock.
    """
    if engine.dialect.name != "postgresql":
        yield
        return
    # On a connection of its own, and by polling: a migrator that waited inside of a statement would
    # hold a snapshot, which CREATE INDEX CONCURRENTLY of the one at work waits for in turn.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        deadline = time.monotonic() + OTHER_MIGRATOR
        lock = sa.text("SELECT pg_try_advisory_lock(:key)").bindparams(key=_ADVISORY_LOCK)
        told = False
        while not connection.scalar(lock):
            if time.monotonic() > deadline:
                raise CommandError(
                    f"Another migrator was at work for over {OTHER_MIGRATOR} seconds"
                )
            if not told:
                logger.info("Another migrator is at work: waiting for it")
                told = True
            time.sleep(random.uniform(0.2, 0.5))  # noqa: S311
        yield


def with_short_locks(migrate: Callable[[], None]) -> None:
    """Runs `migrate` again, after a pause, as long as it fails because a lock was not to be had.

    What is committed by then is not repeated: each revision is a transaction, and one that cannot
    be is written so that it can be run again. Raises `CommandError` after `PATIENCE` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return migrate()
        except DBAPIError as error:
            if sqlstate(error.orig) not in (_LOCK_NOT_AVAILABLE, _DEADLOCK_DETECTED):
                raise
        if time.monotonic() > deadline:
            raise CommandError(f"A lock was not to be had for {PATIENCE} seconds")
        # Longer than the wait for the lock, so that the traffic that waited behind goes first.
        pause = random.uniform(0.5, 1.5)  # noqa: S311
        logger.info("The table is in use: trying again in %.1f s", pause)
        time.sleep(pause)


def create_index(name: str, table: str, columns: list[str], *, unique: bool = False) -> None:
    """CREATE INDEX CONCURRENTLY, which lets writes go on. Can be run again.

    An index that an earlier, interrupted build left invalid is built anew: IF NOT EXISTS alone
    would take it for the index. Raises `CommandError` if the build ends invalid.
    """
    context = op.get_context()
    if context.dialect.name != "postgresql":
        op.create_index(name, table, columns, unique=unique, if_not_exists=True)
        return
    with context.autocommit_block():
        _without_timeouts()
        if _is_valid(name) is False:
            logger.warning(
                "The index %s is invalid, its build was cut short: building it anew", name
            )
            op.drop_index(name, table, postgresql_concurrently=True)
        op.create_index(
            name, table, columns, unique=unique, if_not_exists=True, postgresql_concurrently=True
        )
        _with_timeouts()
        if _is_valid(name) is False:
            raise CommandError(f"The index {name} is invalid")


def drop_index(name: str, table: str) -> None:
    """DROP INDEX CONCURRENTLY, which lets reads and writes go on. Can be run again."""
    context = op.get_context()
    if context.dialect.name != "postgresql":
        op.drop_index(name, table, if_exists=True)
        return
    with context.autocommit_block():
        _without_timeouts()
        op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
        _with_timeouts()


def _without_timeouts() -> None:
    """For what waits for all older transactions and reads the whole table, and nobody waits for."""
    op.execute("SET lock_timeout = 0")
    op.execute("SET statement_timeout = 0")


def _with_timeouts() -> None:
    op.execute("RESET lock_timeout")
    op.execute("RESET statement_timeout")


def _is_valid(index: str) -> bool | None:
    """Whether the index can be used; None where there is none, or in offline mode."""
    if op.get_context().as_sql:
        return None
    valid = sa.text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:index)")
    result: bool | None = op.get_bind().scalar(valid, {"index": index})
    return result


def add_checks(table: str, checks: Mapping[str, str], *, key: str = "id") -> None:
    """Adds CHECK constraints by name, for new rows at once. Can be run again.

    Old rows are checked afterwards, without a lock that writes wait for. Where some break a
    constraint they are kept, counted and named in the log by their `key`; the constraint then
    stays NOT VALID on PostgreSQL, until the rows are mended and it is validated by hand.
    """
    if op.get_context().dialect.name != "postgresql":
        _add_checks_to_sqlite(table, checks, key)
        return
    for name, condition in checks.items():
        if not _has_constraint(table, name):
            op.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID")
    with op.get_context().autocommit_block():
        op.execute("SET statement_timeout = 0")
        for name, condition in checks.items():
            try:
                op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")
            except DBAPIError as error:
                if sqlstate(error.orig) != _CHECK_VIOLATION:
                    raise
                _name_rows(table, name, condition, key)
        op.execute("RESET statement_timeout")


def _add_checks_to_sqlite(table: str, checks: Mapping[str, str], key: str) -> None:
    if not op.get_context().as_sql:
        for name, condition in checks.items():
            _name_rows(table, name, condition, key)
    # SQLite makes the table anew and copies the rows, also those that break a constraint.
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
    return bool(op.get_bind().scalar(named, {"table": table, "name": name}))


def _name_rows(table: str, constraint: str, condition: str, key: str) -> None:
    connection: Connection = op.get_bind()
    broken = sa.text(f"SELECT {key} FROM {table} WHERE NOT ({condition}) ORDER BY {key}")
    keys = connection.execute(broken).scalars().all()
    if keys:
        logger.warning(
            "%d old rows of %s break %s and are kept: %s %s%s",
            len(keys),
            table,
            constraint,
            key,
            ", ".join(str(value) for value in keys[:_NAMED_ROWS]),
            ", …" if len(keys) > _NAMED_ROWS else "",
        )


def backfill(table: str, assignments: str, where: str, *, key: str, batch: int = 1000) -> None:
    """UPDATE table SET assignments WHERE where, in transactions of `batch` rows. Can be run again.

    Each is short enough for writes of the same rows to wait for. PostgreSQL only: on SQLite one
    statement is as good.
    """
    context = op.get_context()
    statement = (
        f"UPDATE {table} SET {assignments} WHERE ({where}) AND {key} > :after AND {key} <= :upto"
    )
    if context.as_sql:
        op.execute(f"UPDATE {table} SET {assignments} WHERE {where}")
        return
    with context.autocommit_block():
        connection: Connection = op.get_bind()
        upto = sa.text(
            f"SELECT max({key}) FROM (SELECT {key} FROM {table}"
            f" WHERE {key} > :after ORDER BY {key} LIMIT {batch}) AS rows"
        )
        after = connection.scalar(sa.text(f"SELECT min({key}) - 1 FROM {table}"))
        while after is not None and (last := connection.scalar(upto, {"after": after})) is not None:
            connection.execute(sa.text(statement), {"after": after, "upto": last})
            after = last
