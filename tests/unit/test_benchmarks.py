"""Short forms of the benchmarks: they run, their answers are checked, and they print what they promise.

Nothing here asserts a time. The servers are real and in processes of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import closed_loop, comparison, gateway, open_loop, soak
from benchmarks.served import service
from matcher_service.terms import SpaceId
from matcher_service.wire import matcher_pb2 as pb

ROOT = Path(__file__).parents[2]
SMALL = ("--references", "300", "--dimension", "16")
LIMIT_S = 120


def ended(*command: str) -> subprocess.CompletedProcess[str]:
    """The command run to its end; if it takes too long, it and whatever it started are killed."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def rows(*command: str) -> list[dict[str, Any]]:
    process = ended(*command, "--json")
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_the_access_benchmark_answers_every_probe_with_everything_on_and_with_it_taken_out() -> None:
    (found,) = rows("-m", "benchmarks.access", *SMALL, "--message", "4", "--rounds", "2", "--seconds", "0.3",
                    "--warm-up", "0.1", "--settle", "0", "--alerts", "0.01")  # fmt: skip
    assert len(found["with_access"]) == len(found["without"]) == 2
    assert min(*found["with_access"], *found["without"]) > 0
    assert found["ratio_least"] <= found["ratio"] <= found["ratio_most"]


def test_the_gateway_benchmark_gives_each_path_with_the_search_real_and_free() -> None:
    found = rows("-m", "benchmarks.gateway", *SMALL, "--message", "4", "--seconds", "0.3", "--warm-up", "0.1",
                 "--settle", "0", "--station-seconds", "0.01")  # fmt: skip
    paths = ("grpc stream", "http protobuf", "http json", "http json base64")
    assert [(row["path"], row["search"]) for row in found] == [(p, s) for s in ("real", "free") for p in paths]
    for row in found:
        rate, index = row["probes_per_second"], row["index_probes_per_second"]
        assert isinstance(rate, float)
        assert isinstance(index, float)
        assert rate > 0
        assert row["ratio"] == pytest.approx(rate / index)
        assert isinstance(row["stations_us_per_probe"], dict)
        assert tuple(row["stations_us_per_probe"]) == gateway.STATIONS


def test_the_open_loop_answers_or_counts_every_message(tmp_path: Path) -> None:
    drawn = tmp_path / "latency.png"
    command = ["-m", "benchmarks.open_loop", *SMALL, "--message", "4", "--streams", "2", "--seconds", "0.4",
               "--settle", "0", "--rates", "100", "400", "--png", str(drawn), "--json"]  # fmt: skip
    # A busy machine may make a run invalid, which is an exit code of its own and not what is tested here.
    process = ended(*command)
    found = [json.loads(line) for line in process.stdout.splitlines()]
    assert [row["offered"] for row in found if row["what"] == "sweep"] == [100, 400], process.stderr[-3000:]
    assert (process.returncode == 0) == all(row["valid"] for row in found)
    for row in found:
        assert row["refused"] == 0
        assert row["sent"] > 0
        assert row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_the_soak_tells_a_leak_from_a_warm_up() -> None:
    def samples(megabytes: Callable[[float], float]) -> list[soak.Sample]:
        return [soak.Sample(at, megabytes(at), 30, 10, 0) for at in range(0, 1800, 10)]

    assert abs(soak.slope_mb_per_min(samples(lambda at: min(at, 300) + 200), 300)) < 1e-9
    assert soak.slope_mb_per_min(samples(lambda at: 200 + 2 * at / 60), 300) == pytest.approx(2)


def test_the_soak_answers_rightly_while_streams_and_references_come_and_go() -> None:
    gallery = ("--references", "300", "--dimension", "256", "--mated", "0.2")
    process = ended("-m", "benchmarks.soak", *gallery, "--seconds", "2", "--warm-up-s", "0", "--every-s", "0.5",
                    "--rate", "200", "--clerk-s", "0.1", "--json")  # fmt: skip
    # Two seconds have a slope of their own, which may fail it: that is not what is tested here.
    found = json.loads(process.stdout)
    assert found["wrong"] == 0, process.stderr[-3000:]
    assert found["outcomes"]["ALERT"] > 0
    assert found["enrolled"] == found["withdrawn"] > 0
    assert found["streams"] > 0


def test_a_late_generator_makes_the_run_invalid() -> None:
    tally = open_loop.Tally(1.0)
    for _ in range(100):
        tally.lag.record_value(2000)
    assert not tally.row("sweep", 1.0, 1, 1.0, 0).valid
    punctual = open_loop.Tally(1.0)
    punctual.lag.record_value(200)
    assert punctual.row("sweep", 1.0, 1, 1.0, 0).valid


def test_latency_counts_from_the_intended_sending_and_late_answers_are_no_goodput() -> None:
    tally = open_loop.Tally(deadline_s=1.0, ends=10.0)
    reply = pb.IdentifyReply(decisions=[pb.Decision(outcome=pb.ALERT), pb.Decision(outcome=pb.REJECTED)])
    tally.arrived = 2
    tally.take(reply, intended=1.0, sending=1.4, now=1.5)
    tally.take(reply, intended=1.0, sending=1.4, now=2.5)
    row = tally.row("sweep", 4.0, 2, 1.0, 0)
    assert row.goodput == 1
    assert row.in_time == 1 / 4
    assert row.refused == 2
    assert row.max_ms == pytest.approx(1500, rel=0.01)
    assert row.service_p50_ms == pytest.approx(100, rel=0.01)


def test_the_knee_is_the_last_rate_before_the_first_that_was_not_kept_up_with() -> None:
    def at(rate: float, p99_ms: float, *, valid: bool = True, in_time: float = 1.0) -> open_loop.Row:
        times = (1.0, 1.0, p99_ms, p99_ms, p99_ms, 1.0, 0.1)
        return open_loop.Row("sweep", rate, rate * in_time, in_time, 1, 0, 0, *times, valid)

    assert open_loop.knee_of([at(100, 2), at(200, 3), at(300, 500), at(400, 3)], 100) == 200
    assert open_loop.knee_of([at(100, 2), at(200, 3, in_time=0.9)], 100) == 100
    assert open_loop.knee_of([at(100, 2, valid=False), at(200, 3)], 100) is None
    table = open_loop.markdown([at(100, 2), at(200, 300)], 100)
    head, line, *_ = table.splitlines()
    assert head.count("|") == line.count("|")
    assert "Knee: 100 probes/s" in table


def test_what_is_appended_to_an_encoded_message_replaces_its_id_and_deadline() -> None:
    space, row = SpaceId("bench", 1, 2), np.ones((1, 2), np.float32)
    body = closed_loop.protobuf_request(space, row, message_id="old", deadline_ms=2000)
    own = pb.IdentifyRequest(message_id="new", deadline_ms=7)
    named = pb.IdentifyRequest.FromString(body + own.SerializeToString())
    assert (named.message_id, named.deadline_ms, named.space.name) == ("new", 7, "bench")


def test_the_comparison_checks_every_answer_of_every_path() -> None:
    found = rows("-m", "benchmarks.comparison", *SMALL, "--message", "1", "4", "--seconds", "0.3", "--warm-up", "0.1",
                 "--settle", "0", "--mated", "0.5")  # fmt: skip
    assert {row["what"] for row in found} >= {
        "this service, gRPC stream",
        "this service, HTTP protobuf",
        "this service, HTTP JSON lists",
        "FastAPI and FAISS flat, JSON lists",
    }
    for row in found:
        assert row["identical"] == 1.0, row
        assert row["probes_per_second"], row


def test_an_answer_that_is_not_the_flat_scans_lowers_the_share() -> None:
    replies = [pb.IdentifyReply(message_id=str(at), decisions=[pb.Decision()]).SerializeToString() for at in (0, 1)]
    driven = closed_loop.Driven(replies, [-1, -1], 1.0, 0.0)
    row = comparison.row_of("one", driven, comparison.protobuf_answer, [("",), ("r7",)], 1)
    assert row.identical == 0.5


def locust(*more: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "locust", "-f", "benchmarks/locustfile.py", "--headless", "--only-summary", "--message", "2"]
    return ended(*command, *SMALL, "--duration-s", "1.5", "--users-most", "10", *more)


@pytest.mark.parametrize(
    ("objective", "code"),
    [
        (("--shape", "match-day", "--slo-p99-ms", "60000"), 0),
        (("--shape", "ramp", "--slo-p99-ms", "0.001"), 1),
    ],
)
def test_locust_searches_over_every_path_and_its_exit_code_says_whether_the_objectives_held(
    objective: Sequence[str], code: int, tmp_path: Path
) -> None:
    run = locust(*objective, "--csv", str(tmp_path / "run"), "--html", str(tmp_path / "run.html"))
    assert run.returncode == code, run.stdout[-3000:] + run.stderr[-3000:]
    assert ("objective missed" in run.stdout) == bool(code)
    table = (tmp_path / "run_stats.csv").read_text()
    for name in ("identify json", "identify protobuf", "identify call", "identify stream", "enrol", "withdraw"):
        assert name in table
    assert (tmp_path / "run.html").stat().st_size > 1000


def test_the_import_benchmark_says_how_fast_references_became_searchable() -> None:
    (found,) = rows("-m", "benchmarks.importing", *SMALL, "--settled-s", "0.2")
    assert found["references"] == 300
    assert isinstance(found["searchable_references_per_second"], float)


def test_the_search_benchmark_finds_the_same_with_every_exact_scanner() -> None:
    found = rows("-m", "benchmarks.search", "--data", "spread07", "--references", "3000", "--dimension", "64",
                 "--batch", "1", "8", "--threshold", "0.5", "--quick", "--rounds", "1",
                 "--seconds", "0.01")  # fmt: skip
    ours = [row for row in found if row["scanner"] == "certified scan"]
    assert {(row["batch"], row["threshold"]) for row in ours} >= {(1, 0.5), (8, 0.5)}
    assert len(found) > 2 * len(ours)
    for row in found:
        assert row["references"] == 3000
        assert row["dimension"] == 64
        assert row["queries_per_second"] > 0
        assert (row["mates_found"], row["identical"]) == (1.0, 1.0)
    assert all(0 <= row["certified"] <= 1 for row in ours)


def test_the_engine_benchmark_answers_rightly_in_every_state_and_beside_a_fresh_index() -> None:
    found = rows("-m", "benchmarks.engine", "--references", "3000", "--dimension", "64", "--batch", "8",
                 "--rounds", "1", "--turns-seconds", "0.1")  # fmt: skip
    assert [row["when"] for row in found] == ["fresh", "restarted", "20% withdrawn", "compacted"]
    assert [row["references"] for row in found] == [3000, 3000, 2400, 2400]
    assert [row["of_fresh"] is None for row in found] == [True, True, False, False]
    assert {row["identical"] for row in found} == {1.0}


def test_a_service_that_does_not_start_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start"), service(tmp_path, settings={"MATCHER_LOG_LEVEL": "loud"}):
        pass


def test_a_service_of_a_benchmark_is_gone_when_its_block_ends(tmp_path: Path) -> None:
    with service(tmp_path) as served:
        began = served.cpu_s()
        assert served.resident_bytes() > 0
    assert began >= 0
    assert not Path(f"/proc/{served.process_id}").exists()
