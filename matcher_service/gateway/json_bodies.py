"""The JSON bodies that HTTP accepts. An unknown field is an error; a template is base64 bytes or a list of numbers.

The same models describe the bodies in the served API description. Counts and ranges that depend on settings are
checked after decoding, together with those of protobuf messages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from matcher_service.terms import Category, GalleryKind, GroundEnd, Verdict

UINT32_MAX = 2**32 - 1
INT64_MAX = 2**63 - 1

Milliseconds = Annotated[int, Field(ge=0, le=INT64_MAX, description="Milliseconds since 1970-01-01T00:00:00Z.")]

# Typed as anything: checked and converted in bulk afterwards, not number by number.
Numbers = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "number"}},
                {"type": "string", "contentEncoding": "base64"},
            ],
            "description": "A list of numbers, or base64 of little-endian values.",
        }
    ),
]


class Body(BaseModel):
    # JSON numbers stay numbers and strings stay strings. Inputs are kept out of error texts elsewhere.
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class SpaceBody(Body):
    name: str
    version: int = Field(ge=0, le=UINT32_MAX)
    dimension: int = Field(ge=0, le=UINT32_MAX)


class ProbeBody(Body):
    probe_id: str = Field(description="Unique within the message; chosen by the caller.")
    template: Numbers
    captured_at_ms: Milliseconds


class IdentifyBody(Body):
    space: SpaceBody
    dtype: Literal["float32", "float16"] = Field("float32", description="Element type of base64 templates.")
    probes: list[ProbeBody]
    deployment_id: str = Field("", description="The authority of a live search; this or case_reference.")
    case_reference: str = Field("", description="The authority of a retrospective search.")
    gallery_ids: list[str] = Field([], description="Empty: every gallery that the authority allows.")
    threshold: float | None = Field(None, description="Raises the galleries' thresholds, never lowers them.")
    rank_max: int = Field(0, description="Most candidates (subjects) per probe; 0 means 1.")
    min_sequence: int = Field(0, ge=0, le=INT64_MAX, description="Answer only from shards that applied it.")
    deadline_ms: int = Field(0, description="Within which the answer is of use; 0: the service's default.")
    message_id: str = Field("", description="Echoed in the reply.")
    traceparent: str = ""
    camera_id: str = Field("", description="Where the deployment names its cameras: the one that saw these probes.")
    stream_nonce: str = Field("", description="Base64 of 16 to 32 random bytes; an edge node must send it.")
    stream_sequence: int = Field(0, ge=0, le=INT64_MAX, description="Counts the sendings under the nonce from 1.")


class ReferenceBody(Body):
    reference_id: str
    subject_id: str
    template: Numbers
    expires_at_ms: Milliseconds = 0
    source: str = Field("", description="Where the picture comes from; empty: the message's, else the gallery's.")
    lawful_basis: str = ""
    review_by_ms: Milliseconds = 0
    category: str = Field("", description="On a watchlist: one of its categories.")
    reason: str = Field("", description="On a watchlist: why.")
    quality: float | None = Field(None, description="From 0 to 1, as /v1/templates measures it.")


class EnrolBody(Body):
    space: SpaceBody
    dtype: Literal["float32", "float16"] = Field("float32", description="Element type of base64 templates.")
    references: list[ReferenceBody]
    idempotency_key: str = Field("", description="Repeating a message with its key changes nothing.")
    replace: bool = Field(False, description="Replace live references of the same reference_id.")
    message_id: str = Field("", description="Echoed in the reply.")
    source: str = Field("", description="Of every reference that names none itself; so for the fields below.")
    lawful_basis: str = ""
    review_by_ms: Milliseconds = 0
    category: str = ""
    reason: str = ""


class WatchlistBody(Body):
    deployment_id: str = Field(description="The deployment, yet to begin or to be created, that it is built for.")
    categories: list[Annotated[Category, Field(strict=False)]] = Field(
        description="The closed list that its entries come from."
    )
    author: str = Field("", description="Who built it; for a person who signed in, always that person.")


class GalleryBody(Body):
    gallery_id: str
    kind: GalleryKind = Field(strict=False)
    controller: str = Field(description="Who is answerable for the data.")
    lawful_basis: str
    purpose: str
    retention_ms: int = Field(ge=1, le=INT64_MAX, description="Longest life of a reference from its enrolment.")
    space: SpaceBody
    threshold: float | None = Field(
        None, description="Least score, in [-1, 1], that is a candidate; this or one_false_alert_in."
    )
    one_false_alert_in: int = Field(
        0,
        ge=0,
        description="At most one of so many unmated probes may alert while the gallery holds size_max: the threshold "
        "is then computed from the calibration of the template space.",
    )
    retention_rule: str = Field("", description="The rule that the retention and the review interval come from.")
    review_interval_ms: int = Field(0, ge=0, le=INT64_MAX, description="Until a review is due; 0: the retention.")
    source: str = Field("", description="Where references come from that do not say; empty: the controller's records.")
    quality_min: float = Field(0.0, description="Least quality, from 0 to 1, of a reference; 0: none is asked for.")
    resembles_max: int = Field(
        0, description="A reference that resembles more other subjects at the threshold is refused; 0: no check."
    )
    size_max: int = Field(0, description="References that the threshold was calibrated for; 0: unlimited.")
    adjudicators: int = Field(1, description="People who must judge an alert: 1 or 2.")
    watchlist: WatchlistBody | None = Field(None, description="For a gallery of kind watchlist, and for no other.")


class ApprovalBody(Body):
    approved_by: str = Field("", description="Not its author; for a person who signed in, always that person.")
    reason: str
    approved: bool = Field(True, description="false: reopen it, so that it can be changed.")


class GroundEndBody(Body):
    ground: GroundEnd = Field(strict=False)
    reason: str
    gallery_id: str = Field("", description="Empty: in every custody gallery.")


class ReviewBody(Body):
    review_by_ms: Milliseconds = Field(description="When the ground is to be looked at next.")
    reviewed_by: str = Field("", description="For a person who signed in, always that person.")
    reason: str = Field(description="Why the ground still stands.")


class HoldBody(Body):
    subject_id: str
    requested_by: str = Field(description="Who asked for it: a court, an inquiry, a defence.")
    authorised_by: str = Field("", description="For a person who signed in, always that person.")
    reason: str
    review_by_ms: Milliseconds = Field(description="When it is looked at again, within a year.")
    gallery_id: str = Field("", description="Empty: what is held in any gallery.")
    hold_id: str = Field("", description="Empty: one is made.")


class ReleaseBody(Body):
    reason: str
    released_by: str = Field("", description="For a person who signed in, always that person.")


class AdjudicationBody(Body):
    verdict: Verdict = Field(strict=False)
    reason: str
    by: str = Field("", description="Who looked; for a person who signed in, always that person.")
    evidence_reference: str = Field("", description="Where the force's evidence system keeps what was looked at.")


class RateChangeBody(Body):
    measure: Literal["FPIR", "FNIR"]
    group: str = Field("", description="The group of people that it was measured on; empty: all.")
    before: float = Field(ge=0, le=1, description="Upper limit of the rate at the threshold until now.")
    after: float = Field(ge=0, le=1, description="Upper limit of the rate at the new threshold.")


class ThresholdBody(Body):
    threshold: float = Field(description="Least score, in [-1, 1], that is a candidate from now on.")
    reason: str
    proposed_by: str
    approved_by: str = Field(description="A second person.")
    rates: list[RateChangeBody] = Field(description="What it does to FPIR and FNIR, over all people and by group.")


class SpaceMapBody(Body):
    source: SpaceBody
    matrix: Numbers


class GenuineTableBody(Body):
    scores: list[float] = Field(description="Ascending.")
    estimates: list[float] = Field(description="Share of comparisons of people with themselves below each score.")
    low_rates: list[float] = Field(description="Lower limits.")
    high_rates: list[float] = Field(description="Upper limits.")
    confidence: float = Field(ge=0.0, lt=1.0, description="Of the interval from low_rates to high_rates.")
    comparisons: int = Field(ge=1, le=INT64_MAX)
    subjects: int = Field(ge=1, le=INT64_MAX)


class ScoreTableBody(Body):
    scores: list[float] = Field(description="Ascending.")
    rates: list[float] = Field(description="False-match rate at each score; non-increasing, in (0, 1].")
    method: str = Field(description="Where the table comes from, in words.")
    estimates: list[float] = Field([], description="Best estimates at the same scores, of which rates are the limits.")
    low_rates: list[float] = Field([], description="Lower limits at the same scores.")
    confidence: float = Field(0.0, ge=0.0, lt=1.0, description="Of the interval from low_rates to rates; 0: unknown.")
    genuine: GenuineTableBody | None = Field(None, description="What the same set says of people whom it would miss.")


class TemplateSpaceBody(Body):
    space: SpaceBody
    centre: Numbers
    maps: list[SpaceMapBody] = []
    score_table: ScoreTableBody | None = None


class DeploymentBody(Body):
    deployment_id: str
    gallery_ids: list[str]
    opens_at_ms: Milliseconds | None = Field(None, description="Left out: now.")
    closes_at_ms: Milliseconds
    probe_age_ms_max: int = Field(description="A live probe captured longer ago is refused.")
    authorised_by: str
    reason: str
    place: str = Field("", description="Where; required of an authenticated person, as are the next two.")
    legal_authority: str = Field("", description="The law and the decision that it rests on.")
    necessity: str = Field("", description="Why nothing less would do.")
    cameras: list[str] = Field([], description="The cameras it is authorised for; empty: any.")
    threshold: float | None = Field(None, description="Raises the galleries' thresholds for this deployment.")
    alert_retention_ms: int = Field(
        0, description="How long its alerts live; 0: as long as the service's settings say."
    )
    rank_max: int = Field(10, description="Most candidates that a search may return.")


class CaseBody(Body):
    case_reference: str
    gallery_ids: list[str]
    opens_at_ms: Milliseconds | None = Field(None, description="Left out: now.")
    closes_at_ms: Milliseconds
    requested_by: str
    purpose: str
    immigration_authority: str = Field("", description="What an immigration gallery among them is searched on.")
    rank_max: int = Field(50, description="Most candidates that a search may return.")


class CredentialBody(Body):
    deployment_id: str
    credential_id: str = Field("", description="Empty: the service chooses one.")
    certificate: str = Field(
        "", description="sha256:HEX of a client certificate, or san:NAME; empty: a secret is made and told once."
    )
    cameras: list[str] = Field([], description="Some of the deployment's; empty: all of them.")
    probes_per_s: int = Field(500, description="Most probes in a second.")
    expires_at_ms: Milliseconds | None = Field(None, description="Left out: when the deployment closes.")


class RotationBody(Body):
    certificate: str = Field("", description="Of the successor, as in CredentialBody; empty: a secret.")
    overlap_s: int = Field(0, ge=0, le=86_400, description="For how long the old credential still stands.")


class ReasonBody(Body):
    reason: str = Field(description="Why; it goes into the audit.")


class ProposalBody(Body):
    action: Literal["threshold", "gallery_deletion", "withdrawal"]
    gallery_id: str
    reason: str
    threshold: float | None = Field(None, description="For a threshold: the new one.")
    rates: list[RateChangeBody] = Field([], description="For a threshold: as in ThresholdBody.")
    reference_ids: list[str] = Field([], description="For a withdrawal: which.")


class TemplatesBody(Body):
    pictures: list[str] = Field(description="Base64 of JPEG or PNG files.")
    form: Literal["photograph", "crop"] = Field(
        "photograph", description="photograph: the face is searched for. crop: the picture is the face, brows to chin."
    )


BODIES: tuple[type[Body], ...] = (
    IdentifyBody,
    EnrolBody,
    GalleryBody,
    ThresholdBody,
    TemplateSpaceBody,
    DeploymentBody,
    CaseBody,
    ApprovalBody,
    GroundEndBody,
    ReviewBody,
    AdjudicationBody,
    HoldBody,
    ReleaseBody,
    CredentialBody,
    RotationBody,
    ReasonBody,
    ProposalBody,
    TemplatesBody,
)
