"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "entry",
        sa.Column("sequence", SEQUENCE, autoincrement=False, nullable=False),
        sa.Column("kind", sa.Integer(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("gallery_id", NAME, nullable=False),
        sa.Column("reference_id", NAME, nullable=False),
        sa.Column("subject_id", NAME, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), comment="the sealed template of an ENROL; NULL once erased"),
        sa.Column("record", sa.LargeBinary(), comment="JSON of a catalogue entry"),
        sa.Column("attributes", sa.LargeBinary(), comment="JSON beside the entry, such as the reason of a withdrawal"),
        sa.PrimaryKeyConstraint("sequence", name="pk_entry"),
    )
    op.create_index(
        "ix_entry_catalogue",
        "entry",
        ["sequence"],
        sqlite_where=sa.text("kind >= 3"),
        postgresql_where=sa.text("kind >= 3"),
    )
    op.create_table(
        "live",
        sa.Column("gallery_id", NAME, nullable=False),
        sa.Column("reference_id", NAME, nullable=False),
        sa.Column("subject_id", NAME, nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("enrolled_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("gallery_id", "reference_id", name="pk_live"),
        sqlite_with_rowid=False,
        comment="the references that a search may return",
    )
    op.create_index("ix_live_subject_id", "live", ["subject_id"])
    op.create_index("ix_live_expires_at_ms", "live", ["expires_at_ms"])
    op.create_table(
        "erasure",
        sa.Column("sequence", SEQUENCE, autoincrement=False, nullable=False),
        sa.Column("due_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("held", sa.LargeBinary(), comment="JSON of the legal hold that pauses this erasure; NULL: none"),
        sa.PrimaryKeyConstraint("sequence", name="pk_erasure"),
        comment="entries whose template waits to be erased; those done are taken out",
    )
    op.create_table(
        "enrolment_key",
        sa.Column("gallery_id", NAME, nullable=False),
        sa.Column("idempotency_key", NAME, nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("gallery_id", "idempotency_key", name="pk_enrolment_key"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_enrolment_key_at_ms", "enrolment_key", ["at_ms"])
    op.create_table(
        "audit_record",
        sa.Column("position", SEQUENCE, autoincrement=False, nullable=False),
        sa.Column("chained", sa.LargeBinary(), nullable=False, comment="canonical JSON of the record and its hash"),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column(
            "sealed", sa.LargeBinary(), comment="salt and detail, sealed; NULL if there is none or it was erased"
        ),
        sa.Column("erase_at_ms", sa.BigInteger(), comment="when salt and detail are to be erased; NULL: with the log"),
        sa.PrimaryKeyConstraint("position", name="pk_audit_record"),
    )
    op.create_index("ix_audit_record_erase_at_ms", "audit_record", ["erase_at_ms"])
    op.create_table(
        "alert",
        sa.Column("position", SEQUENCE, autoincrement=False, nullable=False),
        sa.Column("alert_id", NAME, nullable=False),
        sa.Column("deployment_id", NAME, nullable=False),
        sa.Column("raised_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("erase_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("attributes", sa.LargeBinary(), comment="JSON beside the alert, such as its adjudication"),
        sa.PrimaryKeyConstraint("position", name="pk_alert"),
    )
    op.create_index("ix_alert_alert_id", "alert", ["alert_id"], unique=True)
    op.create_index("ix_alert_deployment_id_position", "alert", ["deployment_id", "position"])
    op.create_index("ix_alert_erase_at_ms", "alert", ["erase_at_ms"])
