"""Ids to bigint, 3 of 3: the second column replaces the first

One transaction changes only the catalogue, so its duration does not depend on the number of rows.

Revision ID: 0005
Revises: 0004
Create Date: 2026-11-21 11:00:00+00:00
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name != "postgresql":
        return
    op.execute("DROP TRIGGER hero_id_bigint ON hero")
    op.execute("DROP FUNCTION hero_id_bigint()")
    op.execute("ALTER SEQUENCE hero_id_seq AS bigint OWNED BY hero.id_bigint")
    op.execute("ALTER TABLE hero DROP CONSTRAINT hero_pkey")
    op.execute("ALTER TABLE hero DROP COLUMN id")
    op.execute("ALTER TABLE hero RENAME COLUMN id_bigint TO id")
    # The validated check of revision 0004 spares the scan of all rows. After the renaming, because
    # PostgreSQL 18 derives the name of the constraint from the column's.
    op.execute("ALTER TABLE hero ALTER COLUMN id SET NOT NULL")
    op.execute("ALTER TABLE hero DROP CONSTRAINT hero_id_bigint_check")
    op.execute("ALTER TABLE hero ALTER COLUMN id SET DEFAULT nextval('hero_id_seq')")
    op.execute("ALTER TABLE hero ADD CONSTRAINT hero_pkey PRIMARY KEY USING INDEX hero_id_bigint")


def downgrade() -> None:
    """Not for a table in use: it rewrites every row. It fails if an id exceeds int4."""
    if op.get_context().dialect.name != "postgresql":
        return
    op.execute("ALTER TABLE hero DROP CONSTRAINT hero_pkey")
    op.execute("ALTER TABLE hero RENAME COLUMN id TO id_bigint")
    op.execute("ALTER TABLE hero ALTER COLUMN id_bigint DROP DEFAULT")
    op.execute("ALTER TABLE hero ALTER COLUMN id_bigint DROP NOT NULL")
    op.execute("ALTER TABLE hero ADD COLUMN id integer")
    op.execute("UPDATE hero SET id = id_bigint")
    op.execute("ALTER SEQUENCE hero_id_seq AS integer OWNED BY hero.id")
    op.execute("ALTER TABLE hero ALTER COLUMN id SET DEFAULT nextval('hero_id_seq')")
    op.execute("ALTER TABLE hero ADD CONSTRAINT hero_pkey PRIMARY KEY (id)")
    op.execute("CREATE UNIQUE INDEX hero_id_bigint ON hero (id_bigint)")
    op.execute("ALTER TABLE hero ADD CONSTRAINT hero_id_bigint_check CHECK (id_bigint IS NOT NULL)")
    op.execute(
        """
        CREATE FUNCTION hero_id_bigint() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            NEW.id_bigint := NEW.id;
            RETURN NEW;
        END $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER hero_id_bigint BEFORE INSERT OR UPDATE ON hero
            FOR EACH ROW EXECUTE FUNCTION hero_id_bigint()
        """
    )
