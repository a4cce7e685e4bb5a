"""Who may search what, and why not. Pure: a message and the catalogue in, a plan or a refusal out.

Every refusal names the field and what to do. The rules are versioned: POLICY_VERSION goes into every reply
and every alert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matcher_service import lawful_galleries
from matcher_service.access import bands
from matcher_service.catalogue import Catalogue
from matcher_service.errors import Conflict, Forbidden, Gone, InvalidInput, MatcherError, NotFound, StaleProbe
from matcher_service.models.score_calibrator import check_table
from matcher_service.models.template_adapter import check_space
from matcher_service.terms import (
    Actor,
    Alert,
    ApproveWatchlist,
    Case,
    Cause,
    ChangeThreshold,
    CloseProposal,
    CreateCase,
    CreateDeployment,
    CreateGallery,
    DeleteGallery,
    Deployment,
    EdgeCredential,
    EndCase,
    EndDeployment,
    EndGround,
    Float32,
    Gallery,
    GalleryKind,
    IssueCredential,
    MakeProposal,
    ProbeMessage,
    Proposal,
    ProposalAction,
    RegisterSpace,
    ReviewReference,
    RevokeCredential,
    Scope,
    SpaceId,
    Write,
)

POLICY_VERSION = "1"

# An edge clock may run this far ahead; beyond it a capture time in the future would defeat the age limit.
CAPTURE_AHEAD_MS_MAX = 5_000

# Hard ceilings that no configuration lifts.
RETENTION_MS_MAX = 10 * 365 * 86_400_000
DEPLOYMENT_MS_MAX = 31 * 86_400_000
CASE_MS_MAX = 365 * 86_400_000
PROBE_AGE_MS_MAX = 3_600_000
EDGE_PROBES_PER_S_MAX = 100_000
PROPOSAL_MS_MAX = 7 * 86_400_000
ALERT_RETENTION_MS_MAX = 365 * 86_400_000

# More references than this in one withdrawal, or of one person in an hour, are a bulk withdrawal.
BULK_WITHDRAWAL_REFERENCES = 100
PROPOSED_REFERENCES_MAX = 10_000
CAMERAS_MAX = 256

_CERTIFICATE = re.compile(r"sha256:[0-9a-f]{64}|san:[!-~]{1,256}")


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """What one message may do: galleries in id order, the threshold of each, and the limits that hold."""

    gallery_ids: tuple[str, ...]
    thresholds: tuple[float, ...]
    source: SpaceId
    target: SpaceId
    rank_max: int
    probe_age_ms_max: int | None
    kinds: frozenset[GalleryKind] = frozenset()
    custody_first: bool = False


def plan(message: ProbeMessage, catalogue: Catalogue, now_ms: int) -> SearchPlan:
    """Judge the message's authority, galleries, threshold and space at `now_ms`.

    Raises Forbidden, NotFound, Gone or InvalidInput.
    """
    authority = _authority(message, catalogue, now_ms)
    _require_camera(message, authority)
    bands.require_an_edge(message.actor, message.threshold)
    galleries = _galleries(message, authority, catalogue)
    target = galleries[0].space
    for gallery in galleries[1:]:
        if gallery.space != target:
            raise InvalidInput(
                f"galleries {galleries[0].gallery_id} and {gallery.gallery_id} are in different template spaces",
                field="gallery_ids",
                cause=Cause.WRONG_SPACE,
                hint="send one request per template space",
            )
    require_comparable(message.space, target, catalogue)
    if message.rank_max > authority.rank_max:
        raise Forbidden(
            f"rank_max {message.rank_max} exceeds the {authority.rank_max} that the authority allows",
            field="rank_max",
            cause=Cause.RANK_MAX,
            hint=f"ask for at most {authority.rank_max} candidates",
        )
    return SearchPlan(
        gallery_ids=tuple(gallery.gallery_id for gallery in galleries),
        thresholds=tuple(_threshold(message.threshold, gallery, authority) for gallery in galleries),
        source=message.space,
        target=target,
        rank_max=message.rank_max,
        probe_age_ms_max=authority.probe_age_ms_max if isinstance(authority, Deployment) else None,
        kinds=frozenset(gallery.kind for gallery in galleries),
        custody_first=isinstance(authority, Case) and _reaches_custody(authority, catalogue),
    )


def _authority(message: ProbeMessage, catalogue: Catalogue, now_ms: int) -> Deployment | Case:
    authority: Deployment | Case | None
    if message.deployment_id:
        field, name = "deployment_id", message.deployment_id
        authority = catalogue.deployments.get(name)
    elif message.case_reference:
        field, name = "case_reference", message.case_reference
        authority = catalogue.cases.get(name)
    else:
        raise InvalidInput(
            "a search needs an authority",
            field="deployment_id",
            hint="name the deployment_id or the case_reference under which you search",
        )
    if authority is None or not may_see(message.actor, authority):
        raise NotFound(f"no such {field} {name!r}", field=field, hint="create it first, or check its spelling")
    if authority.ended_at_ms is not None or now_ms >= authority.closes_at_ms:
        raise Gone(f"{field} {name!r} has ended", field=field, hint="search under a current authority")
    if now_ms < authority.opens_at_ms:
        raise Forbidden(f"{field} {name!r} has not begun", field=field, hint="wait for the start of its window")
    return authority


def may_see(actor: Actor, authority: Deployment | Case) -> bool:
    """Whether a deployment or case exists for this actor: an edge node's is its own, a person's one with a gallery
    that the person has rights over."""
    if actor.deployment_id:
        return isinstance(authority, Deployment) and authority.deployment_id == actor.deployment_id
    return actor.galleries is None or not actor.galleries.isdisjoint(authority.gallery_ids)


def may_see_alert(actor: Actor, alert: Alert) -> bool:
    """Whether an alert exists for this actor: of its own deployment, with candidates of its own galleries only."""
    if actor.deployment_id and alert.deployment_id != actor.deployment_id:
        return False
    return all(actor.has_rights_over(one.gallery_id) for one in alert.candidates)


def require_every_gallery(actor: Actor) -> None:
    """Raise Forbidden for who has rights over some galleries only: the audit is one chain, and shows them all."""
    if actor.galleries is not None:
        raise Forbidden(
            "the audit is one chain over every gallery",
            field="authorization",
            hint="it takes an auditor with rights over all galleries",
        )


def _require_camera(message: ProbeMessage, authority: Deployment | Case) -> None:
    cameras = message.actor.cameras or (authority.cameras if isinstance(authority, Deployment) else ())
    if cameras and message.camera_id not in cameras:
        raise Forbidden(
            f"camera {message.camera_id!r} is not one of the deployment's"
            if message.camera_id
            else "no camera is named",
            field="camera_id",
            hint=f"the deployment was authorised for {', '.join(cameras)}",
        )


def _galleries(message: ProbeMessage, authority: Deployment | Case, catalogue: Catalogue) -> list[Gallery]:
    allowed = [one for one in authority.gallery_ids if message.actor.has_rights_over(one)]
    standing = [one for one in allowed if one not in catalogue.deleted_galleries]
    named = message.gallery_ids or [one for one in standing if _unasked(one, authority, catalogue)] or standing
    galleries = []
    for gallery_id in sorted(set(named)):
        if gallery_id not in allowed:
            # The same answer whether or not such a gallery exists: its existence is not the caller's to learn.
            raise Forbidden(
                f"gallery {gallery_id!r} is not among those that the authority allows",
                field="gallery_ids",
                cause=Cause.UNKNOWN_GALLERY,
                hint=f"it allows {', '.join(sorted(allowed))}",
            )
        gallery = gallery_named(gallery_id, catalogue, field="gallery_ids")
        lawful_galleries.require_approved(gallery)
        if gallery.kind is GalleryKind.IMMIGRATION and isinstance(authority, Case):
            _require_immigration_authority(authority)
        galleries.append(gallery)
    if not galleries:
        raise Gone(
            "every gallery of the authority has been deleted",
            field="gallery_ids",
            cause=Cause.UNKNOWN_GALLERY,
            hint="create an authority over the galleries that exist",
        )
    return galleries


def _unasked(gallery_id: str, authority: Deployment | Case, catalogue: Catalogue) -> bool:
    """Whether a search that names no gallery goes there: a case's into an immigration gallery only when asked, or where
    it has no other."""
    gallery = catalogue.galleries.get(gallery_id)
    return isinstance(authority, Deployment) or gallery is None or gallery.kind is not GalleryKind.IMMIGRATION


def _reaches_custody(case: Case, catalogue: Catalogue) -> bool:
    held = (catalogue.galleries.get(one) for one in case.gallery_ids)
    return any(one is not None and one.kind is GalleryKind.CUSTODY for one in held)


def _require_immigration_authority(case: Case) -> None:
    if not case.immigration_authority:
        raise Forbidden(
            f"case {case.case_reference!r} has no authority for an immigration gallery",
            field="gallery_ids",
            hint="create a case that states its immigration_authority",
        )


def gallery_of(actor: Actor, gallery_id: str, catalogue: Catalogue, *, field: str = "gallery_id") -> Gallery:
    """The gallery, for an actor who has rights over it; for anybody else as if it never was."""
    if not actor.has_rights_over(gallery_id):
        raise _no_gallery(gallery_id, field)
    return gallery_named(gallery_id, catalogue, field=field)


def gallery_named(gallery_id: str, catalogue: Catalogue, *, field: str = "gallery_id") -> Gallery:
    """The gallery of that id; raises Gone if it was deleted, NotFound if it never was."""
    gallery = catalogue.galleries.get(gallery_id)
    if gallery is not None:
        return gallery
    if gallery_id in catalogue.deleted_galleries:
        raise Gone(
            f"gallery {gallery_id!r} has been deleted",
            field=field,
            cause=Cause.UNKNOWN_GALLERY,
            hint="its references are withdrawn; name another gallery",
        )
    raise _no_gallery(gallery_id, field)


def _no_gallery(gallery_id: str, field: str) -> NotFound:
    return NotFound(
        f"no gallery {gallery_id!r}",
        field=field,
        cause=Cause.UNKNOWN_GALLERY,
        hint="list the galleries, or create it",
    )


def _threshold(asked: float | None, gallery: Gallery, authority: Deployment | Case) -> float:
    least = gallery.threshold
    if isinstance(authority, Deployment) and authority.threshold is not None:
        least = max(least, authority.threshold)
    if asked is None:
        return least
    # As float32, which is what the wire carries: a threshold read from a reply and sent back must hold.
    if np.float32(asked) < np.float32(least):
        raise InvalidInput(
            f"threshold {asked:g} is below the {least:g} of gallery {gallery.gallery_id}",
            field="threshold",
            cause=Cause.THRESHOLD_BELOW_FLOOR,
            hint="a request may only raise a threshold: leave it out, or ask for a higher one",
        )
    return max(asked, least)


def require_comparable(source: SpaceId, target: SpaceId, catalogue: Catalogue) -> None:
    """Raise InvalidInput (WRONG_DIMENSION or WRONG_SPACE) unless templates of `source` can enter `target`."""
    if source == target:
        return
    if source[:2] == target[:2]:
        raise InvalidInput(
            f"dimension {source.dimension}, but {target.name}/{target.version} has {target.dimension}",
            field="space.dimension",
            cause=Cause.WRONG_DIMENSION,
            hint=f"send templates of dimension {target.dimension}",
        )
    space = catalogue.spaces.get(target)
    mapped = {one.source for one in space.maps} if space is not None else set()
    if source not in mapped or source not in catalogue.spaces:
        raise InvalidInput(
            f"templates of {source} cannot be compared in {target}",
            field="space",
            cause=Cause.WRONG_SPACE,
            hint=f"compute templates with {target.name}/{target.version}, or register a map into it",
        )


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """`usable` bool [n]; `refusals` for the others, by row."""

    usable: NDArray[np.bool_]
    refusals: dict[int, MatcherError]

    @property
    def count(self) -> int:
        return int(self.usable.size) - len(self.refusals)


def judge_templates(templates: Float32) -> JudgedRows:
    """Rows [n, d] that are neither infinite, nor NaN, nor zero."""
    # Of each row the greatest magnitude, which is NaN or infinite if anything in it is: two passes, without a copy.
    peaks = np.maximum(templates.max(axis=1, initial=0.0), -templates.min(axis=1, initial=0.0))
    usable = np.asarray(np.isfinite(peaks))
    refusals: dict[int, MatcherError] = {
        int(row): InvalidInput(
            "the template holds NaN or infinity",
            field=f"templates[{row}]",
            cause=Cause.NOT_FINITE,
            hint="send finite numbers only",
        )
        for row in np.flatnonzero(~usable)
    }
    some = np.asarray(peaks != 0)
    for row in np.flatnonzero(usable & ~some):
        refusals[int(row)] = zero_template(int(row))
    return JudgedRows(usable & some, refusals)


def zero_template(row: int) -> InvalidInput:
    """The refusal of a template that has no direction, as sent or after its space's centre was subtracted."""
    return InvalidInput(
        "the template is zero and has no direction",
        field=f"templates[{row}]",
        cause=Cause.ZERO_TEMPLATE,
        hint="no face was encoded: do not send it",
    )


def judge_probes(message: ProbeMessage, plan: SearchPlan, now_ms: int) -> JudgedRows:
    """As judge_templates, and for live probes the age at capture against the deployment's limit."""
    judged = judge_templates(message.templates)
    if plan.probe_age_ms_max is None:
        return judged
    age_ms = now_ms - message.captured_at_ms
    timely: NDArray[np.bool_] = (age_ms <= plan.probe_age_ms_max) & (age_ms >= -CAPTURE_AHEAD_MS_MAX)
    if timely.all():
        return judged
    refusals = dict(judged.refusals)
    for row in np.flatnonzero(judged.usable & ~timely):
        refusals[int(row)] = _untimely(int(row), int(age_ms[row]), plan.probe_age_ms_max)
    return JudgedRows(judged.usable & timely, refusals)


def _untimely(row: int, age_ms: int, age_ms_max: int) -> MatcherError:
    field = f"captured_at_ms[{row}]"
    if age_ms < 0:
        return InvalidInput(f"captured {-age_ms} ms in the future", field=field, hint="set the clock of the edge node")
    return StaleProbe(
        f"captured {age_ms} ms ago; the deployment allows {age_ms_max} ms",
        field=field,
        hint="send probes as they are captured; an old one never alerts as live",
    )


# --- writes ----------------------------------------------------------------------------------------


def judge_change(
    write: Write, actor: Actor, catalogue: Catalogue, id_bytes_max: int, dimension_max: int, now_ms: int
) -> None:
    """Judge a catalogue write of an actor before it is offered to the log.

    Raises InvalidInput, NotFound, Conflict, or Forbidden for what takes two persons.
    """
    match write:
        case CreateGallery(gallery):
            _require_own(actor, gallery.gallery_id)
            _judge_gallery(gallery, catalogue, id_bytes_max)
        case CreateDeployment(deployment):
            _judge_deployment(deployment, actor, catalogue, id_bytes_max, now_ms)
        case CreateCase(case):
            _judge_case(case, actor, catalogue, id_bytes_max, now_ms)
        case EndDeployment(deployment_id):
            _require_visible(actor, deployment_id, "deployment_id", catalogue.deployments)
        case EndCase(case_reference):
            _require_visible(actor, case_reference, "case_reference", catalogue.cases)
        case ChangeThreshold():
            gallery_of(actor, write.gallery_id, catalogue)
            _require_two_persons(actor, "a change of threshold")
            judge_threshold_change(write, catalogue, id_bytes_max)
        case DeleteGallery():
            if not actor.has_rights_over(write.gallery_id):
                raise _no_gallery(write.gallery_id, "gallery_id")
            _require_two_persons(actor, "the deletion of a gallery")
        case ApproveWatchlist() | EndGround() | ReviewReference():
            if write.gallery_id or not isinstance(write, EndGround) or actor.galleries is not None:
                gallery_of(actor, write.gallery_id, catalogue)
            lawful_galleries.judge_words(write)
        case IssueCredential(credential):
            _judge_credential(credential, actor, catalogue, id_bytes_max, now_ms)
        case RevokeCredential():
            credential_of(actor, write.credential_id, catalogue)
            _require_text(write.reason, "reason", 1024)
        case MakeProposal(proposal):
            _judge_proposal(proposal, actor, catalogue, id_bytes_max, now_ms)
        case CloseProposal():
            proposal_of(actor, write.proposal_id, catalogue)
            _require_text(write.reason, "reason", 1024)
        case RegisterSpace(space):
            _require_text(space.id.name, "name", id_bytes_max)
            if not 2 <= space.id.dimension <= dimension_max:
                raise InvalidInput(
                    f"{space.id.dimension} is not between 2 and {dimension_max}",
                    field="dimension",
                    cause=Cause.WRONG_DIMENSION,
                    hint="give the length of the model's templates",
                )
            check_space(space)
            if space.score_table is not None:
                check_table(space.score_table)
        case _:
            pass


def _require_own(actor: Actor, gallery_id: str) -> None:
    if not actor.has_rights_over(gallery_id):
        raise Forbidden(
            f"gallery {gallery_id!r} is not one that this credential has rights over",
            field="gallery_id",
            hint="the identity provider must name it among the person's galleries",
        )


def _require_visible(actor: Actor, name: str, field: str, known: Mapping[str, Deployment | Case]) -> None:
    authority = known.get(name)
    if authority is not None and not may_see(actor, authority):
        # As the log answers for one that never was.
        what = "deployment" if field == "deployment_id" else "case"
        raise NotFound(f"{what} {name} does not exist", field=field, hint=f"list the {what}s to see which there are")


def _require_two_persons(actor: Actor, what: str) -> None:
    if actor.person:
        raise Forbidden(
            f"{what} takes two persons",
            field="authorization",
            hint="propose it at /v1/proposals; an authorising officer other than you approves it",
        )


def _judge_deployment(
    deployment: Deployment, actor: Actor, catalogue: Catalogue, id_bytes_max: int, now_ms: int
) -> None:
    _judge_window(deployment, deployment.deployment_id, "deployment_id", DEPLOYMENT_MS_MAX, now_ms, id_bytes_max)
    _require_text(deployment.authorised_by, "authorised_by", id_bytes_max)
    _require_text(deployment.reason, "reason", 4096)
    for field in ("place", "legal_authority", "necessity"):
        # On the loopback token nobody is authenticated, and what is left out stays empty in the record.
        if actor.person or getattr(deployment, field):
            _require_text(getattr(deployment, field), field, 4096)
    if len(deployment.cameras) > CAMERAS_MAX:
        raise InvalidInput(f"{len(deployment.cameras)} cameras", field="cameras", hint=f"name at most {CAMERAS_MAX}")
    for row, camera in enumerate(deployment.cameras):
        require_id(camera, f"cameras[{row}]", id_bytes_max)
    if not 1 <= deployment.probe_age_ms_max <= PROBE_AGE_MS_MAX:
        raise InvalidInput(
            f"{deployment.probe_age_ms_max} is not between 1 and {PROBE_AGE_MS_MAX}",
            field="probe_age_ms_max",
            hint="say how old a live probe may be",
        )
    if not 0 <= deployment.alert_retention_ms <= ALERT_RETENTION_MS_MAX:
        raise InvalidInput(
            f"{deployment.alert_retention_ms} is not between 0 and {ALERT_RETENTION_MS_MAX}",
            field="alert_retention_ms",
            hint="say how long its alerts live, or leave it out for as long as the settings say",
        )
    _require_unused(deployment.deployment_id, catalogue.deployments, "deployment_id")
    for gallery in _require_galleries(deployment.gallery_ids, actor, catalogue):
        _judge_deployment_threshold(deployment.threshold, gallery)


def _judge_deployment_threshold(threshold: float | None, gallery: Gallery) -> None:
    if threshold is not None and not gallery.threshold <= threshold <= 1.0:
        raise InvalidInput(
            f"threshold {threshold:g} is not between the {gallery.threshold:g} of gallery {gallery.gallery_id} and 1",
            field="threshold",
            cause=Cause.THRESHOLD_BELOW_FLOOR,
            hint="a deployment may only raise a threshold: leave it out, or give a higher one",
        )


def _judge_case(case: Case, actor: Actor, catalogue: Catalogue, id_bytes_max: int, now_ms: int) -> None:
    _judge_window(case, case.case_reference, "case_reference", CASE_MS_MAX, now_ms, id_bytes_max)
    _require_text(case.requested_by, "requested_by", id_bytes_max)
    _require_text(case.purpose, "purpose", 4096)
    _require_unused(case.case_reference, catalogue.cases, "case_reference")
    kinds = {gallery.kind for gallery in _require_galleries(case.gallery_ids, actor, catalogue)}
    if GalleryKind.IMMIGRATION not in kinds:
        return
    if GalleryKind.CUSTODY not in kinds and actor.person:
        raise InvalidInput(
            "a case over an immigration gallery names no custody gallery",
            field="gallery_ids",
            hint="custody is searched first: name a custody gallery as well",
        )
    _require_text(case.immigration_authority, "immigration_authority", 4096)
    if actor.person and Scope.AUTHORISING_OFFICER not in actor.scopes:
        raise Forbidden(
            "a case over an immigration gallery is an authorising officer's to create",
            field="gallery_ids",
            hint="leave the immigration gallery out, or ask an authorising officer",
        )


def credential_of(actor: Actor, credential_id: str, catalogue: Catalogue) -> EdgeCredential:
    """The edge credential, for an actor who may see its deployment; raises NotFound for anybody else."""
    credential = catalogue.credentials.get(credential_id)
    deployment = catalogue.deployments.get(credential.deployment_id) if credential is not None else None
    if credential is None or deployment is None or not may_see(actor, deployment):
        raise NotFound(f"no credential {credential_id!r}", field="credential_id", hint="list the credentials")
    return credential


def proposal_of(actor: Actor, proposal_id: str, catalogue: Catalogue) -> Proposal:
    """The proposal, for an actor who has rights over its gallery; raises NotFound for anybody else."""
    proposal = catalogue.proposals.get(proposal_id)
    if proposal is None or not actor.has_rights_over(proposal.gallery_id):
        raise NotFound(f"no proposal {proposal_id!r}", field="proposal_id", hint="list the proposals")
    return proposal


def _judge_credential(
    credential: EdgeCredential, actor: Actor, catalogue: Catalogue, id_bytes_max: int, now_ms: int
) -> None:
    require_id(credential.credential_id, "credential_id", min(id_bytes_max, 64))
    deployment = catalogue.deployments.get(credential.deployment_id)
    if deployment is None or not may_see(actor, deployment):
        raise NotFound(
            f"no such deployment_id {credential.deployment_id!r}", field="deployment_id", hint="list the deployments"
        )
    if not now_ms < credential.expires_at_ms <= deployment.closes_at_ms:
        raise InvalidInput(
            "it must expire in the future, and no later than its deployment closes",
            field="expires_at_ms",
            hint="leave it out for the end of the deployment",
        )
    foreign = set(credential.cameras) - set(deployment.cameras)
    if foreign:
        raise InvalidInput(
            f"not cameras of the deployment: {', '.join(sorted(foreign))}",
            field="cameras",
            hint=f"it was authorised for {', '.join(deployment.cameras) or 'no named camera'}",
        )
    if not 1 <= credential.probes_per_s <= EDGE_PROBES_PER_S_MAX:
        raise InvalidInput(
            f"{credential.probes_per_s} is not between 1 and {EDGE_PROBES_PER_S_MAX}",
            field="probes_per_s",
            hint="say how many faces a second its cameras see",
        )
    if credential.certificate and not _CERTIFICATE.fullmatch(credential.certificate):
        raise InvalidInput(
            "neither sha256: and 64 hex digits nor san: and a name",
            field="certificate",
            hint="give the fingerprint of the client certificate, or its subject alternative name",
        )


def _judge_proposal(proposal: Proposal, actor: Actor, catalogue: Catalogue, id_bytes_max: int, now_ms: int) -> None:
    gallery_of(actor, proposal.gallery_id, catalogue)
    if not actor.person or proposal.proposed_by != actor.person:
        raise Forbidden(
            "only an authenticated person can propose",
            field="authorization",
            hint="on the loopback token, change the threshold directly and state the two persons",
        )
    _require_text(proposal.reason, "reason", 4096)
    if not now_ms < proposal.expires_at_ms <= now_ms + PROPOSAL_MS_MAX:
        raise InvalidInput("not within a week from now", field="expires_at_ms", hint="leave it out")
    if proposal.action is ProposalAction.THRESHOLD:
        judge_threshold_change(proposed_threshold(proposal, "another"), catalogue, id_bytes_max)
    listed = len(proposal.reference_ids)
    if proposal.action is ProposalAction.WITHDRAWAL and not 1 <= listed <= PROPOSED_REFERENCES_MAX:
        raise InvalidInput(f"{listed} references", field="reference_ids", hint=f"name 1 to {PROPOSED_REFERENCES_MAX}")


def proposed_threshold(proposal: Proposal, approved_by: str) -> ChangeThreshold:
    """The change that a proposal of a threshold stands for. Raises InvalidInput if it names none."""
    if proposal.threshold is None:
        raise InvalidInput("no threshold is proposed", field="threshold", hint="say which it is to be")
    return ChangeThreshold(
        proposal.gallery_id, proposal.threshold, proposal.reason, proposal.proposed_by, approved_by, proposal.rates
    )


def approvable(proposal_id: str, actor: Actor, catalogue: Catalogue, now_ms: int) -> Proposal:
    """The proposal, if this person may approve it now. Raises NotFound, Gone, or Forbidden for who proposed it."""
    proposal = proposal_of(actor, proposal_id, catalogue)
    if proposal.closed_as or now_ms >= proposal.expires_at_ms:
        raise Gone(
            f"proposal {proposal_id} was {proposal.closed_as or 'left to expire'}",
            field="proposal_id",
            hint="propose it anew",
        )
    if not actor.person or actor.person == proposal.proposed_by:
        raise Forbidden(
            "a proposal is approved by a second authenticated person",
            field="authorization",
            hint="ask another authorising officer",
        )
    return proposal


def _judge_gallery(gallery: Gallery, catalogue: Catalogue, id_bytes_max: int) -> None:
    require_id(gallery.gallery_id, "gallery_id", id_bytes_max)
    for field in ("controller", "lawful_basis", "purpose"):
        _require_text(getattr(gallery, field), field, 4096)
    if not 1 <= gallery.retention_ms <= RETENTION_MS_MAX:
        raise InvalidInput(
            f"{gallery.retention_ms} is not between 1 and {RETENTION_MS_MAX} ms",
            field="retention_ms",
            hint="say for how long a reference may be kept",
        )
    if not -1.0 <= gallery.threshold <= 1.0:
        raise InvalidInput(
            f"{gallery.threshold:g} is not between -1 and 1",
            field="threshold",
            hint="a score is a cosine; set the threshold from a target false-match rate",
        )
    lawful_galleries.judge_terms(gallery)
    if gallery.space not in catalogue.spaces:
        raise NotFound(
            f"template space {gallery.space} is not registered",
            field="space",
            cause=Cause.WRONG_SPACE,
            hint="register the space with its centre first",
        )


def judge_threshold_change(change: ChangeThreshold, catalogue: Catalogue, id_bytes_max: int) -> None:
    gallery = gallery_named(change.gallery_id, catalogue)
    if not -1.0 <= change.threshold <= 1.0:
        raise InvalidInput(
            f"{change.threshold:g} is not between -1 and 1", field="threshold", hint="a score is a cosine"
        )
    if change.threshold == gallery.threshold:
        raise Conflict(f"the threshold is {change.threshold:g} already", field="threshold", hint="nothing to change")
    _require_text(change.reason, "reason", 4096)
    _require_text(change.proposed_by, "proposed_by", id_bytes_max)
    _require_text(change.approved_by, "approved_by", id_bytes_max)
    for row, one in enumerate(change.rates):
        if one.measure not in ("FPIR", "FNIR") or not (0 <= one.before <= 1 and 0 <= one.after <= 1):
            raise InvalidInput(
                "not an error rate before and after", field=f"rates[{row}]", hint="give FPIR or FNIR, from 0 to 1"
            )
    told = {one.measure for one in change.rates if not one.group}
    if told != {"FPIR", "FNIR"}:
        raise InvalidInput(
            "a threshold changes both error rates, and both must be told",
            field="rates",
            hint="give FPIR and FNIR over all people before and after, as `matcher evaluate` measures them",
        )


def _judge_window(
    authority: Deployment | Case, name: str, field: str, ms_max: int, now_ms: int, id_bytes_max: int
) -> None:
    require_id(name, field, id_bytes_max)
    length = authority.closes_at_ms - authority.opens_at_ms
    if not 0 < length <= ms_max or authority.closes_at_ms <= now_ms:
        raise InvalidInput(
            f"the window must end in the future, after it opens, and span at most {ms_max // 86_400_000} days",
            field="closes_at_ms",
            hint="give opens_at_ms and closes_at_ms in milliseconds since 1970",
        )
    if authority.rank_max < 1 or authority.rank_max > 1000:
        raise InvalidInput(
            f"{authority.rank_max} is not between 1 and 1000",
            field="rank_max",
            cause=Cause.RANK_MAX,
            hint="say how many candidates a search may return",
        )


def _require_galleries(gallery_ids: Sequence[str], actor: Actor, catalogue: Catalogue) -> list[Gallery]:
    if not gallery_ids:
        raise InvalidInput("no gallery named", field="gallery_ids", cause=Cause.EMPTY, hint="name at least one")
    return [gallery_of(actor, one, catalogue, field="gallery_ids") for one in gallery_ids]


def _require_unused(name: str, taken: object, field: str) -> None:
    if name in taken:  # type: ignore[operator]
        raise Conflict(f"{name!r} exists already", field=field, hint="choose another; an authority is never rewritten")


def require_id(value: str, field: str, id_bytes_max: int) -> None:
    """An identifier: 1 to id_bytes_max bytes of UTF-8, without control characters, slashes or outer blanks."""
    if (
        not value
        or len(value.encode()) > id_bytes_max
        or not value.isprintable()
        or "/" in value
        or value != value.strip()
    ):
        raise InvalidInput(
            f"not a usable identifier: {value[:40]!r}",
            field=field,
            hint=f"use 1 to {id_bytes_max} bytes of printable text without slashes or outer blanks",
        )


def _require_text(value: str, field: str, bytes_max: int) -> None:
    if not value.strip() or len(value.encode()) > bytes_max:
        raise InvalidInput(
            "must say something" if not value.strip() else f"longer than {bytes_max} bytes",
            field=field,
            hint="a gallery, deployment or case cannot exist without it",
        )


def require_ids(values: Sequence[str], field: str, id_bytes_max: int) -> dict[int, MatcherError]:
    """Refusals, by row, of the identifiers that are not usable."""
    refusals: dict[int, MatcherError] = {}
    for row, value in enumerate(values):
        try:
            require_id(value, f"{field}[{row}]", id_bytes_max)
        except InvalidInput as refusal:
            refusals[row] = refusal
    return refusals


def floors(plan: SearchPlan, probes: int) -> Float32:
    """The thresholds of the plan for each probe, float32 [probes, galleries], none rounded down."""
    row = np.asarray(plan.thresholds, dtype=np.float32)
    low = row.astype(np.float64) < np.asarray(plan.thresholds)
    row[low] = np.nextafter(row[low], np.float32(np.inf))
    return np.broadcast_to(row, (probes, row.size))
