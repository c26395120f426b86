"""The tutorial's table

What `SQLModel.metadata.create_all` makes of the tutorial's models, to the letter. A database that
it has made is taken over as it is.

Revision ID: 0001
Revises:
Create Date: 2026-11-21 10:00:00+00:00
"""

import sqlalchemy as sa

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
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
