"""Who may change the catalogue, and into what. Pure: a wish and the catalogue in, a refusal out, or nothing.

What may be searched is judged in `policy.py`, which has the ceilings too; every refusal names the field and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from matcher_service import lawful_galleries
from matcher_service.catalogue import Catalogue
from matcher_service.errors import Conflict, Forbidden, Gone, InvalidInput, NotFound
from matcher_service.models.score_calibrator import check_table
from matcher_service.models.template_adapter import check_space
from matcher_service.policy import (
    ALERT_RETENTION_MS_MAX,
    CAMERAS_MAX,
    CASE_MS_MAX,
    DEPLOYMENT_MS_MAX,
    EDGE_PROBES_PER_S_MAX,
    PROBE_AGE_MS_MAX,
    PROPOSAL_MS_MAX,
    PROPOSED_REFERENCES_MAX,
    RETENTION_MS_MAX,
    gallery_named,
    gallery_of,
    may_see,
    no_gallery,
    require_id,
)
from matcher_service.terms import (
    Actor,
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
    Gallery,
    GalleryKind,
    IssueCredential,
    MakeProposal,
    Proposal,
    ProposalAction,
    RegisterSpace,
    ReviewReference,
    RevokeCredential,
    Scope,
    Write,
)

_CERTIFICATE = re.compile(r"sha256:[0-9a-f]{64}|san:[!-~]{1,256}")


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
                raise no_gallery(write.gallery_id, "gallery_id")
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


def _require_text(value: str, field: str, bytes_max: int) -> None:
    if not value.strip() or len(value.encode()) > bytes_max:
        raise InvalidInput(
            "must say something" if not value.strip() else f"longer than {bytes_max} bytes",
            field=field,
            hint="a gallery, deployment or case cannot exist without it",
        )
