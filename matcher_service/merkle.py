"""Merkle trees and their proofs, as RFC 6962 and RFC 9162 (section 2.1) define them over SHA-256. Pure.

A leaf is hashed with a zero byte before it and a node with a one, so that neither can pass for the other. A tree of
n leaves splits at the largest power of two below n. Hashes are 32 bytes; leaves are given as their hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256().digest()


def leaf_hash(content: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + content).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """What must be remembered of a growing tree to know its root: the roots of its perfect subtrees, largest first.

    There is one of them for each bit that is set in `size`.
    """

    def __init__(self, size: int = 0, peaks: Sequence[bytes] = ()) -> None:
        if len(peaks) != size.bit_count():
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} peaks, not {len(peaks)}")
        self.size = size
        self.peaks = list(peaks)

    def add(self, leaves: Iterable[bytes]) -> Frontier:
        """Append leaves; returns itself."""
        for node in leaves:
            full = self.size
            while full & 1:
                node = node_hash(self.peaks.pop(), node)
                full >>= 1
            self.peaks.append(node)
            self.size += 1
        return self

    def root(self) -> bytes:
        if not self.peaks:
            return EMPTY_ROOT
        *rest, root = self.peaks
        for peak in reversed(rest):
            root = node_hash(peak, root)
        return root


def root(leaves: Sequence[bytes]) -> bytes:
    return Frontier().add(leaves).root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The path from leaf `index` (from 0) to the root, nearest first. Raises IndexError for no such leaf."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"no leaf {index} among {len(leaves)}")
    if len(leaves) == 1:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*inclusion_proof(leaves[:split], index), root(leaves[split:])]
    return [*inclusion_proof(leaves[split:], index - split), root(leaves[:split])]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], tree_root: bytes) -> bool:
    """Whether the leaf stands at `index` (from 0) of the tree of `size` leaves with that root (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    place, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            found = node_hash(sibling, found)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and found == tree_root


def consistency_proof(leaves: Sequence[bytes], older: int) -> list[bytes]:
    """That the first `older` leaves are an earlier state of the tree. Raises IndexError unless 0 <= older <= all."""
    if not 0 <= older <= len(leaves):
        raise IndexError(f"a tree of {len(leaves)} leaves never had {older}")
    return _consistency(leaves, older, known=True) if 0 < older < len(leaves) else []


def _consistency(leaves: Sequence[bytes], older: int, *, known: bool) -> list[bytes]:
    if older == len(leaves):
        # The root of the older tree is what the verifier has already.
        return [] if known else [root(leaves)]
    split = _split(len(leaves))
    if older <= split:
        return [*_consistency(leaves[:split], older, known=known), root(leaves[split:])]
    return [*_consistency(leaves[split:], older - split, known=False), root(leaves[:split])]


def verify_consistency(older: int, size: int, older_root: bytes, tree_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the tree of `older` leaves is an earlier state of that of `size` (RFC 9162, 2.1.4.2)."""
    if not 0 <= older <= size:
        return False
    if older == size:
        return not proof and older_root == tree_root
    if older == 0:
        return not proof and older_root == EMPTY_ROOT
    path = [older_root, *proof] if older.bit_count() == 1 else list(proof)
    if not path:
        return False
    place, last = older - 1, size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old = new = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and old == older_root and new == tree_root


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << ((size - 1).bit_length() - 1)
