"""The HTTP edge: decode, call, encode. Errors are problem documents (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from importlib.metadata import version

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from matcher_service import errors
from matcher_service.errors import InvalidInput, MatcherError, NotFound
from matcher_service.gateway import (
    decode_json,
    encode_json,
    http_access,
    http_alert_stream,
    http_audit,
    http_catalogue,
    http_description,
    http_erasures,
    http_keys,
    http_lawful,
    http_operation,
    http_records,
    http_references,
    http_search,
    http_subjects,
    http_templates,
    refusals,
)
from matcher_service.gateway.http_exchange import json_response
from matcher_service.gateway.http_guard import Guard, UnsupportedEncoding, require_scope
from matcher_service.gateway.service import Service

STATUS_BY_CLASS: dict[type[MatcherError], HTTPStatus] = {
    UnsupportedEncoding: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.InvalidInput: HTTPStatus.BAD_REQUEST,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.Unauthenticated: HTTPStatus.UNAUTHORIZED,
    errors.Forbidden: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.Gone: HTTPStatus.GONE,
    errors.StaleProbe: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
    errors.CallerFault: HTTPStatus.BAD_REQUEST,
    errors.Overloaded: HTTPStatus.TOO_MANY_REQUESTS,
    errors.ShuttingDown: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.LogUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.AuditUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.ShardUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.ModelsUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.ReplayBehind: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.MemoryRefused: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.ServiceFault: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.DataDamaged: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.StartRefused: HTTPStatus.INTERNAL_SERVER_ERROR,
    MatcherError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def status_of(refusal: MatcherError) -> HTTPStatus:
    """The status of the nearest class of the tree that has one."""
    return next(STATUS_BY_CLASS[kind] for kind in type(refusal).__mro__ if kind in STATUS_BY_CLASS)


def problem_response(refusal: MatcherError, status: HTTPStatus | None = None) -> Response:
    status = status or status_of(refusal)
    response = json_response(
        encode_json.problem(refusal, status.value, status.phrase), status, media_type="application/problem+json"
    )
    if refusal.retry_after_ms is not None:
        # The header counts whole seconds; rounded up, so that nobody comes back too early.
        response.headers["Retry-After"] = str(-(-refusal.retry_after_ms // 1000))
    if status is HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, MatcherError)
    return _noted(request, error)


async def _invalid_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location = [one for one in first["loc"] if one not in ("query", "path")]
    return _noted(request, decode_json.of_kind(first["type"], location, first["msg"]))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    refusal: MatcherError
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        refusal = InvalidInput("this path has no such method", field="method", hint="/docs lists what there is")
    elif status is HTTPStatus.NOT_FOUND:
        refusal = NotFound("no such path", field="path", hint="/docs lists what there is")
    else:
        refusal = InvalidInput(str(error.detail), hint="/docs lists what there is")
    response = _noted(request, refusal, status)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _defect(request: Request, error: Exception) -> Response:
    # The framework raises it again after this answer, and the guard logs it.
    return _noted(request, refusals.internal())


def _noted(request: Request, refusal: MatcherError, status: HTTPStatus | None = None) -> Response:
    request.state.result = refusal.cause
    return problem_response(refusal, status)


def build_http_app(service: Service) -> ASGIApp:
    """The whole HTTP interface, to be served by an ASGI server on the service's event loop."""
    app = FastAPI(
        title="Matcher",
        version=version("matcher-service"),
        description=http_description.INTRODUCTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        dependencies=[Depends(require_scope)],
        exception_handlers={
            MatcherError: _refused,
            RequestValidationError: _invalid_query,
            HTTPException: _no_route,
            Exception: _defect,
        },
    )
    for router in (
        http_search.router(service),
        http_references.router(service),
        http_catalogue.router(service),
        http_records.router(service),
        http_access.router(service),
        http_templates.router(service),
        http_operation.router(service),
    ):
        app.include_router(router)
    app.include_router(http_alert_stream.router(service))
    if service.alert_records is not None:
        app.include_router(http_lawful.router(service, service.alert_records))
    if service.alert_records is not None and service.legal_holds is not None:
        app.include_router(http_subjects.router(service, service.alert_records, service.legal_holds))
    if service.erasures is not None:
        app.include_router(http_erasures.router(service, service.erasures))
    if service.rotations is not None:
        app.include_router(http_keys.router(service, service.rotations))
    if service.proofs is not None:
        app.include_router(http_audit.router(service.proofs))
    http_description.add_to(app)
    return Guard(app, service, problem_response)
