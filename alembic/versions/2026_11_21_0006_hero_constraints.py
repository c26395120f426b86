"""The API's limits as constraints

The tutorial's API accepted any text and any number. Old rows that violate a limit are kept and
logged. On PostgreSQL the constraint then stays NOT VALID. Correct the rows, then run
ALTER TABLE hero VALIDATE CONSTRAINT ...

Revision ID: 0006
Revises: 0005
Create Date: 2026-11-21 11:00:00+00:00
"""

from alembic import op

from app.db.migrations import add_checks

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

CHECKS = {
    "hero_name_length_check": "length(name) BETWEEN 1 AND 200",
    "hero_secret_name_length_check": "length(secret_name) BETWEEN 1 AND 200",
    "hero_age_not_negative_check": "age >= 0",
}


def upgrade() -> None:
    add_checks("hero", CHECKS)


def downgrade() -> None:
    with op.batch_alter_table("hero") as batch:
        for name in CHECKS:
            batch.drop_constraint(op.f(name), type_="check")
