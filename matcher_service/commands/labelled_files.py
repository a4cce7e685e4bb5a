"""What calibration and evaluation share: spaces as the service holds them, and templates adapted to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matcher_service.commands.http_api import HttpApi
    from matcher_service.evaluation.labelled import LabelledSet
    from matcher_service.terms import Float32, SpaceId, TemplateSpace


def registered_space(api: HttpApi, space: SpaceId) -> TemplateSpace:
    """The space with its centre and score table; raises NotFound if it is not registered."""
    import orjson

    from matcher_service import records
    from matcher_service.commands.http_api import path_of

    return records.decode_space(orjson.dumps(api.get(path_of("spaces", *space))))


def adapted(found: LabelledSet, space: TemplateSpace) -> Float32:
    """Unit rows as the service would store them: adapted, and rounded to float16. Raises InvalidInput for templates of
    another dimension, or one that equals the centre."""
    import numpy as np

    from matcher_service.errors import InvalidInput
    from matcher_service.models.template_adapter import adapt

    units = adapt(found.templates, space, space)
    if not units.any(axis=1).all():
        raise InvalidInput("a template equals the centre of the space", field="templates", hint="leave it out")
    return units.astype(np.float16).astype(np.float32)
