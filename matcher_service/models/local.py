"""The models in this process, in numpy: the embedded default of the Models seam."""

from __future__ import annotations

import asyncio

import numpy as np

from matcher_service.errors import Conflict, InvalidInput
from matcher_service.models.score_calibrator import check_table, false_match_rates
from matcher_service.models.template_adapter import adapt, check_space
from matcher_service.terms import Cause, Float32, Float64, SpaceId, TemplateSpace

# Multiplications beyond which the event loop would be held up for longer than a thread costs (about 1 ms).
_WORK_IN_LOOP_MAX = 1 << 18


class LocalModels:
    """Holds the registered spaces and computes with them."""

    def __init__(self) -> None:
        self._spaces: dict[SpaceId, TemplateSpace] = {}

    async def register(self, space: TemplateSpace) -> None:
        """Make a space known. The same id again may bring new maps and another score table, never another centre.

        Raises InvalidInput naming what is wrong with the space, Conflict if its id stands for another centre.
        """
        check_space(space)
        if space.score_table is not None:
            check_table(space.score_table)
        known = self._spaces.get(space.id)
        if known is not None and not np.array_equal(known.centre, space.centre):
            raise Conflict(
                f"{space.id} stands for another centre",
                field="centre",
                hint="register the new centre as a new version of the space",
            )
        self._spaces[space.id] = space

    async def adapt(self, source: SpaceId, target: SpaceId, templates: Float32) -> Float32:
        """As the Models seam says. Large batches are computed in a thread, so that the event loop goes on."""
        from_space, to_space = self._space(source), self._space(target)
        outputs = 1 if source == target else target.dimension
        if templates.size * outputs <= _WORK_IN_LOOP_MAX:
            return adapt(templates, from_space, to_space)
        return await asyncio.to_thread(adapt, templates, from_space, to_space)

    async def false_match_rates(self, space: SpaceId, scores: Float32) -> Float64:
        """As the Models seam says. Raises InvalidInput (WRONG_SPACE) for a space that is not registered."""
        table = self._space(space).score_table
        if table is None:
            return np.full(len(scores), np.nan)
        return false_match_rates(table, scores)

    def _space(self, space: SpaceId) -> TemplateSpace:
        try:
            return self._spaces[space]
        except KeyError:
            raise InvalidInput(
                f"the space {space} is not registered",
                field="space",
                hint="name a registered template space, with its version and dimension",
                cause=Cause.WRONG_SPACE,
            ) from None
