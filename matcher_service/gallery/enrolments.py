"""Enrolments in columns: many references of one gallery judged, sealed and stored at once.

Most rows of an import are plain: their reference is held nowhere, and their idempotency key was not used. Those are
stored by a few statements for all of them. On SQLite the columns go to the database as one value each: its driver lets
go of the interpreter at every step of a statement, and has to wait for it again, so that a statement for each row
makes an import crawl while searches run. Any other row is judged alone, as `judgement` does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson
from numpy.typing import NDArray
from sqlalchemy import Connection, bindparam, insert, select

from matcher_service.errors import MatcherError
from matcher_service.gallery import judgement, seal
from matcher_service.gallery.names import NAME_BYTES_MAX, storable, storable_all
from matcher_service.gallery.schema import enrolment_key, entry, insert_many, live
from matcher_service.gallery.transaction import ENROL, Note, WriteTransaction
from matcher_service.receipts import EnrolReceipts
from matcher_service.terms import Actor, EnrolRows, EnrolRun, Gallery, Int64, WriteOutcome


def enrol(transaction: WriteTransaction, rows: EnrolRows, actor: Actor) -> EnrolReceipts:
    """Judge the rows and hand the accepted ones to the transaction, with one audit record for each kind of change.

    The refusals are those of `seams.GalleryLog.append` for an Enrol each. Plain rows come before the others in the log.
    """
    count = len(rows)
    refusals: dict[int, MatcherError] = {}
    others: dict[int, WriteOutcome] = {}
    sequences = np.zeros(count, np.int64)
    gallery = transaction.state.galleries.get(rows.gallery_id)
    expires_at_ms = np.zeros(count, np.int64)
    plain = np.zeros(0, np.int64)
    if gallery is not None and judged_in_columns(gallery, rows):
        expires_at_ms = _expiries(rows, gallery, transaction.at_ms)
        # What was accepted before must be in the tables, which are asked about these rows.
        transaction.flush()
        # Where the number of references matters, or the list may be closed, each is judged alone.
        if not gallery.size_max and gallery.watchlist is None:
            plain = _plain(transaction.connection, rows, expires_at_ms > transaction.at_ms)
    if len(plain):
        run = _stored(transaction, rows, plain, expires_at_ms)
        sequences[plain] = np.arange(run.sequence, run.last_sequence + 1)
        transaction.note_run(Note("reference.enrolled", rows.gallery_id), run.sequence, run.last_sequence)
    odd = np.setdiff1d(np.arange(count), plain, assume_unique=True).tolist()
    for row, answer in zip(odd, judgement.judge(transaction, [rows.row(row) for row in odd]), strict=True):
        if isinstance(answer, MatcherError):
            refusals[row] = answer
            continue
        sequences[row] = answer.sequence
        if answer.outcome is not WriteOutcome.ENROLLED:
            others[row] = answer.outcome
    transaction.write_notes(actor)
    return EnrolReceipts(sequences, refusals, others)


def judged_in_columns(gallery: Gallery, rows: EnrolRows) -> bool:
    """Whether the rules of the gallery are those that are judged here; if not, every row is judged alone."""
    return rows.templates.shape == (len(rows), gallery.space.dimension)


def _expiries(rows: EnrolRows, gallery: Gallery, at_ms: int) -> Int64:
    """When each row expires: as asked for, but never later than the gallery's retention has it."""
    latest = at_ms + gallery.life_ms
    return np.where(rows.expires_at_ms == 0, latest, np.minimum(rows.expires_at_ms, latest))


def _plain(connection: Connection, rows: EnrolRows, timely: NDArray[np.bool_]) -> Int64:
    """The rows that can be stored without a further look, ascending."""
    none = np.zeros(0, np.int64)
    references, key = rows.reference_ids, rows.idempotency_key
    if len(set(references)) != len(references) or not timely.any():
        return none
    good = timely.copy()
    if not _all_fit(rows):
        for row, (reference_id, subject_id) in enumerate(zip(references, rows.subject_ids, strict=True)):
            used = f"{key}\n{reference_id}" if key else reference_id
            # A reference with a line's end in it could not be told from the key before it.
            good[row] &= storable(subject_id) and storable(used) and storable(reference_id) and "\n" not in reference_id
    kept = np.flatnonzero(good)
    if not len(kept):
        return none
    wanted = list(references) if len(kept) == len(rows) else [references[row] for row in kept.tolist()]
    known = _held(connection, rows.gallery_id, wanted)
    if key:
        known |= _with_used_key(connection, rows.gallery_id, key)
    if known:
        kept = kept[[reference_id not in known for reference_id in wanted]]
    return kept


def _all_fit(rows: EnrolRows) -> bool:
    """Whether all identifiers can be stored, the key among them, told without a look at each; False may be wrong."""
    references, key = rows.reference_ids, rows.idempotency_key
    if key and not storable(key):
        return False
    longest = NAME_BYTES_MAX - len(key.encode()) - 1 if key else NAME_BYTES_MAX
    return (
        storable_all([*references, *rows.subject_ids])
        and max(map(len, references)) <= longest
        and "\n" not in "".join(references)
    )


def _stored(transaction: WriteTransaction, rows: EnrolRows, plain: Int64, expires_at_ms: Int64) -> EnrolRun:
    """Put the plain rows into the tables, under the sequences next in turn."""
    whole = len(plain) == len(rows)
    chosen = plain.tolist()
    run = EnrolRun(
        sequence=transaction.sequence + 1,
        at_ms=transaction.at_ms,
        gallery_id=rows.gallery_id,
        reference_ids=list(rows.reference_ids) if whole else [rows.reference_ids[row] for row in chosen],
        subject_ids=list(rows.subject_ids) if whole else [rows.subject_ids[row] for row in chosen],
        templates=rows.templates if whole else rows.templates[plain],
        expires_at_ms=expires_at_ms[plain],
    )
    sealed = seal.seal_templates(
        transaction.sealing(run.gallery_id), run.gallery_id, run.reference_ids, run.sequence, run.templates
    )
    attributes = [rows.attributes[row] for row in chosen] if rows.attributes else []
    connection = transaction.connection
    _insert_entries(connection, run, sealed, attributes)
    span = {"first": run.sequence, "last": run.last_sequence}
    connection.execute(_TO_LIVE, span)
    if rows.idempotency_key:
        # One row for them all, under the key of the first; a key of another row is found by what they have in common.
        key = f"{rows.idempotency_key}\n{run.reference_ids[0]}"
        insert_many(connection, enrolment_key, [(run.gallery_id, key, run.sequence, run.at_ms, len(run))])
    transaction.stored_run(run, sealed[-1])
    return run


# --- statements ----------------------------------------------------------------------------------


def _held(connection: Connection, gallery_id: str, reference_ids: list[str]) -> set[str]:
    """Which of the references have a row in `live`, expired or not."""
    if connection.dialect.name == "sqlite":
        names = orjson.dumps(reference_ids).decode()
        return set(connection.exec_driver_sql(_HELD_SQLITE, (names, gallery_id)).scalars())
    return set(connection.exec_driver_sql(_HELD_POSTGRES, (reference_ids, gallery_id)).scalars())


def _with_used_key(connection: Connection, gallery_id: str, key: str) -> set[str]:
    """The references that were enrolled under this key, within the window or before."""
    used: set[str] = set()
    of_message = {"gallery": gallery_id, "low": f"{key}\n", "high": f"{key}\v"}
    for one, sequence, rows in connection.execute(_KEYS, of_message).all():
        if rows is None:
            used.add(one[len(key) + 1 :])
        else:
            span = {"first": sequence, "last": sequence + rows - 1}
            used.update(connection.execute(_REFERENCES, span).scalars())
    return used


def _insert_entries(connection: Connection, run: EnrolRun, sealed: list[bytes], attributes: list[bytes]) -> None:
    expires = run.expires_at_ms.tolist()
    if connection.dialect.name == "sqlite":
        columns: list[Sequence[object]] = [run.reference_ids, run.subject_ids, expires]
        if attributes:
            columns.append([one.decode() or None for one in attributes])
        connection.exec_driver_sql(
            _ENTRIES_SQLITE,
            (
                orjson.dumps(list(zip(*columns, strict=True))).decode(),
                run.sequence,
                ENROL,
                run.at_ms,
                run.gallery_id,
                b"".join(sealed),
                len(sealed[0]),
            ),
        )
        return
    insert_many(
        connection,
        entry,
        [
            (sequence, ENROL, run.at_ms, run.gallery_id, reference_id, subject_id, expires_at_ms, one, None, attribute)
            for sequence, (reference_id, subject_id, expires_at_ms, one, attribute) in enumerate(
                zip(
                    run.reference_ids,
                    run.subject_ids,
                    expires,
                    sealed,
                    [one or None for one in attributes] or [None] * len(run),
                    strict=True,
                ),
                run.sequence,
            )
        ],
    )


_HELD_SQLITE = (
    "SELECT value FROM json_each(?1) WHERE EXISTS (SELECT 1 FROM live WHERE gallery_id = ?2 AND reference_id = value)"
)
_ENTRIES_SQLITE = (
    "INSERT INTO entry (sequence, kind, at_ms, gallery_id, reference_id, subject_id, expires_at_ms, sealed, "
    "attributes) "
    "SELECT ?2 + key, ?3, ?4, ?5, json_extract(value, '$[0]'), json_extract(value, '$[1]'), "
    "json_extract(value, '$[2]'), substr(?6, key * ?7 + 1, ?7), CAST(json_extract(value, '$[3]') AS BLOB) "
    "FROM json_each(?1)"
)
# Not EXISTS, which the planner may turn round: with statistics from when the table was empty it would read all of it.
_HELD_POSTGRES = (
    "SELECT value FROM unnest(%s::text[]) AS value WHERE "
    "(SELECT true FROM live WHERE gallery_id = %s AND reference_id = value)"
)
_SPAN = entry.c.sequence.between(bindparam("first"), bindparam("last"))
_TO_LIVE = insert(live).from_select(
    ["gallery_id", "reference_id", "subject_id", "sequence", "enrolled_at_ms", "expires_at_ms"],
    select(
        entry.c.gallery_id,
        entry.c.reference_id,
        entry.c.subject_id,
        entry.c.sequence,
        entry.c.at_ms,
        entry.c.expires_at_ms,
    ).where(_SPAN),
)
_REFERENCES = select(entry.c.reference_id).where(_SPAN)
_KEYS = select(enrolment_key.c.idempotency_key, enrolment_key.c.sequence, enrolment_key.c.rows).where(
    enrolment_key.c.gallery_id == bindparam("gallery"),
    enrolment_key.c.idempotency_key >= bindparam("low"),
    enrolment_key.c.idempotency_key < bindparam("high"),
)
