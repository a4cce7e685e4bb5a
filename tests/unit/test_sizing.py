"""`matcher size`: arithmetic that grows where the load grows, and says so when a node is too small."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.__main__ import run
from matcher_service.errors import InvalidInput
from matcher_service.sizing import Load, size

LOADS = st.builds(
    Load,
    references=st.integers(1, 10**9),
    dimension=st.sampled_from([128, 256, 512, 1024]),
    probes_per_s=st.floats(0, 1e6),
    comparisons_per_core_s=st.floats(1e6, 1e10),
    gateway_probes_per_core_s=st.floats(1e3, 1e5),
    busy_share=st.floats(0.1, 1.0),
    replicas=st.integers(1, 3),
    memory_bytes_per_node=st.integers(4 * 2**30, 2**41),
    cores_per_node=st.integers(1, 256),
)


@given(LOADS)
def test_what_is_reckoned_for_a_shard_fits_the_node_that_it_was_reckoned_for(load: Load) -> None:
    found = size(load)
    share = -(-load.references // found.shards)
    if share > 1:
        mine = size(load._replace(references=share, probes_per_s=0.0))
        assert mine.memory_bytes <= load.memory_bytes_per_node + 10**7
    assert found.search_cores / found.shards <= load.cores_per_node * (1 + 1e-9)
    assert found.shards_all == found.shards * load.replicas


@given(LOADS, st.integers(2, 10))
def test_more_references_or_probes_never_need_less(load: Load, times: int) -> None:
    once = size(load)
    heavier = ({"references": load.references * times}, {"probes_per_s": load.probes_per_s * times})
    for more in (load._replace(**one) for one in heavier):
        grown = size(more)
        assert all(getattr(grown, name) >= getattr(once, name) for name in once._fields if name != "fits_one_process")
        assert once.fits_one_process or not grown.fits_one_process


def test_nonsense_is_refused_by_name() -> None:
    for field, value in (("references", 0), ("busy_share", 1.5), ("memory_bytes_per_node", 10**8)):
        with pytest.raises(InvalidInput) as refused:
            size(Load(1000, 512, 1.0, 1e8)._replace(**{field: value}))
        assert refused.value.field == field


def test_the_command_prints_what_was_reckoned(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["size", "--references", "1000000", "--probes-per-s", "50", "--measured-queries-per-s", "600"]
    assert run(options) == 0
    printed = capsys.readouterr().out
    assert "1280 bytes a reference" in printed
    assert "One process is enough" in printed
    assert run([*options[:2], "500000000", *options[3:]]) == 0
    assert "cluster form" in capsys.readouterr().out
