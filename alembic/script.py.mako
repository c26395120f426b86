"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
Create Date: ${create_date}
"""

# The previous release is serving while this runs: see docs/migrations.md. A statement waits 500 ms
# for its lock. Then the whole revision is tried again.

import sqlalchemy as sa
import sqlmodel
from alembic import op

from app.db.migrations import (
    add_check,
    add_foreign_key,
    add_unique,
    backfill,
    create_index,
    drop_constraint,
    drop_index,
    drop_not_null,
    set_not_null,
)
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
