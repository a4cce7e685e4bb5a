"""Which partitions a shard owns, and which of them its files hold: one small file beside the segments.

The file tells what a restart may believe of the segment files. It is written before rows are let go or taken over,
and again when the segment files show it, so that whatever moment a crash comes at, rows of partitions that are not
held are ended before anything is answered from them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from matcher_service.errors import InvalidInput
from matcher_service.partitions import NO_PARTITIONS, Partitions, from_hex, to_hex

NAME = "assignment.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Assignment:
    """`configured` is what the shard was started with when `wanted`, what it is to own, was last decided. The files
    of the index hold `held`, kept up to the sequence in their manifest; unless `settled` they may have rows of other
    partitions too, which must be ended. The files aside hold `gaining`, as far as they go. `log` identifies the log
    that all of this was read from; "" until it was read."""

    configured: Partitions
    wanted: Partitions
    held: Partitions
    gaining: Partitions = NO_PARTITIONS
    settled: bool = True
    log: str = ""

    def started_with(self, configured: Partitions) -> Assignment:
        """What holds for a start with this configuration. One that has changed overrules what was assigned live;
        partitions that are no longer wanted are no longer held."""
        wanted = self.wanted if configured == self.configured else configured
        held = self.held & wanted
        gaining = self.gaining if self.gaining <= wanted - held else NO_PARTITIONS
        return replace(
            self,
            configured=configured,
            wanted=wanted,
            held=held,
            gaining=gaining,
            settled=self.settled and held == self.held,
        )


def encode(assignment: Assignment) -> bytes:
    """One line of JSON and one with its SHA-256."""
    said: dict[str, Any] = {name: to_hex(getattr(assignment, name)) for name in _SETS}
    said |= {"format": FORMAT, "settled": assignment.settled, "log": assignment.log}
    body = orjson.dumps(said)
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def decode(content: bytes) -> Assignment | None:
    """None if it is not what `encode` wrote: then nothing is known of the files beside it."""
    body, _, rest = content.partition(b"\n")
    if rest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        return None
    try:
        said = orjson.loads(body)
        if said["format"] != FORMAT:
            return None
        sets = {name: from_hex(said[name]) for name in _SETS}
        return Assignment(**sets, settled=bool(said["settled"]), log=str(said["log"]))
    except (ValueError, KeyError, TypeError, InvalidInput):
        return None


def read(directory: Path) -> Assignment | None:
    """What the file in this directory says; None if there is none or it is damaged."""
    try:
        return decode((directory / NAME).read_bytes())
    except FileNotFoundError:
        return None


_SETS = ("configured", "wanted", "held", "gaining")
