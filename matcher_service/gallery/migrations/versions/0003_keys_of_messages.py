"""One idempotency key for many references that were enrolled together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "enrolment_key",
        sa.Column("rows", sa.BigInteger(), comment="of how many entries from `sequence` on; NULL: of that one"),
    )
