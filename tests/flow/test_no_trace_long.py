"""Law 6, the long form: 10,000 probes through every transport of a served process, then a search of every file that it
keeps, its logs, metrics and memory; and of every file again after a gallery was erased."""

from __future__ import annotations

import asyncio
import base64
import shutil
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from matcher_service.client import MatcherClient, Probes, References
from matcher_service.terms import Outcome, SpaceId
from matcher_service.wire import matcher_pb2 as pb
from tests.flow.test_no_trace import forms, unit
from tests.running_service import DAY_MS
from tests.served_process import Served, served

DIMENSION = 64
EACH = 2500
MESSAGE = 250
SPACE = SpaceId("test", 1, DIMENSION)
# Eight bytes of a form are looked up at every place of a file; longer ones that begin so are then compared.
HEAD = 8


class Wanted:
    """Byte strings that must not be found, looked for all at once."""

    def __init__(self, sets: Iterable[dict[str, bytes]]) -> None:
        self._by_head: dict[bytes, list[tuple[str, bytes]]] = {}
        for one in sets:
            for name, form in one.items():
                self._by_head.setdefault(form[:HEAD], []).append((name, form))
        heads = np.frombuffer(b"".join(self._by_head), dtype="<u8")
        self._heads = np.sort(heads)

    def found(self, content: bytes) -> set[str]:
        names: set[str] = set()
        for shift in range(HEAD):
            usable = (len(content) - shift) // HEAD * HEAD
            if usable <= 0:
                continue
            words = np.frombuffer(content, dtype="<u8", count=usable // HEAD, offset=shift)
            at = np.minimum(np.searchsorted(self._heads, words), len(self._heads) - 1)
            for place in np.flatnonzero(self._heads[at] == words).tolist():
                begin = shift + place * HEAD
                for name, form in self._by_head[content[begin : begin + HEAD]]:
                    if content[begin : begin + len(form)] == form:
                        names.add(name)
        return names

    def found_below(self, folder: Path) -> set[str]:
        return {name for path in folder.rglob("*") if path.is_file() for name in self.found(path.read_bytes())}


def test_the_search_finds_every_form_wherever_it_stands(tmp_path: Path) -> None:
    """The search proves itself: one of each form, planted at any offset, is found."""
    rows = np.random.default_rng(1).normal(size=(50, DIMENSION)).astype(np.float32)
    wanted = Wanted(forms(row) for row in rows)
    for name, form in forms(rows[7]).items():
        for offset in range(HEAD):
            (tmp_path / "file").write_bytes(b"x" * (1000 + offset) + form + b"y" * 77)
            assert name in wanted.found_below(tmp_path), (name, offset)
    (tmp_path / "file").write_bytes(np.random.default_rng(2).bytes(100_000))
    assert wanted.found_below(tmp_path) == set()


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = http.post(path, json=body)
    assert answer.is_success, answer.text
    return answer.json()


def prepare(http: httpx.Client, centre: NDArray[np.float32]) -> None:
    now_ms = time.time_ns() // 1_000_000
    space = SPACE._asdict()
    post(http, "/v1/spaces", {"space": space, "centre": centre.tolist()})
    terms = {"controller": "a force", "lawful_basis": "PACE 1984 s.64A", "purpose": "a test", "retention_ms": DAY_MS}
    post(http, "/v1/galleries", {"gallery_id": "g", "kind": "custody", "space": space, "threshold": 0.95, **terms})
    window = {"gallery_ids": ["g"], "closes_at_ms": now_ms + DAY_MS // 2}
    deployment = {"deployment_id": "op", "probe_age_ms_max": 60_000, "authorised_by": "Supt. Gray", "reason": "a test"}
    post(http, "/v1/deployments", {**window, **deployment})
    post(http, "/v1/cases", {**window, "case_reference": "c", "requested_by": "DC Hall", "purpose": "a test"})


async def over_grpc(served_at: Served, streamed: NDArray[np.float32], alone: NDArray[np.float32]) -> list[Outcome]:
    async with MatcherClient(f"127.0.0.1:{served_at.grpc_port}", served_at.token) as client:

        def messages(rows: NDArray[np.float32], prefix: str) -> Iterable[Probes]:
            for begin in range(0, len(rows), MESSAGE):
                some = rows[begin : begin + MESSAGE]
                ids = [f"{prefix}{begin + at}" for at in range(len(some))]
                captured = [time.time_ns() // 1_000_000] * len(some)
                yield Probes(space=SPACE, probe_ids=ids, templates=some, captured_at_ms=captured, deployment_id="op")

        async def stream() -> AsyncIterator[Probes]:
            for one in messages(streamed, "s"):
                yield one

        outcomes = [one.decision.outcome async for one in client.identify_stream(stream())]
        for one in messages(alone, "u"):
            outcomes += [decision.outcome for decision in (await client.identify(one)).decisions]
        return outcomes


async def enrol(served_at: Served, templates: NDArray[np.float32]) -> None:
    async def once() -> AsyncIterator[References]:
        ids = [f"r{at}" for at in range(len(templates))]
        yield References(gallery_id="g", space=SPACE, reference_ids=ids, subject_ids=ids, templates=templates)

    async with MatcherClient(f"127.0.0.1:{served_at.grpc_port}", served_at.token) as client:
        assert len([one async for one in client.enrol_stream(once())]) == len(templates)


def over_http(http: httpx.Client, as_json: NDArray[np.float32], as_protobuf: NDArray[np.float32]) -> list[str]:
    outcomes: list[str] = []
    for begin in range(0, len(as_json), MESSAGE):
        rows = as_json[begin : begin + MESSAGE]
        probes = [
            {
                "probe_id": f"j{at}",
                "template": row.tolist() if at % 2 else base64.b64encode(row.astype("<f4").tobytes()).decode(),
                "captured_at_ms": time.time_ns() // 1_000_000,
            }
            for at, row in enumerate(rows)
        ]
        # One message under the case: how much may be searched under one in an hour is limited.
        authority = {"deployment_id": "op"} if begin else {"case_reference": "c"}
        answer = post(http, "/v1/identify", {"space": SPACE._asdict(), **authority, "probes": probes})
        outcomes += [one["outcome"] for one in answer["decisions"]]
    for begin in range(0, len(as_protobuf), MESSAGE):
        rows = as_protobuf[begin : begin + MESSAGE]
        request = pb.IdentifyRequest(
            space=pb.TemplateSpace(**SPACE._asdict()),
            dtype=pb.FLOAT16,
            templates=rows.astype("<f2").tobytes(),
            probe_ids=[f"b{at}" for at in range(len(rows))],
            captured_at_ms=[time.time_ns() // 1_000_000] * len(rows),
            deployment_id="op",
        )
        kind = {"Content-Type": "application/x-protobuf"}
        answer = http.post("/v1/identify", content=request.SerializeToString(), headers=kind)
        assert answer.is_success, answer.text
        outcomes += [pb.Outcome.Name(one.outcome) for one in pb.IdentifyReply.FromString(answer.content).decisions]
    return outcomes


@pytest.mark.slow
def test_law_6_ten_thousand_probes_leave_nothing_and_an_erased_gallery_leaves_no_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(10_000)
    centre = (rng.normal(size=DIMENSION) * 0.1).astype(np.float32)
    probes = rng.normal(size=(4 * EACH, DIMENSION)).astype(np.float32)
    enrolled = rng.normal(size=(200, DIMENSION)).astype(np.float32)
    adapted = unit((probes - centre).astype(np.float64))
    halves = unit(probes.astype(np.float16).astype(np.float64) - centre)
    wanted = Wanted(forms(row) for rows in (probes, adapted, halves) for row in rows)
    held = Wanted(forms(row) for rows in (enrolled, unit((enrolled - centre).astype(np.float64))) for row in rows)
    kept, log = tmp_path / "kept", tmp_path / "kept/log"
    kept.mkdir()
    with served(kept / "data", log, MATCHER_LOG_LEVEL="debug") as service:
        headers = {"Authorization": f"Bearer {service.token}"}
        base = f"http://127.0.0.1:{service.http_port}"
        with httpx.Client(base_url=base, headers=headers, timeout=120) as http:
            prepare(http, centre)
            asyncio.run(enrol(service, enrolled))
            outcomes: list[str] = list(asyncio.run(over_grpc(service, probes[:EACH], probes[EACH : 2 * EACH])))
            outcomes += over_http(http, probes[2 * EACH : 3 * EACH], probes[3 * EACH :])
            assert len(outcomes) == 4 * EACH
            assert set(outcomes) == {"NO_CANDIDATE"}
            metrics = http.get("/metrics").content
            audit = http.get("/v1/audit", params={"limit": 1000}).content
            assert wanted.found(metrics) == wanted.found(audit) == set()
            assert wanted.found_below(kept) == set()
            tell_what_memory_holds(service, wanted, tmp_path)
            # Erasure: the sealed bytes of every reference, and its template in any form, are in no file any more.
            with sqlite3.connect(kept / "data/gallery.db") as database:
                stored = database.execute("SELECT sealed FROM entry WHERE sealed IS NOT NULL").fetchall()
            assert len(stored) == 200
            sealed = Wanted({"sealed": one[16:48]} for (one,) in stored)
            assert sealed.found_below(kept) == {"sealed"}
            (key_file,) = (kept / "data/keys/galleries").glob("*.key")
            key = Wanted([{"key": key_file.read_bytes()[13:45]}])
            assert http.delete("/v1/galleries/g", params={"reason": "over"}).is_success
            until = time.monotonic() + 120
            while sealed.found_below(kept) and time.monotonic() < until:
                time.sleep(1)
            assert sealed.found_below(kept) == held.found_below(kept) == key.found_below(kept) == set()
        assert service.terminate() == 0
    assert wanted.found_below(kept) == sealed.found_below(kept) == held.found_below(kept) == set()


def tell_what_memory_holds(service: Served, wanted: Wanted, folder: Path) -> None:
    """Best effort: an allocator does not clear what it frees, so what is seen is told and not judged."""
    if shutil.which("gcore") is None:
        print("no gcore: memory was not looked at")
        return
    command = ["gcore", "-o", str(folder / "core"), str(service.process.pid)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    cores = list(folder.glob("core.*"))
    if ran.returncode or not cores:
        print(f"no core was made: {ran.stderr[-300:]}")
        return
    names: set[str] = set()
    size = 0
    with cores[0].open("rb") as core:
        while block := core.read(64 << 20):
            size += len(block)
            names |= wanted.found(block)
    cores[0].unlink()
    print(f"in {size >> 20} MiB of process memory there are forms: {sorted(names) or 'none'}")
