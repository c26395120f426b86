"""The number of writes of a row

The previous release does not know the column and relies on the default in the database. PostgreSQL
does not rewrite the existing rows for it.

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
    # Without batch mode, which would rebuild the table: SQLite can drop a column itself.
    op.drop_column("hero", "version")
