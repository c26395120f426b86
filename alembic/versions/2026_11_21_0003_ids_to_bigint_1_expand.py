"""Ids to bigint, 1 of 3: a second column with the values of the first

ALTER COLUMN ... TYPE would rewrite the whole table under a lock that blocks even reads. SQLite's
ids already have 64 bits.

Revision ID: 0003
Revises: 0002
Create Date: 2026-11-21 11:00:00+00:00
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name != "postgresql":
        return
    op.execute("ALTER TABLE hero ADD COLUMN id_bigint bigint")
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


def downgrade() -> None:
    if op.get_context().dialect.name != "postgresql":
        return
    op.execute("DROP TRIGGER hero_id_bigint ON hero")
    op.execute("DROP FUNCTION hero_id_bigint()")
    op.execute("ALTER TABLE hero DROP COLUMN id_bigint")
