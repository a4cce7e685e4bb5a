"""An edge node with another model version than the gallery's, through a map that was learnt from pairs."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from matcher_service.errors import InvalidInput
from matcher_service.models.fit_adapter import Pairs, fit, mapped_space
from matcher_service.terms import Cause, Outcome, RegisterSpace, SpaceId, TemplateSpace
from tests.running_service import TESTER, whole_service

SEED = 23


async def test_probes_of_another_space_find_their_people_once_a_map_is_registered(tmp_path: Path) -> None:
    """Refused as WRONG_SPACE before; with the map learnt on half of the people, the other half is found by it. The map
    is in the log: it is there after a restart.

    The other space is made from the ORL templates of dlib's model: turned at random, fewer dimensions, noisy.
    """
    print("seed", SEED)
    with (files("matcher_service.demo") / "orl_templates_dlib128.npz").open("rb") as file, np.load(file) as orl:
        core, subjects, shots = orl["templates"], orl["subject"].astype(np.int64), orl["shot"]
    rng = np.random.default_rng(SEED)
    edge = (core - core.mean(axis=0)) @ np.linalg.qr(rng.standard_normal((128, 128)))[0][:, :112]
    edge = (edge + 0.05 * edge.std() * rng.standard_normal(edge.shape)).astype(np.float32)
    learn = subjects <= 20
    core_space = TemplateSpace(SpaceId("core", 1, 128), core[learn].mean(axis=0))
    edge_space = TemplateSpace(SpaceId("edge", 7, 112), edge[learn].mean(axis=0))
    pairs = Pairs(edge[learn], core[learn], edge_space.centre, core_space.centre, subjects[learn])
    found = fit(pairs)

    enrolled, probes = ~learn & (shots <= 5), ~learn & (shots > 5)
    async with whole_service(tmp_path) as service:
        for space in (core_space, edge_space):
            await service.running.service.change(RegisterSpace(space), TESTER)
        await service.gallery("custody", core_space.id, threshold=0.45)
        await service.deployment("custody")
        names = [f"r{row}" for row in np.flatnonzero(enrolled)]
        await service.enrol("custody", core_space.id, core[enrolled], names, [f"s{one}" for one in subjects[enrolled]])
        refused = await service.ask(edge_space.id, edge[probes])
        assert {one.decision.cause for one in refused.values()} == {Cause.WRONG_SPACE}
        with_map = mapped_space(core_space, edge_space.id, found.matrix)
        await service.running.service.change(RegisterSpace(with_map), TESTER)

    async with whole_service(tmp_path) as service:
        answers = await service.ask(edge_space.id, edge[probes])
        right = 0
        for at, subject in enumerate(subjects[probes]):
            decision = answers[f"p{at}"].decision
            assert decision.outcome in (Outcome.ALERT, Outcome.NO_CANDIDATE)
            right += bool(decision.candidates) and decision.candidates[0].subject_id == f"s{subject}"
        print("found", right, "of", int(probes.sum()))
        assert right >= 0.9 * probes.sum()
        with pytest.raises(InvalidInput):
            mapped_space(core_space, SpaceId("edge", 8, 100), found.matrix)
