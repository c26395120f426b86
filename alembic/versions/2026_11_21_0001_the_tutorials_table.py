"""The tutorial's table

The same table that `SQLModel.metadata.create_all` makes of the tutorial's models. A database made
by it is adopted with its rows. A database with a different table `hero` is refused and not changed.

Revision ID: 0001
Revises:
Create Date: 2026-11-21 10:00:00+00:00
"""

import sqlalchemy as sa
from alembic import context, op
from alembic.util import CommandError

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


COLUMNS = {
    "name": "VARCHAR NOT NULL",
    "age": "INTEGER",
    "id": "INTEGER NOT NULL",
    "secret_name": "VARCHAR NOT NULL",
}

DEPENDANTS = sa.text(
    """
    SELECT pg_describe_object(classid, objid, objsubid) || ' depends on id'
    FROM pg_depend
    JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
    WHERE refclassid = 'pg_class'::regclass AND refobjid = to_regclass('hero') AND attname = 'id'
      AND classid <> 'pg_attrdef'::regclass
      AND NOT (classid = 'pg_class'::regclass AND objid = to_regclass('hero_id_seq'))
      AND NOT (classid = 'pg_constraint'::regclass
               AND objid IN (SELECT oid FROM pg_constraint
                             WHERE conrelid = to_regclass('hero') AND contype IN ('p', 'n')))
    """
)


def refuse_other_table() -> None:
    """Raise `CommandError` if there is a table `hero` that is not the tutorial's."""
    inspector = sa.inspect(op.get_bind())
    if not inspector.has_table("hero"):
        return
    found = {
        column["name"]: f"{column['type']}{'' if column['nullable'] else ' NOT NULL'}"
        for column in inspector.get_columns("hero")
    }
    differences = [
        f"{name} is {found.get(name, 'missing')}, not {COLUMNS.get(name, 'expected')}"
        for name in sorted(COLUMNS | found)
        if found.get(name) != COLUMNS.get(name)
    ]
    key = inspector.get_pk_constraint("hero")["constrained_columns"]
    if key != ["id"]:
        differences.append(f"the primary key is ({', '.join(key)}), not (id)")
    if op.get_context().dialect.name == "postgresql":
        # Later revisions replace the column `id`. Other objects that depend on it would be lost, or
        # would stop those revisions.
        serial = op.get_bind().scalar(sa.text("SELECT pg_get_serial_sequence('hero', 'id')"))
        if serial is None or not serial.endswith("hero_id_seq"):
            differences.append("id does not use the sequence hero_id_seq")
        differences += op.get_bind().scalars(DEPENDANTS).all()
    if differences:
        raise CommandError(f"The table hero is not the tutorial's: {'; '.join(differences)}")


def upgrade() -> None:
    if not context.is_offline_mode():
        refuse_other_table()
    op.create_table(
        "hero",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("age", sa.Integer(), nullable=True),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("secret_name", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("hero_pkey")),
        if_not_exists=True,
    )
    op.create_index(op.f("ix_hero_age"), "hero", ["age"], if_not_exists=True)
    op.create_index(op.f("ix_hero_name"), "hero", ["name"], if_not_exists=True)


def downgrade() -> None:
    op.drop_table("hero")
