"""A message is accepted once: by the nonce of its stream and its number in it, never by its probes.

Who asks again after a broken connection, or after a refusal, gives the message the next number. State is a window of
bits for each nonce. None is forgotten while a message of it could still be fresh, so nothing is accepted twice
because it was pushed out; a credential that opens more streams than fit is refused instead.
"""

from __future__ import annotations

from collections import OrderedDict

from matcher_service.errors import Conflict, InvalidInput, Overloaded
from matcher_service.seams import Clock
from matcher_service.terms import Actor, Cause

NONCE_BYTES_MIN = 16
NONCE_BYTES_MAX = 32
WINDOW = 1024
NONCES_PER_CREDENTIAL_MAX = 512
# Longer than any deployment lets a probe wait (policy.PROBE_AGE_MS_MAX).
FORGET_AFTER_S = 3_900.0


class _Window:
    """Bit i of `seen` stands for sequence highest - i."""

    __slots__ = ("highest", "seen", "used_at")

    def __init__(self) -> None:
        self.highest = 0
        self.seen = 0
        self.used_at = 0.0


class Sequences:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # By credential; the nonces of each in order of their last use.
        self._windows: dict[str, OrderedDict[bytes, _Window]] = {}

    def accept(self, actor: Actor, nonce: bytes, sequence: int) -> None:
        """Note the message; raises Conflict (REPLAYED) if it came before, InvalidInput if it cannot be told,
        Overloaded if the credential has too many streams."""
        if not NONCE_BYTES_MIN <= len(nonce) <= NONCE_BYTES_MAX:
            raise InvalidInput(
                f"a nonce of {len(nonce)} bytes" if nonce else "the message names no stream",
                field="stream_nonce",
                hint=f"draw {NONCE_BYTES_MIN} to {NONCE_BYTES_MAX} random bytes for each stream",
            )
        if sequence < 1:
            raise InvalidInput("no number", field="stream_sequence", hint="count the messages of a stream from 1")
        window = self._window(actor.name, nonce)
        ahead = sequence - window.highest
        if ahead > 0:
            # Far ahead, nothing of the window remains; shifting by an attacker's number would cost its memory.
            window.seen = (window.seen << ahead | 1) & ((1 << WINDOW) - 1) if ahead < WINDOW else 1
            window.highest = sequence
            return
        if -ahead >= WINDOW or window.seen >> -ahead & 1:
            raise Conflict(
                "this message of the stream came before",
                field="stream_sequence",
                cause=Cause.REPLAYED,
                hint="number each sending once; ask again under the next number, and use a new nonce for each stream",
            )
        window.seen |= 1 << -ahead

    def _window(self, credential: str, nonce: bytes) -> _Window:
        now = self._clock.monotonic()
        windows = self._windows.get(credential)
        window = None if windows is None else windows.get(nonce)
        if window is None:
            self._forget(now)
            windows = self._windows.setdefault(credential, OrderedDict())
            if len(windows) >= NONCES_PER_CREDENTIAL_MAX:
                raise Overloaded(
                    "this credential has opened too many streams lately",
                    hint="keep the nonce of a stream when it reconnects, and use few streams",
                    retry_after_ms=5_000,
                )
            window = windows[nonce] = _Window()
        window.used_at = now
        self._windows[credential].move_to_end(nonce)
        return window

    def _forget(self, now: float) -> None:
        for credential, windows in list(self._windows.items()):
            while windows and now - next(iter(windows.values())).used_at > FORGET_AFTER_S:
                windows.popitem(last=False)
            if not windows:
                del self._windows[credential]
