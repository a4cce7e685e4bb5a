"""`matcher credentials` and `matcher proposals`: who may search under a deployment, and what two persons stand for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from matcher_service.commands.asking import Answer, asking, lists
from matcher_service.commands.http_api import HttpApi, path_of
from matcher_service.commands.options import Reason
from matcher_service.commands.times import duration_ms, now_ms, time_ms
from matcher_service.evidence_in_words import in_words

credentials = typer.Typer(no_args_is_help=True, help="Credentials of edge nodes, each of one deployment.")
proposals = typer.Typer(no_args_is_help=True, help="Changes that one person proposes and another approves.")

Certificate = Annotated[
    str,
    typer.Option(help="Bind it to a client certificate, not a secret: a PEM file, sha256:HEX, or san:NAME in it."),
]
SecretFile = Annotated[Path | None, typer.Option(help="A new file (mode 0600) for the secret, which is told once.")]


@credentials.command("issue")
@asking
def issue(
    api: HttpApi,
    deployment: str,
    certificate: Certificate = "",
    camera: Annotated[list[str] | None, typer.Option(help="One of the deployment's; repeat for more.")] = None,
    probes_per_s: Annotated[int, typer.Option(min=1, help="Most probes in a second.")] = 500,
    expires: Annotated[str, typer.Option(help="+8h, or a time. Without: when the deployment closes.")] = "",
    secret_file: SecretFile = None,
) -> Answer:
    """Issue an edge node's credential for a deployment."""
    body: dict[str, Any] = {
        "deployment_id": deployment,
        "certificate": _binding(certificate),
        "cameras": camera or [],
        "probes_per_s": probes_per_s,
    }
    if expires:
        body["expires_at_ms"] = time_ms(expires, "expires", now_ms())
    return _told(api.post(path_of("credentials"), body), secret_file)


credentials.command("list")(
    lists(
        "credentials",
        (
            *("credential_id", "deployment_id", "issued_by", "issued_at_ms", "expires_at_ms", "revoked_at_ms"),
            *("certificate", "cameras"),
        ),
        "There are no credentials.",
        "List edge credentials; a secret is never shown again.",
    )
)


@credentials.command("rotate")
@asking
def rotate(
    api: HttpApi,
    credential_id: str,
    certificate: Certificate = "",
    overlap: Annotated[str, typer.Option(help="For how long the old one still stands.")] = "0s",
    secret_file: SecretFile = None,
) -> Answer:
    """Issue a successor with the same rights, and end the credential."""
    body = {"certificate": _binding(certificate), "overlap_s": duration_ms(overlap, "overlap") // 1000}
    return _told(api.post(path_of("credentials", credential_id, "rotate"), body), secret_file)


@credentials.command("revoke")
@asking
def revoke(api: HttpApi, credential_id: str, reason: Reason) -> Answer:
    """End a credential now: its streams are closed within a second."""
    done = api.post(path_of("credentials", credential_id, "revoke"), {"reason": reason})
    return Answer(done, f"Revoked {credential_id} (sequence {done['sequence']}).")


@proposals.command("threshold")
@asking
def propose_threshold(
    api: HttpApi,
    gallery_id: str,
    threshold: Annotated[float, typer.Argument(help="Least score that is a candidate from now on, in [-1, 1].")],
    before: Annotated[Path, typer.Option(help="report.json of `matcher evaluate` at the threshold until now.")],
    after: Annotated[Path, typer.Option(help="report.json of `matcher evaluate` at the new threshold.")],
    reason: Reason,
) -> Answer:
    """Propose another threshold for a gallery."""
    from matcher_service.commands.threshold_evidence import rate_changes

    now = api.get(path_of("galleries", gallery_id))["threshold"]
    rates = rate_changes(before, now, after, threshold)
    body = {"action": "threshold", "gallery_id": gallery_id, "threshold": threshold, "rates": rates}
    return _proposed(api.post(path_of("proposals"), {**body, "reason": reason}))


@proposals.command("deletion")
@asking
def propose_deletion(api: HttpApi, gallery_id: str, reason: Reason) -> Answer:
    """Propose to delete a gallery and everything in it."""
    body = {"action": "gallery_deletion", "gallery_id": gallery_id, "reason": reason}
    return _proposed(api.post(path_of("proposals"), body))


@proposals.command("withdrawal")
@asking
def propose_withdrawal(
    api: HttpApi,
    gallery_id: str,
    file: Annotated[Path, typer.Argument(help="A text file with a reference_id on each line.")],
    reason: Reason,
) -> Answer:
    """Propose to withdraw many references at once."""
    from matcher_service.errors import InvalidInput

    try:
        listed = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {file}: {error}", field="file", hint="give a text file") from error
    body = {"action": "withdrawal", "gallery_id": gallery_id, "reference_ids": listed, "reason": reason}
    return _proposed(api.post(path_of("proposals"), body))


proposals.command("list")(
    lists(
        "proposals",
        ("proposal_id", "action", "gallery_id", "proposed_by", "expires_at_ms", "closed_as", "closed_by", "reason"),
        "There are no proposals.",
        "List proposals, the newest last.",
    )
)


@proposals.command("approve")
@asking
def approve(api: HttpApi, proposal_id: str, reason: Reason) -> Answer:
    """Approve and do what another person proposed."""
    done = api.post(path_of("proposals", proposal_id, "approve"), {"reason": reason})
    return Answer(done, f"Approved and done (sequence {done['sequence']}).")


@proposals.command("reject")
@asking
def reject(api: HttpApi, proposal_id: str, reason: Reason) -> Answer:
    """Close a proposal without doing it."""
    done = api.post(path_of("proposals", proposal_id, "reject"), {"reason": reason})
    return Answer(done, f"Rejected (sequence {done['sequence']}).")


def _proposed(done: dict[str, Any]) -> Answer:
    told = [f"Proposed: {done['proposal_id']}. An authorising officer other than you approves it."]
    if done["evidence"] is not None:
        told += in_words(done["evidence"])
    return Answer(done, "\n  ".join(told))


def _told(issued: dict[str, Any], secret_file: Path | None) -> Answer:
    secret = issued.get("secret", "")
    if secret and secret_file is not None:
        del issued["secret"]
        _write_secret(secret, secret_file)
    told = [f"Credential {issued['credential_id']} of deployment {issued['deployment_id']}."]
    if secret:
        told.append(f"Secret, told this once: {secret}" if secret_file is None else f"Its secret is in {secret_file}.")
    return Answer(issued, "\n".join(told))


def _write_secret(secret: str, path: Path) -> None:
    from matcher_service.errors import InvalidInput

    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        # It exists nowhere else: better on the screen than lost.
        typer.echo(f"Secret, told this once: {secret}", err=True)
        raise InvalidInput(
            f"cannot write {path}: {error.strerror}", field="secret_file", hint="name a new file"
        ) from error
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")


def _binding(certificate: str) -> str:
    """What a credential is bound by: as given, or the fingerprint of the certificate in a file."""
    if not certificate or certificate.startswith(("sha256:", "san:")):
        return certificate
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from matcher_service.errors import InvalidInput

    try:
        found = x509.load_pem_x509_certificate(Path(certificate).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{certificate} is no certificate: {error}", field="certificate", hint="give a PEM file"
        ) from error
    return f"sha256:{found.fingerprint(hashes.SHA256()).hex()}"
