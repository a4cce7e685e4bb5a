"""`matcher evaluate`: a labelled test through the running service, and its report."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

if TYPE_CHECKING:
    from rich.progress import Progress

    from matcher_service.commands.http_api import HttpApi
    from matcher_service.evaluation.approximate import Lost
    from matcher_service.evaluation.labelled import LabelledSet
    from matcher_service.evaluation.searches import Searches
    from matcher_service.terms import SpaceId, TemplateSpace

_DAY_MS = 86_400_000


def evaluate(
    gallery: Annotated[str, typer.Argument(metavar="GALLERY", help="The gallery to search; new with --references.")],
    probes: Annotated[
        Path, typer.Argument(help="An .npz file: templates [n, d], subject [n]; optionally group and synthetic [n].")
    ],
    requested_by: Annotated[str, typer.Option(help="Who asks for the test; it goes into the audit.")],
    references: Annotated[
        Path | None,
        typer.Option(help="A labelled .npz to enrol into GALLERY, made for this test and deleted after it."),
    ] = None,
    space: Annotated[
        str, typer.Option(help="With --references: the registered space NAME/VERSION/DIMENSION of both files.")
    ] = "",
    threshold: Annotated[
        float | None, typer.Option(help="The threshold to judge. Without: the gallery's, or the one for --fpir.")
    ] = None,
    fpir: Annotated[
        float | None,
        typer.Option(
            help="What is asked of it: the share of people not in the gallery who may alert. Without: what was asked "
            "when the gallery was made, else 0.001."
        ),
    ] = None,
    fnir: Annotated[
        float | None, typer.Option(help="What is asked of it: the share of people in the gallery who may be missed.")
    ] = None,
    rank_max: Annotated[int, typer.Option(min=2, help="Most candidates for a probe.")] = 50,
    compare_approximate: Annotated[
        bool, typer.Option("--compare-approximate", help="With --references: what HNSW and IVF would have lost.")
    ] = False,
    confidence: Annotated[float, typer.Option(help="Of every interval.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of resampling.")] = 1,
    title: Annotated[str, typer.Option(help="Of the report.")] = "",
    credit: Annotated[str, typer.Option(help="Whose data these are; stands at the end of the report.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the report into this directory.")] = None,
    server: Server = GRPC_ADDRESS,
    http: Http = HTTP_URL,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Search a labelled set through the running service, and say whether the threshold is defensible.

    The searches run under a case of their own, so they are audited, and their alerts bear probe ids that begin with
    "evaluation". An existing gallery answers nothing below its threshold, so the curves begin there; with --references
    a gallery without a threshold is made for the test, searched, and deleted. The exit code is 1 if the threshold is
    not defensible; 0 if it is, or if the test cannot tell.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from matcher_service.commands.http_api import api_to
    from matcher_service.errors import InvalidInput
    from matcher_service.evaluation import figures, summary
    from matcher_service.evaluation.evaluation import Plan
    from matcher_service.evaluation.evaluation import evaluate as evaluated
    from matcher_service.evaluation.labelled import load_labelled
    from matcher_service.evaluation.verdict import Answer, judge
    from matcher_service.evidence_in_words import in_words

    searched = load_labelled(probes)
    held = load_labelled(references) if references else None
    if compare_approximate and held is None:
        raise InvalidInput(
            "the templates of an existing gallery never leave it", field="references", hint="give --references too"
        )
    if held is not None and not space:
        raise InvalidInput("a new gallery needs a space", field="space", hint="give --space")
    with ExitStack() as open_now:
        api = open_now.enter_context(api_to(http, token_file, ca_file))
        progress = open_now.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
        )
        test = _Test(api, progress, gallery, requested_by, rank_max, server, token_file, ca_file)
        searches, held_space, own = test.run(searched, held, space_from(space) if space else None)
        table = held_space.score_table
        known = own and own.get("evidence")
        target = (known and known["one_false_alert_in"]) or 1000
        wanted = 1 / target if fpir is None else fpir
        own_threshold = None if own is None else float(own["threshold"])
        judged = _threshold(threshold, own_threshold, wanted, searches, held_space)
        lost = (
            _lost(held_space, held, searched, judged, rank_max, confidence, progress)
            if compare_approximate and held is not None
            else ()
        )
        plan = Plan(
            title=title or f"Evaluation of gallery {gallery}",
            gallery=gallery,
            space=str(held_space.id),
            threshold=judged,
            fpir_wanted=wanted,
            fnir_wanted=fnir,
            confidence=confidence,
            seed=seed,
            credit=credit,
            on_record=tuple(in_words(known)) if judged == own_threshold else (),
        )
        result = evaluated(searches, plan, table, lost)
        verdict = judge(result)
        if out is not None:
            _write(out, result, verdict)
    if as_json:
        typer.echo(figures.as_json(result, verdict))
    else:
        summary.show(result, verdict, Console(width=None if sys.stdout.isatty() else 120))
        if out is not None:
            typer.echo(f"The report is {out / 'index.html'}.")
    raise typer.Exit(1 if verdict.answer is Answer.NO else 0)


def _threshold(
    asked: float | None, own: float | None, fpir_wanted: float, searches: Searches, space: TemplateSpace
) -> float:
    from matcher_service.errors import InvalidInput
    from matcher_service.models.promise import threshold_for

    if asked is not None:
        if asked < searches.floor:
            raise InvalidInput(
                f"{asked:g} is below the gallery's {searches.floor:g}: nothing there was answered",
                field="threshold",
                hint="give --references, to test in a gallery without a threshold",
            )
        return asked
    if own is not None:
        return own
    if space.score_table is None:
        raise InvalidInput(
            f"no threshold is given and {space.id} has no score table to take one from",
            field="threshold",
            hint="give --threshold, or calibrate the space first",
        )
    return threshold_for(space.score_table, fpir_wanted, searches.references).threshold


def _lost(
    space: TemplateSpace,
    held: LabelledSet,
    searched: LabelledSet,
    threshold: float,
    rank_max: int,
    confidence: float,
    progress: Progress,
) -> tuple[Lost, ...]:
    from matcher_service.commands.labelled_files import adapted
    from matcher_service.evaluation.approximate import mates_lost

    bar = progress.add_task("approximate indexes", total=None)
    return mates_lost(
        adapted(held, space),
        held.subjects,
        adapted(searched, space),
        searched.subjects,
        threshold=threshold,
        rank_max=rank_max,
        confidence=confidence,
        advance=lambda done, of: progress.update(bar, completed=done, total=of),
    )


def _write(out: Path, result: Any, verdict: Any) -> None:
    from matcher_service.evaluation import figures, report
    from matcher_service.evaluation.plots import plots

    drawn = plots(result)
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(report.html(result, verdict, drawn), encoding="utf-8")
    (out / "report.json").write_text(figures.as_json(result, verdict) + "\n", encoding="utf-8")
    (out / "report.csv").write_text(figures.as_csv(result), encoding="utf-8")
    for one in drawn:
        (out / f"{one.name}.png").write_bytes(one.png)
        (out / f"{one.name}.svg").write_text(one.svg, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Test:
    """The searches of one test, with what has to exist for them and be gone afterwards."""

    api: HttpApi
    progress: Progress
    gallery: str
    requested_by: str
    rank_max: int
    server: str
    token_file: Path | None
    ca_file: Path | None

    def run(
        self, searched: LabelledSet, held: LabelledSet | None, space: SpaceId | None
    ) -> tuple[Searches, TemplateSpace, dict[str, Any] | None]:
        """The searches, the space, and the document of an existing gallery."""
        from matcher_service.commands.http_api import path_of
        from matcher_service.commands.labelled_files import registered_space
        from matcher_service.evaluation.searches import searches_of
        from matcher_service.terms import SpaceId

        with ExitStack() as made:
            if held is None:
                own = self.api.get(path_of("galleries", self.gallery))
                space, floor = SpaceId(**own["space"]), float(own["threshold"])
                listed = list(
                    self.api.pages(path_of("galleries", self.gallery, "references"), "references", "after", 0)
                )
                enrolled, synthetic = {one["subject_id"] for one in listed}, frozenset[str]()
                references = len(listed)
            else:
                assert space is not None
                made.enter_context(self._own_gallery(space))
                floor, own, references = -1.0, None, len(held)
                enrolled = set(held.subjects.tolist())
                synthetic = frozenset(held.subjects[held.synthetic].tolist())
            case = made.enter_context(self._own_case())
            probe_ids = [f"evaluation-{row:08d}" for row in range(len(searched))]
            decisions = asyncio.run(self._search(case, space, searched, probe_ids, held))
            template_space = registered_space(self.api, space)
        searches = searches_of(
            decisions,
            probe_ids,
            searched,
            enrolled=enrolled,
            synthetic=synthetic,
            references=references,
            floor=floor,
            rank_max=self.rank_max,
        )
        return searches, template_space, own

    async def _search(
        self,
        case: str,
        space: SpaceId,
        searched: LabelledSet,
        probe_ids: list[str],
        held: LabelledSet | None,
    ) -> Any:
        from matcher_service.evaluation.through_service import enrol_all, search_all

        sequence = 0
        async with client_to(self.server, self.token_file, self.ca_file) as client:
            if held is not None:
                bar = self.progress.add_task("enrolling", total=len(held))
                ids = [f"evaluation-{row:08d}" for row in range(len(held))]
                sequence = await enrol_all(
                    client, self.gallery, space, held, ids, lambda count: self.progress.advance(bar, count)
                )
            searching = self.progress.add_task("searching", total=len(searched))
            return await search_all(
                client,
                case,
                self.gallery,
                space,
                searched,
                probe_ids,
                rank_max=self.rank_max,
                min_sequence=sequence,
                advance=lambda count: self.progress.advance(searching, count),
            )

    @contextmanager
    def _own_gallery(self, space: SpaceId) -> Iterator[None]:
        from matcher_service.commands.http_api import path_of

        self.api.post(
            path_of("galleries"),
            {
                "gallery_id": self.gallery,
                "kind": "custody",
                "controller": self.requested_by,
                "lawful_basis": "a labelled test set; nobody is sought",
                "purpose": "evaluation of a threshold",
                "retention_ms": _DAY_MS,
                "space": space._asdict(),
                "threshold": -1.0,
            },
        )
        try:
            yield
        finally:
            self.api.delete(path_of("galleries", self.gallery), reason="the evaluation is over")

    @contextmanager
    def _own_case(self) -> Iterator[str]:
        from matcher_service.commands.http_api import path_of

        now_ms = time.time_ns() // 1_000_000
        case = f"evaluation-{self.gallery}-{now_ms}"
        self.api.post(
            path_of("cases"),
            {
                "case_reference": case,
                "immigration_authority": "an evaluation, which decides nothing about a person",
                "gallery_ids": [self.gallery],
                "closes_at_ms": now_ms + _DAY_MS,
                "requested_by": self.requested_by,
                "purpose": "evaluation of a threshold on a labelled test set",
                "rank_max": self.rank_max,
            },
        )
        try:
            yield case
        finally:
            self.api.post(path_of("cases", case, "end"))
