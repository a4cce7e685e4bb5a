"""A receipt for each erasure, and whose templates were erased found without reading the log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "erasure_receipt",
        sa.Column("receipt_id", SEQUENCE, nullable=False, autoincrement=False),
        sa.Column("kind", NAME, nullable=False),
        sa.Column("gallery_id", NAME, nullable=False, comment="empty: of no gallery"),
        sa.Column("erased", sa.BigInteger(), nullable=False, comment="how many templates, alerts or details"),
        sa.Column(
            "sequences",
            sa.LargeBinary(),
            nullable=False,
            comment="JSON: the entries whose templates went, as closed ranges",
        ),
        sa.Column("erased_at_ms", sa.BigInteger(), nullable=False),
        sa.Column(
            "head",
            sa.BigInteger(),
            nullable=False,
            comment="the newest entry then: whatever was erased had ended by it",
        ),
        sa.Column(
            "backups_until_ms", sa.BigInteger(), nullable=False, comment="when the last backup with it is destroyed"
        ),
        sa.Column(
            "wiped_at_ms", sa.BigInteger(), comment="when database and write-ahead log held no older version of it"
        ),
        sa.Column("indexes", sa.LargeBinary(), comment="JSON: when which index held none of it any more"),
        sa.Column("complete_at_ms", sa.BigInteger()),
        sa.PrimaryKeyConstraint("receipt_id", name="pk_erasure_receipt"),
    )
    op.create_index("ix_erasure_receipt_gallery_id_receipt_id", "erasure_receipt", ["gallery_id", "receipt_id"])
    unfinished = sa.text("complete_at_ms IS NULL")
    op.create_index(
        "ix_erasure_receipt_open",
        "erasure_receipt",
        ["receipt_id"],
        sqlite_where=unfinished,
        postgresql_where=unfinished,
    )
    erased = sa.text("kind = 1 AND sealed IS NULL")
    op.create_index("ix_entry_erased", "entry", ["subject_id"], sqlite_where=erased, postgresql_where=erased)
