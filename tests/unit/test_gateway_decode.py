"""Messages and JSON bodies become the same values, and the same faults the same refusals."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matcher_service.errors import CallerFault, InvalidInput, MatcherError
from matcher_service.gateway import decode, decode_json
from matcher_service.settings import LimitSettings
from matcher_service.terms import Actor, Case, Deployment, EnrolMessage, Gallery, ProbeMessage, TemplateSpace
from matcher_service.wire import matcher_pb2 as pb
from tests.edges import SPACE, probes, references

LIMITS = LimitSettings(probes_per_message_max=8, references_per_message_max=8)  # type: ignore[call-arg]
ACTOR = Actor("tester")
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
ROWS = st.lists(st.lists(FLOATS, min_size=4, max_size=4), min_size=1, max_size=8)


def decoded(request: pb.IdentifyRequest, remaining_s: float | None = None) -> ProbeMessage:
    return decode.probe_message(request, LIMITS, ACTOR, 100.0, remaining_s)


def decoded_json(body: dict[str, Any] | bytes) -> ProbeMessage:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return decode_json.probe_message(data, LIMITS, ACTOR, 100.0)


def identify_body(*templates: Any, **more: Any) -> dict[str, Any]:
    rows = [
        {"probe_id": f"p{row}", "template": template, "captured_at_ms": 1000} for row, template in enumerate(templates)
    ]
    return {"space": SPACE._asdict(), "deployment_id": "op", "probes": rows} | more


def base64_of(row: Any, dtype: str = "<f4") -> str:
    return b64encode(np.asarray(row).astype(dtype).tobytes()).decode()


@given(ROWS)
def test_float32_bytes_become_a_view_of_the_same_values(rows: list[list[float]]) -> None:
    sent = np.array(rows, "<f4")
    message = decoded(probes(*[f"p{row}" for row in range(len(rows))], rows=sent))
    np.testing.assert_array_equal(message.templates, sent)
    assert message.templates.dtype == np.float32
    assert message.templates.base is not None
    assert not message.templates.flags.writeable


@given(ROWS)
def test_float16_bytes_are_widened_without_change(rows: list[list[float]]) -> None:
    with np.errstate(over="ignore"):
        sent = np.array(rows).astype("<f2")
    names = [f"p{row}" for row in range(len(rows))]
    message = decoded(probes(*names, templates=sent.tobytes(), dtype=pb.FLOAT16))
    np.testing.assert_array_equal(message.templates, sent.astype(np.float32))


@given(ROWS)
def test_json_base64_and_numbers_become_what_the_bytes_of_a_message_become(rows: list[list[float]]) -> None:
    sent = np.array(rows, "<f4")
    wanted = decoded(probes(*[f"p{row}" for row in range(len(rows))], rows=sent)).templates
    as_text = decoded_json(identify_body(*[base64_of(row) for row in sent]))
    np.testing.assert_array_equal(as_text.templates, wanted)
    # orjson writes NaN as null; the bare words are what Python, JavaScript tools and others write.
    words = identify_body(*range(len(rows)))
    data = orjson.dumps(words).decode()
    for at, row in enumerate(sent):
        numbers = ",".join(
            "NaN" if value != value else f"{value!r}".replace("inf", "Infinity") for value in row.tolist()
        )
        data = data.replace(f'"template":{at},', f'"template":[{numbers}],', 1)
    np.testing.assert_array_equal(decoded_json(data.encode()).templates, wanted)


def test_both_codecs_give_the_same_message() -> None:
    rows = [[1, 0, 0, 0], [0, 0.5, 0, -1]]
    more = {
        "gallery_ids": ["wanted", "custody"],
        "threshold": 0.625,
        "rank_max": 7,
        "min_sequence": 2**40,
        "deadline_ms": 350,
        "message_id": "m",
        "traceparent": "00-a-b-01",
    }
    first = decoded(probes("p0", "p1", rows=rows, **more))
    second = decoded_json(identify_body(base64_of(rows[0], "<f2"), base64_of(rows[1], "<f2"), dtype="float16", **more))
    for name in ProbeMessage.__slots__:
        one, other = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert first.deadline == pytest.approx(100.35)
    assert (first.rank_max, first.threshold, first.gallery_ids) == (7, 0.625, ("wanted", "custody"))


def test_what_is_left_out_has_its_stated_default() -> None:
    message = decoded(probes("a"))
    assert message.rank_max == 1
    assert message.threshold is None
    assert message.gallery_ids == ()
    assert message.deadline == pytest.approx(100.0 + LIMITS.deadline_ms_default / 1000)
    assert decoded(probes("a"), remaining_s=0.5).deadline == pytest.approx(100.5)
    assert decoded(probes("a", deadline_ms=200), remaining_s=0.5).deadline == pytest.approx(100.2)


def test_a_threshold_of_zero_is_a_threshold() -> None:
    assert decoded(probes("a", threshold=0.0)).threshold == 0.0
    assert decoded_json(identify_body([1, 0, 0, 0], threshold=0)).threshold == 0.0


REFUSED_MESSAGES: list[tuple[str, pb.IdentifyRequest, str, str]] = [
    ("no probe", probes(), "EMPTY", "probe_ids"),
    ("too many", probes(*map(str, range(9))), "TOO_MANY", "probe_ids"),
    ("twice", probes("a", "b", "a"), "DUPLICATE_PROBE_ID", "probe_ids[2]"),
    ("empty id", probes("a", ""), "INVALID", "probe_ids[1]"),
    ("long id", probes("a", "é" * 65), "INVALID", "probe_ids[1]"),
    ("control id", probes("a\n"), "INVALID", "probe_ids[0]"),
    ("no space", probes("a", space=None), "WRONG_SPACE", "space"),
    ("nameless space", probes("a", space=pb.TemplateSpace(dimension=4)), "WRONG_SPACE", "space.name"),
    ("no dimension", probes("a", space=pb.TemplateSpace(name="x")), "WRONG_DIMENSION", "space.dimension"),
    (
        "huge dimension",
        probes("a", space=pb.TemplateSpace(name="x", dimension=2**32 - 1)),
        "WRONG_DIMENSION",
        "space.dimension",
    ),
    ("no dtype", probes("a", dtype=0), "UNKNOWN_DTYPE", "dtype"),
    ("unknown dtype", probes("a", dtype=77), "UNKNOWN_DTYPE", "dtype"),
    ("short", probes("a", templates=bytes(15)), "WRONG_LENGTH", "templates"),
    ("long", probes("a", templates=bytes(17)), "WRONG_LENGTH", "templates"),
    ("none", probes("a", templates=b""), "WRONG_LENGTH", "templates"),
    ("half as float32", probes("a", templates=bytes(8)), "WRONG_LENGTH", "templates"),
    ("float32 as half", probes("a", dtype=pb.FLOAT16), "WRONG_LENGTH", "templates"),
    ("capture times", probes("a", "b", captured_at_ms=[1]), "INVALID", "captured_at_ms"),
    ("negative time", probes("a", "b", captured_at_ms=[1, -1]), "INVALID", "captured_at_ms[1]"),
    ("no capture time", probes("a", captured_at_ms=[]), "INVALID", "captured_at_ms"),
    ("no authority", probes("a", deployment_id=None), "INVALID", "deployment_id"),
    ("long authority", probes("a", deployment_id="x" * 129), "INVALID", "deployment_id"),
    ("nameless gallery", probes("a", gallery_ids=[""]), "INVALID", "gallery_ids"),
    ("gallery twice", probes("a", gallery_ids=["x", "x"]), "INVALID", "gallery_ids[1]"),
    ("many galleries", probes("a", gallery_ids=map(str, range(257))), "TOO_MANY", "gallery_ids"),
    ("threshold over 1", probes("a", threshold=1.5), "INVALID", "threshold"),
    ("threshold NaN", probes("a", threshold=float("nan")), "INVALID", "threshold"),
    ("threshold -inf", probes("a", threshold=float("-inf")), "INVALID", "threshold"),
    ("rank_max", probes("a", rank_max=101), "RANK_MAX", "rank_max"),
    ("deadline", probes("a", deadline_ms=60_001), "INVALID", "deadline_ms"),
    ("message_id", probes("a", message_id="x" * 129), "INVALID", "message_id"),
    ("traceparent", probes("a", traceparent="x" * 129), "INVALID", "traceparent"),
]


@pytest.mark.parametrize(
    ("name", "request_", "cause", "field"), REFUSED_MESSAGES, ids=[one[0] for one in REFUSED_MESSAGES]
)
def test_a_message_at_fault_is_refused_by_cause_and_field(
    name: str, request_: pb.IdentifyRequest, cause: str, field: str
) -> None:
    with pytest.raises(CallerFault) as refused:
        decoded(request_)
    assert (refused.value.cause, refused.value.field) == (cause, field)
    assert refused.value.hint


ROW = [1, 0, 0, 0]
GOOD = identify_body(ROW)


def changed(**more: Any) -> dict[str, Any]:
    return {key: value for key, value in (GOOD | more).items() if value is not None}


REFUSED_BODIES: list[tuple[str, Any, str, str]] = [
    ("not JSON", b"{", "MALFORMED", ""),
    ("nothing", b"", "MALFORMED", ""),
    ("not UTF-8", b'{"message_id": "\xff"}', "MALFORMED", ""),
    ("deep", b"[" * 100_000, "MALFORMED", ""),
    ("huge number", orjson.dumps(GOOD).replace(b"1000", b"9" * 5000), "MALFORMED", ""),
    ("a list", b"[]", "INVALID", ""),
    ("unknown field", changed(rankmax=3), "UNKNOWN_FIELD", "rankmax"),
    (
        "unknown field of a probe",
        identify_body(ROW) | {"probes": [{**GOOD["probes"][0], "id": 1}]},
        "UNKNOWN_FIELD",
        "probes[0].id",
    ),
    ("unknown field of the space", changed(space={**SPACE._asdict(), "centre": []}), "UNKNOWN_FIELD", "space.centre"),
    ("no probes", changed(probes=None), "INVALID", "probes"),
    ("empty", changed(probes=[]), "EMPTY", "probes"),
    ("too many", identify_body(*[ROW] * 9), "TOO_MANY", "probes"),
    ("twice", changed(probes=GOOD["probes"] * 2), "DUPLICATE_PROBE_ID", "probes[1].probe_id"),
    ("no id", changed(probes=[{**GOOD["probes"][0], "probe_id": ""}]), "INVALID", "probes[0].probe_id"),
    ("number as id", changed(probes=[{**GOOD["probes"][0], "probe_id": 7}]), "INVALID", "probes[0].probe_id"),
    (
        "text as time",
        changed(probes=[{**GOOD["probes"][0], "captured_at_ms": "7"}]),
        "INVALID",
        "probes[0].captured_at_ms",
    ),
    (
        "huge time",
        changed(probes=[{**GOOD["probes"][0], "captured_at_ms": 2**63}]),
        "INVALID",
        "probes[0].captured_at_ms",
    ),
    ("dtype", changed(dtype="float64"), "UNKNOWN_DTYPE", "dtype"),
    ("no space", changed(space=None), "INVALID", "space"),
    ("short list", identify_body(ROW, [1, 0]), "WRONG_DIMENSION", "probes[1].template"),
    ("long list", identify_body([*ROW, 0]), "WRONG_DIMENSION", "probes[0].template"),
    ("short base64", identify_body(base64_of([1, 0])), "WRONG_LENGTH", "probes[0].template"),
    ("not base64", identify_body("*" * 24), "MALFORMED", "probes[0].template"),
    ("text in the list", identify_body([1, 0, 0, "1"]), "INVALID", "probes[0].template"),
    ("null in the list", identify_body([1, 0, 0, None]), "INVALID", "probes[0].template"),
    ("true in the list", identify_body([1, 0, 0, True]), "INVALID", "probes[0].template"),
    ("a list in the list", identify_body([[1], [0], [0], [0]]), "INVALID", "probes[0].template"),
    ("null", identify_body(None), "INVALID", "probes[0].template"),
    ("an object", identify_body({"0": 1}), "INVALID", "probes[0].template"),
    ("no authority", changed(deployment_id=None), "INVALID", "deployment_id"),
    ("two authorities", changed(case_reference="c"), "INVALID", "deployment_id"),
    ("threshold", changed(threshold=2), "INVALID", "threshold"),
    ("threshold text", changed(threshold="0.5"), "INVALID", "threshold"),
    ("rank_max", changed(rank_max=101), "RANK_MAX", "rank_max"),
    ("negative rank_max", changed(rank_max=-1), "RANK_MAX", "rank_max"),
    ("negative sequence", changed(min_sequence=-1), "INVALID", "min_sequence"),
    ("negative deadline", changed(deadline_ms=-1), "INVALID", "deadline_ms"),
]


@pytest.mark.parametrize(("name", "body", "cause", "field"), REFUSED_BODIES, ids=[one[0] for one in REFUSED_BODIES])
def test_a_body_at_fault_is_refused_by_cause_and_field(name: str, body: Any, cause: str, field: str) -> None:
    with pytest.raises(CallerFault) as refused:
        decoded_json(body)
    assert (refused.value.cause, refused.value.field) == (cause, field)
    assert refused.value.hint


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_are_refused(data: bytes) -> None:
    for kind, read in ((pb.IdentifyRequest, decode.probe_message), (pb.EnrolRequest, decode.enrol_message)):
        try:
            read(decode.parse(kind, data), LIMITS, ACTOR, 0.0)  # type: ignore[type-var, operator]
        except CallerFault as refusal:
            assert refusal.hint  # noqa: PT017
    with pytest.raises(CallerFault):
        decoded_json(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from([*GOOD, "threshold", "rank_max", "gallery_ids", "dtype", "message_id"]), VALUES)
def test_any_value_of_any_field_is_accepted_or_refused_by_name(field: str, value: Any) -> None:
    body = GOOD | {field: value}
    try:
        decoded_json(orjson.dumps(body, option=orjson.OPT_PASSTHROUGH_SUBCLASS))
    except orjson.JSONEncodeError:
        pass  # an integer beyond 64 bits, or a lone surrogate
    except MatcherError as refusal:
        assert isinstance(refusal, CallerFault)  # noqa: PT017
        assert refusal.field.startswith(field) or refusal.field == "deployment_id"  # noqa: PT017
        assert refusal.hint  # noqa: PT017


def test_a_refusal_never_repeats_a_template() -> None:
    for body in (identify_body([0.123456, "x", 1, 1]), identify_body("0123456*"), changed(probes="0.123456")):
        with pytest.raises(InvalidInput) as refused:
            decoded_json(body)
        assert "123456" not in f"{refused.value}{refused.value.hint}"
        assert refused.value.__cause__ is None or "123456" not in str(refused.value.__cause__)


def test_what_is_repeated_of_an_unknown_field_is_bounded() -> None:
    with pytest.raises(InvalidInput) as refused:
        decoded_json(changed(**{"x" * 100_000: 1}))
    assert refused.value.field == "x" * decode_json.FIELD_NAME_MAX


# --- references ------------------------------------------------------------------------------------------


def enrol_decoded(request: pb.EnrolRequest) -> EnrolMessage:
    return decode.enrol_message(request, LIMITS, ACTOR, 100.0)


def test_both_codecs_give_the_same_references() -> None:
    first = enrol_decoded(references("a", "b", expires_at_ms=[0, 9], idempotency_key="k", replace=True, message_id="m"))
    body = {
        "space": SPACE._asdict(),
        "references": [
            {"reference_id": "a", "subject_id": "s-a", "template": [1, 0, 0, 0]},
            {"reference_id": "b", "subject_id": "s-b", "template": base64_of([0, 1, 0, 0]), "expires_at_ms": 9},
        ],
        "idempotency_key": "k",
        "replace": True,
        "message_id": "m",
    }
    second = decode_json.enrol_message(orjson.dumps(body), "wanted", LIMITS, ACTOR, 100.0)
    for name in EnrolMessage.__slots__:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert first.expires_at_ms.tolist() == [0, 9]
    assert enrol_decoded(references("a")).expires_at_ms.tolist() == [0]


REFUSED_ENROLMENTS: list[tuple[str, pb.EnrolRequest, str, str]] = [
    ("none", references(), "EMPTY", "reference_ids"),
    ("too many", references(*map(str, range(9))), "TOO_MANY", "reference_ids"),
    ("twice", references("a", "a"), "INVALID", "reference_ids[1]"),
    ("subjects", references("a", subject_ids=[]), "INVALID", "subject_ids"),
    ("no subject", references("a", subject_ids=[""]), "INVALID", "subject_ids[0]"),
    ("expiries", references("a", "b", expires_at_ms=[1]), "INVALID", "expires_at_ms"),
    ("negative expiry", references("a", expires_at_ms=[-1]), "INVALID", "expires_at_ms[0]"),
    ("no gallery", references("a", gallery_id=""), "INVALID", "gallery_id"),
    ("length", references("a", templates=b"1"), "WRONG_LENGTH", "templates"),
    ("dtype", references("a", dtype=9), "UNKNOWN_DTYPE", "dtype"),
    ("key", references("a", idempotency_key="k" * 129), "INVALID", "idempotency_key"),
]


@pytest.mark.parametrize(
    ("name", "request_", "cause", "field"), REFUSED_ENROLMENTS, ids=[one[0] for one in REFUSED_ENROLMENTS]
)
def test_an_enrolment_at_fault_is_refused_by_cause_and_field(
    name: str, request_: pb.EnrolRequest, cause: str, field: str
) -> None:
    with pytest.raises(CallerFault) as refused:
        enrol_decoded(request_)
    assert (refused.value.cause, refused.value.field) == (cause, field)
    assert refused.value.hint


# --- the catalogue ---------------------------------------------------------------------------------------

SPACE_BODY = {
    "space": SPACE._asdict(),
    "centre": [0.5, 0, 0, 0],
    "maps": [{"source": {"name": "old", "version": 1, "dimension": 2}, "matrix": base64_of(np.arange(8))}],
    "score_table": {"scores": [0.1, 0.2], "rates": [0.5, 0.25], "method": "measured"},
}


def test_a_template_space_is_read_with_its_maps_and_table() -> None:
    space = decode_json.template_space(orjson.dumps(SPACE_BODY), LIMITS)
    assert isinstance(space, TemplateSpace)
    np.testing.assert_array_equal(space.centre, np.array([0.5, 0, 0, 0], np.float32))
    np.testing.assert_array_equal(space.maps[0].matrix, np.arange(8, dtype=np.float32).reshape(4, 2))
    assert space.score_table is not None
    assert space.score_table.rates == (0.5, 0.25)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"centre": [1, 2]}, "centre"),
        ({"maps": [{"source": {"name": "", "version": 1, "dimension": 2}, "matrix": []}]}, "maps[0].source.name"),
        ({"maps": [{"source": {"name": "o", "version": 1, "dimension": 2}, "matrix": [1]}]}, "maps[0].matrix"),
        ({"score_table": {"scores": [0.2, 0.1], "rates": [0.5, 0.25], "method": "m"}}, "score_table"),
        ({"score_table": {"scores": [0.1, 0.2], "rates": [0.25, 0.5], "method": "m"}}, "score_table"),
        ({"score_table": {"scores": [0.1], "rates": [0.0], "method": "m"}}, "score_table"),
        ({"score_table": {"scores": [], "rates": [], "method": "m"}}, "score_table"),
        ({"centre_": 1}, "centre_"),
    ],
)
def test_a_template_space_at_fault_is_refused_by_field(more: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        decode_json.template_space(orjson.dumps(SPACE_BODY | more), LIMITS)
    assert refused.value.field == field


def test_a_deployment_and_a_case_open_now_unless_they_say_when() -> None:
    common = {"gallery_ids": ["g"], "closes_at_ms": 9_000}
    live = common | {"deployment_id": "d", "probe_age_ms_max": 5, "authorised_by": "a", "reason": "r"}
    later = {"opens_at_ms": 7_000}
    assert decode_json.deployment(orjson.dumps(live), 6_000, 77) == Deployment(
        "d", ("g",), 6_000, 9_000, 5, "a", "r", alert_retention_ms=77
    )
    assert decode_json.deployment(orjson.dumps(live | later), 6_000, 77).opens_at_ms == 7_000
    past = common | {"case_reference": "c", "requested_by": "q", "purpose": "p"}
    assert decode_json.case(orjson.dumps(past), 6_000) == Case("c", ("g",), 6_000, 9_000, "q", "p")


def test_a_gallery_of_an_unknown_kind_is_refused_and_never_dates_itself() -> None:
    body = {
        "gallery_id": "g",
        "kind": "custody",
        "controller": "c",
        "lawful_basis": "l",
        "purpose": "p",
        "retention_ms": 5,
        "space": SPACE._asdict(),
        "threshold": 0.5,
    }
    gallery, target = decode_json.gallery(orjson.dumps(body))
    assert target == 0
    assert gallery == Gallery("g", gallery.kind, "c", "l", "p", 5, SPACE, 0.5)
    for more, field in (
        ({"kind": "everyone"}, "kind"),
        ({"created_at_ms": 5}, "created_at_ms"),
        ({"retention_ms": 0}, "retention_ms"),
        ({"one_false_alert_in": 1000}, "threshold"),
        ({"threshold": None}, "threshold"),
    ):
        with pytest.raises(InvalidInput) as refused:
            decode_json.gallery(orjson.dumps(body | more))
        assert refused.value.field == field
