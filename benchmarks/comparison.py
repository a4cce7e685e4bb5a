"""This service beside what one would use instead, at one gallery, in one run: `python -m benchmarks.comparison --help`.

The rivals are FastAPI over a flat FAISS index with JSON lists (baseline_flat_json.py), and LanceDB without an
approximate index, in process as it is meant to be used, if it is installed. Every answer of every path is compared
with a flat scan of the stored rows: the best reference at or above the threshold, or none. Servers and LanceDB have
one core, the client another, where there are two.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import uvloop
from numpy.typing import NDArray
from rich.console import Console

from benchmarks import closed_loop
from benchmarks.closed_loop import JSON, PROTOBUF, Driven
from benchmarks.galleries import gallery, probes
from benchmarks.served import Service, enrol, pinned, prepare, service, two_cores
from matcher_service.terms import SpaceId
from matcher_service.wire import matcher_pb2 as pb

GALLERY = "watchlist"

# The answer of a message: for each probe the best reference, "" for none.
Answer = tuple[str, ...]


class Row(NamedTuple):
    """`identical`: share of the answers that are those of the flat scan. `busy`: of a core, by the client."""

    what: str
    probes_per_message: int
    probes_per_second: float
    identical: float
    busy: float


def truth_of(stored: NDArray[np.float16], asked: NDArray[np.float32], threshold: float) -> list[str]:
    """The id of the best row at or above the threshold, "" if there is none."""
    scores = asked.astype(np.float64) @ stored.astype(np.float64).T
    best = scores.argmax(axis=1)
    return [f"r{row}" if scores[probe, row] >= threshold else "" for probe, row in enumerate(best)]


def protobuf_answer(reply: bytes) -> Answer:
    return tuple(
        one.candidates[0].reference_id if one.candidates else "" for one in pb.IdentifyReply.FromString(reply).decisions
    )


def json_answer(reply: bytes) -> Answer:
    return tuple(
        one["candidates"][0]["reference_id"] if one.get("candidates") else ""
        for one in orjson.loads(reply)["decisions"]
    )


def baseline_answer(reply: bytes) -> Answer:
    return tuple(found[0]["reference_id"] if found else "" for found in orjson.loads(reply))


def row_of(what: str, driven: Driven, answer: Callable[[bytes], Answer], truth: Sequence[Answer], size: int) -> Row:
    same = 0
    for reply, question in zip(driven.replies, driven.questions, strict=True):
        at = question if question >= 0 else int(pb.IdentifyReply.FromString(reply).message_id)
        same += answer(reply) == truth[at]
    count = len(driven.replies)
    return Row(what, size, count * size / driven.seconds, same / max(1, count), driven.client_busy)


async def ours(served: Service, space: SpaceId, asked: NDArray[np.float32], truth: Sequence[str],
               args: argparse.Namespace, notes: Console) -> list[Row]:  # fmt: skip
    rows = []
    for size in args.message:
        answers = cut(truth, size)
        slices = [asked[first : first + size] for first in range(0, len(asked), size)]
        encoded = [closed_loop.protobuf_request(space, one, message_id=str(at)) for at, one in enumerate(slices)]
        texts = [closed_loop.json_request(space, one, "numbers") for one in slices]
        kept = {"seconds": args.seconds, "warm_up_s": args.warm_up}
        notes.print(f"this service, {size} a message")
        driven = await closed_loop.over_grpc_streams(
            served.grpc_address, served.token, encoded, streams=4, window=12, **kept
        )
        rows.append(row_of("this service, gRPC stream", driven, protobuf_answer, answers, size))
        for name, kind, bodies, read in (
            ("HTTP protobuf", PROTOBUF, encoded, protobuf_answer),
            ("HTTP JSON lists", JSON, texts, json_answer),
        ):
            driven = await closed_loop.over_http(
                served.http_port, "/v1/identify", served.token, kind, bodies, connections=args.connections, **kept
            )
            rows.append(row_of(f"this service, {name}", driven, read, answers, size))
    return rows


@contextmanager
def baseline(folder: Path, stored: NDArray[np.float16], cores: Collection[int] | None) -> Iterator[int]:
    """The afternoon's server on `cores`; yields its port."""
    file = folder / "references.npy"
    np.save(file, stored.astype(np.float32))
    with (
        pinned(cores),
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.baseline_flat_json", str(file)], stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()
            process.wait()


async def theirs(port: int, asked: NDArray[np.float32], truth: Sequence[str], args: argparse.Namespace,
                 notes: Console) -> list[Row]:  # fmt: skip
    rows = []
    for size in args.message:
        notes.print(f"FastAPI and FAISS, {size} a request")
        bodies = [
            orjson.dumps({"templates": asked[first : first + size].tolist(), "threshold": args.threshold})
            for first in range(0, len(asked), size)
        ]
        driven = await closed_loop.over_http(
            port, "/search", "", JSON, bodies, seconds=args.seconds, connections=args.connections,
            warm_up_s=args.warm_up,
        )  # fmt: skip
        rows.append(row_of("FastAPI and FAISS flat, JSON lists", driven, baseline_answer, cut(truth, size), size))
    return rows


def cut(truth: Sequence[str], size: int) -> list[Answer]:
    return [tuple(truth[first : first + size]) for first in range(0, len(truth), size)]


def lancedb_rate(
    folder: str, stored: NDArray[np.float32], asked: NDArray[np.float32], truth: Sequence[str], threshold: float,
    seconds: float,
) -> Row:  # fmt: skip
    """LanceDB, one search after another. Its dot distance is 1 - score."""
    import lancedb
    import pyarrow

    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(stored.ravel()), stored.shape[1])
    ids = pyarrow.array([f"r{row}" for row in range(len(stored))])
    table = lancedb.connect(folder).create_table("references", pyarrow.table({"id": ids, "vector": vectors}))
    same = done = 0
    began = None
    for number in itertools.count(-8):  # the first ones open files
        if number == 0:
            began = time.perf_counter()
        if began is not None and time.perf_counter() - began >= seconds:
            break
        at = number % len(asked)
        found = table.search(asked[at]).distance_type("dot").limit(1).select(["id", "_distance"]).to_list()
        best = found[0]["id"] if found and 1 - found[0]["_distance"] >= threshold else ""
        if began is not None:
            done += 1
            same += best == truth[at]
    took = time.perf_counter() - (began or 0.0)
    return Row("LanceDB in process, no index", 1, done / took, same / max(1, done), float("nan"))


def lancedb_row(cores: Collection[int] | None, *given: Any) -> Row:
    """In a process of its own, so that it has its cores to itself from the start."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool, pinned(cores):
        return pool.submit(lancedb_rate, *given).result()


async def measure(args: argparse.Namespace, folder: Path, notes: Console) -> list[Row]:
    cores = two_cores()
    server_cores, client_cores = cores or (None, None)
    notes.print("server and client on a core each" if cores else "one core only: server and client share it")
    space = SpaceId("bench", 1, args.dimension)
    stored = gallery("isotropic", args.references, args.dimension, args.seed)
    count = max(args.message) * 16
    asked = probes(stored, "isotropic", count, args.threshold + 0.2, args.seed + 1, args.mated).vectors
    truth = truth_of(stored, asked, args.threshold)
    rows: list[Row] = []
    with service(folder / "ours", cores=server_cores) as served, pinned(client_cores):
        prepare(served, space, {GALLERY: args.threshold})
        await enrol(served, space, GALLERY, stored)
        await asyncio.sleep(args.settle)
        rows += await ours(served, space, asked, truth, args, notes)
    with baseline(folder, stored, server_cores) as port, pinned(client_cores):
        rows += await theirs(port, asked, truth, args, notes)
    if importlib.util.find_spec("lancedb"):
        notes.print("LanceDB")
        rows.append(
            lancedb_row(server_cores, str(folder / "lance"), stored.astype("f4"), asked, truth, args.threshold,
                        args.seconds)
        )  # fmt: skip
    return rows


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| what | probes a message | probes/s | answers as the flat scan | client busy |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        busy = "" if row.busy != row.busy else f"{row.busy:.0%}"
        lines.append(
            f"| {row.what} | {row.probes_per_message} | {row.probes_per_second:,.0f} | {row.identical:.2%} | {busy} |"
        )
    if not any(row.what.startswith("LanceDB") for row in rows):
        lines += ["", "LanceDB is not installed here, so it was not measured."]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--mated", type=float, default=0.02, help="share of the probes with a mate: each is an alert")
    parser.add_argument("--message", type=int, nargs="+", default=[1, 32], help="probes of a message")
    parser.add_argument("--connections", type=int, default=16, help="HTTP connections")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each")
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--settle", type=float, default=3.0, help="seconds for the index to come to rest")
    parser.add_argument("--seed", type=int, default=20_250_101)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    notes = Console(stderr=True)
    notes.print(f"seed {args.seed}, {args.references:,} references of {args.dimension} dimensions")
    with tempfile.TemporaryDirectory() as folder:
        rows = uvloop.run(measure(args, Path(folder), notes))
    if args.json:
        for row in rows:
            print(json.dumps({name: None if value != value else value for name, value in row._asdict().items()}))
    else:
        print(markdown(rows))
    if any(row.what.startswith("this service") and row.identical < 1 for row in rows):
        sys.exit("this service gave another answer than the flat scan of the stored rows")


if __name__ == "__main__":
    main()
