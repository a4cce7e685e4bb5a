"""The template spaces that an implementation of the Models seam knows."""

from __future__ import annotations

import numpy as np

from matcher_service.errors import Conflict, InvalidInput
from matcher_service.models.score_calibrator import check_table
from matcher_service.models.template_adapter import check_space
from matcher_service.terms import Cause, SpaceId, TemplateSpace


class Spaces:
    """Registered spaces by id."""

    def __init__(self) -> None:
        self._spaces: dict[SpaceId, TemplateSpace] = {}

    def register(self, space: TemplateSpace) -> None:
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

    def get(self, space: SpaceId) -> TemplateSpace:
        """Raises InvalidInput (WRONG_SPACE) for a space that is not registered."""
        try:
            return self._spaces[space]
        except KeyError:
            raise InvalidInput(
                f"the space {space} is not registered",
                field="space",
                hint="name a registered template space, with its version and dimension",
                cause=Cause.WRONG_SPACE,
            ) from None
