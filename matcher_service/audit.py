"""The audit chain: a record's hash covers the record before it, so that no record can be changed, dropped or
moved without every later hash changing too.

A hash is SHA-256 over the byte 0x00 and the record's canonical JSON: RFC 6962's hash of a Merkle leaf, so that a
tree and its proofs can later stand on the same records. Details that may name persons stand beside the chain; the
chain carries only their digest under a salt of their own. Erasing detail and salt leaves the chain verifiable and
the digest without meaning. Everything here is pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from matcher_service.errors import DataDamaged

CHAIN_START = "00" * 32
"""The `previous` of the first record."""

CHAINED = ("index", "at_ms", "actor", "action", "subject", "facts", "detail_digest", "previous")
"""The fields under the hash. `facts` never names a person; `detail` and `salt` stand beside."""

SALT_BYTES = 32

_LEAF = b"\x00"


def canonical(value: object) -> bytes:
    """One byte string per value: JSON in UTF-8, keys in order of code points, no white space.

    Raises ValueError for what JSON cannot carry: NaN, infinities, foreign types.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except TypeError as foreign:
        raise ValueError(str(foreign)) from foreign


def canonical_detail(detail: Mapping[str, object]) -> bytes:
    """A detail in the canonical form of what will be read back; b"" for an empty one. Raises ValueError as above."""
    return reread(canonical(dict(detail))) if detail else b""


def reread(text: bytes) -> bytes:
    """The canonical form of a JSON text. Keys that were not strings in Python, and foreign ways to write numbers,
    take their final form and order here."""
    return canonical(json.loads(text))


def detail_digest(salt: bytes, detail: bytes) -> str:
    """Hex digest of a canonical detail; "" stands for no detail at all.

    The salt (SALT_BYTES random bytes) keeps a short detail from being guessed once it has been erased.
    """
    return hashlib.sha256(salt + detail).hexdigest() if detail else ""


def leaf_hash(record: Mapping[str, object]) -> str:
    """Hex hash of a record's chained fields; other fields are ignored. Raises KeyError if one is absent."""
    return hashlib.sha256(_LEAF + canonical({name: record[name] for name in CHAINED})).hexdigest()


def chained(
    *,
    index: int,
    at_ms: int,
    actor: str,
    action: str,
    subject: str,
    facts: Mapping[str, object],
    digest: str,
    previous: str,
) -> dict[str, object]:
    """The next record of the chain, with its `hash`."""
    record: dict[str, object] = {
        "index": index,
        "at_ms": at_ms,
        "actor": actor,
        "action": action,
        "subject": subject,
        "facts": dict(facts),
        "detail_digest": digest,
        "previous": previous,
    }
    record["hash"] = leaf_hash(record)
    return record


def verify(records: Iterable[Mapping[str, object]], previous: str = CHAIN_START, index: int = 0) -> tuple[int, str]:
    """Check records that follow on `index` and its hash `previous`; returns the last index and its hash.

    Checked: no index is missing or repeated, every record names the hash before it and carries its own, and every
    detail that has not been erased has the digest that the chain carries. Raises DataDamaged naming the first
    record that fails. An intact chain does not prove that nothing was cut off its end: compare the returned hash
    with one noted elsewhere.
    """
    for record in records:
        index += 1
        if record.get("index") != index:
            raise _damaged(index, f"record {record.get('index')} stands in its place")
        if record.get("previous") != previous:
            raise _damaged(index, "it does not follow on the record before it")
        try:
            expected = leaf_hash(record)
        except (KeyError, ValueError) as unfit:
            raise _damaged(index, "it lacks a field or holds a value that is not JSON") from unfit
        if record.get("hash") != expected:
            raise _damaged(index, "its hash is not that of its content")
        if not detail_fits(record):
            raise _damaged(index, "its detail is not the one that was recorded")
        previous = expected
    return index, previous


def detail_fits(record: Mapping[str, object]) -> bool:
    """Whether a record's detail and salt are, to the byte, what its digest was made of, or both erased."""
    text, detail = record.get("salt"), record.get("detail")
    if text is None or detail is None:
        return text is detail
    try:
        salt = bytes.fromhex(str(text))
    except ValueError:
        return False
    # Hexadecimal reads in either case, and only one of them was written.
    return salt.hex() == text and record["detail_digest"] == detail_digest(salt, canonical(detail))


def _damaged(index: int, why: str) -> DataDamaged:
    return DataDamaged(
        f"audit record {index}: {why}",
        hint="keep the database as it is, and compare it with a backup and with hashes noted elsewhere",
    )
