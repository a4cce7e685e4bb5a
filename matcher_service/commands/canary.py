"""`matcher canary`: known mates and strangers, sent again and again through the whole path."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matcher_service.commands.options import GRPC_ADDRESS, AsJson, CaFile, Server, TokenFile, client_to, space_from
from matcher_service.commands.output import print_json

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from matcher_service.client import MatcherClient
    from matcher_service.evaluation.canaries import Round
    from matcher_service.evaluation.labelled import LabelledSet
    from matcher_service.terms import Decision, SpaceId

MESSAGE_ROWS = 64
DEADLINE_S = 10.0


def canary(
    file: Annotated[
        Path, typer.Argument(help='An .npz file: templates [n, d]; subject [n], "" for strangers, who must not alert.')
    ],
    space: Annotated[str, typer.Option(help="Template space NAME/VERSION/DIMENSION of the file.")],
    deployment: Annotated[str, typer.Option(help="The deployment to search under.")],
    every_s: Annotated[float, typer.Option(min=1.0, help="Seconds from one round to the next.")] = 30.0,
    rounds: Annotated[int, typer.Option(min=0, help="How many; 0: until interrupted.")] = 0,
    metrics_port: Annotated[int, typer.Option(help="Serve metrics on this loopback port; 0: do not.")] = 0,
    server: Server = GRPC_ADDRESS,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Send canary probes, and count what is found, missed, falsely alerted on or not answered.

    Their probe ids begin with "canary-": alerts with such an id are no sightings and are not adjudicated. The mates
    must be enrolled in a gallery of the deployment, best in one of their own. Prints a line for each round that is not
    well, and for the first; with --json for every round. The exit code is 1 if any round was not well.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    from matcher_service.evaluation.labelled import load_labelled

    found, registry = load_labelled(file), CollectorRegistry()
    watch = _Watch(found, space_from(space), deployment, registry, as_json)
    served = start_http_server(metrics_port, "127.0.0.1", registry)[0] if metrics_port else None
    try:
        asyncio.run(watch.run(client_to(server, token_file, ca_file, deadline_s=DEADLINE_S), every_s, rounds))
    finally:
        if served is not None:
            served.shutdown()
            served.server_close()
    raise typer.Exit(0 if watch.all_well else 1)


class _Watch:
    """The rounds, and the metrics of them."""

    def __init__(
        self, found: LabelledSet, space: SpaceId, deployment: str, registry: CollectorRegistry, as_json: bool
    ) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        from matcher_service.evaluation.canaries import PREFIX, Seen
        from matcher_service.metrics import LATENCY_BUCKETS_S

        self._found, self._space, self._deployment = found, space, deployment
        self._ids = [f"{PREFIX}{row:06d}" for row in range(len(found))]
        self._first: Round | None = None
        self._as_json = as_json
        self.all_well = True
        self._seen = Counter(
            "matcher_canary_answers_total", "Canaries by what became of them.", ["seen"], registry=registry
        )
        for one in Seen:
            self._seen.labels(one.value)
        self._change = Gauge(
            "matcher_canary_score_change", "Largest change of a mate's score since the first round.", registry=registry
        )
        self._well = Gauge(
            "matcher_canary_well_timestamp_seconds", "When all canaries were last answered rightly.", registry=registry
        )
        self._seconds = Histogram(
            "matcher_canary_round_seconds", "From sending a round to its last answer.", buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )  # fmt: skip

    async def run(self, client: MatcherClient, every_s: float, rounds: int) -> None:
        loop = asyncio.get_running_loop()
        async with client:
            due, number = loop.time(), 0
            while not rounds or number < rounds:
                await asyncio.sleep(max(0.0, due - loop.time()))
                due, number = max(due + every_s, loop.time()), number + 1
                await self._round(client)

    async def _round(self, client: MatcherClient) -> None:
        from collections import Counter as Tally

        from matcher_service.evaluation.canaries import judge_round

        began = time.monotonic()
        decisions = await self._decisions(client)
        self._seconds.observe(time.monotonic() - began)
        first = self._first.scores if self._first else None
        result = judge_round(decisions, self._ids, self._found.subjects.tolist(), first)
        tally = Tally(one.value for one in result.seen)
        for name, count in tally.items():
            self._seen.labels(name).inc(count)
        self._change.set(result.score_change)
        if result.is_well:
            self._well.set(time.time())
        self.all_well &= result.is_well
        if self._as_json:
            print_json({**tally, "well": result.is_well, "score_change": result.score_change})
        elif self._first is None or not result.is_well:
            told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(tally.items()))
            typer.echo(f"{'well' if result.is_well else 'NOT WELL'}: {told}; score change {result.score_change:.2g}")
        self._first = self._first or result

    async def _decisions(self, client: MatcherClient) -> dict[str, Decision]:
        from collections.abc import AsyncIterator
        from contextlib import aclosing

        from matcher_service.client import Probes
        from matcher_service.errors import MatcherError

        async def messages() -> AsyncIterator[Probes]:
            for start in range(0, len(self._ids), MESSAGE_ROWS):
                ids = self._ids[start : start + MESSAGE_ROWS]
                yield Probes(
                    space=self._space,
                    probe_ids=ids,
                    templates=self._found.templates[start : start + MESSAGE_ROWS],
                    captured_at_ms=[time.time_ns() // 1_000_000] * len(ids),
                    deployment_id=self._deployment,
                )

        decisions: dict[str, Decision] = {}
        try:
            async with aclosing(client.identify_stream(messages())) as answers:
                async for answer in answers:
                    decisions[answer.decision.probe_id] = answer.decision
        except MatcherError as error:
            # A service that is gone is what canaries are for: its probes count as unanswered.
            typer.echo(f"NOT WELL: {error}", err=True)
        return decisions
