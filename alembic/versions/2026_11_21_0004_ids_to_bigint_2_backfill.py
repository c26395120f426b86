"""Ids to bigint, 2 of 3: the old rows, and the index and constraint of the primary key

Not all statements can share one transaction, so each can be run again.

Revision ID: 0004
Revises: 0003
Create Date: 2026-11-21 11:00:00+00:00
"""

from alembic import op

from app.db.migrations import add_checks, backfill, create_index, drop_index

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name != "postgresql":
        return
    backfill("hero", "id_bigint = id", "id_bigint IS NULL", key="id")
    create_index("hero_id_bigint", "hero", ["id_bigint"], unique=True)
    # Stands in for NOT NULL, which would scan the table under an exclusive lock.
    add_checks("hero", {"hero_id_bigint_check": "id_bigint IS NOT NULL"})


def downgrade() -> None:
    if op.get_context().dialect.name != "postgresql":
        return
    op.execute("ALTER TABLE hero DROP CONSTRAINT IF EXISTS hero_id_bigint_check")
    drop_index("hero_id_bigint", "hero")
