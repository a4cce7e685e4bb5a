"""The demo: the real server, the real client, real templates, and figures with ground truth.

It enrols five shots of 35 people, streams the other five shots of 40 people through the client as an edge node would,
then fills the galleries with synthetic references up to a realistic size and streams the same probes again.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from matcher_service.client import MatcherClient, ProbeAnswer, Probes, References
from matcher_service.demo import report
from matcher_service.demo.calibration import CALIBRATION_DRAWS, Calibration, calibrate
from matcher_service.demo.data import GALLERY_SUBJECTS, SPACE, Faces, enrolment, is_mated, load_faces, probes
from matcher_service.demo.distractors import raw_templates
from matcher_service.demo.report import Report, Run
from matcher_service.demo.server import Administration, Server, started
from matcher_service.demo.tally import latency, tally
from matcher_service.demo.thresholds import Part, fpir_limit, threshold_for_fpir
from matcher_service.errors import InvalidInput, MatcherError, ServiceFault
from matcher_service.terms import Decision, Deployment, Float32, Gallery, GalleryKind, Int64

REFERENCES_MAX = 20_000
# The share of unmated probes that may alert, over all galleries searched. Both thresholds are set from it.
FPIR_WANTED = 0.05
SEED = 1992

# An edge node: a camera's 25 frames a second with four faces in each.
FRAME_PROBES = 4
FRAME_S = 0.04
# At full speed: larger messages, as an edge sends them when it catches up, and every probe this many times.
BURST_PROBES = 64
BURST_ROUNDS = 10
ENROL_ROWS = 500
# A busy machine must not turn a probe into a missed mate; the latencies tell how long it took.
DEADLINE_S = 20.0

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Options:
    """`references`: how many there are in the end, synthetic ones included. `data_dir` None: a temporary directory,
    removed at the end; else an empty or new one, which is kept. Ports: 0 takes a free one."""

    references: int = REFERENCES_MAX
    data_dir: Path | None = None
    stay: bool = False
    as_json: bool = False
    http_port: int = 0
    grpc_port: int = 0


def demo(options: Options) -> int:
    """Run it and print the results; returns the exit code: 0 when every probe was answered, 1 when something failed,
    130 when interrupted. Progress goes to standard error, results to standard output."""
    progress_console, console = Console(stderr=True), Console()
    try:
        with _directory(options) as data_dir:
            return asyncio.run(_owned(_demo(options, data_dir, progress_console, console)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        progress_console.print("Interrupted; the server is stopped.")
        return 130
    except MatcherError as error:
        progress_console.print(f"matcher demo: {error}", markup=False)
        return 1


@contextmanager
def _directory(options: Options) -> Iterator[Path]:
    if options.data_dir is None:
        made = Path(tempfile.mkdtemp(prefix="matcher-demo-"))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return
    if options.data_dir.exists() and any(options.data_dir.iterdir()):
        raise InvalidInput(
            f"{options.data_dir} is not empty",
            field="data_dir",
            hint="name a new directory: the demo never adds to data that is there",
        )
    options.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    yield options.data_dir


async def _owned(work: Coroutine[Any, Any, int]) -> int:
    """Runs the work so that SIGTERM, like an interrupt, cancels it and lets it stop the server."""
    task = asyncio.create_task(work, name="demo")
    loop = asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, task.cancel)
    return await task


async def _demo(options: Options, data_dir: Path, progress_console: Console, console: Console) -> int:
    if not 0 <= options.references <= REFERENCES_MAX:
        raise InvalidInput(
            f"{options.references} is not between 0 and {REFERENCES_MAX}",
            field="references",
            hint="35 people calibrate no more than that",
        )
    faces = load_faces()
    enrolled, searched = enrolment(faces), probes(faces)
    with _Progress(progress_console) as progress:
        bar = progress.step("Learning centre and thresholds from shots 1-5", CALIBRATION_DRAWS)
        calibration = await asyncio.to_thread(
            calibrate, enrolled, np.random.default_rng([SEED, 1]), lambda done: progress.advance(bar, done)
        )
        synthetic_count = max(0, options.references - len(enrolled))
        real = Part(calibration.real_table, len(enrolled))
        full = (real, Part(calibration.synthetic_table, synthetic_count))
        threshold_real = threshold_for_fpir([real], FPIR_WANTED)
        threshold_full = max(threshold_real, threshold_for_fpir(full, FPIR_WANTED))

        bar = progress.step("Starting the server", None)
        async with (
            started(
                data_dir, data_dir / "server.log", http_port=options.http_port, grpc_port=options.grpc_port
            ) as server,
            Administration(server) as administration,
            MatcherClient(server.grpc_address, server.token, deadline_s=DEADLINE_S) as client,
        ):
            progress.done(bar, f"Server ready: {server.http_url}, gRPC {server.grpc_address}")
            job = _Job(client, progress, searched)
            await _set_up(administration, calibration, threshold_real)
            await job.enrol("Enrolling real references", _real_references(faces))
            runs = [
                await job.run(
                    "real references",
                    deployment_id="demo",
                    threshold=None,
                    applied=threshold_real,
                    limit=fpir_limit([real], threshold_real),
                )
            ]
            if synthetic_count:
                rng = np.random.default_rng([SEED, 2])
                await job.enrol(
                    "Enrolling synthetic references", _synthetic_references(calibration, synthetic_count, rng)
                )
                runs.append(
                    await job.run(
                        "synthetic added",
                        deployment_id="demo-same-threshold",
                        threshold=None,
                        applied=threshold_real,
                        limit=fpir_limit(full, threshold_real),
                    )
                )
                runs.append(
                    await job.run(
                        "synthetic, raised threshold",
                        deployment_id="demo-raised-threshold",
                        threshold=threshold_full,
                        applied=threshold_full,
                        limit=fpir_limit(full, threshold_full),
                    )
                )
            progress.stop()
            result = Report(tuple(runs), calibration, FPIR_WANTED, SEED, server, options.stay)
            report.show(result, console, as_json=options.as_json)
            if options.stay:
                await _stay(server)
    return 0 if result.healthy else 1


class _Progress(Progress):
    """Bars on a terminal; elsewhere, where nothing can be redrawn, one line as each step begins."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        super().__init__(*columns, console=console, disable=not console.is_terminal)

    def step(self, description: str, total: int | None) -> TaskID:
        self._say(description)
        return self.add_task(description, total=total)

    def done(self, step: TaskID, description: str) -> None:
        """End a step of unknown length, and say what came of it."""
        self._say(description)
        self.update(step, total=1, completed=1, description=description)

    def _say(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(line, highlight=False, soft_wrap=True)


async def _stay(server: Server) -> None:
    """Until interrupted, or until the server ends by itself, which is an error."""
    task = asyncio.current_task()
    assert task is not None
    try:
        await asyncio.wait({server.exited})
    except asyncio.CancelledError:
        task.uncancel()
        return
    raise ServiceFault("the server ended by itself", hint=f"see {server.log_file}")


async def _set_up(administration: Administration, calibration: Calibration, threshold: float) -> None:
    await administration.register(calibration.space)
    for gallery_id in GALLERY_SUBJECTS:
        await administration.create_gallery(
            Gallery(
                gallery_id=gallery_id,
                kind=GalleryKind(gallery_id),
                controller="the operator of this demonstration",
                lawful_basis="published research templates, with the credit that their terms ask for",
                purpose="demonstration",
                retention_ms=_DAY_MS,
                space=SPACE,
                threshold=threshold,
            )
        )
    now_ms = _wall_ms()
    for deployment_id in ("demo", "demo-same-threshold", "demo-raised-threshold", "demo-load"):
        await administration.create_deployment(
            Deployment(
                deployment_id=deployment_id,
                gallery_ids=tuple(GALLERY_SUBJECTS),
                opens_at_ms=now_ms,
                closes_at_ms=now_ms + _DAY_MS,
                probe_age_ms_max=60_000,
                authorised_by="the operator of this demonstration",
                reason="to see the service at work",
                place="this machine",
                rank_max=5,
            )
        )


def _real_references(faces: Faces) -> Iterator[References]:
    for gallery_id in GALLERY_SUBJECTS:
        held = enrolment(faces, gallery_id)
        yield from _messages(gallery_id, held.row_ids, held.subject_ids, held.templates)


def _synthetic_references(calibration: Calibration, count: int, rng: np.random.Generator) -> Iterator[References]:
    """Synthetic subjects with one reference each, shared out among the galleries as the real subjects are."""
    units = calibration.generator.draw(count, rng)
    templates = raw_templates(units, calibration.space.centre, calibration.template_length)
    people = np.cumsum([len(subjects) for subjects in GALLERY_SUBJECTS.values()])
    edges = [0, *(people * count // people[-1]).tolist()]
    for gallery_id, first, last in zip(GALLERY_SUBJECTS, edges, edges[1:], strict=False):
        names = [f"synthetic-{number:05d}" for number in range(first, last)]
        yield from _messages(gallery_id, names, names, templates[first:last])


def _messages(
    gallery_id: str, reference_ids: list[str], subject_ids: list[str], templates: Float32
) -> Iterator[References]:
    for start in range(0, len(reference_ids), ENROL_ROWS):
        rows = slice(start, start + ENROL_ROWS)
        yield References(
            gallery_id=gallery_id,
            space=SPACE,
            reference_ids=reference_ids[rows],
            subject_ids=subject_ids[rows],
            templates=templates[rows],
        )


class _Job:
    """Enrols and streams through one client, with progress; remembers how far the log must be applied."""

    def __init__(self, client: MatcherClient, progress: _Progress, searched: Faces) -> None:
        self._client = client
        self._progress = progress
        self._searched = searched
        mated = is_mated(searched)
        self._mates = {
            probe_id: subject_id if has_mate else None
            for probe_id, subject_id, has_mate in zip(searched.row_ids, searched.subject_ids, mated, strict=True)
        }
        self._sequence = 0
        self.enrolled = 0

    async def enrol(self, description: str, messages: Iterable[References]) -> None:
        """Raises ServiceFault if a reference was refused."""
        waiting = list(messages)
        bar = self._progress.step(description, sum(len(one.reference_ids) for one in waiting))

        async def source() -> AsyncIterator[References]:
            for message in waiting:
                yield message

        async with aclosing(self._client.enrol_stream(source())) as receipts:
            async for receipt in receipts:
                if receipt.cause:
                    raise ServiceFault(
                        f"reference {receipt.reference_id} was refused: {receipt.cause} {receipt.detail}",
                        field=receipt.field,
                    )
                self._sequence = max(self._sequence, receipt.sequence)
                self.enrolled += 1
                self._progress.advance(bar)

    async def run(self, name: str, *, deployment_id: str, threshold: float | None, applied: float, limit: float) -> Run:
        """The probes at an edge's pace, for the figures and latencies; then again and again at full speed, for the
        throughput. `threshold` is what the request asks for, `applied` what thereby holds."""
        paced = await self._stream(f"At 100/s: {name}", self._frames(deployment_id, threshold), len(self._searched))
        began = time.monotonic()
        burst = await self._stream(
            f"At full speed: {name}",
            self._burst(threshold),
            len(self._searched) * BURST_ROUNDS,
        )
        burst_s = time.monotonic() - began
        decisions = {answer.decision.probe_id: answer.decision for answer in paced}
        for answer in paced:
            if answer.answered and any(abs(one - np.float32(applied)) > 1e-7 for one in answer.thresholds.values()):
                raise ServiceFault(f"the service applied {dict(answer.thresholds)}, not {applied}")
        return Run(
            name=name,
            references=self.enrolled,
            threshold=applied,
            fpir_limit=limit,
            tally=tally(decisions, self._mates),
            latency=latency([answer.elapsed_s for answer in paced]),
            throughput_probes_per_s=len(burst) / burst_s,
            answers_that_differ=sum(
                _essence(answer.decision) != _essence(decisions.get(answer.decision.probe_id.partition("#")[0]))
                for answer in burst
            ),
        )

    async def _stream(self, description: str, messages: AsyncIterator[Probes], count: int) -> list[ProbeAnswer]:
        bar = self._progress.step(description, count)
        answers = []
        async with aclosing(self._client.identify_stream(messages)) as stream:
            async for answer in stream:
                answers.append(answer)
                self._progress.advance(bar)
        return answers

    async def _frames(self, deployment_id: str, threshold: float | None) -> AsyncIterator[Probes]:
        loop = asyncio.get_running_loop()
        due = loop.time()
        for start in range(0, len(self._searched), FRAME_PROBES):
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += FRAME_S
            rows = np.arange(start, min(start + FRAME_PROBES, len(self._searched)))
            yield self._message(rows, "", deployment_id, threshold)

    async def _burst(self, threshold: float | None) -> AsyncIterator[Probes]:
        for number in range(BURST_ROUNDS):
            for start in range(0, len(self._searched), BURST_PROBES):
                rows = np.arange(start, min(start + BURST_PROBES, len(self._searched)))
                yield self._message(rows, f"#{number}", "demo-load", threshold)

    def _message(self, rows: Int64, suffix: str, deployment_id: str, threshold: float | None) -> Probes:
        row_ids = self._searched.row_ids
        return Probes(
            space=SPACE,
            probe_ids=[row_ids[row] + suffix for row in rows],
            templates=self._searched.templates[rows],
            captured_at_ms=[_wall_ms()] * len(rows),
            deployment_id=deployment_id,
            threshold=threshold,
            rank_max=5,
            min_sequence=self._sequence,
        )


def _essence(decision: Decision | None) -> object:
    """What must be the same each time a probe is searched for."""
    return decision and (decision.outcome, decision.candidates)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
