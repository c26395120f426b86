"""The safe form of each operation that `alembic revision --autogenerate` writes.

Alembic finds the differences between models and database. This module refuses those without a safe
form. It divides the others into revisions that are one transaction and revisions of helpers, which
can be run again. SQLite and PostgreSQL give the same revision.
"""

import re
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate import renderers
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.rewriter import Rewriter
from alembic.ddl.impl import ComparisonResult
from alembic.ddl.postgresql import PostgresqlImpl
from alembic.ddl.sqlite import SQLiteImpl
from alembic.operations import ops
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy.exc import ProgrammingError

from app.db.drift import LITERALLY
from app.db.engine import sqlstate

_INSUFFICIENT_PRIVILEGE = "42501"
_UNDEFINED_COLUMN = "42703"

# With Alembic's own comparison of CHECK constraints, which compares names. See below.
PLUGINS = ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname"]

# In a revision's message: the reason why an operation is safe that would be refused.
SAFE = re.compile(r"# safe: \S")

# PostgreSQL computes such a default once, so it does not rewrite the table for it.
_CONSTANT = re.compile(
    r"(-?[\d.]+|'[^']*'(::[\w ]+)?|true|false|now\(\)|current_timestamp|current_date)",
    re.IGNORECASE,
)


def process(context: MigrationContext, revision: Any, scripts: list[ops.MigrationScript]) -> None:
    """Replace the generated script by scripts with the safe operations.

    Raises `CommandError` if an operation has no safe form and the message of the revision does not
    give a reason.
    """
    [script] = scripts
    assert script.upgrade_ops  # noqa: S101
    operations = list(_flat(script.upgrade_ops.ops))
    refused = [reason for operation in operations if (reason := _refusal(operation))]
    if refused and not SAFE.search(script.message or ""):
        raise CommandError(
            f"No safe form: {'; '.join(refused)}. docs/migrations.md has the recipes. If it is safe"
            ' here, give the reason: -m "... # safe: reason"'
        )
    parts = [part for part in _divide(operations) if part] or [[]]
    scripts[:] = [_script(script, part, n, len(parts)) for n, part in enumerate(parts, start=1)]
    for each in scripts:
        assert each.upgrade_ops  # noqa: S101
        if all(_has_helper(operation) for operation in each.upgrade_ops.ops):
            helpers(context, revision, [each])
        else:
            for directives in (each.upgrade_ops, each.downgrade_ops):
                assert directives  # noqa: S101
                directives.ops[:] = [_in_batch(operation) for operation in directives.ops]


def _flat(operations: Iterable[ops.MigrateOperation]) -> Iterable[ops.MigrateOperation]:
    """Return the operations without their grouping by table. NOT NULL becomes one of its own."""
    for operation in operations:
        if isinstance(operation, ops.ModifyTableOps):
            yield from _flat(operation.ops)
        elif isinstance(operation, ops.AlterColumnOp) and operation.modify_nullable is not None:
            yield ops.AlterColumnOp(
                operation.table_name,
                operation.column_name,
                existing_nullable=operation.existing_nullable,
                modify_nullable=operation.modify_nullable,
            )
            operation.modify_nullable = None
            if operation.has_changes():
                yield operation
        else:
            yield operation


def _has_helper(operation: ops.MigrateOperation) -> bool:
    if isinstance(operation, ops.AlterColumnOp):
        return operation.modify_nullable is not None
    return isinstance(
        operation,
        ops.CreateIndexOp | ops.DropIndexOp | ops.AddConstraintOp | ops.DropConstraintOp,
    )


def _divide(operations: list[ops.MigrateOperation]) -> list[list[ops.MigrateOperation]]:
    """Return the operations in three parts: a transaction, then helpers, then a transaction.

    New tables and columns come first, drops last. An index of a new table is part of its creation.
    """
    first: list[ops.MigrateOperation] = []
    helped: list[ops.MigrateOperation] = []
    drops: list[ops.MigrateOperation] = []
    created = {each.table_name for each in operations if isinstance(each, ops.CreateTableOp)}
    for operation in operations:
        table = getattr(operation, "table_name", None) or getattr(operation, "source_table", None)
        if isinstance(operation, ops.DropColumnOp):
            drops.append(operation)
        elif _has_helper(operation) and table not in created:
            helped.append(operation)
        else:
            first.append(operation)
    return [first, helped, drops]


def _script(
    script: ops.MigrationScript, part: list[ops.MigrateOperation], number: int, count: int
) -> ops.MigrationScript:
    """Return the script for a part of the operations. env.py sets the number and the head."""
    upgrade = ops.UpgradeOps(part)
    return ops.MigrationScript(
        script.rev_id,
        upgrade,
        upgrade.reverse(),
        message=f"{script.message}, {number} of {count}" if count > 1 else script.message,
        head=script.head,
        splice=script.splice if number == 1 else False,
        branch_label=script.branch_label if number == 1 else None,
        version_path=script.version_path,
        depends_on=script.depends_on if number == 1 else None,
    )


def _in_batch(operation: ops.MigrateOperation) -> ops.MigrateOperation:
    """Make a change in batch mode, without which SQLite cannot: it rebuilds the table."""
    if isinstance(operation, ops.AddColumnOp):
        default = operation.column.server_default
        is_constant = default is None or isinstance(getattr(default, "arg", None), str)
        return operation if is_constant else ops.ModifyTableOps(operation.table_name, [operation])
    if not isinstance(operation, ops.AlterColumnOp):
        return operation
    operation.existing_type = operation.existing_nullable = operation.existing_comment = None
    operation.existing_server_default = False
    return ops.ModifyTableOps(operation.table_name, [operation])


# Operations without a safe form.


def _refusal(operation: ops.MigrateOperation) -> str | None:
    """Return why an operation is refused, with the name of the recipe; None if it is not."""
    match operation:
        case ops.CreateTableOp(schema=str()):
            name = f"{operation.schema}.{operation.table_name}"
            return f"the table {name} has a schema, which the helpers and later comparisons ignore"
        case ops.CreateTableOp():
            refused = (_native_enum(operation.table_name, each) for each in operation.columns)
            return next(filter(None, refused), None)
        case ops.AddColumnOp():
            return _column_refusal(operation.table_name, operation.column)
        case ops.DropColumnOp():
            return (
                f'dropping {operation.table_name}.{operation.column_name} (see "Drop a column",'
                ' or "Rename a column")'
            )
        case ops.AlterColumnOp(modify_type=new) if new is not None:
            if not _is_wider(operation.existing_type, new):
                name = f"{operation.table_name}.{operation.column_name}"
                return f'changing the type of {name} to {new!r} (see "Change a type")'
        case ops.CreateUniqueConstraintOp() if operation.kw:
            return f"{operation.constraint_name} with options, which add_unique does not have"
    return None


def _column_refusal(table: str, column: sa.Column[Any]) -> str | None:
    if refused := _native_enum(table, column):
        return refused
    name, default = f"{table}.{column.name}", column.server_default
    if isinstance(default, sa.Computed | sa.Identity):
        return f'{name} is computed by the database, which rewrites the table (see "Change a type")'
    if isinstance(default, sa.DefaultClause):
        if isinstance(default.arg, str) or _CONSTANT.fullmatch(str(default.arg).strip()):
            return None
        return f'{name} has the default {default.arg}, which may rewrite the table (see "Backfill")'
    if not column.nullable and default is None:
        return f'{name} is NOT NULL without a server default (see "Add a column")'
    if getattr(column.type, "create_constraint", False):
        return f'{name} has a type with a constraint (see "Enum")'
    return None


def _native_enum(table: str, column: Any) -> str | None:
    if isinstance(getattr(column, "type", None), sa.Enum) and column.type.native_enum:
        return f'{table}.{column.name} is a native enum (see "Enum")'
    return None


def _is_wider(old: Any, new: Any) -> bool:
    """Return whether PostgreSQL changes the type in its catalogue only: text that may be longer."""
    if not (_is_text(old) and _is_text(new)):
        return False
    # A column of another collation has its indexes built again.
    is_longer = new.length is None or (old.length is not None and old.length <= new.length)
    return is_longer and old.collation == new.collation


def _is_text(type_: Any) -> bool:
    # SQLModel's type for text wraps that of SQLAlchemy. CHAR stores spaces up to its length.
    type_ = getattr(type_, "impl_instance", type_)
    return isinstance(type_, sa.String) and not isinstance(type_, sa.Enum | sa.CHAR)


def compare_type(_: Any, __: Any, ___: Any, found: Any, expected: Any) -> bool | None:
    """Compare the lengths of text. Alembic ignores a length that is missing on one side."""
    if _is_text(found) and _is_text(expected) and found.length != expected.length:
        return True
    return None


# Operations with a helper. The functions serve both directions, upgrade and downgrade.

helpers = Rewriter()


class Call(ops.MigrateOperation):
    """A call of a helper of app/db/migrations.py."""

    def __init__(self, helper: str, *arguments: object, **options: object) -> None:
        """Keep the values of the arguments, for the code of the revision."""
        named = [f"{name}={_code(value)}" for name, value in options.items()]
        self.code = f"{helper}({', '.join([*map(_code, arguments), *named])})"


@renderers.dispatch_for(Call)
def _render(_: AutogenContext, call: Call) -> str:
    return call.code


def _code(value: object) -> str:
    """Return the Python code of an argument: names as text, SQL expressions in `sa.text`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_code, value))}]"
    if isinstance(value, sa.Column):
        return repr(str(value.name))
    if isinstance(value, sa.ClauseElement):
        # A colon would begin a parameter.
        return f"sa.text({_PARAMETER.sub(_ESCAPED, _sql(value))!r})"
    return repr(str(value) if isinstance(value, str) else value)


_PARAMETER = sa.TextClause._bind_params_regex
_ESCAPED = r"\\:\1"


def _sql(expression: Any) -> str:
    if isinstance(expression, sa.TextClause):
        return expression.text.replace(r"\:", ":")
    options = {"literal_binds": True, "include_table": False}
    return str(expression.compile(compile_kwargs=options))


@helpers.rewrites(ops.CreateIndexOp)
def _create_index(_: MigrationContext, __: Any, operation: ops.CreateIndexOp) -> Call:
    index = operation.to_index()
    unique = {"unique": True} if index.unique else {}
    columns = list(index.expressions)
    return Call(
        "create_index", index.name, operation.table_name, columns, **unique, **index.dialect_kwargs
    )


@helpers.rewrites(ops.DropIndexOp)
def _drop_index(_: MigrationContext, __: Any, operation: ops.DropIndexOp) -> Call:
    return Call("drop_index", operation.index_name, operation.table_name)


@helpers.rewrites(ops.CreateCheckConstraintOp)
def _add_check(_: MigrationContext, __: Any, operation: ops.CreateCheckConstraintOp) -> Call:
    condition = _sql(operation.to_constraint().sqltext)
    return Call("add_check", operation.constraint_name, operation.table_name, condition)


@helpers.rewrites(ops.CreateForeignKeyOp)
def _add_foreign_key(_: MigrationContext, __: Any, operation: ops.CreateForeignKeyOp) -> Call:
    return Call(
        "add_foreign_key",
        operation.constraint_name,
        operation.source_table,
        operation.local_cols,
        operation.referent_table,
        operation.remote_cols,
        **{
            name: operation.kw[name]
            for name in ("ondelete", "onupdate", "deferrable", "initially", "match")
            if operation.kw.get(name) is not None
        },
    )


@helpers.rewrites(ops.CreateUniqueConstraintOp)
def _add_unique(_: MigrationContext, __: Any, operation: ops.CreateUniqueConstraintOp) -> Call:
    return Call("add_unique", operation.constraint_name, operation.table_name, operation.columns)


@helpers.rewrites(ops.DropConstraintOp)
def _drop_constraint(_: MigrationContext, __: Any, operation: ops.DropConstraintOp) -> Call:
    kind = operation.constraint_type
    return Call("drop_constraint", operation.constraint_name, operation.table_name, type_=kind)


@helpers.rewrites(ops.AlterColumnOp)
def _not_null(_: MigrationContext, __: Any, operation: ops.AlterColumnOp) -> Call:
    helper = "drop_not_null" if operation.modify_nullable else "set_not_null"
    return Call(helper, operation.table_name, operation.column_name)


# The comparison of CHECK constraints. Alembic compares names only. It uses the newest class for a
# dialect.


class _Postgresql(PostgresqlImpl):
    __dialect__ = "postgresql"

    def compare_check_constraint(
        self, metadata_constraint: sa.CheckConstraint, reflected_constraint: sa.CheckConstraint
    ) -> ComparisonResult:
        """Compare the conditions as PostgreSQL writes them, in which BETWEEN is two comparisons.

        A temporary table, which is rolled back, has PostgreSQL write the condition of the models.
        """
        connection = self.connection
        assert connection  # noqa: S101
        assert reflected_constraint.table is not None  # noqa: S101
        if connection.scalar(sa.text("SHOW transaction_read_only")) == "on":
            return ComparisonResult.Skip("the database is read-only")
        table = self.dialect.identifier_preparer.format_table(reflected_constraint.table)
        condition = _sql(metadata_constraint.sqltext)
        savepoint = connection.begin_nested()
        try:
            for statement in (
                f"CREATE TEMPORARY TABLE compared (LIKE {table})",
                f"ALTER TABLE compared ADD CONSTRAINT compared CHECK ({condition})",
            ):
                connection.execute(sa.text(statement.replace(":", r"\:")))
            expected = connection.scalar(_CONDITION, {"table": "compared", "name": "compared"})
        except ProgrammingError as error:
            if sqlstate(error.orig) == _INSUFFICIENT_PRIVILEGE:
                return ComparisonResult.Skip("the role may not create temporary tables")
            if sqlstate(error.orig) != _UNDEFINED_COLUMN:
                raise
            # The models' condition names a column that the database does not have yet.
            return ComparisonResult.Different(str(error.orig))
        finally:
            savepoint.rollback()
        named = {"table": table, "name": reflected_constraint.name}
        found = connection.scalar(_CONDITION, named)
        return _compared(found, expected)

    def compare_server_default(
        self, inspector_column: Any, metadata_column: Any, expected: Any, found: Any
    ) -> bool:
        """Compare the defaults as PostgreSQL writes them. Alembic has it compare their values.

        That fails for quotes in a text, and for types that have no =, such as json.
        """
        if expected is None or found is None or found.startswith("nextval("):
            different: bool = super().compare_server_default(  # type: ignore[no-untyped-call]
                inspector_column, metadata_column, expected, found
            )
            return different
        type_ = inspector_column.type.compile(self.dialect)
        default = _default_of(self.dialect, metadata_column)
        return self._printed(f"CAST({default} AS {type_})") != self._printed(
            f"CAST({found} AS {type_})"
        )

    def _printed(self, expression: str) -> str:
        """Return the expression as PostgreSQL plans it. The statement does not run."""
        assert self.connection  # noqa: S101
        explain = f"EXPLAIN (VERBOSE, FORMAT JSON) SELECT {expression}"
        result = self.connection.exec_driver_sql(explain, execution_options=LITERALLY)
        return str(result.scalar_one()[0]["Plan"]["Output"])


class _SQLite(SQLiteImpl):
    __dialect__ = "sqlite"

    def compare_check_constraint(
        self, metadata_constraint: sa.CheckConstraint, reflected_constraint: sa.CheckConstraint
    ) -> ComparisonResult:
        """Compare the conditions as text, which SQLite stores."""
        found, expected = (
            " ".join(_sql(constraint.sqltext).split())
            for constraint in (reflected_constraint, metadata_constraint)
        )
        return _compared(found, expected)

    def compare_server_default(
        self, inspector_column: Any, metadata_column: Any, expected: Any, found: Any
    ) -> bool:
        """Compare as Alembic does, which would not recognize an empty text, quotes or lines."""
        if found and re.sub(r"^\((.*)\)$", r"\1", found, flags=re.DOTALL) == _default_of(
            self.dialect, metadata_column
        ):
            return False
        return super().compare_server_default(inspector_column, metadata_column, expected, found)


def _default_of(dialect: Any, column: sa.Column[Any]) -> str | None:
    """Return the default of a column of the models in SQL."""
    default = dialect.ddl_compiler(dialect, None).get_column_default_string(column)
    # SQLAlchemy doubles each %, for the driver.
    return default and str(default).replace("%%", "%")


_CONDITION = sa.text(
    "SELECT pg_get_expr(conbin, conrelid) FROM pg_constraint"
    " WHERE conrelid = to_regclass(:table) AND conname = :name"
)


def _compared(found: str, expected: str) -> ComparisonResult:
    if found == expected:
        return ComparisonResult.Equal()
    return ComparisonResult.Different(f"{found} to {expected}")
