"""Law 5 as the kernel sees it: what SIGKILL cannot show is a sync that was never asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, os, sys
from pathlib import Path
import numpy as np
from matcher_service.clock import SystemClock
from matcher_service.gallery.log import open_sqlite_log
from matcher_service.settings import StorageSettings
from matcher_service.terms import *

async def main(directory):
    log = await open_sqlite_log(directory, directory / "keys", StorageSettings(), SystemClock())
    space = SpaceId("face", 1, 4)
    gallery = Gallery("g", GalleryKind.CUSTODY, "c", "l", "p", 10**10, space, 0.5)
    await log.append([RegisterSpace(TemplateSpace(space, np.zeros(4, np.float32)))], Actor("a"))
    os.write(1, b"CREATING")
    await log.append([CreateGallery(gallery)], Actor("a"))
    os.write(1, b"ENROLLING")
    (receipt,) = await log.append([Enrol("g", "r", "s", b"12345678")], Actor("a"))
    os.write(1, b"ACKNOWLEDGED %d" % receipt.sequence)
    await log.record([AuditEvent("a", "b", "c", {"d": "e"})], [])
    os.write(1, b"RECORDED")
    await log.close()

asyncio.run(main(Path(sys.argv[1])))
"""

CALL = re.compile(r"^\d+\s+(?P<name>\w+)\((?P<arguments>.*)$")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """The file system calls of one process, in the order in which they began, as (name, arguments)."""
    strace = shutil.which("strace")
    if strace is None:
        if os.environ.get("CI") == "true":
            pytest.fail("strace is not installed, and CI must have it")
        pytest.skip("strace is not installed")
    directory = tmp_path_factory.mktemp("traced")
    traced = "trace=write,pwrite64,pwritev,fsync,fdatasync,rename,renameat,renameat2"
    done = subprocess.run(
        [
            *(strace, "-f", "-y", "-s", "16", "-e", traced, "-o", str(directory / "trace")),
            *(sys.executable, "-c", PROGRAM, str(directory / "data")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        if os.environ.get("CI") == "true":
            pytest.fail(f"processes cannot be traced, and CI must be able to: {done.stderr}")
        pytest.skip("processes cannot be traced here")
    assert done.returncode == 0, done.stderr
    found = []
    for line in (directory / "trace").read_text().splitlines():
        call = CALL.match(line)
        if call:
            found.append((call["name"], call["arguments"]))
    return found


def between(trace: list[tuple[str, str]], first: str, last: str) -> list[tuple[str, str]]:
    """The calls from one word on standard output to another."""
    said = {
        word: place
        for place, (name, arguments) in enumerate(trace)
        for word in (first, last)
        if name == "write" and arguments.startswith("1<") and f'"{word}' in arguments
    }
    return trace[said[first] + 1 : said[last]]


def places(calls: list[tuple[str, str]], names: str, file: str) -> list[int]:
    return [place for place, (name, arguments) in enumerate(calls) if name in names.split() and file in arguments]


@pytest.mark.parametrize(("first", "last"), [("ENROLLING", "ACKNOWLEDGED"), ("ACKNOWLEDGED", "RECORDED")])
def test_law_5_the_write_ahead_log_is_synced_between_the_write_and_the_receipt(
    trace: list[tuple[str, str]], first: str, last: str
) -> None:
    """Law 5: an enrolment is acknowledged, and an event recorded, after it is durable."""
    calls = between(trace, first, last)
    written = places(calls, "pwrite64 pwritev write", "gallery.db-wal>")
    synced = places(calls, "fsync fdatasync", "gallery.db-wal>")
    assert written
    assert synced
    assert max(written) < max(synced)


def test_law_10_a_key_is_durable_before_its_gallery_is_committed(trace: list[tuple[str, str]]) -> None:
    """Law 10: written aside, synced, renamed, its directory synced; only then is the gallery written."""
    calls = between(trace, "CREATING", "ENROLLING")
    (written,) = places(calls, "write", ".key.tmp>")
    (synced,) = places(calls, "fsync fdatasync", ".key.tmp>")
    (renamed,) = places(calls, "rename renameat renameat2", ".key.tmp")
    (directory,) = places(calls, "fsync", "/galleries>")
    committed = places(calls, "pwrite64 pwritev write", "gallery.db-wal>")
    assert written < synced < renamed < directory < min(committed)
