"""Generations of the keys of galleries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

NAME = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "data_key",
        sa.Column("gallery_id", NAME, nullable=False),
        sa.Column(
            "generation", sa.Integer(), nullable=False, comment="what is sealed from now on is sealed under this"
        ),
        sa.Column("rotated_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("resealed_to", sa.BigInteger(), comment="entries up to here are under it; NULL: all of them are"),
        sa.Column("resealed", sa.BigInteger(), nullable=False, comment="how many templates were sealed anew"),
        sa.Column("resealed_at_ms", sa.BigInteger()),
        sa.Column(
            "retire_at_ms", sa.BigInteger(), nullable=False, comment="the generations before are not destroyed earlier"
        ),
        sa.Column("retired_at_ms", sa.BigInteger(), comment="when they were given up"),
        sa.PrimaryKeyConstraint("gallery_id", name="pk_data_key"),
        sqlite_with_rowid=False,
        comment="galleries whose key was rotated; of the others the first generation seals",
    )
