"""Indexes with the id, for lists in a total order

They replace the tutorial's indexes and serve the same queries.

Revision ID: 0007
Revises: 0006
Create Date: 2026-11-21 11:00:00+00:00
"""

from app.db.migrations import create_index, drop_index

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_index("ix_hero_name_id", "hero", ["name", "id"])
    create_index("ix_hero_age_id", "hero", ["age", "id"])
    drop_index("ix_hero_name", "hero")
    drop_index("ix_hero_age", "hero")


def downgrade() -> None:
    create_index("ix_hero_name", "hero", ["name"])
    create_index("ix_hero_age", "hero", ["age"])
    drop_index("ix_hero_name_id", "hero")
    drop_index("ix_hero_age_id", "hero")
