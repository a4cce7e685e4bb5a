"""Signed checkpoints of the audit, and the check of an exported one. Pure; nothing here needs the service.

A checkpoint says: the first `size` audit records have this Merkle root. It is signed with Ed25519, so that whoever
keeps one elsewhere can later show that not one of these records was changed, dropped, moved or cut off. The hash of a
record (`audit.leaf_hash`) is the tree's leaf.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from matcher_service import audit, merkle
from matcher_service.errors import DataDamaged, InvalidInput
from matcher_service.terms import Checkpoint

KEY_ROTATED = "audit.key_rotated"
"""Action of the record by which one signing key hands over to the next."""

_SIGNED = b"matcher.audit.checkpoint.1\n"
_ENDORSED = b"matcher.audit.key.1\n"
_RECORD_KEYS = frozenset((*audit.CHAINED, "hash", "salt", "detail"))

Sign = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class VerifiedExport:
    """What an intact export holds. `compared`: the size of the checkpoint kept elsewhere that it was compared with,
    0 without one. `key_known`: the signing key follows from that checkpoint, or was given. `details_erased`: records
    whose personal detail has been erased, each after its time."""

    records: int
    hash: str
    checkpoint: Checkpoint
    compared: int
    key_known: bool
    details_erased: int


@dataclass(frozen=True, slots=True)
class VerifiedProof:
    """What a single proof shows, all of it under `checkpoint`: that audit record `index` is covered, or (`index` 0)
    that the first `older` records are those of the checkpoint kept elsewhere. `tied`: the checkpoint kept elsewhere is
    the very one that covers; `key_known`: it is signed by a key that is known from elsewhere."""

    index: int
    older: int
    checkpoint: Checkpoint
    tied: bool
    key_known: bool


def signed_checkpoint(size: int, root: bytes, at_ms: int, key: bytes, sign: Sign) -> Checkpoint:
    unsigned = Checkpoint(size, root.hex(), at_ms, key.hex(), "")
    return dataclasses.replace(unsigned, signature=sign(_text(unsigned)).hex())


def endorsement_text(key: str) -> bytes:
    """What a signing key signs to hand over to the key with that public part."""
    return _ENDORSED + key.encode()


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    return audit.canonical(dataclasses.asdict(checkpoint))


def decode_checkpoint(text: bytes) -> Checkpoint:
    """Raises InvalidInput for what is no checkpoint, DataDamaged if its signature is not that of its key."""
    try:
        found = json.loads(text)
        checkpoint = Checkpoint(**{field.name: found[field.name] for field in dataclasses.fields(Checkpoint)})
        whole = all(isinstance(one, int) and one >= 0 for one in (checkpoint.size, checkpoint.at_ms))
        if len(bytes.fromhex(checkpoint.root)) != merkle.HASH_BYTES or not whole:
            raise ValueError("a field is out of range")
    except (KeyError, TypeError, ValueError) as unfit:
        raise InvalidInput(
            f"this is no checkpoint: {unfit}", field="checkpoint", hint="as `matcher audit checkpoint` writes it"
        ) from unfit
    if not _is_signed(checkpoint.key, checkpoint.signature, _text(checkpoint)):
        raise _damaged(f"the checkpoint of {checkpoint.size} records is not signed by the key that it names")
    return checkpoint


def export_lines(records: Iterable[Mapping[str, Any]], checkpoint: Checkpoint) -> Iterable[bytes]:
    """The lines of an export: the records that the checkpoint covers, in canonical form, and at the end itself."""
    for record in records:
        yield audit.canonical(dict(record)) + b"\n"
    yield audit.canonical({"checkpoint": dataclasses.asdict(checkpoint)}) + b"\n"


def verify_export(lines: Iterable[bytes], kept: Checkpoint | None = None, key: str = "") -> VerifiedExport:
    """Check an exported audit, alone or against a checkpoint kept elsewhere or a public key (hexadecimal).

    Checked: every byte of every record, their order and links (`audit.verify`), details that are gone before their
    time, the root and the signature of the checkpoint at the end, and that the first `kept.size` records are those
    that `kept` was made of. Alone, an export can prove only that it is whole, and not that nobody made another.
    Raises DataDamaged naming what is wrong.
    """
    export = _Export(kept, key)
    index, head = audit.verify(export.records(lines))
    end = export.end
    if end is None:
        raise _damaged("the export has no checkpoint at its end: it was cut")
    if end.size != index or end.root != export.frontier.root().hex():
        raise _damaged("the records are not those that the checkpoint at the end was made of")
    if kept is not None and not export.kept_met:
        raise _damaged(f"the first {kept.size} records are not those of the checkpoint kept elsewhere: it has {index}")
    if export.keys and end.key not in export.keys:
        raise _damaged("the checkpoint at the end is signed by a key that nothing leads to from the one known")
    if export.detail_due_ms > end.at_ms:
        raise _damaged(f"audit record {export.detail_due_index}: its detail is gone before its time")
    return VerifiedExport(index, head, end, kept.size if kept else 0, bool(export.keys), export.details_erased)


def verify_proof(
    answer: bytes, record: bytes | None = None, kept: Checkpoint | None = None, key: str = ""
) -> VerifiedProof:
    """Check what /v1/audit/proofs/inclusion or /consistency answered, with what the verifier holds.

    An inclusion proof needs the `record` (JSON, as in an export or in /v1/audit), every byte of which is hashed again;
    a consistency proof needs the `kept` checkpoint whose size was asked for. `key` as in `verify_export`. Raises
    InvalidInput for what is no proof or is not enough to check it, DataDamaged if it does not prove what it says.
    """
    try:
        found = json.loads(answer)
        checkpoint = decode_checkpoint(audit.canonical(found["checkpoint"]))
        index, older = int(found.get("index", 0)), int(found.get("older", 0))
        proof = [bytes.fromhex(one) for one in found["proof"]]
        if (index > 0) == (older > 0):
            raise ValueError("it names neither a record nor an earlier checkpoint")
    except (AttributeError, KeyError, TypeError, ValueError) as unfit:
        raise InvalidInput(
            f"this is no proof: {unfit}", field="proof", hint="as /v1/audit/proofs/inclusion or /consistency answers"
        ) from unfit
    known = {one for one in (key.lower(), kept.key if kept else "") if one}
    if known and checkpoint.key not in known:
        raise _damaged("the proof's checkpoint is not signed by the key known: verify an export, which shows handovers")
    size, tree_root = checkpoint.size, bytes.fromhex(checkpoint.root)
    if index:
        leaf = _leaf_of(record, index)
        proves = merkle.verify_inclusion(leaf, index - 1, size, proof, tree_root)
        tied = kept is not None and (kept.size, kept.root) == (checkpoint.size, checkpoint.root)
        if kept is not None and kept.size == size and not tied:
            raise _damaged(f"the checkpoint kept elsewhere has another root for the same {size} records")
    else:
        if kept is None or kept.size != older:
            raise InvalidInput(
                f"the proof is of the checkpoint of {older} records",
                field="checkpoint",
                hint="give the checkpoint of that size, which was kept elsewhere",
            )
        tied = proves = merkle.verify_consistency(older, size, bytes.fromhex(kept.root), tree_root, proof)
    if not proves:
        what = f"audit record {index} is not covered" if index else "the checkpoint kept elsewhere is no past state"
        raise _damaged(f"{what} by what the proof shows")
    return VerifiedProof(index, older, checkpoint, tied, bool(known))


def _leaf_of(record: bytes | None, index: int) -> bytes:
    """Hash of the record that an inclusion proof is of."""
    if record is None:
        raise InvalidInput(
            f"the proof is of audit record {index}, which is not given",
            field="record",
            hint="give the record as a file: its line of an export",
        )
    try:
        found = json.loads(record)
        leaf = audit.leaf_hash(found)
        fits = audit.detail_fits(found)
    except (AttributeError, KeyError, TypeError, ValueError) as unfit:
        raise InvalidInput(
            f"this is no audit record: {unfit}", field="record", hint="give one line of an export"
        ) from unfit
    if found["index"] != index:
        raise InvalidInput(
            f"this is audit record {found['index']}, and the proof is of {index}",
            field="record",
            hint="give the record that the proof was asked for",
        )
    if not fits:
        raise _damaged(f"audit record {index}: its detail is not the one that was recorded")
    return bytes.fromhex(leaf)


class _Export:
    """Takes note, while records pass to the check of the chain, of what is to be checked beside it."""

    def __init__(self, kept: Checkpoint | None, key: str) -> None:
        self.frontier = merkle.Frontier()
        self.end: Checkpoint | None = None
        self.keys = {one for one in (key.lower(), kept.key if kept else "") if one}
        self.kept_met = kept is not None and kept.size == 0
        self.details_erased = 0
        self.detail_due_ms = 0
        self.detail_due_index = 0
        self._kept = kept

    def records(self, lines: Iterable[bytes]) -> Iterable[Mapping[str, Any]]:
        for number, line in enumerate(lines, 1):
            if self.end is not None:
                raise _damaged(f"line {number}: something stands behind the checkpoint that ends the export")
            try:
                found = json.loads(line)
                exact = audit.canonical(found) + b"\n" == line
            except (ValueError, RecursionError):
                exact = False
            if not exact or not isinstance(found, dict):
                raise _damaged(f"line {number} is not as it was written")
            if found.keys() == {"checkpoint"}:
                self.end = _checkpoint_of(found["checkpoint"])
                continue
            if found.keys() != _RECORD_KEYS:
                raise _damaged(f"line {number} is no audit record")
            yield found
            # Resumed only after the record was found good.
            self._passed(found)

    def _passed(self, record: Mapping[str, Any]) -> None:
        self.frontier.add([bytes.fromhex(record["hash"])])
        kept = self._kept
        if kept is not None and self.frontier.size == kept.size:
            self.kept_met = self.frontier.root().hex() == kept.root
        facts = record["facts"]
        if record["detail_digest"] and record["detail"] is None:
            self.details_erased += 1
            due_ms = facts.get("detail_until_ms", 0)
            if due_ms > self.detail_due_ms:
                self.detail_due_ms, self.detail_due_index = due_ms, record["index"]
        if record["action"] == KEY_ROTATED and facts.get("previous") in self.keys:
            key = str(facts["key"])
            self.keys |= {key} if _is_signed(facts["previous"], facts["endorsement"], endorsement_text(key)) else set()


def _checkpoint_of(found: Any) -> Checkpoint:
    try:
        return decode_checkpoint(audit.canonical(found))
    except InvalidInput as unfit:
        raise _damaged(unfit.detail) from unfit


def _text(checkpoint: Checkpoint) -> bytes:
    fields = {name: value for name, value in dataclasses.asdict(checkpoint).items() if name != "signature"}
    return _SIGNED + audit.canonical(fields)


def _is_signed(key: str, signature: str, text: bytes) -> bool:
    try:
        signed = bytes.fromhex(signature)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signed, text)
    except (InvalidSignature, ValueError, TypeError):
        return False
    # The text holds the key but not the signature, which would read in either case.
    return signed.hex() == signature


def _damaged(why: str) -> DataDamaged:
    return DataDamaged(why, hint="keep the database as it is, and compare it with a backup")
