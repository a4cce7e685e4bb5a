"""`matcher edge`: stream the templates of a file as an edge node does."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matcher_service.commands.latency import Latencies
from matcher_service.commands.options import (
    GRPC_ADDRESS,
    HTTP_URL,
    AsJson,
    CaFile,
    Http,
    Server,
    TokenFile,
    client_to,
    space_from,
)
from matcher_service.commands.output import print_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from matcher_service.client import MatcherClient, ProbeAnswer, Probes
    from matcher_service.template_files import Rows, TemplateFile
    from matcher_service.terms import SpaceId

READ_ROWS = 1024
REFRESHES_PER_S = 8


def edge(
    file: Annotated[
        Path,
        typer.Argument(help="An .npz or .parquet file: templates, and optionally probe_ids and captured_at_ms."),
    ],
    deployment: Annotated[str, typer.Option(help="The deployment to search under.")] = "",
    case: Annotated[str, typer.Option(help="The case to search under, instead of a deployment.")] = "",
    gallery: Annotated[
        list[str] | None, typer.Option(help="Only this gallery; repeat for more. Without: all that are allowed.")
    ] = None,
    rate: Annotated[float, typer.Option(min=0, help="Probes per second; 0: as fast as answers come.")] = 0,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Probes in a message.")] = 32,
    window: Annotated[int, typer.Option(min=1, help="Most unanswered messages.")] = 16,
    threshold: Annotated[float | None, typer.Option(help="Raise the galleries' threshold to this.")] = None,
    rank_max: Annotated[int, typer.Option(min=1, help="Most candidates for a probe.")] = 1,
    deadline_ms: Annotated[int, typer.Option(min=1, help="Within which an answer is of use.")] = 2000,
    now: Annotated[
        bool, typer.Option("--now", help="Say that the probes are captured now, whatever the file says.")
    ] = False,
    space: Annotated[
        str, typer.Option(help="Template space NAME/VERSION/DIMENSION. Without: that of the galleries.")
    ] = "",
    camera: Annotated[str, typer.Option(help="Where the deployment names its cameras: the one that saw these.")] = "",
    certificate_file: Annotated[
        Path | None, typer.Option(help="PEM client certificate: the credential, instead of a token.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="PEM key of the client certificate.")] = None,
    server: Server = GRPC_ADDRESS,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Stream the templates of a file and show what is answered.

    The token may be an edge credential's secret, which is exchanged for a short-lived token at --http. An edge node
    has no view of the galleries: name the --space.

    --json prints a line for each answer and a last one with the summary. The exit code is 1 if any probe
    was rejected, not searched for in full, or could not be sent.
    """
    from matcher_service.errors import InvalidInput
    from matcher_service.template_files import open_template_file

    if bool(deployment) == bool(case):
        raise InvalidInput(
            "a search needs one authority", field="deployment", hint="give either --deployment or --case"
        )
    templates = open_template_file(file)
    named = space_from(space) if space else _space_of(deployment, case, gallery or [], http, token_file, ca_file)
    common = {
        "deployment_id": deployment,
        "case_reference": case,
        "gallery_ids": gallery or [],
        "threshold": threshold,
        "rank_max": rank_max,
        "camera_id": camera,
    }
    client = client_to(
        server,
        token_file,
        ca_file,
        token="" if certificate_file is not None else _token(http, token_file, ca_file),
        certificate_file=certificate_file,
        key_file=key_file,
        in_flight_messages_max=window,
        deadline_s=deadline_ms / 1000,
    )
    streaming = _Streaming(client, templates, named, common, batch=batch, rate=rate, now=now, as_json=as_json)
    asyncio.run(streaming.run())
    raise typer.Exit(0 if streaming.all_well else 1)


def _token(http: str, token_file: Path | None, ca_file: Path | None) -> str:
    """The token presented; for an edge credential's secret the one that it is exchanged for."""
    from matcher_service.commands.http_api import api_to, path_of
    from matcher_service.commands.options import token_from

    token = token_from(token_file)
    if not token.startswith("edge."):
        return token
    with api_to(http, token_file, ca_file) as api:
        return str(api.post(path_of("tokens"))["token"])


def _space_of(
    deployment: str, case: str, gallery_ids: list[str], http: str, token_file: Path | None, ca_file: Path | None
) -> SpaceId:
    """The one template space of the galleries searched; raises InvalidInput if there are several."""
    from matcher_service.commands.http_api import api_to, path_of
    from matcher_service.errors import InvalidInput
    from matcher_service.terms import SpaceId

    with api_to(http, token_file, ca_file) as api:
        authority = api.get(path_of("deployments", deployment) if deployment else path_of("cases", case))
        # What was deleted since is not searched: watchlists are, when their deployment ends.
        held = {one["gallery_id"]: one for one in api.get(path_of("galleries"))["galleries"]}
        named = gallery_ids or [one for one in authority["gallery_ids"] if one in held]
        spaces = {SpaceId(**(held.get(one) or api.get(path_of("galleries", one)))["space"]) for one in named}
    if len(spaces) != 1:
        told = ", ".join(sorted(map(str, spaces)))
        raise InvalidInput(f"the galleries have several spaces: {told}", field="space", hint="give --space")
    return spaces.pop()


class _Streaming:
    """One run: what was sent, what came back, how long it took."""

    def __init__(
        self,
        client: MatcherClient,
        file: TemplateFile,
        space: SpaceId,
        common: dict[str, Any],
        *,
        batch: int,
        rate: float,
        now: bool,
        as_json: bool,
    ) -> None:
        self._client = client
        self._file = file
        self._space = space
        self._common = common
        self._batch = batch
        self._rate = rate
        self._captured_in_file = file.has("captured_at_ms") and not now
        self._as_json = as_json
        self._sent = 0
        self._unsent = 0
        self._outcomes: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._latencies = Latencies()
        self._began_at = 0.0
        # When each message on its way was due, and its probes still without an answer.
        self._due: dict[str, list[float]] = {}

    @property
    def answered(self) -> int:
        return self._outcomes.total()

    @property
    def all_well(self) -> bool:
        return not (self._unsent or self._outcomes["REJECTED"] or self._outcomes["INCOMPLETE"])

    async def run(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        progress = Progress(
            TextColumn("probes"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            console=Console(stderr=True),
            refresh_per_second=REFRESHES_PER_S,
        )
        self._began_at = time.monotonic()
        try:
            with progress:
                task = progress.add_task("probes", total=self._file.rows, line="")
                async with self._client as client, aclosing(client.identify_stream(self._messages())) as answers:
                    shown_at = 0.0
                    async for answer in answers:
                        self._take(answer, progress)
                        at = time.monotonic()
                        if at - shown_at > 1 / REFRESHES_PER_S:
                            shown_at = at
                            self._show(progress, task)
                self._show(progress, task)
        finally:
            # Also of a run that was interrupted.
            self._print_summary()

    async def _messages(self) -> AsyncIterator[Probes]:
        loop = asyncio.get_running_loop()
        due = loop.time()
        number = 0
        texts = ("probe_id",) if self._file.has("probe_id") else ()
        numbers = ("captured_at_ms",) if self._captured_in_file else ()
        blocks = self._file.blocks(READ_ROWS, self._space.dimension, texts, numbers)
        while (rows := await asyncio.to_thread(_next, blocks)) is not None:
            for offsets in self._cut(rows):
                if self._rate:
                    # Behind schedule it catches up; the latency counts from when a message was due.
                    await asyncio.sleep(max(0.0, due - loop.time()))
                else:
                    due = loop.time()
                number += 1
                self._due[str(number)] = [due, len(offsets)]
                self._sent += len(offsets)
                yield self._probes(rows, offsets, str(number))
                if self._rate:
                    due += len(offsets) / self._rate

    def _cut(self, rows: Rows) -> Iterator[list[int]]:
        """Offsets of the rows of each message; faulty rows are told and left out."""
        offsets: list[int] = []
        ids: set[str] = set()
        for offset in range(len(rows)):
            fault = rows.faults.get(offset)
            probe_id = self._probe_id(rows, offset)
            if fault is not None:
                self._unsent += 1
                typer.echo(f"row {rows.first_row + offset}: {fault.field}: {fault.detail}", err=True)
                continue
            if probe_id in ids or len(offsets) == self._batch:
                yield offsets
                offsets, ids = [], set()
            offsets.append(offset)
            ids.add(probe_id)
        if offsets:
            yield offsets

    def _probe_id(self, rows: Rows, offset: int) -> str:
        given = rows.texts.get("probe_id")
        return given[offset] if given is not None else f"row-{rows.first_row + offset}"

    def _probes(self, rows: Rows, offsets: list[int], message_id: str) -> Probes:
        from matcher_service.client import Probes

        if self._captured_in_file:
            captured = rows.numbers["captured_at_ms"][offsets].tolist()
        else:
            captured = [time.time_ns() // 1_000_000] * len(offsets)
        return Probes(
            space=self._space,
            probe_ids=[self._probe_id(rows, offset) for offset in offsets],
            templates=rows.templates[offsets],
            captured_at_ms=captured,
            message_id=message_id,
            **self._common,
        )

    def _take(self, answer: ProbeAnswer, progress: Progress) -> None:
        decision = answer.decision
        on_its_way = self._due[answer.message_id]
        elapsed_s = asyncio.get_running_loop().time() - on_its_way[0]
        on_its_way[1] -= 1
        if not on_its_way[1]:
            del self._due[answer.message_id]
        self._latencies.add(elapsed_s)
        self._outcomes[decision.outcome.value] += 1
        if decision.cause:
            self._causes[decision.cause] += 1
        if self._as_json:
            print_json(_answer_document(answer, elapsed_s))
        elif decision.outcome == "ALERT":
            best = decision.candidates[0]
            part = "" if answer.complete else " (not every part answered)"
            progress.console.print(
                f"ALERT  probe {decision.probe_id}: {best.subject_id} ({best.gallery_id}) score {best.score:.3f}{part}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _show(self, progress: Progress, task: TaskID) -> None:
        p50_ms, p99_ms = (self._latencies.quantile_s(share) * 1000 for share in (0.5, 0.99))
        progress.update(
            task,
            completed=self.answered + self._unsent,
            line=(
                f"sent {self._sent}  alerts {self._outcomes['ALERT']}  in flight {self._sent - self.answered}  "
                f"p50 {p50_ms:.1f} ms  p99 {p99_ms:.1f} ms"
            ),
        )

    def _print_summary(self) -> None:
        elapsed_s = time.monotonic() - self._began_at
        latency = self._latencies
        summary = {
            "probes_sent": self._sent,
            "answered": self.answered,
            "alerts": self._outcomes["ALERT"],
            "no_candidate": self._outcomes["NO_CANDIDATE"],
            "incomplete": self._outcomes["INCOMPLETE"],
            "rejected": self._outcomes["REJECTED"],
            "causes": dict(self._causes),
            "rows_not_sent": self._unsent,
            "elapsed_s": round(elapsed_s, 3),
            "probes_per_s": round(self.answered / elapsed_s, 1) if elapsed_s else 0.0,
            "latency_ms": {
                name: round(latency.quantile_s(share) * 1000, 3) if latency.count else None
                for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
            },
            "connections": self._client.counts.connections,
        }
        if self._as_json:
            print_json({"summary": summary})
            return
        typer.echo(
            f"{summary['probes_sent']} probes sent, {summary['answered']} answered in {elapsed_s:.1f} s "
            f"({summary['probes_per_s']:.0f}/s)"
        )
        typer.echo(
            f"{summary['alerts']} alerts, {summary['no_candidate']} without candidate, "
            f"{summary['incomplete']} incomplete, {summary['rejected']} rejected"
        )
        if self._causes:
            typer.echo("causes: " + ", ".join(f"{cause} {count}" for cause, count in self._causes.most_common()))
        if self._unsent:
            typer.echo(f"{self._unsent} rows could not be sent")
        if latency.count:
            parts = (f"{name} {value:.1f}" for name, value in summary["latency_ms"].items())  # type: ignore[attr-defined]
            typer.echo("latency ms: " + ", ".join(parts))


def _answer_document(answer: ProbeAnswer, elapsed_s: float) -> dict[str, Any]:
    decision = answer.decision
    document: dict[str, Any] = {
        "probe_id": decision.probe_id,
        "outcome": decision.outcome.value,
        "complete": answer.complete,
        "elapsed_ms": round(elapsed_s * 1000, 3),
    }
    if decision.candidates:
        document |= {
            "alert_id": decision.alert_id,
            "candidates": [one._asdict() for one in decision.candidates],
            "thresholds": dict(answer.thresholds),
            "sequence": answer.sequence,
            "policy_version": answer.policy_version,
        }
    if decision.cause:
        document |= {"cause": decision.cause, "detail": decision.detail, "field": decision.field}
    if answer.missing:
        document["missing"] = list(answer.missing)
    return document


def _next(blocks: Iterator[Rows]) -> Rows | None:
    return next(blocks, None)
