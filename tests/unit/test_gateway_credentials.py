"""The bearer token of a data directory."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from matcher_service.errors import StartRefused, Unauthenticated
from matcher_service.gateway.credentials import BearerToken, load_or_create

TOKEN = "a" * 43


def test_a_first_start_makes_a_token_that_only_its_owner_can_read_and_later_ones_keep_it(tmp_path: Path) -> None:
    token, path = load_or_create(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= 43
    assert load_or_create(tmp_path) == (token, path)
    (tmp_path / "other").mkdir()
    assert load_or_create(tmp_path / "other")[0] != token


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_token_file_that_others_may_read_refuses_the_start(tmp_path: Path, mode: int) -> None:
    _, path = load_or_create(tmp_path)
    path.chmod(mode)
    with pytest.raises(StartRefused) as refused:
        load_or_create(tmp_path)
    assert "chmod 600" in refused.value.hint


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 50])
def test_a_token_file_without_a_token_refuses_the_start(tmp_path: Path, content: bytes) -> None:
    _, path = load_or_create(tmp_path)
    path.write_bytes(content)
    with pytest.raises(StartRefused):
        load_or_create(tmp_path)


def test_a_directory_that_does_not_exist_refuses_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartRefused):
        load_or_create(tmp_path / "none")


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER  {TOKEN} "])
def test_the_token_opens_and_names_an_actor_without_showing_itself(authorization: str) -> None:
    actor = BearerToken(TOKEN).authenticate(authorization)
    assert actor.name.startswith("token-")
    assert TOKEN not in actor.name
    assert BearerToken("b" * 43).authenticate("Bearer " + "b" * 43) != actor


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer \udcff é",
    ],
)
def test_nothing_else_opens(authorization: str | None) -> None:
    with pytest.raises(Unauthenticated) as refused:
        BearerToken(TOKEN).authenticate(authorization)
    assert refused.value.field == "authorization"
    assert refused.value.hint
    assert TOKEN not in str(refused.value)
