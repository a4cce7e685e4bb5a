"""SIGKILL while keys are rotated: nothing that was sealed is lost, and the next process goes on where it was."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

from matcher_service import audit
from matcher_service.clock import SystemClock
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.gallery.resealing import SqlKeyRotations
from matcher_service.settings import StorageSettings
from matcher_service.terms import EntryKind
from tests.fault.test_log_kill import template, writers

ROUNDS = 10  # and as many more as it takes for one to come as far as to retire a key
ROUNDS_MAX = 100
STEPS_MAX = 25

# As in test_log_kill: forks a child for each round, which says what it has done until it is killed.
ROTATORS = """
import asyncio, os, sys
from pathlib import Path
import numpy as np
from matcher_service.clock import SystemClock
from matcher_service.gallery import resealing
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.gallery.resealing import SqlKeyRotations
from matcher_service.settings import StorageSettings
from matcher_service.terms import *
from tests.fault.test_log_kill import SPACE, DIMENSION, template

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

async def rotate(directory, number):
    resealing.ENTRIES_AT_ONCE = 16
    log = await open_sqlite_log(directory, directory / "keys", StorageSettings(), SystemClock())
    if not await log.head():
        gallery = Gallery("g", GalleryKind.CUSTODY, "c", "l", "p", 10**10, SPACE, 0.5)
        space = TemplateSpace(SPACE, np.zeros(DIMENSION, np.float32))
        await log.append([RegisterSpace(space), CreateGallery(gallery)], Actor("a"))
    say("open", os.getpid())

    async def enrolling():
        turn = 0
        while True:
            names = [f"{number}.{turn}.{at}" for at in range(8)]
            turn += 1
            templates = np.frombuffer(b"".join(map(template, names)), "<f2").reshape(-1, DIMENSION)
            receipts = await log.enrol(EnrolRows("g", names, names, templates, np.zeros(8, np.int64)), Actor("a"))
            for name in names:
                say("enrolled", name)

    async def rotating():
        rotations = SqlKeyRotations(log)
        while True:
            if await rotations.reseal_some():
                say("step", "resealed")
            elif await rotations.retire({}, SystemClock().wall_ms()):
                say("step", "retired")
            else:
                told = await rotations.rotate("g", "x", True, Actor("a"))
                say("step", "rotated")

    await asyncio.gather(enrolling(), rotating())

directory = Path(sys.argv[1])
say("ready", 0)
for line in sys.stdin:
    child = os.fork()
    if not child:
        asyncio.run(rotate(directory, int(line)))
    os.waitpid(child, 0)
    say("killed", 0)
"""


def test_law_5_sigkill_while_keys_are_rotated_loses_no_template(tmp_path: Path) -> None:
    """Laws 5 and 10: the kill comes after so many steps, not after so long, so that it falls into a rotation however
    slow the machine is."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    enrolled: set[str] = set()
    steps: dict[str, int] = {}
    newest = 0
    with writers(tmp_path, ROTATORS) as crew:
        lines = crew.lines()
        assert next(lines)[0] == "ready"
        for number in range(ROUNDS_MAX):
            if number >= ROUNDS and "retired" in steps:
                break
            crew.ask(number)
            word, pid = next(lines)
            assert word == "open"
            left = dice.randrange(1, STEPS_MAX)
            for word, *rest in lines:
                if word == "killed":
                    break
                if word == "enrolled":
                    enrolled.add(rest[0])
                else:
                    steps[rest[0]] = steps.get(rest[0], 0) + 1
                    left -= 1
                    if not left:
                        os.kill(int(pid), signal.SIGKILL)
            newest = asyncio.run(readable(tmp_path, enrolled))
    print(f"{len(enrolled)} enrolments, {steps}, generation {newest}")
    assert steps["retired"] >= 1
    assert newest > 2


async def readable(directory: Path, enrolled: set[str]) -> int:
    """Every template that was acknowledged can be read, also when the rotation has been finished; the newest
    generation of the key."""
    log = await open_sqlite_log(directory, directory / "keys", StorageSettings(), SystemClock())
    try:
        for _ in range(2):
            found = {one.reference_id: one.template for one in await log.read(0, 100_000, [EntryKind.ENROL])}
            assert enrolled <= found.keys()
            assert all(found[name] == template(name) for name in enrolled)
            rotations = SqlKeyRotations(log)
            if enrolled and random.random() < 0.5:
                while await rotations.reseal_some():
                    pass
                await rotations.retire({}, SystemClock().wall_ms())
        audit.verify(await log.audit(0, 100_000))
        return log.keyring.newest("g")
    finally:
        await log.close()
