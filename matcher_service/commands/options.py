"""The options that commands share, and what they lead to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from matcher_service.client import MatcherClient
    from matcher_service.terms import SpaceId

GRPC_ADDRESS = "127.0.0.1:8081"
HTTP_URL = "http://127.0.0.1:8080"
TOKEN_FILE = Path("data/token")

_WHERE = "Where the service is"

Server = Annotated[
    str,
    typer.Option("--server", envvar="MATCHER_GRPC_ADDRESS", help="gRPC address.", rich_help_panel=_WHERE),
]
Http = Annotated[
    str,
    typer.Option("--http", envvar="MATCHER_HTTP_URL", help="HTTP address.", rich_help_panel=_WHERE),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="MATCHER_TOKEN_FILE",
        help=f"File with the bearer token. Without it: the variable MATCHER_TOKEN, else {TOKEN_FILE}.",
        rich_help_panel=_WHERE,
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        envvar="MATCHER_CA_FILE",
        help="PEM certificates of the authority that the service's TLS certificate comes from.",
        rich_help_panel=_WHERE,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it goes into the audit.")]


def token_from(token_file: Path | None) -> str:
    """The bearer token: of the file named, else of the environment, else of the default file."""
    from matcher_service.errors import Unauthenticated

    if token_file is None and (token := os.environ.get("MATCHER_TOKEN", "").strip()):
        return token
    path = token_file or TOKEN_FILE
    hint = "name the file `token` of the service's data directory with --token-file, or set MATCHER_TOKEN"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unauthenticated(f"cannot read the token file {path}: {error}", field="token", hint=hint) from error
    if not token:
        raise Unauthenticated(f"the token file {path} is empty", field="token", hint=hint)
    return token


def client_to(
    server: str,
    token_file: Path | None,
    ca_file: Path | None,
    *,
    token: str | None = None,
    certificate_file: Path | None = None,
    key_file: Path | None = None,
    **more: float,
) -> MatcherClient:
    """The gRPC client; `more` goes to MatcherClient. `token` None: that of the file; "": the client certificate is the
    credential."""
    from matcher_service.client import MatcherClient, Tls
    from matcher_service.errors import InvalidInput

    if (certificate_file is None) != (key_file is None):
        raise InvalidInput("a certificate needs its key", field="certificate_file", hint="give both files, or neither")
    files = [ca_file, certificate_file, key_file]
    try:
        read = [None if one is None else one.read_bytes() for one in files]
    except OSError as error:
        raise InvalidInput(f"cannot read {error.filename}: {error}", field="ca_file", hint="check the paths") from error
    tls = Tls(root_certificates=read[0], certificate=read[1], key=read[2]) if any(read) else None
    token = token_from(token_file) if token is None else token
    return MatcherClient(server, token, tls=tls, **more)  # type: ignore[arg-type]


def space_from(text: str) -> SpaceId:
    """NAME/VERSION/DIMENSION, for example arcface/3/512."""
    from matcher_service.errors import InvalidInput
    from matcher_service.terms import SpaceId

    name, *numbers = text.rsplit("/", 2)
    if not name or len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise InvalidInput(
            f"{text!r} names no template space", field="space", hint="write NAME/VERSION/DIMENSION: arcface/3/512"
        )
    return SpaceId(name, int(numbers[0]), int(numbers[1]))
