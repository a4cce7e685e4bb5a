"""One status table per edge covers the whole tree of errors; only a defect of the service is a 500."""

from __future__ import annotations

from http import HTTPStatus

import grpc
import orjson
import pytest
from google.rpc import error_details_pb2

from matcher_service import errors
from matcher_service.errors import InvalidInput, MatcherError, Overloaded
from matcher_service.gateway import grpc_call, refusals
from matcher_service.gateway import http as http_edge
from matcher_service.terms import Cause, Decision, Outcome, Receipt, WriteOutcome

TREE = [one for one in refusals.error_classes() if one.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", TREE)
def test_each_error_has_a_status_of_its_own_on_both_edges(kind: type[MatcherError]) -> None:
    assert kind in http_edge.STATUS_BY_CLASS
    assert kind in grpc_call.STATUS_BY_CLASS


@pytest.mark.parametrize("kind", TREE)
def test_only_what_is_internal_is_answered_as_a_defect(kind: type[MatcherError]) -> None:
    internal = not issubclass(kind, errors.CallerFault | errors.ServiceFault)
    assert (http_edge.status_of(kind("x")) is HTTPStatus.INTERNAL_SERVER_ERROR) == internal
    assert (grpc_call.status_of(kind("x")) is grpc.StatusCode.INTERNAL) == internal


@pytest.mark.parametrize("kind", TREE)
def test_retryable_errors_have_the_statuses_that_clients_retry(kind: type[MatcherError]) -> None:
    retried_http = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
    retried_grpc = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
    assert (http_edge.status_of(kind("x")) in retried_http) == kind.retryable
    assert (grpc_call.status_of(kind("x")) in retried_grpc) == kind.retryable


def test_a_new_error_takes_the_status_of_what_it_is_a_kind_of() -> None:
    class Narrower(errors.Overloaded):
        pass

    assert http_edge.status_of(Narrower("x")) is HTTPStatus.TOO_MANY_REQUESTS
    assert grpc_call.status_of(Narrower("x")) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("cause", list(Cause))
def test_each_cause_of_a_row_belongs_to_a_class_that_is_no_defect_unless_it_is_one(cause: Cause) -> None:
    status = http_edge.status_of(refusals.of_cause(cause)("x", cause=cause))
    assert (status is HTTPStatus.INTERNAL_SERVER_ERROR) == (cause is Cause.INTERNAL)


@pytest.mark.parametrize(
    ("cause", "status"),
    [
        (Cause.NOT_FINITE, 400),
        (Cause.UNKNOWN_GALLERY, 404),
        (Cause.EXPIRED, 410),
        (Cause.STALE_PROBE, 422),
        (Cause.TOO_MANY, 413),
        (Cause.OVERLOADED, 429),
        (Cause.DEADLINE, 504),
        (Cause.SHARD_UNAVAILABLE, 503),
    ],
)
def test_the_cause_of_a_row_decides_the_status_of_a_call_that_was_refused_whole(cause: Cause, status: int) -> None:
    assert http_edge.status_of(refusals.of_cause(cause)("x", cause=cause)) == status


def test_a_call_is_refused_whole_only_if_every_probe_was_rejected_for_one_cause() -> None:
    def rejected(cause: str) -> Decision:
        return Decision("p", Outcome.REJECTED, cause=cause, detail="what; what to do; and more", field="templates[0]")

    refusal = refusals.of_all_probes([rejected("NOT_FINITE"), rejected("NOT_FINITE")])
    assert isinstance(refusal, InvalidInput)
    assert (refusal.cause, refusal.detail, refusal.hint, refusal.field) == (
        "NOT_FINITE",
        "what",
        "what to do; and more",
        "templates[0]",
    )
    assert refusals.of_all_probes([rejected("NOT_FINITE"), rejected("ZERO_TEMPLATE")]) is None
    assert refusals.of_all_probes([rejected("NOT_FINITE"), Decision("q", Outcome.NO_CANDIDATE)]) is None
    assert refusals.of_all_probes([Decision("q", Outcome.INCOMPLETE, cause="SHARD_UNAVAILABLE")]) is None
    assert refusals.of_all_probes([]) is None


def test_an_enrolment_is_refused_whole_only_if_every_reference_was_refused_for_one_cause() -> None:
    gone, clash = errors.Gone("ended"), errors.Conflict("live")
    assert refusals.of_all_references([gone, gone]) is gone
    assert refusals.of_all_references([gone, clash]) is None
    assert refusals.of_all_references([gone, Receipt(WriteOutcome.ENROLLED, 1)]) is None


def test_a_problem_document_says_what_where_what_to_do_and_when() -> None:
    refusal = Overloaded("no permit", hint="send slower", field="probe_ids", retry_after_ms=1001)
    response = http_edge.problem_response(refusal)
    assert response.media_type == "application/problem+json"
    assert response.headers["retry-after"] == "2"
    assert orjson.loads(response.body) == {
        "type": "urn:matcher:problem:overloaded",
        "title": "Too Many Requests",
        "status": 429,
        "detail": "no permit",
        "cause": "OVERLOADED",
        "field": "probe_ids",
        "hint": "send slower",
        "retryable": True,
        "retry_after_ms": 1001,
    }


def test_a_rich_status_says_what_where_what_to_do_and_when() -> None:
    status = grpc_call.rich_status(Overloaded("no permit", hint="send slower", field="probe_ids", retry_after_ms=40))
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for packed, detail in zip(status.details, (info, bad, retry), strict=True):
        assert packed.Unpack(detail)
    assert (info.reason, dict(info.metadata)) == ("OVERLOADED", {"field": "probe_ids", "hint": "send slower"})
    assert bad.field_violations[0].field == "probe_ids"
    assert retry.retry_delay.ToMilliseconds() == 40
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


def test_a_status_fits_into_the_headers_that_peers_take() -> None:
    long = "面" * 100_000
    status = grpc_call.rich_status(InvalidInput(long, hint=long, field=long, retry_after_ms=1))
    # In the headers the details stand in base64 and the message in percent encoding, within 8 KiB.
    details, message = len(status.SerializeToString()) * 4 / 3, len(status.message.encode()) * 3
    assert details + message < 8000


def test_the_text_of_a_defect_reaches_nobody() -> None:
    try:
        raise ValueError("0.25, 0.5")
    except ValueError as error:
        refusal = refusals.unexpected(error)
    assert "0.25" not in f"{refusal}{refusal.hint}"
    assert refusal.cause is Cause.INTERNAL
