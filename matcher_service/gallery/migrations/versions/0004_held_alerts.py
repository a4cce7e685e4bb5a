"""Alerts and details of the audit that a legal hold keeps beyond their time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column(
        "audit_record",
        sa.Column("held", NAME, comment="the legal hold that has kept the detail beyond its time; NULL: none"),
    )
    op.add_column(
        "alert", sa.Column("held", NAME, comment="the legal hold that has kept it beyond its time; NULL: none")
    )
