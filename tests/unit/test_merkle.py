"""Merkle roots and proofs are those of RFC 6962: known roots, and no proof that holds for anything else."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service import merkle

# The leaves and roots with which implementations of Certificate Transparency test themselves.
CONTENTS = [bytes.fromhex(one) for one in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
SIZES = st.integers(1, 70)


def leaves_of(size: int) -> list[bytes]:
    return [merkle.leaf_hash(b"%d" % at) for at in range(size)]


def by_definition(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, written down once more."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + by_definition(leaves[:split]) + by_definition(leaves[split:])).digest()


def test_the_roots_are_those_of_the_known_vectors() -> None:
    leaves = [merkle.leaf_hash(one) for one in CONTENTS]
    assert [merkle.root(leaves[: size + 1]).hex() for size in range(8)] == ROOTS
    assert merkle.root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_an_inclusion_proof_is_that_of_the_known_vector() -> None:
    """The path of the first of eight leaves, as Certificate Transparency's own tests have it."""
    leaves = [merkle.leaf_hash(one) for one in CONTENTS]
    assert [one.hex() for one in merkle.inclusion_proof(leaves, 0)] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]


@given(SIZES, SIZES)
def test_a_frontier_kept_between_appends_gives_the_root_of_all(first: int, more: int) -> None:
    leaves = leaves_of(first + more)
    kept = merkle.Frontier().add(leaves[:first])
    assert kept.root() == by_definition(leaves[:first])
    assert merkle.Frontier(kept.size, kept.peaks).add(leaves[first:]).root() == by_definition(leaves)


@given(SIZES, st.data())
def test_an_inclusion_proof_holds_for_its_leaf_place_and_tree_only(size: int, data: st.DataObject) -> None:
    leaves = leaves_of(size)
    index = data.draw(st.integers(0, size - 1))
    proof, root = merkle.inclusion_proof(leaves, index), merkle.root(leaves)
    assert merkle.verify_inclusion(leaves[index], index, size, proof, root)
    assert not merkle.verify_inclusion(merkle.leaf_hash(b"other"), index, size, proof, root)
    assert not merkle.verify_inclusion(leaves[index], index, size, proof, merkle.leaf_hash(b"other"))
    assert not merkle.verify_inclusion(leaves[index], index, size, [*proof, root], root)
    assert not merkle.verify_inclusion(leaves[index], size, size, proof, root)
    for other in range(size):
        assert other == index or not merkle.verify_inclusion(leaves[index], other, size, proof, root)
    for at in range(len(proof)):
        assert not merkle.verify_inclusion(leaves[index], index, size, [*proof[:at], *proof[at + 1 :]], root)


@given(SIZES, st.data())
def test_a_consistency_proof_holds_for_the_true_past_only(size: int, data: st.DataObject) -> None:
    leaves = leaves_of(size)
    older = data.draw(st.integers(1, size))
    proof = merkle.consistency_proof(leaves, older)
    old_root, root = merkle.root(leaves[:older]), merkle.root(leaves)
    assert merkle.verify_consistency(older, size, old_root, root, proof)
    changed = data.draw(st.integers(0, size - 1))
    forged = [merkle.leaf_hash(b"forged") if at == changed else one for at, one in enumerate(leaves)]
    if changed < older:
        forged_proof = merkle.consistency_proof(forged, older)
        assert not merkle.verify_consistency(older, size, old_root, merkle.root(forged), forged_proof)
        assert not merkle.verify_consistency(older, size, merkle.root(forged[:older]), root, proof)
    assert not merkle.verify_consistency(older, size, old_root, merkle.root(forged), proof)
    assert not merkle.verify_consistency(size + 1, size, old_root, root, proof)
    for at in range(len(proof)):
        assert not merkle.verify_consistency(older, size, old_root, root, [*proof[:at], *proof[at + 1 :]])


def test_the_empty_tree_is_the_past_of_every_tree() -> None:
    assert merkle.verify_consistency(0, 3, merkle.EMPTY_ROOT, merkle.root(leaves_of(3)), [])
    assert not merkle.verify_consistency(0, 3, merkle.leaf_hash(b""), merkle.root(leaves_of(3)), [])


def test_what_a_tree_does_not_have_has_no_proof() -> None:
    with pytest.raises(IndexError):
        merkle.inclusion_proof(leaves_of(3), 3)
    with pytest.raises(IndexError):
        merkle.consistency_proof(leaves_of(3), 4)
    with pytest.raises(ValueError, match="peaks"):
        merkle.Frontier(3, leaves_of(1))
