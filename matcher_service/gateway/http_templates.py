"""POST /v1/templates: pictures of faces to raw templates, where an embedder is configured. Nothing of it is kept."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from matcher_service import records
from matcher_service.errors import InvalidInput, NotFound, TooLarge
from matcher_service.gateway import decode_json
from matcher_service.gateway.http_exchange import documented, json_response, read_body, unless_left
from matcher_service.gateway.http_guard import UnsupportedEncoding
from matcher_service.gateway.http_queries import NoQuery
from matcher_service.gateway.json_bodies import TemplatesBody
from matcher_service.gateway.service import Service
from matcher_service.models.embedder.outcome import Embedding, Form
from matcher_service.terms import Cause

PICTURES_MAX = 16
PICTURE_TYPES = ("image/jpeg", "image/png")


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["templates"])

    @routes.post("/v1/templates", openapi_extra=_DOCUMENTED)
    async def make_templates(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        """Turn pictures of faces into raw templates of the embedder's space, with their quality.

        Each picture is judged: TEMPLATE, or NO_FACE, SEVERAL_FACES, TOO_SMALL, TOO_BLURRED or UNREADABLE with the
        reason. Templates are base64 of little-endian float32. One photograph can also be sent as it is, as image/jpeg
        or image/png. Nothing is searched, enrolled or kept.
        """
        maker = service.templates
        if maker is None:
            raise NotFound("no embedder is configured here", field="path", hint="set embedder.card in the settings")
        pictures, form = _decoded(request, await read_body(request))
        found = await unless_left(request, maker.embed(pictures, form))
        return json_response(
            {"space": records.space_id_dict(maker.card.space), "templates": [_document(one) for one in found]}
        )

    return routes


_DOCUMENTED = documented(TemplatesBody)
for _type in PICTURE_TYPES:
    _schema = {"type": "string", "format": "binary", "description": "one photograph, as the file is"}
    _DOCUMENTED["requestBody"]["content"][_type] = {"schema": _schema}


def _decoded(request: Request, data: bytes) -> tuple[list[bytes], Form]:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in PICTURE_TYPES:
        return [data], Form.PHOTOGRAPH
    if kind != "application/json":
        raise UnsupportedEncoding(
            "the body is neither JSON nor a picture",
            field="Content-Type",
            hint=f"send `Content-Type: application/json`, or one of {', '.join(PICTURE_TYPES)}",
        )
    sent = decode_json.body(TemplatesBody, data)
    if not sent.pictures:
        raise InvalidInput("there are no pictures", field="pictures", hint="send at least one", cause=Cause.EMPTY)
    if len(sent.pictures) > PICTURES_MAX:
        raise TooLarge(
            f"{len(sent.pictures)} pictures",
            field="pictures",
            hint=f"send at most {PICTURES_MAX} at a time",
            cause=Cause.TOO_MANY,
        )
    return [_picture(number, one) for number, one in enumerate(sent.pictures)], Form(sent.form)


def _picture(number: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(
            "is not base64", field=f"pictures[{number}]", hint="send the file's bytes in base64", cause=Cause.MALFORMED
        ) from error


def _document(one: Embedding) -> dict[str, Any]:
    template = None
    if one.template is not None:
        template = base64.b64encode(np.ascontiguousarray(one.template, dtype="<f4").tobytes()).decode()
    return {
        "judgement": one.judgement.value,
        "template": template,
        "quality": round(one.quality, 4),
        "face_width_px": round(one.face_width_px, 1),
        "sharpness": round(one.sharpness, 4),
        "detail": one.detail,
    }
