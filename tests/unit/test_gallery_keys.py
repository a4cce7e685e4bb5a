"""Law 10: keys stand wrapped in files of their own, and a destroyed key is gone."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from matcher_service.errors import Conflict, DataDamaged, NotFound, StartRefused
from matcher_service.gallery.keys import Keyring
from matcher_service.gallery.signing import SigningKeys


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    made = Keyring.open(tmp_path / "keys")
    made.prepare(fresh=True)
    return made


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "keys").rglob("*") if path.is_file())


def test_a_key_is_the_same_after_reopening_and_differs_from_every_other(tmp_path: Path, keyring: Keyring) -> None:
    for gallery_id in ("a", "b/../c", "é"):
        keyring.create(gallery_id)
    keys = [keyring.key(gallery_id) for gallery_id in ("a", "b/../c", "é")]
    assert len({*keys}) == 3
    assert {len(key) for key in keys} == {32}
    keyring.create("a")
    again = Keyring.open(tmp_path / "keys")
    again.prepare(fresh=False)
    assert [again.key(gallery_id) for gallery_id in ("a", "b/../c", "é")] == keys


def test_no_file_holds_a_data_key_in_the_clear_and_all_are_for_their_owner_only(
    tmp_path: Path, keyring: Keyring
) -> None:
    keyring.create("a")
    assert len(files(tmp_path)) == 3
    for path in files(tmp_path):
        assert keyring.key("a") not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_a_destroyed_key_is_gone_from_memory_and_disk_and_never_made_again(tmp_path: Path, keyring: Keyring) -> None:
    keyring.create("a")
    (wrapped,) = (path.read_bytes() for path in files(tmp_path) if path.parent.name == "galleries")
    keyring.destroy("a", 7)
    keyring.destroy("a", 8)
    assert all(wrapped not in path.read_bytes() for path in files(tmp_path))
    again = Keyring.open(tmp_path / "keys")
    for one in (keyring, again):
        assert one.destroyed("a")
        assert one.cipher("a") is None
        with pytest.raises(NotFound):
            one.key("a")
        with pytest.raises(Conflict):
            one.create("a")


def test_a_key_that_was_never_made_cannot_be_had(keyring: Keyring) -> None:
    assert not keyring.destroyed("a")
    assert keyring.cipher("a") is None
    with pytest.raises(NotFound):
        keyring.key("a")
    keyring.create("a")
    assert len(keyring.key("a")) == 32


@pytest.mark.parametrize("name", ["master.key", "system.key"])
def test_a_missing_key_is_not_made_anew_over_what_was_sealed_under_it(tmp_path: Path, name: str) -> None:
    Keyring.open(tmp_path / "keys").prepare(fresh=True)
    (tmp_path / "keys" / name).unlink()
    with pytest.raises(StartRefused, match=name):
        Keyring.open(tmp_path / "keys").prepare(fresh=False)


def test_a_master_key_that_others_may_read_is_refused(tmp_path: Path, keyring: Keyring) -> None:
    (tmp_path / "keys" / "master.key").chmod(0o640)
    with pytest.raises(StartRefused, match="open to others"):
        Keyring.open(tmp_path / "keys")


def test_an_altered_or_exchanged_key_file_is_found(tmp_path: Path, keyring: Keyring) -> None:
    keyring.create("a")
    keyring.create("b")
    one, other = (path for path in files(tmp_path) if path.parent.name == "galleries")
    kept = one.read_bytes()
    for wrong in (other.read_bytes(), kept[:-1], kept[:-1] + bytes([kept[-1] ^ 1]), b"", b"\x02" + kept[1:]):
        one.write_bytes(wrong)
        fresh = Keyring.open(tmp_path / "keys")
        with pytest.raises(DataDamaged):
            [fresh.key(gallery_id) for gallery_id in ("a", "b")]
    one.write_bytes(kept)
    (tmp_path / "keys" / "master.key").write_bytes(os.urandom(32))
    with pytest.raises(DataDamaged):
        Keyring.open(tmp_path / "keys")


def test_a_write_that_was_cut_short_leaves_no_key(tmp_path: Path, keyring: Keyring) -> None:
    """What a crash leaves aside is never taken for a key, and does not stand in the way of one."""
    keyring.create("a")
    (path,) = (path for path in files(tmp_path) if path.parent.name == "galleries")
    aside = path.with_name(path.name + ".tmp")
    path.unlink()
    aside.write_bytes(b"half")
    fresh = Keyring.open(tmp_path / "keys")
    fresh.prepare(fresh=False)
    assert fresh.cipher("a") is None
    fresh.create("a")
    assert len(fresh.key("a")) == 32
    assert not aside.exists()


def test_of_gateways_that_start_together_one_makes_the_keys(tmp_path: Path) -> None:
    """Each ends up with the same master key: what one of them seals, all can read."""
    started = [Keyring.open(tmp_path / "keys") for _ in range(8)]
    with ThreadPoolExecutor(len(started)) as at_once:
        list(at_once.map(lambda keyring: keyring.prepare(fresh=True), started))
        list(at_once.map(lambda keyring: keyring.create("a"), started))
    assert len({keyring.key("a") for keyring in started}) == 1
    with ThreadPoolExecutor(len(started)) as at_once:
        signing = list(at_once.map(lambda keyring: SigningKeys(tmp_path / "audit", keyring), started))
    assert len({one.current.public for one in signing}) == 1
