"""Law 5 with the log in PostgreSQL: the server is killed, stopped and frozen under several gateways that write."""

from __future__ import annotations

import asyncio
import queue
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matcher_service import audit
from matcher_service.clock import SystemClock
from matcher_service.gallery.postgres import open_postgres_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import (
    Actor,
    CreateGallery,
    EntryKind,
    Gallery,
    GalleryKind,
    RegisterSpace,
    SpaceId,
    TemplateSpace,
)
from tests.cluster.served_postgres import ServedPostgres, served_postgres

pytestmark = pytest.mark.cluster

DIMENSION = 64
SPACE = SpaceId("kill", 1, DIMENSION)
WRITERS = 3
LINE_S_MAX = 60.0

# One gateway: enrols in batches of its own and withdraws some of what it enrolled; what is not acknowledged it repeats
# with the same keys, as a client would. It says what was acknowledged, and nothing before.
WRITER = """
import asyncio, os, sys
from pathlib import Path
from matcher_service.clock import SystemClock
from matcher_service.errors import LogUnavailable, NotFound
from matcher_service.gallery.postgres import open_postgres_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import Actor, Enrol, Receipt, Withdraw
from tests.cluster.test_postgres_kill import template

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

async def write(number, url, keys):
    log = await open_postgres_log(url, keys, StorageSettings(), SystemClock())
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, stop.set)
    say("open")
    acknowledged = []

    async def enrolling(writer):
        turn = 0
        while not stop.is_set():
            names = [f"{number}.{writer}.{turn}.{at}" for at in range(1 + 37 * turn % 90)]
            turn += 1
            wishes = [Enrol("g", name, name, template(name), 0, False, name) for name in names]
            while True:
                try:
                    answers = await log.append(wishes, Actor(f"gateway {number}"))
                    break
                except LogUnavailable as refusal:
                    assert refusal.retryable
                    say("refused")
                    await asyncio.sleep(0.05)
            for name, receipt in zip(names, answers):
                assert isinstance(receipt, Receipt), receipt
                say("enrolled", name, receipt.sequence)
                acknowledged.append(name)

    async def withdrawing():
        while not stop.is_set():
            await asyncio.sleep(0.002)
            if acknowledged:
                name = acknowledged.pop(0)
                say("withdrawing", name)
                while True:
                    try:
                        (answer,) = await log.append([Withdraw("g", name, "x")], Actor(f"gateway {number}"))
                        break
                    except LogUnavailable:
                        await asyncio.sleep(0.05)
                # Not live: done by an attempt whose outcome was not known.
                assert isinstance(answer, Receipt | NotFound), answer
                say("withdrawn", name)

    await asyncio.gather(enrolling(0), enrolling(1), withdrawing())
    await log.close()
    say("closed")

asyncio.run(write(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
"""


def template(name: str) -> bytes:
    return np.random.default_rng(list(name.encode())).standard_normal(DIMENSION).astype("<f2").tobytes()


class Writers:
    """The gateways, and what they have said so far."""

    def __init__(self, url: str, keys: Path) -> None:
        self.said: queue.Queue[list[str]] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in range(WRITERS):
            process = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(number), url, str(keys)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.append(process)
            reader = threading.Thread(target=self._listen, args=(process,))
            reader.start()
            self._threads.append(reader)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.said.put(line.decode().split())
        self.said.put(["ended"])

    def wait_for(self, word: str, times: int, heard: list[list[str]]) -> None:
        """Read on until this word has been said so often."""
        while times:
            words = self.said.get(timeout=LINE_S_MAX)
            assert words[0] != "ended", "a gateway died"
            heard.append(words)
            times -= words[0] == word

    def stop(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            with process:
                """Its pipes are closed and its end is taken note of."""


@contextmanager
def writers(url: str, keys: Path) -> Iterator[Writers]:
    crew = Writers(url, keys)
    try:
        yield crew
    finally:
        crew.end()


async def stock(url: str, keys: Path) -> None:
    log = await open_postgres_log(url, keys, StorageSettings(), SystemClock())
    gallery = Gallery("g", GalleryKind.CUSTODY, "c", "l", "p", 10**10, SPACE, 0.5)
    space = TemplateSpace(SPACE, np.zeros(DIMENSION, np.float32))
    await log.append([RegisterSpace(space), CreateGallery(gallery)], Actor("a"))
    await log.close()


def harm(served: ServedPostgres, how: str) -> None:
    match how:
        case "kill":
            served.kill()
            served.start()
        case "restart":
            served.stop()
            served.start()
        case "freeze":
            served.pause()
            time.sleep(1.0)
            served.resume()


@pytest.mark.timeout(200)
def test_law_5_a_server_that_is_killed_under_several_gateways_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Laws 1, 5 and 7: every receipt holds after each harm, every enrolment is there once, the chain names it all."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    keys = tmp_path / "keys"
    heard: list[list[str]] = []
    with served_postgres() as served:
        url = served.create("log")
        asyncio.run(stock(url, keys))
        with writers(url, keys) as crew:
            crew.wait_for("open", WRITERS, heard)
            for how in ("kill", "freeze", "kill", "restart", "kill"):
                crew.wait_for("enrolled", dice.randrange(100, 400), heard)
                harm(served, how)
            crew.wait_for("enrolled", 200, heard)
            crew.stop()
            crew.wait_for("closed", WRITERS, heard)
        asyncio.run(holds(url, keys, heard))


async def holds(url: str, keys: Path, heard: list[list[str]]) -> None:
    enrolled = {words[1]: int(words[2]) for words in heard if words[0] == "enrolled"}
    asked = {words[1] for words in heard if words[0] == "withdrawing"}
    withdrawn = {words[1] for words in heard if words[0] == "withdrawn"}
    said = Counter(words[0] for words in heard)
    print(said)
    log = await open_postgres_log(url, keys, StorageSettings(), SystemClock(), read_only=True)
    try:
        entries = await log.read(0, 1_000_000)
        live: set[str] = set()
        while page := await log.references("g", max(live, default="", key=str.encode), 10_000):
            live |= {one.reference_id for one in page}
        chain = await log.audit(0, 1_000_000)
    finally:
        await log.close()
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
    stored = Counter(entry.reference_id for entry in entries if entry.kind is EntryKind.ENROL)
    assert max(stored.values()) == 1, "an enrolment was stored twice"
    by_name = {entry.reference_id: entry for entry in entries if entry.kind is EntryKind.ENROL}
    for name, sequence in enrolled.items():
        assert by_name[name].sequence == sequence
        assert by_name[name].template == template(name)
    ended = Counter(entry.reference_id for entry in entries if entry.kind is EntryKind.WITHDRAW)
    assert set(ended.values()) == {1}
    assert withdrawn <= ended.keys() <= asked
    assert not withdrawn & live
    assert enrolled.keys() - asked <= live
    # Each gateway stopped in order, so nothing was left without an answer.
    assert stored.keys() == enrolled.keys()

    audit.verify(chain)
    named: list[int] = []
    for record in chain:
        facts: Any = record["facts"]
        named += [one for first, last in facts["sequences"] for one in range(first, last + 1)]
    assert sorted(named) == list(range(1, len(entries) + 1))
