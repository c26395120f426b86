"""Change the schema of a database in use: one migrator at a time, short locks, safe statements.

For `alembic/env.py` and the revisions. The service does not use it. docs/migrations.md explains
which helper to use when. `alembic revision --autogenerate` writes calls of the helpers.

A helper commits each of its statements, so that a lock ends with its statement. It can be run
again after it failed or was killed. It refuses to run after other changes of the same revision,
because these would be committed half-way. On SQLite the upgrade is one transaction, and a helper
rebuilds the table (batch mode).
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, pool
from sqlalchemy.exc import DBAPIError

from app import MIGRATION_LOCK, NAME
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

_LOCK_NOT_AVAILABLE = "55P03"
_DEADLOCK_DETECTED = "40P01"
_UNIQUE_VIOLATION = "23505"
_FOREIGN_KEY_VIOLATION = "23503"
_CHECK_VIOLATION = "23514"
_MAX_LOGGED_KEYS = 20
_POOLER_ROUNDS = 10
# A batch of a backfill keeps its rows locked while it waits for another row.
_ROW_LOCK_TIMEOUT = "100ms"
_PROGRESS_SECONDS = 5


def engine(url: URL) -> Engine:
    """Return the engine for migrations. Its sessions start with the timeouts above.

    With an empty `?options=` in the URL, they start with the timeouts of their role instead, as
    `app.db.pool.ConnectionPool` documents.
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

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A rebuild of a table copies all rows, also those that violate a constraint.
        connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
        connection.exec_driver_sql("BEGIN IMMEDIATE")

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
        lock = sa.text("SELECT pg_try_advisory_lock(:key)").bindparams(key=MIGRATION_LOCK)
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
    one is written so that it can be run again. Raises `CommandError` after `LOCK_WAIT_SECONDS` of
    pauses. The attempts do not count, because one may build an index for an hour.
    """
    waited = 0.0
    while True:
        try:
            return migrate()
        except DBAPIError as error:
            if sqlstate(error.orig) not in (_LOCK_NOT_AVAILABLE, _DEADLOCK_DETECTED):
                raise
        if waited > LOCK_WAIT_SECONDS:
            raise CommandError(
                f"Could not acquire a lock within {LOCK_WAIT_SECONDS} seconds:"
                " end the blocking session and run the migration again"
            )
        # Longer than the lock timeout, so that the queued statements of the service run first.
        pause = random.uniform(0.5, 1.5)  # noqa: S311
        logger.info("The table is in use: trying again in %.1f s", pause)
        time.sleep(pause)
        waited += pause


def _on_postgresql() -> bool:
    return op.get_context().dialect.name == "postgresql"


@contextmanager
def _committing_each() -> Iterator[None]:
    """Commit each statement of the block.

    Raises `CommandError` if the upgrade of the revision has changed something before, which would
    be committed too and would fail when the revision runs again.
    """
    context = op.get_context()
    has_changed = sa.text("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
    if context.opts.get("is_upgrade") and not context.as_sql and op.get_bind().scalar(has_changed):
        raise CommandError(
            "A helper that commits follows another change in the same revision: move it and the"
            " steps after it to a revision of their own"
        )
    with context.autocommit_block():
        yield


@contextmanager
def _without_timeouts() -> Iterator[None]:
    """Switch the timeouts off for statements that wait without blocking other statements."""
    op.execute("SET lock_timeout = 0")
    op.execute("SET statement_timeout = 0")
    yield
    # After an error the session ends.
    op.execute("RESET lock_timeout")
    op.execute("RESET statement_timeout")


def _quote(name: str) -> str:
    """Quote a name that needs it, such as `order` or `user`."""
    return op.get_context().dialect.identifier_preparer.quote(name)


def _sql(condition: str) -> sa.TextClause:
    """Return a condition as SQL. A colon in it does not begin a parameter."""
    return sa.text(condition.replace(":", r"\:"))


def create_index(
    name: str, table: str, columns: list[Any], *, unique: bool = False, **options: Any
) -> None:
    """Build an index concurrently. Can be run again.

    Lock: SHARE UPDATE EXCLUSIVE, which blocks neither reads nor writes. Replaces an invalid index
    that an interrupted build has left: IF NOT EXISTS alone would accept it. `options` are those of
    `op.create_index`. Raises `CommandError` if the rows are not unique.
    """
    if not _on_postgresql():
        op.create_index(name, table, columns, unique=unique, if_not_exists=True, **options)
        return
    with _committing_each(), _without_timeouts():
        if _is_valid(name) is False:
            logger.warning(
                "The index %s is invalid, its build was interrupted: rebuilding it", name
            )
            _drop_index(name, table)
        options |= {"if_not_exists": True, "postgresql_concurrently": True}
        try:
            op.create_index(name, table, columns, unique=unique, **options)
        except DBAPIError as error:
            if sqlstate(error.orig) != _UNIQUE_VIOLATION:
                raise
            # An invalid unique index would refuse new rows all the same.
            _drop_index(name, table)
            raise CommandError(
                f"The rows of {table} are not unique, as {name} requires:"
                " correct them and run the migration again"
            ) from error
        if _is_valid(name) is False:
            raise CommandError(f"The index {name} is invalid: run the migration again")


def drop_index(name: str, table: str) -> None:
    """Drop an index concurrently. Can be run again.

    Lock: SHARE UPDATE EXCLUSIVE, which blocks neither reads nor writes.
    """
    if not _on_postgresql():
        op.drop_index(name, table, if_exists=True)
        return
    with _committing_each(), _without_timeouts():
        _drop_index(name, table)


def _drop_index(name: str, table: str) -> None:
    op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)


def _is_valid(index: str) -> bool | None:
    """Return whether the index is valid; None if it does not exist, or in offline mode."""
    if op.get_context().as_sql:
        return None
    valid = sa.text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:index)")
    result: bool | None = op.get_bind().scalar(valid, {"index": _quote(index)})
    return result


def add_check(name: str, table: str, condition: str) -> None:
    """Add a CHECK constraint, first for new rows only. Can be run again.

    Locks: ACCESS EXCLUSIVE for an instant, to add the constraint NOT VALID. Then SHARE UPDATE
    EXCLUSIVE, which blocks neither reads nor writes, to validate it. Old rows that violate it are
    kept, counted and logged by their primary key. The constraint then stays NOT VALID until an
    operator corrects the rows and validates it.
    """
    add_checks(table, {name: condition})


def add_checks(table: str, checks: Mapping[str, str]) -> None:
    """Add CHECK constraints by name, as `add_check` does. SQLite rebuilds the table once."""
    if not _on_postgresql():
        for name, condition in checks.items():
            _log_violations(table, name, condition)
        with op.batch_alter_table(table) as batch:
            for name, condition in checks.items():
                batch.create_check_constraint(op.f(name), _sql(condition))
        return
    with _committing_each():
        for name, condition in checks.items():
            if not _has_constraint(table, name):
                op.create_check_constraint(
                    op.f(name), table, _sql(condition), postgresql_not_valid=True
                )
        for name, condition in checks.items():
            _validate(table, name, condition)


def add_foreign_key(
    name: str,
    table: str,
    columns: list[str],
    referent: str,
    referent_columns: list[str],
    **options: Any,
) -> None:
    """Add a foreign key, first for new rows only. Can be run again.

    Locks: SHARE ROW EXCLUSIVE on both tables for an instant, to add the constraint NOT VALID. Then
    SHARE UPDATE EXCLUSIVE and ROW SHARE, which block neither reads nor writes, to validate it. Old
    rows that violate it are handled as in `add_check`. `options` are those of
    `op.create_foreign_key`, such as `ondelete`.
    """
    both = zip(columns, referent_columns, strict=True)
    table_ = _quote(table)
    # With a name of its own, because a table may refer to itself.
    equal = [f"referenced.{_quote(to)} = {table_}.{_quote(column)}" for column, to in both]
    condition = " OR ".join(
        [f"{table_}.{_quote(column)} IS NULL" for column in columns]
        + [f"EXISTS (SELECT 1 FROM {_quote(referent)} AS referenced WHERE {' AND '.join(equal)})"]
    )
    if not _on_postgresql():
        _log_violations(table, name, condition)
        with op.batch_alter_table(table) as batch:
            batch.create_foreign_key(op.f(name), referent, columns, referent_columns, **options)
        return
    with _committing_each():
        if not _has_constraint(table, name):
            op.create_foreign_key(
                op.f(name),
                table,
                referent,
                columns,
                referent_columns,
                postgresql_not_valid=True,
                **options,
            )
        _validate(table, name, condition)


def add_unique(name: str, table: str, columns: list[str]) -> None:
    """Add a unique constraint that uses an index built concurrently. Can be run again.

    Locks: those of `create_index`. Then ACCESS EXCLUSIVE for an instant, to make the index a
    constraint. Raises `CommandError` if the rows are not unique.
    """
    if not _on_postgresql():
        with op.batch_alter_table(table) as batch:
            batch.create_unique_constraint(op.f(name), columns)
        return
    create_index(name, table, columns, unique=True)
    with _committing_each():
        if not _has_constraint(table, name):
            op.execute(
                f"ALTER TABLE {_quote(table)} ADD CONSTRAINT {_quote(name)}"
                f" UNIQUE USING INDEX {_quote(name)}"
            )


def drop_constraint(name: str, table: str, *, type_: str) -> None:
    """Drop a constraint of the type `check`, `foreignkey` or `unique`. Can be run again.

    Lock: ACCESS EXCLUSIVE for an instant, for a foreign key on both tables.
    """
    if not _on_postgresql():
        with op.batch_alter_table(table) as batch:
            batch.drop_constraint(op.f(name), type_=type_)
        return
    with _committing_each():
        op.drop_constraint(op.f(name), table, if_exists=True)


def set_not_null(table: str, column: str) -> None:
    """Make a column NOT NULL. Can be run again.

    Locks: those of `add_check`, because a validated CHECK spares SET NOT NULL the scan. Then
    ACCESS EXCLUSIVE for two instants, for SET NOT NULL and to drop the CHECK. Raises `CommandError`
    and changes no constraint if the column of a row is NULL.
    """
    if not _on_postgresql():
        with op.batch_alter_table(table) as batch:
            batch.alter_column(column, nullable=False)
        return
    check, condition = f"{column}_is_set"[:63], f"{_quote(column)} IS NOT NULL"
    with _committing_each():
        if not _has_constraint(table, check):
            op.create_check_constraint(
                op.f(check), table, _sql(condition), postgresql_not_valid=True
            )
        if not _validate(table, check, condition, log=False):
            op.drop_constraint(op.f(check), table)
            raise CommandError(
                f"{table}.{column} is NULL in some rows: backfill them and run the migration again"
            )
        op.alter_column(table, column, nullable=False)
        op.drop_constraint(op.f(check), table)


def drop_not_null(table: str, column: str) -> None:
    """Allow NULL in a column. Can be run again.

    Lock: ACCESS EXCLUSIVE for an instant.
    """
    if not _on_postgresql():
        with op.batch_alter_table(table) as batch:
            batch.alter_column(column, nullable=True)
        return
    with _committing_each():
        op.alter_column(table, column, nullable=True)


def _has_constraint(table: str, name: str) -> bool:
    if op.get_context().as_sql:
        return False
    named = sa.text(
        "SELECT count(*) FROM pg_constraint"
        " WHERE conrelid = to_regclass(:table) AND conname = :name"
    )
    return bool(op.get_bind().scalar(named, {"table": _quote(table), "name": name}))


def _validate(table: str, name: str, condition: str, *, log: bool = True) -> bool:
    """Validate a constraint; return whether all rows meet it."""
    try:
        op.execute("SET statement_timeout = 0")
        op.execute(f"ALTER TABLE {_quote(table)} VALIDATE CONSTRAINT {_quote(name)}")
    except DBAPIError as error:
        if sqlstate(error.orig) not in (_CHECK_VIOLATION, _FOREIGN_KEY_VIOLATION):
            raise
        if log:
            _log_violations(table, name, condition)
        return False
    finally:
        op.execute("RESET statement_timeout")
    return True


def _log_violations(table: str, constraint: str, condition: str) -> None:
    if op.get_context().as_sql:
        return
    connection: Connection = op.get_bind()
    names = sa.inspect(connection).get_pk_constraint(table)["constrained_columns"]
    columns = [sa.literal_column(_quote(name), sa.types.NullType()) for name in names]
    key: list[Any] = [*columns] or [sa.null()]
    violating = sa.select(*key).select_from(sa.table(table)).where(_sql(f"NOT ({condition})"))
    count = connection.scalar(sa.select(sa.func.count()).select_from(violating.subquery())) or 0
    rows = connection.execute(violating.order_by(*key).limit(_MAX_LOGGED_KEYS)).all()
    if count:
        logger.warning(
            "%d old rows of %s violate %s and are kept: %s %s%s",
            count,
            table,
            constraint,
            ", ".join(names) if len(names) == 1 else f"({', '.join(names)})",
            ", ".join(str(row[0] if len(names) == 1 else tuple(row)) for row in rows),
            ", …" if count > len(rows) else "",
        )


def backfill(
    table: str, assignments: str, where: str, *, key: str, batch: int = 1000, pause: float = 0.01
) -> None:
    """UPDATE table SET assignments WHERE where, in transactions of `batch` rows. Can be run again.

    Lock: ROW EXCLUSIVE, and each row's lock during one short transaction, which is tried again if
    another one has locked a row. `pause` seconds between the transactions leave time to others.
    Rows that no longer match `where` are skipped, so a backfill that was interrupted continues.
    Ends with ANALYZE. On SQLite it is one statement.
    """
    quoted, column = _quote(table), _quote(key)
    # A colon does not begin a parameter.
    assignments, where = (each.replace(":", r"\:") for each in (assignments, where))
    update = f"UPDATE {quoted} SET {assignments} WHERE ({where})"
    if not _on_postgresql() or op.get_context().as_sql:
        op.execute(update)
        return
    first = sa.text(f"SELECT {column} FROM {quoted} WHERE {where} ORDER BY {column} LIMIT 1")
    upto = sa.text(
        f"SELECT {column} FROM (SELECT {column} FROM {quoted} WHERE {column} >= :start"
        f" ORDER BY {column} LIMIT {batch}) AS rows ORDER BY {column} DESC LIMIT 1"
    )
    following = sa.text(
        f"SELECT {column} FROM {quoted} WHERE {column} > :last ORDER BY {column} LIMIT 1"
    )
    change = sa.text(f"{update} AND {column} >= :start AND {column} <= :last")
    with _committing_each():
        connection: Connection = op.get_bind()
        op.execute("SET statement_timeout = 0")
        total: int = connection.scalar(sa.text(f"SELECT count(*) FROM {quoted} WHERE {where}")) or 0
        start = connection.scalar(first)
        op.execute("RESET statement_timeout")
        op.execute(f"SET lock_timeout = '{_ROW_LOCK_TIMEOUT}'")
        done, began = 0, time.monotonic()
        next_log = began + _PROGRESS_SECONDS

        def change_batch() -> None:
            nonlocal done
            done += connection.execute(change, {"start": start, "last": last}).rowcount

        while start is not None:
            last = connection.scalar(upto, {"start": start})
            retry_on_lock_timeout(change_batch)
            start = connection.scalar(following, {"last": last})
            if time.monotonic() > next_log or start is None:
                rate = done / (time.monotonic() - began)
                left = f"{max(total - done, 0) / rate:,.0f}" if rate else "?"
                logger.info(
                    f"Backfill of {table}: {done:,} of {total:,} rows, {rate:,.0f} rows/s,"
                    f" {left} s left"
                )
                next_log += _PROGRESS_SECONDS
            time.sleep(pause)
        op.execute("RESET lock_timeout")
        op.execute(f"ANALYZE {quoted}")
