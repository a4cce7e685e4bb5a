"""Sealing with AES-256-GCM. Pure but for the nonces, which come from the operating system.

A sealed value is a format byte (2: and 4 bytes that say which generation of the key it is sealed under; 1: the first),
a 12-byte random nonce, the ciphertext and a 16-byte tag. The associated data of a
template names its gallery, reference and sequence, each string with its length before it, so that no sealed bytes
can be moved to another row, not even one whose names run together to the same text.

Random 96-bit nonces: after 2^27 seals under one key two of them are equal with probability below 2^-42. A nonce
counted from the sequence would not do: a sequence whose transaction was rolled back is given out again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from struct import Struct, pack
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from matcher_service.errors import DataDamaged

FORMAT = b"\x01"
FORMAT_OF_GENERATION = b"\x02"
NONCE_BYTES = 12
OVERHEAD_BYTES = 1 + NONCE_BYTES + 16
"""By how much a sealed value is longer than what it holds; 4 more under another generation than the first."""

_TEMPLATE = b"matcher.template.1"
_LENGTH, _SEQUENCE = Struct(">I"), Struct(">Q")


def template_names(gallery_id: str, reference_id: str, sequence: int) -> bytes:
    """Associated data of a template: injective in its three arguments."""
    gallery, reference = gallery_id.encode(), reference_id.encode()
    return pack(f">18sI{len(gallery)}sI{len(reference)}sQ", _TEMPLATE, len(gallery), gallery, len(reference),
                reference, sequence)  # fmt: skip


def record_names(what: str, name: str) -> bytes:
    """Associated data of a sealed record of the service itself, such as an alert."""
    kind, text = what.encode(), name.encode()
    return pack(f">16sI{len(kind)}sI{len(text)}s", b"matcher.record.1", len(kind), kind, len(text), text)


def nonces(count: int) -> Callable[[], bytes]:
    """A source of `count` random nonces, drawn from the operating system at once."""
    drawn = os.urandom(NONCE_BYTES * count)
    places = iter(range(0, len(drawn), NONCE_BYTES))

    def draw() -> bytes:
        place = next(places)
        return drawn[place : place + NONCE_BYTES]

    return draw


class Sealing(NamedTuple):
    """A key to seal under: which generation it is, and its cipher."""

    generation: int
    cipher: AESGCM

    @property
    def prefix(self) -> bytes:
        """How what it seals begins."""
        return FORMAT if self.generation == 1 else FORMAT_OF_GENERATION + _LENGTH.pack(self.generation)


def generation_of(sealed: bytes) -> int:
    """Which generation of its key something is sealed under; 0 if that cannot be told."""
    if sealed[:1] == FORMAT:
        return 1
    return _LENGTH.unpack_from(sealed, 1)[0] if sealed[:1] == FORMAT_OF_GENERATION and len(sealed) > 5 else 0


def seal(under: Sealing | AESGCM, nonce: bytes, plain: bytes, names: bytes) -> bytes:
    """`under`: a key, or a cipher of which there is one generation."""
    key = under if isinstance(under, Sealing) else Sealing(1, under)
    return key.prefix + nonce + key.cipher.encrypt(nonce, plain, names)


def seal_templates(
    under: Sealing, gallery_id: str, reference_ids: Sequence[str], sequence: int, templates: NDArray[np.float16]
) -> list[bytes]:
    """Each row of `templates`, float16 [n, d] in C order, sealed as the template of its reference; their sequences
    follow on one another from `sequence`."""
    encrypt, prefix, gallery = under.cipher.encrypt, under.prefix, gallery_id.encode()
    before = pack(f">18sI{len(gallery)}s", _TEMPLATE, len(gallery), gallery)
    width = templates.shape[1] * templates.itemsize
    plain = np.ascontiguousarray(templates).view(np.uint8).reshape(-1).data
    drawn = os.urandom(NONCE_BYTES * len(reference_ids))
    sealed = []
    for row, reference_id in enumerate(reference_ids):
        reference = reference_id.encode()
        names = before + _LENGTH.pack(len(reference)) + reference + _SEQUENCE.pack(sequence + row)
        nonce = drawn[row * NONCE_BYTES : (row + 1) * NONCE_BYTES]
        sealed.append(prefix + nonce + encrypt(nonce, plain[row * width : (row + 1) * width], names))
    return sealed


def unseal(cipher: AESGCM, sealed: bytes, names: bytes) -> bytes:
    """The sealed value. Raises InvalidTag if anything of it, or of its names, was altered."""
    start = {FORMAT: 1, FORMAT_OF_GENERATION: 5}.get(sealed[:1])
    if start is None:
        raise InvalidTag
    return cipher.decrypt(sealed[start : start + NONCE_BYTES], sealed[start + NONCE_BYTES :], names)


def unseal_template(cipher: AESGCM, sealed: bytes, gallery_id: str, reference_id: str, sequence: int) -> bytes:
    """The template of one row. Raises DataDamaged naming the row if it fails its authentication."""
    try:
        return unseal(cipher, sealed, template_names(gallery_id, reference_id, sequence))
    except (InvalidTag, ValueError) as unfit:
        raise DataDamaged(
            f"the template of gallery {gallery_id}, reference {reference_id}, sequence {sequence} "
            "fails its authentication",
            hint="restore the database from a backup, or withdraw the reference and enrol it again",
        ) from unfit


def unseal_record(cipher: AESGCM, sealed: bytes, what: str, name: str) -> bytes:
    """The content of a sealed record. Raises DataDamaged naming it if it fails its authentication."""
    try:
        return unseal(cipher, sealed, record_names(what, name))
    except (InvalidTag, ValueError) as unfit:
        raise DataDamaged(
            f"{what} {name} fails its authentication", hint="restore the database from a backup"
        ) from unfit
