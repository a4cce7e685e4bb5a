"""Checkpoints of the audit, tallies of deployments and cases, legal holds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "audit_checkpoint",
        sa.Column("size", SEQUENCE, autoincrement=False, nullable=False, comment="how many audit records it covers"),
        sa.Column("signed", sa.LargeBinary(), nullable=False, comment="JSON of the signed checkpoint"),
        sa.Column(
            "peaks", sa.LargeBinary(), nullable=False, comment="the Merkle tree's perfect subtrees, to go on from"
        ),
        sa.PrimaryKeyConstraint("size", name="pk_audit_checkpoint"),
    )
    op.create_table(
        "tally",
        sa.Column("authority", NAME, nullable=False, comment="deployment:ID or case:REFERENCE"),
        sa.Column("name", NAME, nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("authority", "name", name="pk_tally"),
        sqlite_with_rowid=False,
        comment="counters alone: nothing in it stands for one probe",
    )
    op.create_table(
        "legal_hold",
        sa.Column("hold_id", NAME, nullable=False),
        sa.Column("gallery_id", NAME, nullable=False, comment="empty: of every gallery"),
        sa.Column("subject_id", NAME, nullable=False),
        sa.Column("review_by_ms", sa.BigInteger(), nullable=False),
        sa.Column("released_at_ms", sa.BigInteger()),
        sa.Column("sealed", sa.LargeBinary(), nullable=False, comment="who asked, who authorised, and why"),
        sa.PrimaryKeyConstraint("hold_id", name="pk_legal_hold"),
    )
    op.create_index("ix_legal_hold_subject_id", "legal_hold", ["subject_id"])
