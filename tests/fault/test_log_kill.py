"""Law 5 at the log itself: SIGKILL at any moment loses nothing acknowledged and brings nothing withdrawn back."""

from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from matcher_service import audit
from matcher_service.clock import SystemClock
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import EntryKind, SpaceId

DIMENSION = 64
SPACE = SpaceId("kill", 1, DIMENSION)
ROUNDS = 12
LINE_S_MAX = 60.0

# Waits for rounds; forks for each a child that writes until it is killed. Forked, because importing takes longer
# than a round.
WRITERS = """
import asyncio, os, sys
from pathlib import Path
import numpy as np
from matcher_service.clock import SystemClock
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import *
from tests.fault.test_log_kill import SPACE, DIMENSION, template

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

async def write(directory, number):
    log = await open_sqlite_log(directory, directory / "keys", StorageSettings(), SystemClock())
    if not await log.head():
        gallery = Gallery("g", GalleryKind.CUSTODY, "c", "l", "p", 10**10, SPACE, 0.5)
        space = TemplateSpace(SPACE, np.zeros(DIMENSION, np.float32))
        await log.append([RegisterSpace(space), CreateGallery(gallery)], Actor("a"))
    say("open", os.getpid())
    acknowledged = []

    async def enrolling(writer):
        turn = 0
        while True:
            names = [f"{number}.{writer}.{turn}.{at}" for at in range(1 + 7 * turn % 40)]
            turn += 1
            if writer:
                templates = np.frombuffer(b"".join(map(template, names)), "<f2").reshape(-1, DIMENSION)
                rows = EnrolRows("g", names, names, templates, np.zeros(len(names), np.int64), False, names[0])
                receipts = await log.enrol(rows, Actor("a"))
            else:
                wishes = [Enrol("g", name, name, template(name), 0, False, name) for name in names]
                receipts = await log.append(wishes, Actor("a"))
            for name, receipt in zip(names, receipts):
                say("enrolled", receipt.sequence, name)
                acknowledged.append(name)

    async def withdrawing():
        while True:
            await asyncio.sleep(0.001)
            if acknowledged:
                name = acknowledged.pop(0)
                say("withdrawing", 0, name)
                (receipt,) = await log.append([Withdraw("g", name, "x")], Actor("a"))
                say("withdrawn", receipt.sequence, name)

    async def erasing():
        while True:
            await asyncio.sleep(0.03)
            await log.erase(0)

    await asyncio.gather(enrolling(0), enrolling(1), withdrawing(), erasing())

directory = Path(sys.argv[1])
say("ready", 0)
for line in sys.stdin:
    child = os.fork()
    if not child:
        asyncio.run(write(directory, int(line)))
    os.waitpid(child, 0)
    say("killed", 0)
"""


def template(name: str) -> bytes:
    return np.random.default_rng(list(name.encode())).standard_normal(DIMENSION).astype("<f2").tobytes()


class Writers:
    """The process that forks the writers, and the lines that they write."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._rest = b""

    def ask(self, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()

    def lines(self) -> Iterator[list[str]]:
        """Whole lines as they come; a line cut off by a kill stays unread."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while True:
            while b"\n" not in self._rest:
                readable, _, _ = select.select([descriptor], [], [], LINE_S_MAX)
                assert readable, "the writers fell silent"
                chunk = os.read(descriptor, 1 << 16)
                assert chunk, "the writers ended"
                self._rest += chunk
            line, _, self._rest = self._rest.partition(b"\n")
            yield line.decode().split(" ", 2)


@contextmanager
def writers(directory: Path, script: str = WRITERS) -> Iterator[Writers]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        try:
            yield Writers(process)
        finally:
            process.kill()


def test_law_5_sigkill_at_random_moments_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Laws 5 and 7: after each kill every receipt holds, the chain verifies and names every entry."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    enrolled: dict[str, int] = {}
    withdrawn: dict[str, int] = {}
    uncertain: set[str] = set()
    kept: list[tuple[int, str, str]] = []
    with writers(tmp_path) as crew:
        lines = crew.lines()
        assert next(lines)[0] == "ready"
        for number in range(ROUNDS):
            crew.ask(number)
            word, pid = next(lines)
            assert word == "open"
            # By a timer, so that what the writer says is read all the while and never holds it up.
            fate = threading.Timer(dice.uniform(0.0, 0.3), os.kill, (int(pid), signal.SIGKILL))
            fate.start()
            for word, *rest in lines:
                if word == "killed":
                    break
                sequence, name = int(rest[0]), rest[1]
                if word == "enrolled":
                    enrolled[name] = sequence
                elif word == "withdrawing":
                    uncertain.add(name)
                else:
                    withdrawn[name] = sequence
            fate.join()
            kept = asyncio.run(holds(tmp_path, enrolled, withdrawn, uncertain, kept))
    print(f"{len(enrolled)} enrolments and {len(withdrawn)} withdrawals acknowledged, {len(kept)} entries")
    assert len(enrolled) > ROUNDS
    assert withdrawn


async def holds(
    directory: Path,
    enrolled: dict[str, int],
    withdrawn: dict[str, int],
    uncertain: set[str],
    kept: list[tuple[int, str, str]],
) -> list[tuple[int, str, str]]:
    """Compare what stands in the log with every receipt so far; returns the entries for the next comparison."""
    log = await open_sqlite_log(directory, directory / "keys", StorageSettings(), SystemClock())
    try:
        entries = await log.read(0, 1_000_000)
        live: set[str] = set()
        while page := await log.references("g", max(live, default="", key=str.encode), 10_000):
            live |= {one.reference_id for one in page}
        chain = await log.audit(0, 1_000_000)
    finally:
        await log.close()
    place = {(entry.kind, entry.reference_id): entry for entry in entries}
    for name, sequence in enrolled.items():
        entry = place[(EntryKind.ENROL, name)]
        assert entry.sequence == sequence
        if name not in uncertain:
            assert entry.template == template(name)
    for name, sequence in withdrawn.items():
        assert place[(EntryKind.WITHDRAW, name)].sequence == sequence
    assert enrolled.keys() - uncertain <= live
    assert not withdrawn.keys() & live
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
    now = [(entry.sequence, entry.kind.name, entry.reference_id) for entry in entries]
    assert now[: len(kept)] == kept, "an entry that had been read has changed"

    audit.verify(chain)
    named: list[int] = []
    for record in chain:
        facts: Any = record["facts"]
        if record["action"] != "template.erased":
            named += [one for first, last in facts["sequences"] for one in range(first, last + 1)]
    assert sorted(named) == list(range(1, len(entries) + 1))
    return now
