"""The Ed25519 keys that audit checkpoints are signed with: made at the first start, beside the other keys.

A folder holds for each key, numbered from 1, its private part wrapped (`1.key`) and its public
part (`1.pub`, hexadecimal), which may be copied anywhere. The newest signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from matcher_service.audit_proofs import endorsement_text
from matcher_service.errors import DataDamaged
from matcher_service.gallery.keys import Keyring, alone, write_durably


@dataclass(frozen=True, slots=True)
class SigningKey:
    """`public` is the 32 bytes by which signatures are checked."""

    number: int
    private: Ed25519PrivateKey

    @property
    def public(self) -> bytes:
        return self.private.public_key().public_bytes_raw()

    def sign(self, text: bytes) -> bytes:
        return self.private.sign(text)


@dataclass(frozen=True, slots=True)
class Handover:
    """A new key, with the signature by which the one before it vouches for it."""

    key: SigningKey
    endorsement: bytes


class SigningKeys:
    """`current` signs. Methods block on the disk."""

    def __init__(self, folder: Path, keyring: Keyring) -> None:
        self._folder = folder
        self._keyring = keyring
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with alone(folder):
            numbers = [int(path.stem) for path in folder.glob("*.key") if path.stem.isdecimal()]
            if numbers:
                self.current = self._read(max(numbers))
            else:
                self.adopt(Handover(SigningKey(1, Ed25519PrivateKey.generate()), b""))

    def successor(self) -> Handover:
        """A new key that the current one vouches for; not kept until it is adopted."""
        key = SigningKey(self.current.number + 1, Ed25519PrivateKey.generate())
        return Handover(key, self.current.sign(endorsement_text(key.public.hex())))

    def adopt(self, handover: Handover) -> None:
        """Keep a key and sign with it from now on; durable on return."""
        key = handover.key
        write_durably(self._folder / f"{key.number}.pub", key.public.hex().encode() + b"\n")
        self._keyring.store(_name(key.number), self._folder / f"{key.number}.key", key.private.private_bytes_raw())
        self.current = key

    def _read(self, number: int) -> SigningKey:
        path = self._folder / f"{number}.key"
        private = Ed25519PrivateKey.from_private_bytes(self._keyring.unwrap(_name(number), path))
        key = SigningKey(number, private)
        if path.with_suffix(".pub").read_text().strip() != key.public.hex():
            raise DataDamaged(
                f"{path.with_suffix('.pub')} is not the public part of {path}",
                hint="restore the keys directory from its backup",
            )
        return key


def _name(number: int) -> str:
    return f"audit:{number}"
