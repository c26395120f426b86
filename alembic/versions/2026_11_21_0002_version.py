"""The number of writes of a row

With a default in the database, which PostgreSQL does not write into the old rows, and which the
release before, not knowing the column, relies on.

Revision ID: 0002
Revises: 0001
Create Date: 2026-11-21 11:00:00+00:00
"""

import sqlalchemy as sa

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("hero", sa.Column("version", sa.Integer(), server_default="1", nullable=False))


def downgrade() -> None:
    # By SQLite itself and not in batch mode, which would make the table anew.
    op.drop_column("hero", "version")
