"""The models in this process, in numpy: the embedded default of the Models seam."""

from __future__ import annotations

import asyncio

import numpy as np

from matcher_service.models.score_calibrator import false_match_rates
from matcher_service.models.spaces import Spaces
from matcher_service.models.template_adapter import adapt
from matcher_service.terms import Float32, Float64, SpaceId, TemplateSpace

# Multiplications beyond which the event loop would be held up for longer than a thread costs (about 1 ms).
_WORK_IN_LOOP_MAX = 1 << 18


class LocalModels:
    """Holds the registered spaces and computes with them."""

    def __init__(self) -> None:
        self._spaces = Spaces()

    async def register(self, space: TemplateSpace) -> None:
        """As `Spaces.register`."""
        self._spaces.register(space)

    async def adapt(self, source: SpaceId, target: SpaceId, templates: Float32) -> Float32:
        """As the Models seam says. Large batches are computed in a thread, so that the event loop goes on."""
        from_space, to_space = self._spaces.get(source), self._spaces.get(target)
        outputs = 1 if source == target else target.dimension
        if templates.size * outputs <= _WORK_IN_LOOP_MAX:
            return adapt(templates, from_space, to_space)
        return await asyncio.to_thread(adapt, templates, from_space, to_space)

    async def false_match_rates(self, space: SpaceId, scores: Float32) -> Float64:
        """As the Models seam says. Raises InvalidInput (WRONG_SPACE) for a space that is not registered."""
        table = self._spaces.get(space).score_table
        if table is None:
            return np.full(len(scores), np.nan)
        return false_match_rates(table, scores)
