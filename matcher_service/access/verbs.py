"""Which scopes open which verb: one row for every HTTP endpoint and every RPC. Pure.

A verb without a row is open to nobody but a credential that holds every scope, and a test fails until it has one.
Names of HTTP verbs are those of the route functions, names of RPCs are in snake case. Holding the scope of a verb
is not enough: rights over the object are checked apart, in `policy` and in the handlers.
"""

from __future__ import annotations

from collections.abc import Mapping

from matcher_service.errors import Forbidden
from matcher_service.terms import Actor, Scope

EDGE, OPERATOR, ADJUDICATOR = Scope.EDGE, Scope.OPERATOR, Scope.ADJUDICATOR
MANAGER, OFFICER, AUDITOR, SRE = Scope.GALLERY_MANAGER, Scope.AUTHORISING_OFFICER, Scope.AUDITOR, Scope.SRE

ROLES = frozenset((EDGE, OPERATOR, ADJUDICATOR, MANAGER, OFFICER, AUDITOR, SRE))
EVERY_SCOPE = ROLES | {Scope.RAW_SCORES}
"""What the token of a data directory holds."""

_EVERYONE = ROLES
_WHO_RUN_SEARCHES = frozenset((OPERATOR, ADJUDICATOR, MANAGER, OFFICER, AUDITOR))


def _only(*scopes: Scope) -> frozenset[Scope]:
    return frozenset(scopes)


HTTP_VERBS: Mapping[str, frozenset[Scope]] = {
    # searching
    "identify": _only(EDGE, OPERATOR),
    "make_templates": _only(EDGE, OPERATOR, MANAGER),
    # references and subjects
    "enrol": _only(MANAGER),
    "list_references": _only(MANAGER),
    "describe_reference": _only(MANAGER),
    "withdraw_reference": _only(MANAGER),
    "describe_subject": _only(MANAGER),
    "withdraw_subject": _only(MANAGER),
    "end_ground": _only(MANAGER),
    "export_subject": _only(MANAGER),
    "place_hold": _only(OFFICER),
    "list_holds": _only(OFFICER, AUDITOR),
    "release_hold": _only(OFFICER),
    "review_reference": _only(MANAGER),
    # galleries and template spaces
    "create_gallery": _only(MANAGER),
    "list_galleries": _WHO_RUN_SEARCHES,
    "describe_gallery": _WHO_RUN_SEARCHES,
    "change_threshold": _only(MANAGER),
    "delete_gallery": _only(MANAGER),
    "list_watchlists": _WHO_RUN_SEARCHES,
    "describe_watchlist": _WHO_RUN_SEARCHES,
    "approve_watchlist": _only(OFFICER),
    "register_space": _only(MANAGER),
    "list_spaces": _EVERYONE,
    "describe_space": _EVERYONE,
    # authority
    "create_deployment": _only(OFFICER),
    "list_deployments": _WHO_RUN_SEARCHES | {EDGE},
    "describe_deployment": _WHO_RUN_SEARCHES | {EDGE},
    "export_assessment": _only(OFFICER, AUDITOR),
    "report_deployment": _only(OPERATOR, OFFICER, AUDITOR),
    "end_deployment": _only(OFFICER, OPERATOR),
    "create_case": _only(OFFICER, OPERATOR),
    "list_cases": _only(OPERATOR, OFFICER, AUDITOR),
    "describe_case": _only(OPERATOR, OFFICER, AUDITOR),
    "end_case": _only(OFFICER, OPERATOR),
    # what two persons stand for
    "make_proposal": _only(MANAGER),
    "list_proposals": _only(MANAGER, OFFICER, AUDITOR),
    "approve_proposal": _only(OFFICER),
    "reject_proposal": _only(MANAGER, OFFICER),
    # edge credentials
    "issue_credential": _only(OFFICER),
    "list_credentials": _only(OFFICER, OPERATOR, AUDITOR),
    "rotate_credential": _only(OFFICER),
    "revoke_credential": _only(OFFICER, OPERATOR),
    "exchange_token": _only(Scope.TOKEN_EXCHANGE),
    # records
    "list_alerts": _only(OPERATOR, ADJUDICATOR, AUDITOR),
    "stream_alerts": _only(EDGE, OPERATOR, ADJUDICATOR),
    "describe_alert": _only(OPERATOR, ADJUDICATOR, AUDITOR),
    "adjudicate_alert": _only(ADJUDICATOR),
    "list_erasures": _only(MANAGER, OFFICER, AUDITOR),
    "describe_erasure": _only(MANAGER, OFFICER, AUDITOR),
    "list_audit": _only(AUDITOR),
    "list_checkpoints": _only(AUDITOR),
    "make_checkpoint": _only(AUDITOR),
    "prove_inclusion": _only(AUDITOR),
    "prove_consistency": _only(AUDITOR),
    "rotate_key": _only(AUDITOR),
    # keys
    "list_keys": _only(MANAGER, AUDITOR, SRE),
    "rotate_gallery_key": _only(MANAGER),
    "rewrap_keys": _only(SRE),
    # operation; open on loopback
    "metrics": _only(SRE),
    "live": _EVERYONE,
    "ready": _EVERYONE,
    "started": _EVERYONE,
    "openapi": _EVERYONE,
    "docs": _EVERYONE,
    "root": _EVERYONE,
}

GRPC_VERBS: Mapping[str, frozenset[Scope]] = {
    "identify": _only(EDGE, OPERATOR),
    "identify_stream": _only(EDGE, OPERATOR),
    "enrol": _only(MANAGER),
    "withdraw": _only(MANAGER),
    "watch_alerts": _only(EDGE, OPERATOR, ADJUDICATOR),
    "reflection": _EVERYONE,
}


def require(actor: Actor, verb: str, verbs: Mapping[str, frozenset[Scope]]) -> None:
    """Raise Forbidden unless one of the actor's scopes opens the verb."""
    opened_by = verbs.get(verb)
    if opened_by is None:
        if actor.scopes >= EVERY_SCOPE:
            return
        opened_by = frozenset()
    if actor.scopes & opened_by:
        return
    names = ", ".join(sorted(one.value for one in opened_by)) or "no role"
    raise Forbidden(f"{verb} is open to {names}", field="authorization", hint="use a credential with that role")
