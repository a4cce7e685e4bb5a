"""Law 10: what is sealed opens only whole, under its key, in its place."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.errors import DataDamaged
from matcher_service.gallery import seal

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SEQUENCES = st.integers(0, 2**64 - 1)
CIPHER = AESGCM(os.urandom(32))


def sealed(plain: bytes, *place: object) -> bytes:
    return seal.seal(CIPHER, os.urandom(12), plain, seal.template_names(*place))  # type: ignore[arg-type]


@given(st.binary(max_size=64), NAMES, NAMES, SEQUENCES)
def test_a_template_opens_where_it_was_sealed(plain: bytes, gallery: str, reference: str, sequence: int) -> None:
    blob = sealed(plain, gallery, reference, sequence)
    assert len(blob) == len(plain) + seal.OVERHEAD_BYTES
    assert seal.unseal_template(CIPHER, blob, gallery, reference, sequence) == plain


@given(st.tuples(NAMES, NAMES, SEQUENCES), st.tuples(NAMES, NAMES, SEQUENCES))
def test_no_two_places_share_their_associated_data(one: tuple[str, str, int], other: tuple[str, str, int]) -> None:
    assert (seal.template_names(*one) == seal.template_names(*other)) == (one == other)


def test_names_that_run_together_to_the_same_text_are_told_apart() -> None:
    assert seal.template_names("ab", "c", 1) != seal.template_names("a", "bc", 1)
    assert seal.record_names("ab", "c") != seal.record_names("a", "bc")


def test_a_template_moved_to_another_place_is_damaged_and_the_place_is_named() -> None:
    blob = sealed(b"template", "g", "r", 7)
    for place in (("h", "r", 7), ("g", "s", 7), ("g", "r", 8)):
        with pytest.raises(DataDamaged, match=f"gallery {place[0]}, reference {place[1]}, sequence {place[2]} "):
            seal.unseal_template(CIPHER, blob, *place)


@given(st.integers(0, 8 * (8 + seal.OVERHEAD_BYTES) - 1))
def test_any_flipped_bit_is_found(bit: int) -> None:
    blob = bytearray(sealed(b"template", "g", "r", 7))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DataDamaged):
        seal.unseal_template(CIPHER, bytes(blob), "g", "r", 7)


@given(st.integers(0, 7 + seal.OVERHEAD_BYTES))
def test_a_shortened_blob_is_found(length: int) -> None:
    with pytest.raises(DataDamaged):
        seal.unseal_template(CIPHER, sealed(b"template", "g", "r", 7)[:length], "g", "r", 7)


def test_another_key_opens_nothing() -> None:
    with pytest.raises(DataDamaged):
        seal.unseal_template(AESGCM(os.urandom(32)), sealed(b"template", "g", "r", 7), "g", "r", 7)


def test_every_nonce_is_drawn_once() -> None:
    draw = seal.nonces(1000)
    drawn = [draw() for _ in range(1000)]
    assert len({*drawn}) == 1000
    assert {len(nonce) for nonce in drawn} == {12}
