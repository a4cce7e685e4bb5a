"""Law 10: keys stand wrapped in files of their own, and a destroyed key is gone."""

from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from matcher_service.errors import Conflict, DataDamaged, NotFound, StartRefused
from matcher_service.gallery import keys
from matcher_service.gallery.keys import Keyring, write_durably
from matcher_service.gallery.signing import SigningKeys


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    made = Keyring.open(tmp_path / "keys")
    made.prepare(fresh=True)
    return made


def secret(keyring: Keyring, gallery_id: str, generation: int = 0) -> bytes:
    found = keyring.key(gallery_id, generation)
    assert found is not None
    return found.key


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "keys").rglob("*") if path.is_file())


def test_a_key_is_the_same_after_reopening_and_differs_from_every_other(tmp_path: Path, keyring: Keyring) -> None:
    for gallery_id in ("a", "b/../c", "é"):
        keyring.create(gallery_id)
    keys = [keyring.key(gallery_id) for gallery_id in ("a", "b/../c", "é")]
    assert len({*keys}) == 3
    assert all(key is not None and (key.generation, len(key.key)) == (1, 32) for key in keys)
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
        assert secret(keyring, "a") not in path.read_bytes()
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
    assert len(secret(keyring, "a")) == 32


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
    for wrong in (other.read_bytes(), kept[:-1], kept[:-1] + bytes([kept[-1] ^ 1]), b"", b"\x03" + kept[1:]):
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
    assert len(secret(fresh, "a")) == 32
    assert not aside.exists()


def test_of_gateways_that_start_together_one_makes_the_keys(tmp_path: Path) -> None:
    """Each ends up with the same master key: what one of them seals, all can read."""
    started = [Keyring.open(tmp_path / "keys") for _ in range(8)]
    with ThreadPoolExecutor(len(started)) as at_once:
        list(at_once.map(lambda keyring: keyring.prepare(fresh=True), started))
        list(at_once.map(lambda keyring: keyring.create("a"), started))
    assert len({secret(keyring, "a") for keyring in started}) == 1
    with ThreadPoolExecutor(len(started)) as at_once:
        signing = list(at_once.map(lambda keyring: SigningKeys(tmp_path / "audit", keyring), started))
    assert len({one.current.public for one in signing}) == 1


# --- generations ---------------------------------------------------------------------------------


def test_generations_of_a_key_differ_and_the_older_ones_can_be_forgotten(tmp_path: Path, keyring: Keyring) -> None:
    keyring.create("a")
    other = Keyring.open(tmp_path / "keys")
    assert (keyring.newest("a"), other.newest("a"), keyring.newest("b")) == (1, 1, 0)
    first = secret(keyring, "a")
    keyring.create("a", 2)
    assert (keyring.newest("a"), other.newest("a")) == (2, 2)
    second = secret(other, "a")
    assert secret(keyring, "a", 1) == first != second == secret(keyring, "a", 2)
    (path,) = (path for path in files(tmp_path) if path.name.endswith(".2.key"))
    wrapped = [one.read_bytes() for one in files(tmp_path) if one.parent.name == "galleries" and one != path]
    keyring.forget("a", 2)
    keyring.forget("a", 2)
    for one in (keyring, other, Keyring.open(tmp_path / "keys")):
        assert (one.newest("a"), one.cipher("a", 1), one.key("a", 1)) == (2, None, None)
        assert secret(one, "a") == second
        assert not one.destroyed("a")
    assert not any(old in one.read_bytes() for old in wrapped for one in files(tmp_path))
    keyring.create("a", 3)
    keyring.destroy("a", 1)
    assert [one.name for one in files(tmp_path) if one.parent.name == "galleries" and one.suffix == ".key"] == []
    assert (keyring.newest("a"), other.newest("a"), other.cipher("a", 3)) == (0, 0, None)


# --- wrapping anew -------------------------------------------------------------------------------


def everything(keyring: Keyring, tmp_path: Path) -> list[bytes]:
    sealed = keyring.system.encrypt(bytes(12), b"", b"")
    signing = SigningKeys(tmp_path / "keys" / "audit", keyring).current.public
    return [sealed, signing, secret(keyring, "a"), secret(keyring, "b", 1), secret(keyring, "b", 2)]


def stocked_keys(tmp_path: Path, keyring: Keyring) -> list[bytes]:
    keyring.create("a")
    keyring.create("b")
    keyring.create("b", 2)
    return everything(keyring, tmp_path)


def test_keys_are_wrapped_by_a_new_master_key_and_the_old_one_is_destroyed(tmp_path: Path, keyring: Keyring) -> None:
    before = stocked_keys(tmp_path, keyring)
    other = Keyring.open(tmp_path / "keys")
    master = (tmp_path / "keys" / "master.key").read_bytes()
    done = keyring.rewrap(["a", "b"])
    assert (done.keys, done.left) == (5, 0)
    assert (tmp_path / "keys" / "master.key").read_bytes() != master
    assert all(master not in path.read_bytes() for path in files(tmp_path))
    assert sorted((tmp_path / "keys").glob("master*")) == [tmp_path / "keys" / "master.key"]
    # In a process that knew the old one too, which also makes keys under the new one.
    for one in (keyring, other, Keyring.open(tmp_path / "keys")):
        assert everything(one, tmp_path) == before
    other.create("c")
    assert secret(Keyring.open(tmp_path / "keys"), "c") == secret(keyring, "c")


@pytest.mark.parametrize("writes", range(9))
def test_wrapping_anew_may_break_off_anywhere_and_goes_on(
    tmp_path: Path, keyring: Keyring, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stocked_keys(tmp_path, keyring)
    left = iter(range(writes))

    def until_power_is_lost(path: Path, content: bytes) -> None:
        if next(left, None) is None:
            raise PowerLost
        write_durably(path, content)

    monkeypatch.setattr(keys, "write_durably", until_power_is_lost)
    try:
        keyring.rewrap(["a", "b"])
        assert writes >= 7
    except PowerLost:
        assert writes < 7
    monkeypatch.undo()
    after = Keyring.open(tmp_path / "keys")
    after.prepare(fresh=False)
    assert everything(after, tmp_path) == before
    assert after.rewrap(["a", "b"]).left == 0
    assert everything(Keyring.open(tmp_path / "keys"), tmp_path) == before
    assert sorted((tmp_path / "keys").glob("master*")) == [tmp_path / "keys" / "master.key"]


def test_keys_of_the_first_format_are_read_and_wrapped_anew(tmp_path: Path) -> None:
    """As releases before wrote them: no id of what wrapped them, and a gallery's key under the gallery's name."""
    directory = tmp_path / "keys"
    (directory / "galleries").mkdir(parents=True)
    master, data = os.urandom(32), {name: os.urandom(32) for name in ("system", "gallery:a", "gallery:gone")}
    write_durably(directory / "master.key", master)
    for name, key in data.items():
        nonce = os.urandom(12)
        digest = hashlib.sha256(name.removeprefix("gallery:").encode()).hexdigest()
        path = directory / ("system.key" if name == "system" else f"galleries/{digest}.key")
        write_durably(path, b"\x01" + nonce + AESGCM(master).encrypt(nonce, key, name.encode()))
    keyring = Keyring.open(directory)
    keyring.prepare(fresh=False)
    assert secret(keyring, "a") == data["gallery:a"]
    # One whose gallery nobody knows can only be left as it is, and so is what it is wrapped under.
    assert keyring.rewrap(["a"])[::2] == (2, 1)
    again = Keyring.open(directory)
    assert secret(again, "a") == data["gallery:a"]
    assert secret(again, "gone") == data["gallery:gone"]
    assert again.rewrap(["a", "gone"])[::2] == (1, 0)
    assert sorted(directory.glob("master*")) == [directory / "master.key"]
    assert secret(Keyring.open(directory), "gone") == data["gallery:gone"]


class PowerLost(Exception):
    """Nothing is written from here on."""
