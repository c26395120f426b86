"""The differences between a table of the models and the same table of a database.

`alembic check` compares neither lengths of text, CHECK constraints, primary keys, collations nor
partial indexes.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, NoSuchTableError, SAWarning
from sqlmodel import Session

from app.db.engine import sqlstate

# For exec_driver_sql: a % in the statement does not begin a parameter.
LITERALLY = {"no_parameters": True}
# SQLSTATEs: insufficient privilege, lock not available, query canceled (by a timeout).
NOT_CHECKED = ("42501", "55P03", "57014")


class _Part(NamedTuple):
    """A part of a definition, and its expression if PostgreSQL may print that in another form."""

    text: str
    expression: str | None = None


_Definition = list[_Part]


def reflect(session: Session, model: sa.Table) -> sa.Table | None:
    """Return the table of the database with the name of the model, or None if it is missing."""
    options: dict[str, Any] = {"autoload_with": session.connection(), "resolve_fks": False}
    # SQLAlchemy warns of constraints that are NOT VALID, and of expressions in SQLite's indexes.
    with warnings.catch_warnings(action="ignore", category=SAWarning):
        try:
            return sa.Table(model.name, sa.MetaData(), **options)
        except NoSuchTableError:
            return None


def differences(session: Session, model: sa.Table, table: sa.Table) -> Iterator[str]:
    """Yield one line for each column, constraint or index that differs."""
    expected, found = _definitions(session, model), _definitions(session, table)
    names = expected.keys() | found.keys()
    if session.get_bind().dialect.name == "sqlite":
        # SQLAlchemy does not reflect expressions in indexes of SQLite.
        names -= {
            f"index {index.name}"
            for index in model.indexes
            if not all(isinstance(each, sa.Column) for each in index.expressions)
        }
    for name in sorted(names):
        if name not in found:
            yield f"{model.name}: the {name} is missing: {_text(expected[name])}"
        elif name not in expected:
            yield f"{model.name}: the {name} is not in the models: {_text(found[name])}"
        elif not _are_equal(session, table, expected[name], found[name]):
            is_found, is_expected = _text(found[name]), _text(expected[name])
            yield f"{model.name}: the {name} is {is_found}, the models have {is_expected}"


def _text(definition: _Definition) -> str:
    # SQLAlchemy doubles each %, for the driver.
    return " ".join(part.text for part in definition).replace("%%", "%")


def _definitions(session: Session, table: sa.Table) -> dict[str, _Definition]:
    """Return the columns, constraints and indexes by name."""
    dialect = session.get_bind().dialect
    names = dialect.identifier_preparer

    def sql(element: Any) -> str:
        clause = sa.text(element) if isinstance(element, str) else element
        options = {"literal_binds": True, "include_table": False}
        return str(clause.compile(dialect=dialect, compile_kwargs=options))

    def listed(elements: Iterable[Any]) -> str:
        return f"({', '.join(sql(element) for element in elements)})"

    definitions: dict[str, _Definition] = {}
    for column in table.columns:
        is_known = not isinstance(column.type, sa.types.NullType)
        column_type = (
            column.type.compile(dialect) if is_known else "of a type unknown to SQLAlchemy"
        )
        definition = [_Part(column_type, f"CAST(NULL AS {column_type})")]
        if not column.nullable:
            definition.append(_Part("NOT NULL"))
        default = dialect.ddl_compiler(dialect, None).get_column_default_string(column)  # type: ignore[arg-type]
        if column is table.autoincrement_column or "nextval(" in (default or ""):
            definition.append(_Part("WITH A SEQUENCE"))  # The models do not name it.
        elif default:
            definition.append(_Part(f"DEFAULT {default}", f"CAST({default} AS {column_type})"))
        definitions[f"column {column.name}"] = definition
    for constraint in table.constraints:
        # SQLite has constraints without names.
        named = constraint.name is not None
        name = f"constraint {names.format_constraint(constraint) if named else ''}".strip()
        if isinstance(constraint, sa.CheckConstraint):
            condition = sql(constraint.sqltext)
            definitions[name] = [_Part(f"CHECK ({condition})", condition)]
        elif isinstance(constraint, sa.ForeignKeyConstraint):
            referenced = ", ".join(element.target_fullname for element in constraint.elements)
            action = (constraint.ondelete or "NO ACTION").upper()
            reference = f"REFERENCES {referenced} ON DELETE {action}"
            definitions[name] = [_Part(f"FOREIGN KEY {listed(constraint.columns)} {reference}")]
        elif isinstance(constraint, sa.UniqueConstraint):
            definitions[name] = [_Part(f"UNIQUE {listed(constraint.columns)}")]
    if table.primary_key.columns:
        definitions["primary key"] = [_Part(listed(table.primary_key.columns))]
    for index in table.indexes:
        definition = [_Part("UNIQUE" if index.unique else "INDEX")]
        definition.append(_Part(elements := listed(index.expressions), elements))
        if (where := index.dialect_options[dialect.name].get("where")) is not None:
            definition.append(_Part(f"WHERE {(condition := sql(where))}", condition))
        definitions[f"index {names.format_index(index)}"] = definition
    return definitions


def _are_equal(session: Session, table: sa.Table, one: _Definition, other: _Definition) -> bool:
    def is_same(part: _Part, its: _Part) -> bool:
        if part.text == its.text or not (part.expression and its.expression):
            return part.text == its.text
        return _printed(session, table, part.expression) == _printed(session, table, its.expression)

    return len(one) == len(other) and all(map(is_same, one, other))


def _printed(session: Session, table: sa.Table, expression: str) -> str:
    """Return an expression as PostgreSQL prints it: BETWEEN becomes >= and <=.

    EXPLAIN parses the expression and prints it again. It does not read the table.
    """
    dialect = session.get_bind().dialect
    if dialect.name != "postgresql":
        return "".join(expression.split())
    name = dialect.identifier_preparer.format_table(table)
    explain = f"EXPLAIN (VERBOSE, FORMAT JSON) SELECT {expression} FROM {name}"  # noqa: S608
    try:
        result = session.connection().exec_driver_sql(explain, execution_options=LITERALLY)
        return str(result.scalar_one()[0]["Plan"]["Output"])
    except DBAPIError as error:
        if sqlstate(error.orig) in NOT_CHECKED:
            raise
        return expression
