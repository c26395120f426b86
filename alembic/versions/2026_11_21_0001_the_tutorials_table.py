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

# Later revisions replace the column `id`, so other objects that depend on it would be lost or would
# stop them half-way. They also need the ownership, and the names of their own objects.
DIFFERENCES = sa.text(
    """
    WITH hero AS (SELECT * FROM pg_class WHERE oid = to_regclass('hero')),
        id AS (SELECT * FROM pg_attribute WHERE attrelid = (SELECT oid FROM hero) AND attnum > 0)
    SELECT 'it is not an ordinary table' FROM hero WHERE relkind <> 'r'
    UNION ALL SELECT 'its owner is ' || pg_get_userbyid(relowner)
        FROM hero WHERE NOT pg_has_role(relowner, 'USAGE')
    UNION ALL SELECT 'it has row level security' FROM hero WHERE relrowsecurity
    UNION ALL SELECT 'it is part of an inheritance' FROM hero
        WHERE EXISTS (SELECT FROM pg_inherits WHERE hero.oid IN (inhrelid, inhparent))
    UNION ALL SELECT 'it has the trigger ' || tgname
        FROM hero JOIN pg_trigger ON tgrelid = hero.oid WHERE NOT tgisinternal
    UNION ALL SELECT 'it has the rule ' || rulename FROM hero JOIN pg_rewrite ON ev_class = hero.oid
    UNION ALL SELECT attname || ' is an identity or a generated column'
        FROM id WHERE attidentity <> '' OR attgenerated <> ''
    UNION ALL SELECT 'id has privileges of its own' FROM id WHERE attname = 'id' AND attacl <> '{}'
    UNION ALL SELECT 'id does not use the sequence hero_id_seq' FROM hero
        WHERE coalesce(pg_get_serial_sequence(oid::regclass::text, 'id'), '')
            NOT LIKE '%.hero_id_seq'
    UNION ALL SELECT 'it has the constraint ' || conname
        FROM hero JOIN pg_constraint ON conrelid = hero.oid
        WHERE (contype = 'p') <> (conname = 'hero_pkey') OR conname LIKE ANY (
            ARRAY['hero_%length_check', 'hero_age_not_negative_check', 'hero_id_bigint_check'])
    UNION ALL SELECT pg_describe_object(classid, objid, objsubid) || ' depends on id'
        FROM pg_depend JOIN id ON attrelid = refobjid AND attnum = refobjsubid
        WHERE refclassid = 'pg_class'::regclass AND attname = 'id'
            AND classid <> 'pg_attrdef'::regclass
            AND NOT (classid = 'pg_class'::regclass AND objid = to_regclass('hero_id_seq'))
            AND NOT (classid = 'pg_constraint'::regclass
                AND objid IN (SELECT oid FROM pg_constraint
                              WHERE conrelid = refobjid AND contype IN ('p', 'n')))
    UNION ALL SELECT name || ' exists already'
        FROM unnest(ARRAY['idempotency_key', 'ix_hero_name_id', 'ix_hero_age_id', 'hero_id_bigint'])
            AS name
        WHERE to_regclass(name) IS NOT NULL OR to_regproc(name) IS NOT NULL
    """
)
SQLITE_DIFFERENCES = sa.text(
    """
    SELECT 'it has the trigger ' || name FROM sqlite_master
    WHERE type = 'trigger' AND tbl_name = 'hero'
    UNION ALL SELECT name || ' exists already' FROM sqlite_master
    WHERE name IN ('idempotency_key', 'ix_hero_name_id', 'ix_hero_age_id')
    """
)


def refuse_other_table() -> None:
    """Raise `CommandError` if there is a table `hero` that is not the tutorial's.

    Also if there are other objects with the names of later revisions.
    """
    inspector = sa.inspect(op.get_bind())
    differences = []
    if inspector.has_table("hero"):
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
    on_sqlite = op.get_context().dialect.name == "sqlite"
    if on_sqlite or not differences:
        query = SQLITE_DIFFERENCES if on_sqlite else DIFFERENCES
        differences += op.get_bind().scalars(query).all()
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
