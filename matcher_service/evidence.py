"""What the calibration of a template space says of a gallery's threshold: computed when it is set, kept with it. Pure.

A threshold that is asked for by target is refused where the calibration does not reach. One that is given is not: it is
recorded what is known of it, and in words what is not. A refusal would do harm. The thresholds beyond the end of a
calibration are the high ones, and who is refused a high threshold takes a lower one, or states no size, or leaves the
space uncalibrated; and then nobody sees it. An auditor finds the words in the log, the answers, and the reports.
"""

from __future__ import annotations

import dataclasses

from matcher_service.catalogue import Catalogue
from matcher_service.errors import InvalidInput
from matcher_service.evidence_in_words import one_in
from matcher_service.models.promise import promise, threshold_limits
from matcher_service.terms import (
    ChangeThreshold,
    CreateGallery,
    Gallery,
    Limits,
    MakeProposal,
    ScoreTable,
    ThresholdEvidence,
    Write,
)

# A rate is a power of a rate; what should be equal differs by rounding.
_ROUNDING = 1.0 + 1e-6


def settled(write: Write, catalogue: Catalogue) -> Write:
    """The write with what is known of the threshold that it sets, and, where a target was given, with the threshold
    itself. Other writes, and senseless ones, are returned as they are. Raises InvalidInput for a target that the
    calibration does not reach."""
    match write:
        case CreateGallery(gallery, one_false_alert_in) if one_false_alert_in:
            return CreateGallery(_by_target(gallery, one_false_alert_in, catalogue), one_false_alert_in)
        case CreateGallery(gallery) if _is_score(gallery.threshold) and gallery.size_max >= 0:
            return CreateGallery(dataclasses.replace(gallery, evidence=evidence_of(gallery, 0, catalogue)))
        case ChangeThreshold() if _is_score(write.threshold):
            return write._replace(evidence=_after_change(write.gallery_id, write.threshold, catalogue))
        case MakeProposal(proposal) if proposal.threshold is not None and _is_score(proposal.threshold):
            known = _after_change(proposal.gallery_id, proposal.threshold, catalogue)
            return MakeProposal(dataclasses.replace(proposal, evidence=known))
        case _:
            return write


def evidence_of(gallery: Gallery, one_false_alert_in: int, catalogue: Catalogue) -> ThresholdEvidence:
    """What the calibration of now says of the gallery's threshold, be it what was asked for or not."""
    space = catalogue.spaces.get(gallery.space)
    table = None if space is None else space.score_table
    asked = (gallery.threshold, one_false_alert_in, gallery.size_max)
    if table is None:
        return ThresholdEvidence(
            *asked, 0, not_supported="The template space is not calibrated: its error rates are not known."
        )
    wanted = 1 / one_false_alert_in if one_false_alert_in else 0.5
    promised = promise(table, gallery.threshold, wanted, max(gallery.size_max, 1))
    fpir = Limits(promised.fpir_estimate, promised.fpir_low, promised.fpir_high) if gallery.size_max else None
    return ThresholdEvidence(
        *asked,
        catalogue.calibrations[gallery.space],
        table.method,
        table.confidence,
        _needed(table, one_false_alert_in, gallery.size_max),
        fpir,
        promised.fnir,
        _not_supported(table, gallery.threshold, one_false_alert_in, fpir),
    )


def superseded(gallery: Gallery, catalogue: Catalogue) -> ThresholdEvidence | None:
    """What the calibration of now says of the threshold, if it is another one than that of its evidence."""
    held = gallery.evidence
    now = evidence_of(gallery, 0 if held is None else held.one_false_alert_in, catalogue)
    is_same = held is not None and held.calibration_sequence == now.calibration_sequence
    return None if is_same or (held is None and not now.calibration_sequence) else now


def _by_target(gallery: Gallery, one_false_alert_in: int, catalogue: Catalogue) -> Gallery:
    space = catalogue.spaces.get(gallery.space)
    table = space.score_table if space is not None else None
    if table is None:
        raise InvalidInput(
            f"template space {gallery.space} is not calibrated",
            field="one_false_alert_in",
            hint="measure it with `matcher calibrate`, or give a threshold",
        )
    if gallery.size_max < 1:
        raise InvalidInput(
            "the threshold depends on how many references it is for",
            field="size_max",
            hint="say how many the gallery may hold: more are then refused",
        )
    if one_false_alert_in < 2:
        raise InvalidInput(
            f"one alert in {one_false_alert_in} is no target", field="one_false_alert_in", hint="for example 1000"
        )
    chosen = dataclasses.replace(
        gallery, threshold=threshold_limits(table, 1 / one_false_alert_in, gallery.size_max).high
    )
    return dataclasses.replace(chosen, evidence=evidence_of(chosen, one_false_alert_in, catalogue))


def _after_change(gallery_id: str, threshold: float, catalogue: Catalogue) -> ThresholdEvidence | None:
    """What was asked of the gallery stays asked of its next threshold."""
    gallery = catalogue.galleries.get(gallery_id)
    if gallery is None:
        return None
    asked = 0 if gallery.evidence is None else gallery.evidence.one_false_alert_in
    return evidence_of(dataclasses.replace(gallery, threshold=threshold), asked, catalogue)


def _needed(table: ScoreTable, one_false_alert_in: int, references: int) -> Limits | None:
    if not one_false_alert_in or not references:
        return None
    try:
        return threshold_limits(table, 1 / one_false_alert_in, references)
    except InvalidInput:
        return None


def _not_supported(table: ScoreTable, threshold: float, one_false_alert_in: int, fpir: Limits | None) -> str:
    if fpir is None:
        return "No size was stated, and false alerts grow with the number of references: their rate is not bounded."
    said = []
    if one_false_alert_in and fpir.high > _ROUNDING / one_false_alert_in:
        said.append(
            f"At most one false alert in {one_false_alert_in:,} was asked for; the upper limit is {one_in(fpir.high)}."
        )
    if threshold > table.scores[-1]:
        said.append(
            f"The calibration ends at a score of {table.scores[-1]:.4f}: fewer false alerts than {one_in(fpir.high)} "
            "are likely, and not shown."
        )
    return " ".join(said)


def _is_score(threshold: float) -> bool:
    return -1.0 <= threshold <= 1.0
