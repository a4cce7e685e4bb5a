"""The served description of the HTTP interface: /openapi.json, and /docs as one page that needs no internet."""

from __future__ import annotations

import functools
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from matcher_service.gateway.http_exchange import json_response
from matcher_service.gateway.json_bodies import BODIES

INTRODUCTION = (
    "1:N identification of face templates in galleries that a deployment or a case allows. Send "
    "`Authorization: Bearer TOKEN` with the token from the file `token` of the data directory. Bodies are JSON, or "
    "the protobuf messages of the gRPC service `matcher.v1.Matcher` as `application/x-protobuf`; unknown JSON fields "
    "are errors. Every error is a problem document (RFC 9457) with `cause`, `field`, `hint` and, where waiting "
    "helps, `retry_after_ms`."
)
_EXAMPLE = """\
curl -H "Authorization: Bearer $(cat data/token)" -H 'Content-Type: application/json' \\
  http://127.0.0.1:8080/v1/identify -d '{
    "space": {"name": "SPACE", "version": 1, "dimension": 128},
    "deployment_id": "DEPLOYMENT",
    "probes": [{"probe_id": "p1", "captured_at_ms": '$(date +%s000)', "template": "BASE64 OF 128 FLOAT32"}]
  }'"""
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code,pre{font-family:ui-monospace,monospace;background:#f4f4f2}pre{padding:.8rem;overflow-x:auto}"
    "table{border-collapse:collapse;margin:.4rem 0 1rem}td,th{border-bottom:1px solid #ddd;padding:.2rem .8rem;"
    "text-align:left;vertical-align:top}h3 code{background:none}section{border-top:1px solid #bbb;margin-top:1.5rem}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}code,pre{background:#2a2a2a}a{color:#8bf}}"
)

Schema = dict[str, Any]


class Problem(BaseModel):
    """An error (RFC 9457), as application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    cause: str
    field: str
    hint: str
    retryable: bool
    retry_after_ms: int | None = None


def add_to(app: FastAPI) -> None:
    """Serve the description of the app's routes; made when it is first asked for, because it takes a while."""
    description = functools.cache(lambda: describe(app))
    page = functools.cache(lambda: docs_page(description()))
    app.openapi = description  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return json_response(description())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page())

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")


def describe(app: FastAPI) -> Schema:
    """OpenAPI of the app, with the bodies that we decode ourselves and with our one form of error."""
    description = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    kinds: list[type[BaseModel]] = [*BODIES, Problem]
    _, bodies = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    components = description.setdefault("components", {})
    components["schemas"] = bodies["$defs"]
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    description["security"] = [{"bearer": []}]
    problem = {
        "description": "A problem document.",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = problem
    return description


def docs_page(description: Schema) -> str:
    """One self-contained page: every operation with its parameters and body, then every body's fields."""
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(_schema(name, schema) for name, schema in sorted(description["components"]["schemas"].items()))
    title = escape(description["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{title} {escape(description['info']['version'])}</h1>{_prose(description['info']['description'])}"
        f'<pre>{escape(_EXAMPLE)}</pre><p><a href="/openapi.json">openapi.json</a> · <a href="/metrics">metrics</a> · '
        f'<a href="/readyz">readiness</a></p><h2>Operations</h2>{operations}<h2>Bodies</h2>{schemas}</html>'
    )


def _operation(method: str, path: str, operation: Schema) -> str:
    summary = operation.get("description") or operation.get("summary", "")
    rows = [
        _row(f"{one['name']} ({one['in']})", one["schema"], one.get("description", ""), one.get("required", False))
        for one in operation.get("parameters", ())
    ]
    content = operation.get("requestBody", {}).get("content", {})
    bodies = "".join(f"<li><code>{escape(kind)}</code>: {_type(one['schema'])}" for kind, one in content.items())
    return (
        f"<section><h3><code>{method.upper()} {escape(path)}</code></h3>{_prose(summary)}"
        f"{_table(rows)}{f'<p>Body:<ul>{bodies}</ul>' if bodies else ''}</section>"
    )


def _schema(name: str, schema: Schema) -> str:
    required = schema.get("required", ())
    rows = [
        _row(field, one, one.get("description", ""), field in required)
        for field, one in schema.get("properties", {}).items()
    ]
    values = ", ".join(f"<code>{escape(str(one))}</code>" for one in schema.get("enum", ()))
    return f'<section id="{escape(name)}"><h3><code>{escape(name)}</code></h3>{values}{_table(rows)}</section>'


def _row(name: str, schema: Schema, prose: str, required: bool) -> str:
    default = schema.get("default")
    note = "required" if required else f"default <code>{escape(str(default))}</code>" if default else ""
    return f"<tr><td><code>{escape(name)}</code><td>{_type(schema)}<td>{note}<td>{_code(prose)}"


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(one))}</code>" for one in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    kind = escape(str(schema.get("type", "anything")))
    if schema.get("contentEncoding"):
        return "base64"
    return f"{kind} ({escape(schema['description'])})" if schema.get("format") == "binary" else kind


def _table(rows: list[str]) -> str:
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _prose(text: str) -> str:
    return "".join(f"<p>{_code(one)}</p>" for one in text.split("\n\n"))


def _code(text: str) -> str:
    """Escaped text, with what stands between backticks set as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{one}</code>" if at % 2 else one for at, one in enumerate(parts))
