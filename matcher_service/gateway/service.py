"""What an edge needs of the rest of the service, in one value.

The edges decode, call and encode; everything that judges or stores stands behind these callables.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from matcher_service.access.authentication import Presented
from matcher_service.access.edge_tokens import EdgeTokens
from matcher_service.catalogue import Catalogue
from matcher_service.errors import MatcherError
from matcher_service.metrics import Metrics
from matcher_service.models.embedder.outcome import TemplateMaker
from matcher_service.seams import (
    AlertRecords,
    AuditProofs,
    Clock,
    ErasureReceipts,
    GalleryLog,
    KeyRotations,
    LegalHolds,
)
from matcher_service.settings import Settings
from matcher_service.terms import Actor, Alert, EnrolMessage, IdentifyReply, ProbeMessage, Receipt, Write


class Credentials(Protocol):
    async def authenticate(self, presented: Presented) -> Actor:
        """Who presents this; raises Unauthenticated, Gone, or ServiceFault if it cannot be found out."""
        ...

    def require_standing(self, actor: Actor) -> None:
        """Asked again for every message, because a credential may end (law 11); raises Unauthenticated or Gone."""
        ...


class Subscriptions(Protocol):
    def subscribe(self, deployment_ids: Sequence[str] = ()) -> AsyncIterator[Alert]:
        """Alerts from now on, of these deployments (none: of all); raises Overloaded if the reader lags."""
        ...


Withdrawal = Callable[[str, Sequence[str], str, Actor], Awaitable[Receipt]]
SubjectWithdrawal = Callable[[str, str, str, Actor], Awaitable[Receipt]]


class Admitted(Protocol):
    """A message that may be searched for. It holds a permit until it is answered or released."""

    def answer(self) -> Awaitable[IdentifyReply]: ...

    def release(self) -> None:
        """Give back what it holds, if it was not answered."""
        ...


@dataclass(frozen=True)
class Service:
    """Every callable raises MatcherError for a refusal of the whole message.

    `admit` does not wait. `identify` and `enrol` answer row by row otherwise. `withdraw` takes (gallery_id,
    reference_ids, reason, actor), `withdraw_subject` (gallery_id or "", subject_id, reason, actor). `log` is only read
    here.
    `ready` says whether requests had better come here and, if not, why; `started` whether the start is over.
    `templates` is None where no embedder is configured, `proofs`, `erasures`, `rotations` and `alert_records` where the
    log gives none. `approve` takes (proposal_id, reason, actor); it and `tokens` are None where only the loopback token
    is let in.
    """

    admit: Callable[[ProbeMessage], Admitted]
    enrol: Callable[[EnrolMessage], Awaitable[Sequence[Receipt | MatcherError]]]
    withdraw: Withdrawal
    withdraw_subject: SubjectWithdrawal
    change: Callable[[Write, Actor], Awaitable[Receipt]]
    catalogue: Catalogue
    log: GalleryLog
    alert_feed: Subscriptions
    ready: Callable[[], tuple[bool, str]]
    settings: Settings
    metrics: Metrics
    clock: Clock
    credentials: Credentials
    templates: TemplateMaker | None = None
    proofs: AuditProofs | None = None
    alert_records: AlertRecords | None = None
    legal_holds: LegalHolds | None = None
    erasures: ErasureReceipts | None = None
    rotations: KeyRotations | None = None
    approve: Callable[[str, str, Actor], Awaitable[Receipt]] | None = None
    tokens: EdgeTokens | None = None
    started: Callable[[], bool] = lambda: True

    async def identify(self, message: ProbeMessage) -> IdentifyReply:
        return await self.admit(message).answer()
