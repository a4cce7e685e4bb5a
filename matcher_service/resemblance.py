"""The impostor check of an enrolment: a reference that resembles too many others would accuse whoever resembles it.

Such references come from poor pictures more often than from common faces, and no threshold cures them. The check asks
the gallery itself, and the other references of the same message, which are not in it yet. Whom a reference resembles
is told to nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from matcher_service.errors import InvalidInput, MatcherError, ShardUnavailable
from matcher_service.seams import Shard
from matcher_service.terms import Cause, Float32, Gallery, SearchRequest

ROWS_PER_SEARCH = 256


async def refusals(
    shard: Shard, gallery: Gallery, subject_ids: Sequence[str], templates: Float32, now_ms: int
) -> dict[int, MatcherError]:
    """What speaks against rows of adapted templates [n, d]: more than `gallery.resembles_max` other subjects score at
    or above the gallery's threshold. Raises ShardUnavailable if not all of the gallery could be asked."""
    found: dict[int, MatcherError] = {}
    for first in range(0, len(templates), ROWS_PER_SEARCH):
        rows = slice(first, first + ROWS_PER_SEARCH)
        others = await asyncio.to_thread(_in_message, templates[rows], templates, subject_ids, gallery.threshold)
        held = await _in_gallery(shard, gallery, templates[rows], now_ms)
        for at, (one, another) in enumerate(zip(others, held, strict=True)):
            count = len((one | another) - {subject_ids[first + at]})
            if count > gallery.resembles_max:
                found[first + at] = InvalidInput(
                    f"it resembles more than {gallery.resembles_max} other subjects",
                    field=f"templates[{first + at}]",
                    cause=Cause.RESEMBLES_OTHERS,
                    hint="look at its picture; enrol a better one of the same person",
                )
    return found


async def _in_gallery(shard: Shard, gallery: Gallery, probes: Float32, now_ms: int) -> list[set[str]]:
    count = len(probes)
    result = await shard.search(
        SearchRequest(
            gallery_ids=(gallery.gallery_id,),
            probes=np.ascontiguousarray(probes),
            floors=np.full((count, 1), gallery.threshold, np.float32),
            # The subject itself may be among them, and one more than allowed must be.
            rank_max=np.full(count, gallery.resembles_max + 2, np.int64),
            at_ms=now_ms,
        )
    )
    if result.missing:
        raise ShardUnavailable(
            f"whom the references resemble cannot be found out: {', '.join(result.missing)} did not answer",
            hint="enrol again when the gallery is complete",
        )
    places = zip(result.offsets[:-1].tolist(), result.offsets[1:].tolist(), strict=True)
    return [set(result.subject_ids[first:last]) for first, last in places]


def _in_message(some: Float32, templates: Float32, subject_ids: Sequence[str], threshold: float) -> list[set[str]]:
    alike = some @ templates.T >= threshold
    return [{subject_ids[column] for column in np.flatnonzero(row).tolist()} for row in alike]
