"""Checks of a live database: one line per finding, for the command `doctor`.

They concern only the tables of the models, and need no privilege beyond the service's.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, SQLModel

from app.base import is_partial
from app.db import drift, idempotency, revisions  # noqa: F401  (Fills SQLModel.metadata.)
from app.db.engine import sqlstate
from app.errors import SchemaBehind, WrongDatabase

_UNDEFINED_TABLE = "42P01"


class Check(NamedTuple):
    """A query of PostgreSQL's catalogs, and the message for each of its rows.

    `:tables` contains the OIDs of the models' tables.
    """

    message: str
    query: str


_CHECKS = (
    Check(
        "the role {role} has {attribute}: ALTER ROLE {role} NO{attribute}",
        """
        SELECT quote_ident(rolname) AS role, attribute
        FROM pg_roles, LATERAL (VALUES (rolsuper, 'SUPERUSER'), (rolcreaterole, 'CREATEROLE'),
            (rolcreatedb, 'CREATEDB'), (rolreplication, 'REPLICATION'),
            (rolbypassrls, 'BYPASSRLS')) AS attributes (is_set, attribute)
        WHERE rolname = current_user AND is_set
        """,
    ),
    Check(
        "the role {role} {problem}",
        """
        WITH objects (object, owner, acl, needed) AS (
            SELECT 'the table ' || oid::regclass, relowner,
                coalesce(relacl, acldefault('r', relowner)),
                CASE WHEN oid = ANY (:tables) THEN ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']
                    ELSE ARRAY['SELECT'] END
            FROM pg_class WHERE oid = ANY (:tables) OR oid = to_regclass('alembic_version')
            -- An identity column's sequence ('i' instead of 'a') needs no privilege.
            UNION ALL SELECT 'the sequence ' || oid::regclass, relowner,
                coalesce(relacl, acldefault('s', relowner)), ARRAY['USAGE']
            FROM pg_class JOIN pg_depend ON objid = oid AND classid = 'pg_class'::regclass
                AND deptype = 'a' AND refobjid = ANY (:tables)
            WHERE relkind = 'S'
            UNION ALL SELECT 'the schema ' || nspname, nspowner,
                coalesce(nspacl, acldefault('n', nspowner)), ARRAY['USAGE']
            FROM pg_namespace
            WHERE oid IN (SELECT relnamespace FROM pg_class WHERE oid = ANY (:tables))
            UNION ALL SELECT 'the database ' || datname, datdba,
                coalesce(datacl, acldefault('d', datdba)), ARRAY['CONNECT']
            FROM pg_database WHERE datname = current_database()
        ),
        privileges AS (
            SELECT *, pg_has_role(owner, 'MEMBER') AS is_owner, ARRAY(
                SELECT DISTINCT privilege_type::text FROM aclexplode(acl)
                WHERE grantee = 0 OR pg_has_role(grantee, 'USAGE')) AS granted
            FROM objects
        ),
        problems AS (
            SELECT 'may change ' || string_agg(object, ', ') || ', because it is or may become'
                ' the owner: give the service a role without DDL' AS problem
            FROM privileges WHERE is_owner
            UNION ALL SELECT 'lacks ' || string_agg(privilege, ', ') || ' on ' || object
            FROM privileges, unnest(needed) AS privilege
            WHERE privilege <> ALL (granted) GROUP BY object
            UNION ALL SELECT 'has ' || string_agg(privilege, ', ' ORDER BY privilege) || ' on '
                || object || ', which the service does not need: REVOKE it from the role or PUBLIC'
            FROM privileges, unnest(granted) AS privilege
            WHERE privilege <> ALL (needed) AND NOT is_owner GROUP BY object
            UNION ALL SELECT 'is a member of ' || rolname || ', which the service does not need'
            FROM pg_roles WHERE rolname LIKE 'pg\\_%' AND pg_has_role(oid, 'MEMBER')
            UNION ALL SELECT 'shares ' || string_agg(privilege_type, ', ') || ' on ' || object
                || ' with every role: REVOKE it from PUBLIC'
            FROM objects, aclexplode(acl)
            WHERE object LIKE 'the table %' AND grantee = 0 GROUP BY object
        )
        SELECT quote_ident(rolname) AS role, problem FROM problems, pg_roles
        WHERE problem IS NOT NULL AND rolname = current_user AND NOT rolsuper
        """,
    ),
    Check(
        "the index {index} of {table} is invalid, because its build was interrupted or is still"
        " running: REINDEX INDEX CONCURRENTLY {index}",
        """
        SELECT indexrelid::regclass::text AS index, indrelid::regclass::text AS table
        FROM pg_index WHERE NOT indisvalid AND indrelid = ANY (:tables)
        """,
    ),
    Check(
        "the sequence {sequence} has used {percent} % of its numbers, which end at {end}",
        """
        SELECT *, trunc(last * 100 / "end") AS percent FROM (
            SELECT seqrelid::regclass::text AS sequence, least(seqmax, CASE atttypid
                    WHEN 'int2'::regtype THEN 32767 WHEN 'int4'::regtype THEN 2147483647
                    ELSE seqmax END) AS "end",
                CASE WHEN has_sequence_privilege(seqrelid, 'USAGE, SELECT')
                    THEN pg_sequence_last_value(seqrelid)::numeric END AS last
            FROM pg_sequence JOIN pg_depend ON objid = seqrelid AND deptype IN ('a', 'i')
                AND classid = 'pg_class'::regclass AND refobjid = ANY (:tables)
            JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
        ) AS sequences WHERE last * 100 / "end" >= 80
        """,
    ),
    Check(
        "the sequence {sequence} is {found}, its column {column} is {needed}:"
        " ALTER SEQUENCE {sequence} AS {needed}",
        """
        SELECT seqrelid::regclass::text AS sequence, seqtypid::regtype::text AS found,
            atttypid::regtype::text AS needed, quote_ident(attname) AS column
        FROM pg_sequence JOIN pg_depend ON objid = seqrelid AND deptype IN ('a', 'i')
            AND classid = 'pg_class'::regclass AND refobjid = ANY (:tables)
        JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
        WHERE seqtypid <> atttypid
        """,
    ),
    Check(
        "the table {table} has no statistics: ANALYZE {table}",
        # A table of few rows needs none. ANALYZE of a table without rows stores reltuples = 0,
        # which stays until the next ANALYZE.
        """
        SELECT oid::regclass::text AS table FROM pg_class
        WHERE oid = ANY (:tables) AND pg_relation_size(oid) > 80 * 1024
            AND (reltuples <> 0 OR pg_stat_get_live_tuples(oid) > 0)
            AND has_table_privilege(oid, 'SELECT') AND NOT EXISTS (
                SELECT FROM pg_stats WHERE schemaname = relnamespace::regnamespace::text
                AND tablename = relname)
        """,
    ),
)


_TABLES = sa.text(
    "SELECT oid FROM pg_class WHERE relname = ANY (:names) AND relkind IN ('r', 'p')"
    " AND pg_table_is_visible(oid)"
)
_NOT_VALID = sa.text(
    """
    SELECT conrelid::regclass::text, quote_ident(conname), CASE contype
        WHEN 'c' THEN 'NOT (' || pg_get_expr(conbin, conrelid) || ')'
        WHEN 'n' THEN (SELECT format('%I IS NULL', attname)
            FROM pg_attribute WHERE attrelid = conrelid AND attnum = conkey[1])
        WHEN 'f' THEN (SELECT format('NOT EXISTS (SELECT FROM %s AS referenced WHERE %s) AND %s',
                confrelid::regclass,
                string_agg(format('referenced.%I = referencing.%I', theirs.attname, ours.attname),
                    ' AND '),
                string_agg(format('referencing.%I IS NOT NULL', ours.attname), ' AND '))
            FROM unnest(conkey, confkey) AS keys (our_key, their_key)
            JOIN pg_attribute AS ours
                ON ours.attrelid = conrelid AND ours.attnum = our_key
            JOIN pg_attribute AS theirs
                ON theirs.attrelid = confrelid AND theirs.attnum = their_key)
        END
    FROM pg_constraint WHERE NOT convalidated AND contype IN ('c', 'n', 'f')
        AND conrelid = ANY (:tables)
    """
)


def findings(session: Session) -> Iterator[str]:
    """Yield one line per finding. Raises `DBAPIError` if the database fails.

    The session must be in autocommit: a refused query must not end a transaction.
    """
    try:
        revisions.check_database(session.connection())
    except WrongDatabase as error:
        yield str(error)
        return
    wrong_revision = list(_reported(_check_revision(session)))
    yield from wrong_revision
    if not wrong_revision:  # Otherwise each change between the two revisions would be a finding.
        yield from _reported(_check_drift(session))
    yield from _reported(_check_foreign_keys(session))
    if session.get_bind().dialect.name == "sqlite":
        yield from _check_rows_on_sqlite(session)
        return
    names = {"names": list(SQLModel.metadata.tables)}
    tables = {"tables": session.connection().scalars(_TABLES, names).all()}
    for check in _CHECKS:
        yield from _reported(_run(session, check, tables))
    yield from _reported(_check_not_valid(session, tables))


def _reported(lines: Iterator[str]) -> Iterator[str]:
    """Add the error of a query to the findings, if the role may not run it, or not for so long."""
    try:
        yield from lines
    except DBAPIError as error:
        if sqlstate(error.orig) not in drift.NOT_CHECKED:
            raise
        yield f"not checked: {str(error.orig).splitlines()[0]}"


def _run(session: Session, check: Check, tables: dict[str, Any]) -> Iterator[str]:
    for row in session.connection().execute(sa.text(check.query), tables):
        yield check.message.format(**row._mapping)


def _check_revision(session: Session) -> Iterator[str]:
    code = revisions.Revisions.of_the_code()
    try:
        code.check(session)
    except SchemaBehind as error:
        yield f"the schema is behind, run alembic upgrade head: {error}"
        return
    except DBAPIError as error:
        if sqlstate(error.orig) != _UNDEFINED_TABLE:
            raise
        yield "the schema has no revision, run alembic upgrade head"
        return
    if unknown := revisions.current(session) - code.known:
        found = ", ".join(sorted(unknown))
        yield f"the database is at {found}, which this code does not know: use the newer release"


def _check_drift(session: Session) -> Iterator[str]:
    for model in SQLModel.metadata.tables.values():
        if (table := drift.reflect(session, model)) is None:
            yield f"the table {model.name} is missing"
        else:
            yield from drift.differences(session, model, table)


def _check_foreign_keys(session: Session) -> Iterator[str]:
    for model in SQLModel.metadata.tables.values():
        if (table := drift.reflect(session, model)) is None:
            continue
        for key in table.foreign_key_constraints:
            columns = list(key.columns)
            unique = (sa.PrimaryKeyConstraint, sa.UniqueConstraint)
            keys = (each for each in table.constraints if isinstance(each, unique))
            whole = (each for each in table.indexes if not is_partial(each))
            indexes = (list(each.columns) for each in (*keys, *whole))
            if not any(set(index[: len(columns)]) == set(columns) for index in indexes):
                names = ", ".join(key.column_keys)
                yield f"{table.name}: the foreign key on ({names}) has no index"


def _check_not_valid(session: Session, tables: dict[str, Any]) -> Iterator[str]:
    for table, name, violated in session.connection().execute(_NOT_VALID, tables).all():
        count = f"SELECT count(*) FROM {table} AS referencing WHERE {violated}"  # noqa: S608
        rows = session.connection().exec_driver_sql(count, execution_options=drift.LITERALLY)
        yield (
            f"the constraint {name} of {table} is NOT VALID, {rows.scalar_one()} rows violate it:"
            f" correct them, then ALTER TABLE {table} VALIDATE CONSTRAINT {name}"
        )


def _check_rows_on_sqlite(session: Session) -> Iterator[str]:
    """SQLite keeps rows that violate a constraint, as PostgreSQL does with NOT VALID."""
    problems = Counter(session.connection().scalars(sa.text("PRAGMA integrity_check")))
    yield from (f"{each} ({count} times)" for each, count in problems.items() if each != "ok")
    for table, row, parent, _ in session.connection().execute(sa.text("PRAGMA foreign_key_check")):
        yield f"{table}: the row {row} refers to a row of {parent} that does not exist"
