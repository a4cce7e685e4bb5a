"""How a credential behaves over many messages: rates, replays, climbing, bands. All state is bounded."""

from __future__ import annotations

import math
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service import policy
from matcher_service.access import bands, sequences
from matcher_service.access.climbing import BLOCK, COOL_DOWN_S, RUNS_MAX, Climbing
from matcher_service.access.edge_tokens import (
    KEY_FILE,
    EdgeTokens,
    credential_of,
    load_or_create_key,
    new_secret,
    secret_opens,
)
from matcher_service.access.rates import BUCKETS_MAX, Rates
from matcher_service.access.sequences import NONCES_PER_CREDENTIAL_MAX, WINDOW, Sequences
from matcher_service.errors import (
    Conflict,
    InvalidInput,
    MatcherError,
    Overloaded,
    StartRefused,
    TooLarge,
    Unauthenticated,
)
from matcher_service.terms import Actor, Candidate, Scope
from tests.fake_clock import FakeClock

VAN = Actor("edge-van")
NONCE = b"n" * 16


# --- rates -------------------------------------------------------------------------------------------------


def test_a_rate_tells_when_to_come_again_and_keeps_its_word() -> None:
    clock = FakeClock()
    rates = Rates(clock, 2.0, "the test")
    rates.take("a", 200, 100.0)
    with pytest.raises(Overloaded) as refused:
        rates.take("a", 50, 100.0)
    assert refused.value.retry_after_ms == 500
    clock.advance(0.499)
    with pytest.raises(Overloaded):
        rates.take("a", 50, 100.0)
    clock.advance(0.002)
    rates.take("a", 50, 100.0)
    rates.take("b", 200, 100.0)
    with pytest.raises(TooLarge):
        rates.take("c", 201, 100.0)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40)), max_size=60))
def test_whatever_comes_no_more_passes_than_burst_and_rate_allow(asked: list[tuple[float, int]]) -> None:
    clock = FakeClock()
    rates, passed, began = Rates(clock, 2.0, "the test"), 0, clock.monotonic()
    for pause_s, count in asked:
        clock.advance(pause_s)
        try:
            rates.take("a", count, 20.0)
        except Overloaded:
            continue
        passed += count
        assert passed <= 40 + 20 * (clock.monotonic() - began) + 1e-6


def test_buckets_are_bounded() -> None:
    rates = Rates(FakeClock(), 1.0, "the test")
    for number in range(BUCKETS_MAX + 100):
        rates.take(str(number), 1, 1.0)
    assert len(rates._buckets) == BUCKETS_MAX


# --- replays -----------------------------------------------------------------------------------------------


def accepted(known: Sequences, sequence: int, nonce: bytes = NONCE, actor: Actor = VAN) -> bool:
    try:
        known.accept(actor, nonce, sequence)
    except Conflict:
        return False
    return True


@given(st.lists(st.integers(1, 3 * WINDOW), max_size=200))
def test_a_message_is_accepted_once_and_within_the_window_in_any_order(sent: list[int]) -> None:
    known, seen, highest = Sequences(FakeClock()), set[int](), 0
    for sequence in sent:
        fresh = sequence not in seen and sequence > highest - WINDOW
        assert accepted(known, sequence) is fresh
        seen.add(sequence)
        highest = max(highest, sequence)


def test_a_nonce_is_one_credentials_and_one_streams() -> None:
    known = Sequences(FakeClock())
    assert accepted(known, 1)
    assert accepted(known, 1, b"m" * 16)
    assert accepted(known, 1, actor=Actor("edge-other"))
    assert not accepted(known, 1)
    assert accepted(known, 2**60)
    assert not accepted(known, 2**60)


@pytest.mark.parametrize(("nonce", "sequence"), [(b"", 1), (b"x" * 15, 1), (b"x" * 33, 1), (NONCE, 0), (NONCE, -1)])
def test_a_message_that_cannot_be_told_from_another_is_refused(nonce: bytes, sequence: int) -> None:
    with pytest.raises(InvalidInput):
        Sequences(FakeClock()).accept(VAN, nonce, sequence)


def test_no_nonce_is_forgotten_while_a_probe_of_it_could_be_fresh() -> None:
    clock = FakeClock()
    known = Sequences(clock)
    nonces = [number.to_bytes(16, "big") for number in range(NONCES_PER_CREDENTIAL_MAX)]
    assert all(accepted(known, 1, nonce) for nonce in nonces)
    with pytest.raises(Overloaded):
        known.accept(VAN, b"another one, new", 1)
    assert accepted(known, 1, b"another one, new", Actor("edge-other"))
    clock.advance(policy.PROBE_AGE_MS_MAX / 1000)
    assert not any(accepted(known, 1, nonce) for nonce in nonces)
    clock.advance(sequences.FORGET_AFTER_S + 1)
    assert accepted(known, 1, b"another one, new")
    assert len(known._windows) == 1
    assert policy.PROBE_AGE_MS_MAX / 1000 + policy.CAPTURE_AHEAD_MS_MAX / 1000 < sequences.FORGET_AFTER_S


# --- climbing ----------------------------------------------------------------------------------------------


def candidate(score: float, subject: str = "s") -> Candidate:
    return Candidate(subject, f"r-{subject}", "custody", score, 1, 1e-6)


def test_a_hill_climb_is_stopped_long_before_it_arrives() -> None:
    """The attack: keep a change if the disclosed score is higher. It sees exact scores here, the worst case."""
    rng = np.random.default_rng(5)
    clock, climbing = FakeClock(), Climbing(FakeClock())
    target = rng.normal(size=128)
    target /= np.linalg.norm(target)
    found = rng.normal(size=128)
    found /= np.linalg.norm(found)
    found = 0.52 * target + math.sqrt(1 - 0.52**2) * (found - (found @ target) * target) / np.linalg.norm(
        found - (found @ target) * target
    )
    best, stopped_at, tries = float(found @ target), None, 0
    while stopped_at is None and tries < 20_000:
        tries += 1
        step = found + 0.03 * rng.normal(size=128)
        step /= np.linalg.norm(step)
        score = float(step @ target)
        if climbing.note("van", [candidate(score)]):
            stopped_at = best
        if score > best:
            found, best = step, score
    assert stopped_at is not None, "never stopped"
    assert stopped_at < 0.9
    assert tries < 3000
    assert climbing.cooling_s("van") == COOL_DOWN_S
    assert climbing.cooling_s("desk") == 0.0
    assert clock.monotonic() == FakeClock().monotonic()


def test_people_who_stand_or_walk_by_are_not_taken_for_a_climb() -> None:
    rng = np.random.default_rng(7)
    clock = FakeClock()
    climbing = Climbing(clock)
    stopped = 0
    for person in range(300):
        # Standing: scores about a mean. Walking up: 6 s at 10 frames a second, from 0.5 to 0.8.
        for score in 0.7 + 0.06 * rng.normal(size=200):
            stopped += climbing.note("van", [candidate(score, f"standing-{person}")])
        for score in np.linspace(0.5, 0.8, 60) + 0.04 * rng.normal(size=60):
            stopped += climbing.note("van", [candidate(score, f"walking-{person}")])
    assert stopped == 0


def test_a_pause_ends_a_run_and_a_cool_down_ends() -> None:
    clock = FakeClock()
    climbing = Climbing(clock)
    for block in range(9):
        for _ in range(BLOCK):
            assert not climbing.note("van", [candidate(0.4 + 0.03 * block)])
    clock.advance(1000)
    for block in range(10):
        for _ in range(BLOCK):
            assert not climbing.note("van", [candidate(0.4 + 0.03 * block)])
    assert any([climbing.note("van", [candidate(0.8)]) for _ in range(BLOCK)])
    assert climbing.cooling_s("van") == COOL_DOWN_S
    clock.advance(COOL_DOWN_S)
    assert climbing.cooling_s("van") == 0.0


def test_runs_are_bounded() -> None:
    climbing = Climbing(FakeClock())
    for number in range(RUNS_MAX + 100):
        climbing.note("van", [candidate(0.6, str(number))])
    assert len(climbing._runs) == RUNS_MAX


# --- bands -------------------------------------------------------------------------------------------------


@given(st.floats(-1, 1), st.floats(1e-12, 1))
def test_a_band_tells_a_score_to_its_step_and_a_rate_to_its_power_of_ten(score: float, rate: float) -> None:
    shown = bands.banded(candidate(score)._replace(false_match_rate=rate))
    assert shown.score_step == bands.STEP
    assert shown.score - 1e-6 <= score < shown.score + bands.STEP + 1e-6
    assert abs(shown.score / bands.STEP - round(shown.score / bands.STEP)) < 1e-9
    assert rate <= shown.false_match_rate * (1 + 1e-6)
    exponent = math.log10(shown.false_match_rate)
    assert abs(exponent - round(exponent)) < 1e-9


def test_who_sees_bands_asks_for_thresholds_at_their_edges_only() -> None:
    operator, expert = Actor("a", frozenset((Scope.OPERATOR,))), Actor("b", frozenset((Scope.RAW_SCORES,)))
    for threshold in (None, 0.6, float(np.float32(0.65)), 0.0):
        bands.require_an_edge(operator, threshold)
    bands.require_an_edge(expert, 0.6123)
    with pytest.raises(InvalidInput):
        bands.require_an_edge(operator, 0.6123)


# --- tokens of edge nodes ----------------------------------------------------------------------------------


def test_a_secret_is_kept_as_a_digest_and_opens_nothing_else() -> None:
    presented, digest = new_secret("van-7")
    assert credential_of(presented) == "van-7"
    assert secret_opens(presented, digest)
    assert presented.rpartition(".")[2] not in digest
    for other in (presented + "x", presented[:-1], "edge.van-7.", "edge.van-7", ""):
        assert not secret_opens(other, digest)
    assert not secret_opens("edge.van-7.", "")
    assert credential_of("edge.v.a.n.secret") == "v.a.n"
    assert [credential_of(one) for one in ("", "edge", "edge.", "edge.a", "other.a.b")] == [""] * 5


def test_an_edge_token_is_read_by_its_own_service_until_it_ends() -> None:
    tokens, other = EdgeTokens(b"k" * 32), EdgeTokens(b"l" * 32)
    token = tokens.issue("van-7", 1_000_000, 1_900_000)
    assert tokens.read(token, 1_899_999) == ("van-7", 1_900_000)
    refusals: list[tuple[EdgeTokens, str, int]] = [
        (tokens, token, 1_900_000),
        (other, token, 1_000_000),
        (tokens, token[:-2], 1_000_000),
        (tokens, "a.b.c", 1_000_000),
    ]
    for reader, text, now_ms in refusals:
        with pytest.raises(Unauthenticated):
            reader.read(text, now_ms)


def test_the_signing_key_is_made_once_and_read_by_its_owner_only(tmp_path: Path) -> None:
    key = load_or_create_key(tmp_path / "keys")
    path = tmp_path / "keys" / KEY_FILE
    assert load_or_create_key(tmp_path / "keys") == key
    assert (len(key), stat.S_IMODE(path.stat().st_mode)) == (32, 0o600)
    assert [one.name for one in path.parent.iterdir()] == [KEY_FILE]
    path.chmod(0o640)
    with pytest.raises(StartRefused, match="others may read"):
        load_or_create_key(tmp_path / "keys")
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(StartRefused, match="no key"):
        load_or_create_key(tmp_path / "keys")


def test_every_refusal_of_conduct_says_what_to_do() -> None:
    known = Sequences(FakeClock())
    known.accept(VAN, NONCE, 1)
    for refuse in (lambda: known.accept(VAN, NONCE, 1), lambda: known.accept(VAN, b"", 1)):
        with pytest.raises(MatcherError) as refused:
            refuse()
        assert refused.value.hint
        assert refused.value.field
