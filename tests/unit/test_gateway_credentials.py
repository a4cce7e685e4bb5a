"""The bearer token of a data directory."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from matcher_service.access.authentication import Authentication, Presented
from matcher_service.access.verbs import EVERY_SCOPE
from matcher_service.catalogue import Catalogue
from matcher_service.clock import LawfulTime
from matcher_service.errors import StartRefused, Unauthenticated
from matcher_service.gateway.credentials import BearerToken, load_or_create
from matcher_service.terms import Actor
from tests.fake_clock import FakeClock

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


def read(authorization: str | None, token: str = TOKEN, *, from_loopback: bool = True) -> Actor:
    known = Authentication(Catalogue(), LawfulTime(FakeClock()), BearerToken(token))
    return asyncio.run(known.authenticate(Presented(authorization, from_loopback)))


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER  {TOKEN} "])
def test_the_token_opens_everything_and_names_an_actor_without_showing_itself(authorization: str) -> None:
    actor = read(authorization)
    assert actor.name.startswith("token-")
    assert actor.scopes == EVERY_SCOPE
    assert actor.galleries is None
    assert TOKEN not in actor.name
    assert read("Bearer " + "b" * 43, "b" * 43) != actor


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
        "Bearer a.b.c",
        "Bearer edge.nobody.secret",
    ],
)
def test_nothing_else_opens(authorization: str | None) -> None:
    with pytest.raises(Unauthenticated) as refused:
        read(authorization)
    assert refused.value.field == "authorization"
    assert refused.value.hint
    assert TOKEN not in str(refused.value)


def test_beyond_loopback_the_token_opens_nothing() -> None:
    with pytest.raises(Unauthenticated, match="loopback only") as refused:
        read(f"Bearer {TOKEN}", from_loopback=False)
    assert TOKEN not in str(refused.value)
