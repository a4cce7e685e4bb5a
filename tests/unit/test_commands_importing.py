"""Import over a real grpc.aio server with scripted faults: interrupted and resumed, it gives the same gallery."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matcher_service import importing
from matcher_service.client import Backoff, MatcherClient
from matcher_service.errors import DeadlineExceeded, InvalidInput, MatcherError, NotFound
from matcher_service.importing import BadRow, Import, Progress, ProgressFile
from matcher_service.template_files import open_template_file
from matcher_service.terms import SpaceId
from tests.fake_matcher import TOKEN, Script, fake_server

SPACE = SpaceId("test", 1, 4)
QUICK = Backoff(first_s=0.001, most_s=0.004)


def save(path: Path, ids: list[str]) -> Path:
    rows = len(ids)
    np.savez(
        path,
        templates=np.ones((rows, 4), np.float32),
        reference_ids=np.array(ids),
        subject_ids=np.array([f"s-{one}" for one in ids]),
    )
    return path


def client_to(port: int, **more: object) -> MatcherClient:
    options: dict[str, object] = {"backoff": QUICK, "rng": random.Random(1), "in_flight_messages_max": 3} | more
    return MatcherClient(f"127.0.0.1:{port}", TOKEN, **options)  # type: ignore[arg-type]


def progress_files(path: Path) -> list[Path]:
    return list(path.parent.glob("*.progress*"))


class Interrupted(MatcherError):
    """What stops the import in these tests, from within its own calls."""


async def run_import(
    script: Script, path: Path, *, stop_after_blocks: int | None = None, bad: list[BadRow] | None = None, **more: object
) -> Progress:
    blocks = 0

    def on_progress(_: Progress) -> None:
        nonlocal blocks
        blocks += 1
        if stop_after_blocks is not None and blocks > stop_after_blocks:
            raise Interrupted("stopped by the test")

    async with fake_server(script) as port, client_to(port) as client:
        job = Import(
            client,
            open_template_file(path),
            "g",
            SPACE,
            on_progress=on_progress,
            on_bad_row=(bad if bad is not None else []).append,
            **more,  # type: ignore[arg-type]
        )
        return await job.run()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "BLOCK_ROWS", 5)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 60),
    stops=st.lists(st.integers(0, 8), max_size=3),
    break_at=st.frozensets(st.integers(1, 20), max_size=3),
    repeated=st.integers(0, 5),
    save_every=st.integers(1, 4),
)
async def test_interrupted_anywhere_and_run_again_the_gallery_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    stops: list[int],
    break_at: frozenset[int],
    repeated: int,
    save_every: int,
) -> None:
    """However often it stops, each row ends up enrolled once; rows that repeat an id are told, once per run."""
    ids = [f"r{row}" for row in range(rows)]
    ids += ids[:repeated]
    path = save(tmp_path_factory.mktemp("import") / "refs.npz", ids)
    script = Script(break_at=break_at)
    for stop in stops:
        try:
            await run_import(script, path, stop_after_blocks=stop, save_every_blocks=save_every)
        except Interrupted:
            continue
    done = await run_import(script, path, save_every_blocks=save_every)
    assert script.enrolled == {one: f"s-{one}" for one in ids}
    assert done.rows_done == len(ids)
    assert done.refused == len(ids) - len(set(ids))
    assert not progress_files(path)


async def test_a_resumed_import_does_not_send_again_what_was_durable(tmp_path: Path) -> None:
    """The progress file is used: the second run starts where the first one stopped."""
    path = save(tmp_path / "refs.npz", [f"r{row}" for row in range(100)])
    script = Script()
    with pytest.raises(Interrupted):
        await run_import(script, path, stop_after_blocks=10)
    (left,) = progress_files(path)
    before = ProgressFile(left).read()
    assert before is not None
    assert before.blocks_done >= 10
    script.messages = 0
    done = await run_import(script, path)
    assert script.messages == 20 - before.blocks_done
    assert done.enrolled + done.repeated == 100


async def test_a_finished_import_run_again_changes_nothing(tmp_path: Path) -> None:
    """Without the progress file everything is sent again under the same keys, and is there already."""
    path = save(tmp_path / "refs.npz", [f"r{row}" for row in range(23)])
    script = Script()
    first = await run_import(script, path)
    sequence = script.sequence
    second = await run_import(script, path)
    assert (first.enrolled, first.repeated) == (23, 0)
    assert (second.enrolled, second.repeated) == (0, 23)
    assert script.sequence == sequence


async def test_bad_rows_are_told_by_their_number_in_the_file_and_the_good_ones_go_in(tmp_path: Path) -> None:
    """A missing id and a repeated one are found here, a conflict by the service; 20 others are enrolled."""
    ids = [f"r{row}" for row in range(23)]
    ids[7], ids[9] = "", "r8"
    path = save(tmp_path / "refs.npz", ids)
    script = Script(refuse_rows=frozenset({"r17"}))
    bad: list[BadRow] = []
    done = await run_import(script, path, bad=bad)
    assert [(one.row, one.reference_id, one.cause) for one in sorted(bad)] == [
        (7, "", "INVALID"),
        (9, "r8", "CONFLICT"),
        (17, "r17", "CONFLICT"),
    ]
    assert all(one.detail for one in bad)
    assert (done.enrolled, done.refused) == (20, 3)
    assert set(script.enrolled) == set(ids) - {"", "r17"}


async def test_an_unknown_gallery_stops_the_import_at_once(tmp_path: Path) -> None:
    """A cause that every row would meet is raised, not told a thousand times; the hint says how to go on."""
    path = save(tmp_path / "refs.npz", [f"r{row}" for row in range(50)])
    script = Script(overload_times=10**6, overload_cause="UNKNOWN_GALLERY")
    bad: list[BadRow] = []
    with pytest.raises(NotFound, match="again"):
        await run_import(script, path, bad=bad)
    assert bad == []
    assert not progress_files(path)


async def test_no_answer_in_time_stops_the_import_and_loses_nothing(tmp_path: Path) -> None:
    """Rows whose fate is not known are not counted as done: the next run asks for them again."""
    path = save(tmp_path / "refs.npz", [f"r{row}" for row in range(30)])
    script = Script(overload_times=10**6)
    async with fake_server(script) as port, client_to(port, enrol_deadline_s=0.05) as client:
        with pytest.raises((DeadlineExceeded, MatcherError)):
            await Import(client, open_template_file(path), "g", SPACE).run()
    done = await run_import(Script(), path)
    assert done.enrolled == 30


async def test_another_gallery_of_the_same_name_starts_from_the_first_row(tmp_path: Path) -> None:
    """A progress file of another service's gallery, or of other identifiers, is not gone on from."""
    path = save(tmp_path / "refs.npz", [f"r{row}" for row in range(60)])
    with pytest.raises(Interrupted):
        await run_import(Script(), path, stop_after_blocks=8, gallery_created_at_ms=1)
    elsewhere = Script()
    done = await run_import(elsewhere, path, gallery_created_at_ms=2)
    assert done.enrolled == 60
    assert len(elsewhere.enrolled) == 60


def test_the_key_of_a_block_follows_from_gallery_ids_and_place_and_a_replacing_run_has_its_own() -> None:
    """Two imports of one file share their keys, so that repeating is harmless; replacing again must replace."""

    def progress(**change: object) -> Progress:
        fields: dict[str, object] = {
            "gallery_id": "g",
            "gallery_created_at_ms": 0,
            "ids_digest": "d",
            "block_rows": 5,
            "replace": False,
            "run": "one",
        }
        return Progress(**(fields | change))  # type: ignore[arg-type]

    first = progress().key(3)
    assert progress(run="two").key(3) == first
    others = [
        progress().key(4),
        progress(gallery_id="h").key(3),
        progress(ids_digest="e").key(3),
        progress(block_rows=6).key(3),
        progress(replace=True).key(3),
        progress(replace=True, run="two").key(3),
    ]
    assert len({first, *others}) == 7


def test_blocks_stay_below_the_limits_of_a_message() -> None:
    """Up to a thousand rows and two megabytes, and always at least one row."""
    assert importing.block_rows_for(4) == importing.BLOCK_ROWS
    assert importing.block_rows_for(16384) * 16384 * 4 <= importing.BLOCK_BYTES_MAX
    assert importing.block_rows_for(10**9) == 1


def test_a_file_without_identifiers_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    """Templates alone say nothing of whom they are."""
    path = tmp_path / "refs.npz"
    np.savez(path, templates=np.ones((3, 4), np.float32))
    with pytest.raises(InvalidInput) as refused:
        Import(MatcherClient("127.0.0.1:1", TOKEN), open_template_file(path), "g", SPACE)
    assert refused.value.field == "reference_id"


def test_a_damaged_progress_file_is_none_at_all(tmp_path: Path) -> None:
    """Half a file, or one of another form, only means starting over."""
    file = ProgressFile(tmp_path / "a.progress")
    assert file.read() is None
    for content in ("", "{", "[]", '{"gallery_id": "g"}', '{"unknown": 1}'):
        file.path.write_text(content)
        assert file.read() is None
