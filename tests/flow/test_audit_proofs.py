"""Law 7: whoever keeps a checkpoint elsewhere finds every change to what it covers."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from matcher_service import audit, audit_proofs, merkle
from matcher_service.errors import DataDamaged, InvalidInput, LogUnavailable, NotFound
from matcher_service.gallery.log import SqlGalleryLog, open_sqlite_log
from matcher_service.gallery.proofs import SqlAuditProofs
from matcher_service.gallery.signing import SigningKeys
from matcher_service.settings import StorageSettings
from matcher_service.terms import Actor, AuditEvent, Checkpoint
from tests.fake_clock import FakeClock
from tests.running_service import whole_service

TAMPERINGS = 1000
CLERK = Actor("clerk")


class Kept:
    """A log whose audit has `size` records, and the checkpoint that somebody keeps elsewhere."""

    def __init__(self, folder: Path, log: SqlGalleryLog) -> None:
        self.folder = folder
        self.log = log
        self.proofs = SqlAuditProofs(log, SigningKeys(folder / "keys/audit", log.keyring))

    async def fill(self, size: int) -> None:
        for at in range(size):
            detail = {"why": f"reason {at}"} if at % 3 else {}
            await self.log.record([AuditEvent("clerk", "noted", f"thing {at}", detail)], [])

    async def lines(self) -> list[bytes]:
        checkpoint = await self.proofs.checkpoint()
        return list(audit_proofs.export_lines(await self.log.audit(0, checkpoint.size), checkpoint))


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    log = await open_sqlite_log(tmp_path, tmp_path / "keys", StorageSettings(), FakeClock())
    try:
        yield Kept(tmp_path, log)
    finally:
        await log.close()


async def test_checkpoints_cover_every_record_and_are_not_made_twice(kept: Kept) -> None:
    await kept.fill(5)
    first = await kept.proofs.checkpoint()
    assert first == await kept.proofs.checkpoint()
    leaves = [bytes.fromhex(str(one["hash"])) for one in await kept.log.audit(0, 100)]
    assert (first.size, first.root) == (len(leaves), merkle.root(leaves).hex())
    await kept.fill(3)
    second = await kept.proofs.checkpoint()
    assert second.size == first.size + 3
    assert await kept.proofs.checkpoints(9) == [second, first]


async def test_proofs_hold_for_what_they_prove(kept: Kept) -> None:
    await kept.fill(4)
    older = await kept.proofs.checkpoint()
    await kept.fill(7)
    newest, path = await kept.proofs.consistency(older.size)
    roots = bytes.fromhex(older.root), bytes.fromhex(newest.root)
    assert merkle.verify_consistency(older.size, newest.size, *roots, [bytes.fromhex(one) for one in path])
    for record in await kept.log.audit(0, 100):
        newest, path = await kept.proofs.inclusion(int(str(record["index"])))
        leaf, place = bytes.fromhex(str(record["hash"])), int(str(record["index"])) - 1
        proof = [bytes.fromhex(one) for one in path]
        assert merkle.verify_inclusion(leaf, place, newest.size, proof, bytes.fromhex(newest.root))
    for asked in (kept.proofs.inclusion(newest.size + 1), kept.proofs.consistency(newest.size + 1)):
        with pytest.raises(NotFound):
            await asked


async def test_a_single_proof_is_checked_without_the_service_and_shows_nothing_else(kept: Kept) -> None:
    await kept.fill(6)
    older = await kept.proofs.checkpoint()
    await kept.fill(9)
    records = await kept.log.audit(0, 100)
    for record in records:
        checkpoint, path = await kept.proofs.inclusion(int(str(record["index"])))
        answer = {"index": record["index"], "checkpoint": asdict(checkpoint), "proof": path}
        shown = audit_proofs.verify_proof(json.dumps(answer).encode(), json.dumps(record).encode(), checkpoint)
        assert (shown.index, shown.checkpoint, shown.tied, shown.key_known) == (record["index"], checkpoint, True, True)
    fitting = json.dumps(answer).encode(), json.dumps(record).encode()
    assert not audit_proofs.verify_proof(*fitting, older).tied
    assert not audit_proofs.verify_proof(*fitting).key_known
    # Without its detail, which may have been erased, a record is the same leaf.
    assert audit_proofs.verify_proof(fitting[0], json.dumps(record | {"salt": None, "detail": None}).encode())
    forged_root = replace(checkpoint, root="00" * 32)
    for wrong_answer, wrong_record, kept_one, key, said in (
        (answer, record | {"actor": "another"}, None, "", "not covered"),
        (answer, record | {"detail": {"why": "another"}}, None, "", "detail"),
        (answer | {"proof": path[:-1]}, record, None, "", "not covered"),
        (answer | {"proof": [path[1], path[0], *path[2:]]}, record, None, "", "not covered"),
        (answer, record, None, "00" * 32, "not signed by the key known"),
        (answer, record, forged_root, "", "another root"),
        (answer | {"checkpoint": asdict(forged_root)}, record, None, "", "not signed"),
    ):
        with pytest.raises(DataDamaged, match=said):
            audit_proofs.verify_proof(
                json.dumps(wrong_answer).encode(), json.dumps(wrong_record).encode(), kept_one, key
            )
    for text, told, field in (
        (b"[]", fitting[1], "proof"),
        (b'{"index":1,"older":1}', fitting[1], "proof"),
        (fitting[0], None, "record"),
        (fitting[0], b"[]", "record"),
        (fitting[0], json.dumps(records[0]).encode(), "record"),
    ):
        with pytest.raises(InvalidInput) as refused:
            audit_proofs.verify_proof(text, told)
        assert refused.value.field == field


async def test_a_consistency_proof_is_checked_against_the_checkpoint_kept_elsewhere(kept: Kept) -> None:
    await kept.fill(6)
    older = await kept.proofs.checkpoint()
    await kept.fill(9)
    newest, path = await kept.proofs.consistency(older.size)
    answer = {"older": older.size, "checkpoint": asdict(newest), "proof": path}
    shown = audit_proofs.verify_proof(json.dumps(answer).encode(), kept=older)
    assert (shown.older, shown.checkpoint, shown.tied) == (older.size, newest, True)
    key = SigningKeys(kept.folder / "keys/audit", kept.log.keyring).current
    rewritten = audit_proofs.signed_checkpoint(older.size, bytes(32), 1, key.public, key.sign)
    with pytest.raises(DataDamaged, match="no past state"):
        audit_proofs.verify_proof(json.dumps(answer).encode(), kept=rewritten)
    for other in (None, newest):
        with pytest.raises(InvalidInput) as refused:
            audit_proofs.verify_proof(json.dumps(answer).encode(), kept=other)
        assert refused.value.field == "checkpoint"


async def test_a_key_hands_over_to_the_next_and_a_stranger_does_not(kept: Kept) -> None:
    await kept.fill(2)
    first = await kept.proofs.checkpoint()
    key = await kept.proofs.rotate_key("yearly", CLERK)
    await kept.fill(2)
    lines = await kept.lines()
    verified = audit_proofs.verify_export(lines, first)
    assert (verified.checkpoint.key, verified.key_known, verified.compared) == (key, True, first.size)
    assert key != first.key
    # The same after a restart, which reads the newest key.
    assert SigningKeys(kept.folder / "keys/audit", kept.log.keyring).current.public.hex() == key
    # A key that the audit does not lead to: another one signs the same records.
    stranger = SigningKeys(kept.folder / "elsewhere", kept.log.keyring).current
    root = bytes.fromhex(verified.checkpoint.root)
    forged = audit_proofs.signed_checkpoint(verified.records, root, 1, stranger.public, stranger.sign)
    forged_lines = [*lines[:-1], *audit_proofs.export_lines([], forged)]
    assert not audit_proofs.verify_export(forged_lines).key_known
    with pytest.raises(DataDamaged, match="nothing leads to"):
        audit_proofs.verify_export(forged_lines, first)
    with pytest.raises(DataDamaged, match="nothing leads to"):
        audit_proofs.verify_export(forged_lines, key=key)


async def test_only_a_checkpoint_kept_elsewhere_shows_that_the_service_itself_rewrote_its_past(kept: Kept) -> None:
    """Who holds the signing key can make another audit, whole in itself; not one that begins with the old one."""
    await kept.fill(6)
    checkpoint = await kept.proofs.checkpoint()
    records = await kept.log.audit(0, 100)
    previous = audit.CHAIN_START
    for record in records:
        record["actor"] = "somebody else" if record["index"] == 3 else record["actor"]
        record["previous"] = previous
        record["hash"] = previous = audit.leaf_hash(record)
    key = SigningKeys(kept.folder / "keys/audit", kept.log.keyring).current
    root = merkle.root([bytes.fromhex(str(one["hash"])) for one in records])
    forged = audit_proofs.signed_checkpoint(len(records), root, 1, key.public, key.sign)
    lines = list(audit_proofs.export_lines(records, forged))
    assert audit_proofs.verify_export(lines).records == len(records)
    with pytest.raises(DataDamaged, match="kept elsewhere"):
        audit_proofs.verify_export(lines, checkpoint)


async def test_1000_random_tamperings_with_the_store_are_all_found(kept: Kept) -> None:
    """Edits, deletions, swaps and truncations of the audit's table, by someone who can write to the database."""
    await kept.fill(30)
    checkpoint = await kept.proofs.checkpoint()
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    with sqlite3.connect(kept.folder / "gallery.db", isolation_level=None) as database:
        database.execute("PRAGMA synchronous=OFF")
        for number in range(TAMPERINGS):
            before = rows(database)
            database.execute("BEGIN IMMEDIATE")
            what = tamper(database, draw, checkpoint.size)
            database.execute("COMMIT")
            assert rows(database) != before, what
            with pytest.raises((DataDamaged, LogUnavailable)):
                await verified(kept, checkpoint)
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM audit_record")
            database.executemany("INSERT INTO audit_record VALUES (?, ?, ?, ?, ?, ?)", before)
            database.execute("COMMIT")
            if number % 100 == 0:
                await verified(kept, checkpoint)


def rows(database: sqlite3.Connection) -> list[Any]:
    return database.execute("SELECT * FROM audit_record ORDER BY position").fetchall()


async def verified(kept: Kept, checkpoint: Checkpoint) -> None:
    # What the tamperer left: its own newest checkpoint is no judge, the one kept elsewhere is.
    records = await kept.log.audit(0, 1000)
    audit_proofs.verify_export(audit_proofs.export_lines(records, checkpoint), checkpoint)


def tamper(database: sqlite3.Connection, draw: random.Random, size: int) -> str:
    at, other = draw.sample(range(1, size + 1), 2)
    match draw.choice(["edit", "seal", "rehash", "delete", "swap", "cut"]):
        case "edit":
            (text,) = database.execute("SELECT chained FROM audit_record WHERE position = ?", (at,)).fetchone()
            place = draw.randrange(len(text))
            changed = text[:place] + bytes([(text[place] + draw.randrange(1, 256)) % 256]) + text[place + 1 :]
            database.execute("UPDATE audit_record SET chained = ? WHERE position = ?", (changed, at))
            return f"byte {place} of {at}"
        case "seal":
            # Only records with a detail have something sealed.
            at = draw.choice([one for one, *_, sealed, _, _ in rows(database) if sealed is not None])
            wrong = draw.choice([None, draw.randbytes(90)])
            database.execute("UPDATE audit_record SET sealed = ? WHERE position = ?", (wrong, at))
            return f"detail of {at}"
        case "rehash":
            # The best forger: changes a record and makes every later link and hash fit.
            previous = ""
            for position, text, *_ in rows(database)[at - 1 :]:
                record = dict(audit.json.loads(text))
                if previous:
                    record["previous"] = previous
                else:
                    record["actor"] = "forger"
                record["hash"] = previous = audit.leaf_hash(record)
                update = "UPDATE audit_record SET chained = ?, hash = ? WHERE position = ?"
                database.execute(update, (audit.canonical(record), previous, position))
            return f"rehashed from {at}"
        case "delete":
            database.execute("DELETE FROM audit_record WHERE position = ?", (at,))
            return f"deleted {at}"
        case "swap":
            steps = ((0, at), (at, other), (other, 0))
            for after, before in steps:
                database.execute("UPDATE audit_record SET position = ? WHERE position = ?", (after, before))
            return f"swapped {at} and {other}"
        case _:
            database.execute("DELETE FROM audit_record WHERE position >= ?", (at,))
            return f"cut at {at}"


async def test_random_tamperings_with_an_export_are_all_found(kept: Kept) -> None:
    await kept.fill(20)
    lines = await kept.lines()
    checkpoint = await kept.proofs.checkpoint()
    assert audit_proofs.verify_export(lines, checkpoint).records == len(lines) - 1
    whole = b"".join(lines)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(300):
        one, other = sorted(draw.sample(range(len(lines)), 2))
        place = draw.randrange(len(whole))
        changed = whole[:place] + bytes([(whole[place] + draw.randrange(1, 256)) % 256]) + whole[place + 1 :]
        forged = draw.choice(
            [
                changed.splitlines(keepends=True),
                [*lines[:one], *lines[one + 1 :]],
                [*lines[:one], lines[other], *lines[one + 1 : other], lines[one], *lines[other + 1 :]],
                lines[: one + 1],
                [*lines[:one], lines[other], *lines[one:]],
                whole[:place].splitlines(keepends=True),
                [*lines, lines[one]],
            ]
        )
        with pytest.raises(DataDamaged):
            audit_proofs.verify_export(forged, checkpoint)


async def test_every_flipped_bit_of_an_export_is_found(kept: Kept) -> None:
    # One record without a detail and one with: what is hexadecimal would read as well in the other case.
    await kept.fill(2)
    whole = b"".join(await kept.lines())
    checkpoint = await kept.proofs.checkpoint()
    for place in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(DataDamaged):
            audit_proofs.verify_export(bytes(changed).splitlines(keepends=True), checkpoint)
    records = [json.loads(line) for line in whole.splitlines()[:-1]]
    for one in records:
        swapped = [record | {"salt": "00" * 32} if record is one else record for record in records]
        with pytest.raises(DataDamaged, match="its detail is not the one"):
            audit.verify(swapped)


async def test_a_detail_that_is_gone_before_its_time_is_found_and_one_that_is_due_is_not(kept: Kept) -> None:
    await kept.log.record([AuditEvent("clerk", "noted", "thing", {"why": "a reason"})], [])
    records = await kept.log.audit(0, 10)
    due_ms = records[0]["facts"]["detail_until_ms"]  # type: ignore[index]
    bare = [{**one, "salt": None, "detail": None} for one in records]
    key = SigningKeys(kept.folder / "keys/audit", kept.log.keyring).current
    root = merkle.root([bytes.fromhex(str(one["hash"])) for one in records])
    early, late = (audit_proofs.signed_checkpoint(1, root, at, key.public, key.sign) for at in (due_ms - 1, due_ms))
    with pytest.raises(DataDamaged, match="before its time"):
        audit_proofs.verify_export(audit_proofs.export_lines(bare, early))
    assert audit_proofs.verify_export(audit_proofs.export_lines(bare, late)).details_erased == 1


async def test_a_cut_store_is_found_without_any_checkpoint_kept_elsewhere(kept: Kept) -> None:
    await kept.fill(5)
    checkpoint = await kept.proofs.checkpoint()
    with sqlite3.connect(kept.folder / "gallery.db") as database:
        database.execute("DELETE FROM audit_record WHERE position = ?", (checkpoint.size,))
    with pytest.raises(DataDamaged, match="it was cut"):
        await kept.proofs.checkpoint()


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b'{"size":-1}', b"\xff"])
def test_what_is_no_checkpoint_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidInput):
        audit_proofs.decode_checkpoint(text)


async def test_the_service_signs_its_audit_by_itself_and_on_demand(tmp_path: Path) -> None:
    async with whole_service(tmp_path / "data", storage={"audit_checkpoint_every_s": 0.05}) as service:
        proofs = service.running.service.proofs
        assert proofs is not None
        await service.space(8)
        # The gauge is set after the checkpoint is stored.
        while not service.running.service.metrics.audit_checkpoint._value.get():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        made = await proofs.checkpoints(1)
        base = f"http://127.0.0.1:{service.running.http_port}/v1/audit"
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {service.running.token}"}) as http:
            asked = (await http.post(f"{base}/checkpoints")).json()
            assert asked["size"] >= made[0].size
            listed = (await http.get(f"{base}/checkpoints")).json()["checkpoints"]
            assert asked in listed
            proved = (await http.get(f"{base}/proofs/inclusion", params={"index": 1})).json()
            record = (await http.get(base)).json()["records"][0]
            end = proved["checkpoint"]
            proof = [bytes.fromhex(one) for one in proved["proof"]]
            leaf, root = bytes.fromhex(record["hash"]), bytes.fromhex(end["root"])
            assert merkle.verify_inclusion(leaf, 0, end["size"], proof, root)
            answer = await http.get(f"{base}/proofs/consistency", params={"older": 10**6})
            assert (answer.status_code, answer.json()["field"]) == (404, "older")
            assert (await http.post(f"{base}/keys")).status_code == 400
    # Nothing but its owner reads the keys, and none of them lies there bare.
    for path in (tmp_path / "data/keys/audit").iterdir():
        assert path.stat().st_mode & 0o077 == 0
