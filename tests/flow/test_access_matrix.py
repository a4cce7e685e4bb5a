"""Every endpoint and every RPC, as every role, on an object of one's own and on a foreign one, over the real wires.

The table below says who may do what a second time, by hand: it is what the service's own table is checked against.
An endpoint without a row here fails, and so does a row without an endpoint.
"""

from __future__ import annotations

import base64
import itertools
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio

from matcher_service.access.verbs import EVERY_SCOPE, GRPC_VERBS, HTTP_VERBS
from matcher_service.gateway.http import build_http_app
from matcher_service.terms import (
    Actor,
    EdgeCredential,
    IssueCredential,
    MakeProposal,
    Proposal,
    ProposalAction,
    RateChange,
    SpaceId,
)
from matcher_service.wire import matcher_pb2 as pb
from matcher_service.wire.matcher_pb2_grpc import MatcherStub
from tests.identity_provider import IdentityProvider
from tests.running_service import DAY_MS, TESTER, WholeService, whole_service

pytestmark = pytest.mark.asyncio(loop_scope="module")

PEOPLE = ("operator", "adjudicator", "gallery_manager", "authorising_officer", "auditor", "sre")
ROLES = ("nobody", "edge", "exchange", *PEOPLE, "loopback")
SPACE = SpaceId("test", 1, 8)
RATES = (RateChange("FPIR", "", 0.001, 0.02), RateChange("FNIR", "", 0.05, 0.01))
RATES_JSON = [one._asdict() for one in RATES]

# What may be asked about: one's own, somebody else's, and what never was.
OWN, FOREIGN, UNKNOWN = "mine", "theirs", "nowhere"


@dataclass(frozen=True)
class Row:
    """Who is let in (initials as in WHO), the request, and how an object of one's own is answered.

    `body` and the path are made of an object id; `makes` says which object the request is about, "" for none. An
    object is made anew where the request changes it. `persons` is what a person is told where two are needed.
    """

    who: str
    method: str
    path: str
    makes: str = ""
    body: Callable[[str], Any] | None = None
    own: int = 200
    anew: bool = False
    persons: int | None = None
    params: dict[str, str] = field(default_factory=dict)


WHO = {
    "E": "edge",
    "X": "exchange",
    "O": "operator",
    "J": "adjudicator",
    "M": "gallery_manager",
    "A": "authorising_officer",
    "U": "auditor",
    "S": "sre",
}
EVERYONE = "EOJMAUS"
SEARCH_PEOPLE = "OJMAU"
REASON = {"reason": "a test"}


def identify_body(authority: str) -> dict[str, Any]:
    return {
        "space": SPACE._asdict(),
        "deployment_id": authority,
        "stream_nonce": base64.b64encode(secrets.token_bytes(16)).decode(),
        "stream_sequence": 1,
        "probes": [{"probe_id": "p", "captured_at_ms": now_ms(), "template": np.eye(8)[7].tolist()}],
    }


def enrol_body(_: str) -> dict[str, Any]:
    reference = {"reference_id": secrets.token_hex(6), "subject_id": "s-new", "template": np.eye(8)[6].tolist()}
    return {"space": SPACE._asdict(), "references": [reference]}


def gallery_body(_: str) -> dict[str, Any]:
    return {
        "gallery_id": f"new-{secrets.token_hex(4)}",
        "kind": "custody",
        "controller": "a force",
        "lawful_basis": "PACE 1984 s.64A",
        "purpose": "a test",
        "retention_ms": DAY_MS,
        "space": SPACE._asdict(),
        "threshold": 0.5,
    }


def deployment_body(gallery_id: str) -> dict[str, Any]:
    return {
        "deployment_id": f"op-{secrets.token_hex(4)}",
        "gallery_ids": [gallery_id],
        "closes_at_ms": now_ms() + DAY_MS,
        "probe_age_ms_max": 60_000,
        "authorised_by": "Supt. Gray",
        "reason": "a test",
        "place": "High Street",
        "legal_authority": "common law, decision 7",
        "necessity": "nothing less would do",
    }


def case_body(gallery_id: str) -> dict[str, Any]:
    return {
        "case_reference": f"case-{secrets.token_hex(4)}",
        "gallery_ids": [gallery_id],
        "closes_at_ms": now_ms() + DAY_MS,
        "requested_by": "DC Hall",
        "purpose": "a test",
    }


def threshold_body(_: str) -> dict[str, Any]:
    return {
        "threshold": 0.6 + next(_distinct) / 10_000,
        "proposed_by": "one",
        "approved_by": "two",
        "rates": RATES_JSON,
        **REASON,
    }


def proposal_body(gallery_id: str) -> dict[str, Any]:
    return {"action": "withdrawal", "gallery_id": gallery_id, "reference_ids": ["r"], **REASON}


def space_body(_: str) -> dict[str, Any]:
    return {"space": {"name": f"s-{secrets.token_hex(4)}", "version": 1, "dimension": 2}, "centre": [0.0, 0.0]}


def hold_body(gallery_id: str) -> dict[str, Any]:
    return {
        "gallery_id": gallery_id,
        "subject_id": "nobody",
        "requested_by": "Crown Court",
        "authorised_by": "Supt. Gray",
        "review_by_ms": now_ms() + DAY_MS,
        **REASON,
    }


_distinct = itertools.count(1)

HTTP: dict[str, Row] = {
    "identify": Row("EO", "POST", "/v1/identify", "deployment", identify_body),
    "make_templates": Row("EOM", "POST", "/v1/templates", own=404),  # no embedder is configured here
    "enrol": Row("M", "POST", "/v1/galleries/{}/references", "gallery", enrol_body),
    "list_references": Row("M", "GET", "/v1/galleries/{}/references", "gallery"),
    "describe_reference": Row("M", "GET", "/v1/galleries/{}/references/r", "gallery"),
    "withdraw_reference": Row(
        "M", "DELETE", "/v1/galleries/{}/references/spare", "gallery", anew=True, params=REASON, own=200
    ),
    "review_reference": Row(
        "M",
        "POST",
        "/v1/galleries/{}/references/r/review",
        "gallery",
        lambda _: {"review_by_ms": now_ms() + DAY_MS // 2, "reviewed_by": "Sgt. Low", **REASON},
    ),
    "describe_subject": Row("M", "GET", "/v1/subjects/s-{}", "subject"),
    "withdraw_subject": Row("M", "DELETE", "/v1/subjects/s-{}", "subject", anew=True, params=REASON),
    "end_ground": Row(
        "M",
        "POST",
        "/v1/subjects/s-spare/ground-ended",
        "gallery",
        lambda gallery_id: {"gallery_id": gallery_id, "ground": "acquitted", **REASON},
        anew=True,
    ),
    "create_gallery": Row("M", "POST", "/v1/galleries", body=gallery_body, own=201, persons=403),
    "list_galleries": Row(SEARCH_PEOPLE, "GET", "/v1/galleries"),
    "describe_gallery": Row(SEARCH_PEOPLE, "GET", "/v1/galleries/{}", "gallery"),
    "change_threshold": Row("M", "POST", "/v1/galleries/{}/threshold", "gallery", threshold_body, persons=403),
    "delete_gallery": Row("M", "DELETE", "/v1/galleries/{}", "gallery", anew=True, params=REASON, persons=403),
    "list_watchlists": Row(SEARCH_PEOPLE, "GET", "/v1/watchlists"),
    "describe_watchlist": Row(SEARCH_PEOPLE, "GET", "/v1/watchlists/{}", "gallery", own=404),
    "approve_watchlist": Row(
        "A", "POST", "/v1/watchlists/{}/approval", "gallery", lambda _: {"approved_by": "x", **REASON}, own=409
    ),
    "export_subject": Row("M", "GET", "/v1/subjects/s-{}/export", "subject", params=REASON),
    "place_hold": Row("A", "POST", "/v1/holds", "gallery", hold_body, own=201),
    "list_holds": Row("AU", "GET", "/v1/holds", persons=403),
    "release_hold": Row("A", "POST", "/v1/holds/none/release", body=lambda _: REASON, own=404),
    "export_assessment": Row("AU", "GET", "/v1/impact-assessment", persons=403),
    "report_deployment": Row("OAU", "GET", "/v1/deployments/{}/report", "deployment"),
    "register_space": Row("M", "POST", "/v1/spaces", body=space_body, own=201),
    "list_spaces": Row(EVERYONE, "GET", "/v1/spaces"),
    "describe_space": Row(EVERYONE, "GET", "/v1/spaces/test/1/8"),
    "create_deployment": Row("A", "POST", "/v1/deployments", "gallery", deployment_body, own=201),
    "list_deployments": Row(SEARCH_PEOPLE + "E", "GET", "/v1/deployments"),
    "describe_deployment": Row(SEARCH_PEOPLE + "E", "GET", "/v1/deployments/{}", "deployment"),
    "end_deployment": Row("OA", "POST", "/v1/deployments/{}/end", "deployment", anew=True),
    "create_case": Row("OA", "POST", "/v1/cases", "gallery", case_body, own=201),
    "list_cases": Row("OAU", "GET", "/v1/cases"),
    "describe_case": Row("OAU", "GET", "/v1/cases/{}", "case"),
    "end_case": Row("OA", "POST", "/v1/cases/{}/end", "case", anew=True),
    "make_proposal": Row("M", "POST", "/v1/proposals", "gallery", proposal_body, own=201),
    "list_proposals": Row("MAU", "GET", "/v1/proposals"),
    "approve_proposal": Row("A", "POST", "/v1/proposals/{}/approve", "proposal", lambda _: REASON, anew=True),
    "reject_proposal": Row("MA", "POST", "/v1/proposals/{}/reject", "proposal", lambda _: REASON, anew=True),
    "issue_credential": Row("A", "POST", "/v1/credentials", "deployment", lambda one: {"deployment_id": one}, own=201),
    "list_credentials": Row("OAU", "GET", "/v1/credentials"),
    "rotate_credential": Row("A", "POST", "/v1/credentials/{}/rotate", "credential", lambda _: {}, own=201, anew=True),
    "revoke_credential": Row("OA", "POST", "/v1/credentials/{}/revoke", "credential", lambda _: REASON, anew=True),
    "exchange_token": Row("X", "POST", "/v1/tokens", own=201),
    "list_alerts": Row("OJU", "GET", "/v1/alerts"),
    "stream_alerts": Row("EOJ", "GET", "/v1/alerts/stream"),
    "describe_alert": Row("OJU", "GET", "/v1/alerts/{}", "alert"),
    "adjudicate_alert": Row(
        "J",
        "POST",
        "/v1/alerts/{}/adjudications",
        "alert",
        lambda _: {"verdict": "rejected", "by": "x", **REASON},
        own=201,
    ),
    "list_erasures": Row("MAU", "GET", "/v1/erasures"),
    "describe_erasure": Row("MAU", "GET", "/v1/erasures/999999", own=404),
    "list_keys": Row("MUS", "GET", "/v1/keys"),
    "rotate_gallery_key": Row("M", "POST", "/v1/galleries/{}/key", "gallery", own=400),  # without a reason
    "rewrap_keys": Row("S", "POST", "/v1/keys/rewrap"),
    "list_audit": Row("U", "GET", "/v1/audit", persons=403),
    "list_checkpoints": Row("U", "GET", "/v1/audit/checkpoints"),
    "make_checkpoint": Row("U", "POST", "/v1/audit/checkpoints", own=201),
    "prove_inclusion": Row("U", "GET", "/v1/audit/proofs/inclusion", params={"index": "1"}),
    "prove_consistency": Row("U", "GET", "/v1/audit/proofs/consistency", params={"older": "1"}),
    "rotate_key": Row("U", "POST", "/v1/audit/keys", params=REASON, own=201),
}
# Open to everybody on loopback, where these tests run; beyond it `metrics` is the SRE's (see below).
OPEN_ON_LOOPBACK = {
    "metrics": ("S", "/metrics"),
    "live": (EVERYONE, "/livez"),
    "ready": (EVERYONE, "/readyz"),
    "started": (EVERYONE, "/startupz"),
    "openapi": (EVERYONE, "/openapi.json"),
    "docs": (EVERYONE, "/docs"),
    "root": (EVERYONE, "/"),
}
RPCS = {
    "identify": "EO",
    "identify_stream": "EO",
    "enrol": "M",
    "withdraw": "M",
    "watch_alerts": "EOJ",
    "reflection": EVERYONE,
}


def who(initials: str) -> set[str]:
    return {WHO[one] for one in initials}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class World:
    """Two galleries with all that hangs on them, and a credential for each role that reaches one of them only."""

    def __init__(self, service: WholeService, provider: IdentityProvider, http: httpx.AsyncClient) -> None:
        self.service = service
        self.http = http
        self._provider = provider
        self.tokens: dict[str, str] = {}
        self._made: dict[tuple[str, str], str] = {}

    async def prepare(self) -> None:
        service = self.service
        await service.space(8)
        for at, gallery_id in enumerate((OWN, FOREIGN)):
            await service.gallery(gallery_id, SPACE)
            await service.enrol(gallery_id, SPACE, np.eye(8, dtype=np.float32)[[at]], ["r"], [f"s-{gallery_id}"])
            for what in ("deployment", "case", "credential", "proposal", "subject"):
                self._made[what, gallery_id] = await self._make(what, gallery_id)
            raised = await service.ask(
                SPACE, np.eye(8, dtype=np.float32)[[at]], deployment_id=self._made["deployment", gallery_id]
            )
            self._made["alert", gallery_id] = raised["p0"].decision.alert_id
        secret = await self.credential(self._made["deployment", OWN])
        exchanged = await self.http.post("/v1/tokens", headers={"Authorization": f"Bearer {secret}"})
        self.tokens = {
            "edge": exchanged.json()["token"],
            "exchange": secret,
            "loopback": service.running.token,
            **{role: self._provider.token(f"p-{role}", role, galleries=(OWN,)) for role in PEOPLE},
        }

    async def credential(self, deployment_id: str) -> str:
        issued = await self.http.post(
            "/v1/credentials",
            json={"deployment_id": deployment_id},
            headers={"Authorization": f"Bearer {self.service.running.token}"},
        )
        return str(issued.json()["secret"])

    async def an(self, what: str, whose: str, anew: bool) -> str:
        """The id of an object; that of UNKNOWN is of the same form."""
        if whose == UNKNOWN:
            return f"{UNKNOWN}-{next(_distinct)}" if what != "gallery" else UNKNOWN
        if what == "gallery":
            if anew and whose == OWN:
                await self._spare()
            return whose
        return await self._make(what, whose) if anew and whose == OWN else self._made[what, whose]

    async def _spare(self) -> None:
        """A reference that may be withdrawn."""
        await self.service.enrol(
            OWN, SPACE, np.eye(8, dtype=np.float32)[[5]], ["spare"], ["s-spare"], replace=True, idempotency_key=""
        )

    async def _make(self, what: str, gallery_id: str) -> str:
        change, name = self.service.running.service.change, f"{what}-{next(_distinct)}"
        match what:
            case "deployment":
                return await self.service.deployment(gallery_id, deployment_id=name)
            case "case":
                return await self.service.case(gallery_id, case_reference=name)
            case "credential":
                credential = EdgeCredential(
                    name, self._made["deployment", gallery_id], "x", 0, now_ms() + DAY_MS // 2, secret_sha256="0" * 64
                )
                await change(IssueCredential(credential), TESTER)
            case "proposal":
                threshold = 0.7 + next(_distinct) / 10_000
                await change(
                    MakeProposal(
                        Proposal(
                            name,
                            ProposalAction.THRESHOLD,
                            gallery_id,
                            "a test",
                            "p-proposer",
                            now_ms(),
                            now_ms() + DAY_MS,
                            threshold,
                            RATES,
                        )
                    ),
                    Actor("person-p-proposer", person="p-proposer"),
                )
            case "subject":
                name = f"{gallery_id}-{next(_distinct)}"
                rows = np.eye(8, dtype=np.float32)[[4]]
                await self.service.enrol(gallery_id, SPACE, rows, [f"of-{name}"], [f"s-{name}"])
        return name

    def headers(self, role: str) -> dict[str, str]:
        token = self.tokens.get(role)
        return {"Authorization": f"Bearer {token}"} if token else {}

    async def ask(self, role: str, row: Row, whose: str) -> tuple[int, str]:
        """(status, body with the object's id blanked out)."""
        name = await self.an(row.makes, whose, row.anew and self.lets_in(role, row)) if row.makes else ""
        body = row.body(name) if row.body else None
        request = self.http.build_request(
            row.method, row.path.format(name), json=body, params=row.params, headers=self.headers(role)
        )
        answer = await self.http.send(request, stream=True)
        try:
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                return answer.status_code, ""
            await answer.aread()
        finally:
            await answer.aclose()
        return answer.status_code, answer.text.replace(name, "#") if name else answer.text

    @staticmethod
    def lets_in(role: str, row: Row) -> bool:
        return role in who(row.who) or (role == "loopback" and row.who != "X")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for all these tests, in one event loop: each makes anew what it takes away."""
    folder = tmp_path_factory.mktemp("world")
    provider = IdentityProvider(folder)
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(whole_service(folder / "data", access=provider.settings()))
        url = f"http://127.0.0.1:{service.running.http_port}"
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, trust_env=False))
        world = World(service, provider, http)
        await world.prepare()
        yield world


async def test_every_endpoint_has_a_row_and_every_row_an_endpoint(made: World) -> None:
    app: Any = build_http_app(made.service.running.service)
    description = app._app.openapi()
    found = {
        operation["operationId"].removesuffix(re.sub(r"\W", "_", path) + "_" + method): (method.upper(), path)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }
    undescribed = {"openapi", "docs", "root"}
    assert set(found) | undescribed == set(HTTP) | set(OPEN_ON_LOOPBACK)
    assert set(found) | undescribed == set(HTTP_VERBS)
    for verb, row in HTTP.items():
        method, path = found[verb]
        assert row.method == method
        assert re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)), row.path.format("x")), verb
    rpcs = {
        re.sub(r"(?<!^)(?=[A-Z])", "_", one.name).lower() for one in pb.DESCRIPTOR.services_by_name["Matcher"].methods
    }
    assert rpcs | {"reflection"} == set(RPCS) == set(GRPC_VERBS)


async def test_the_services_table_is_the_one_above() -> None:
    scopes = {role: {"exchange": "token_exchange"}.get(role, role) for role in WHO.values()}
    above = {verb: row.who for verb, row in HTTP.items()} | {verb: one for verb, (one, _) in OPEN_ON_LOOPBACK.items()}
    for table, held in ((above, HTTP_VERBS), (RPCS, GRPC_VERBS)):
        for verb, initials in table.items():
            assert {one.value for one in held[verb]} == {scopes[role] for role in who(initials)}, verb
    sre = {verb for verb, held in HTTP_VERBS.items() if "sre" in held}
    keys = {"list_keys", "rewrap_keys"}
    assert sre == keys | {
        "list_spaces",
        "describe_space",
        "metrics",
        "live",
        "ready",
        "started",
        "openapi",
        "docs",
        "root",
    }


async def test_every_endpoint_as_every_role_on_own_and_foreign_objects(made: World) -> None:
    asked = 0
    # What takes a gallery or a subject away comes last.
    for verb, row in sorted(HTTP.items(), key=lambda one: (one[0] in ("delete_gallery", "withdraw_subject"), one[0])):
        for role in ROLES:
            told = {}
            for whose in (OWN, FOREIGN, UNKNOWN) if row.makes else (OWN,):
                if role == "loopback" and whose != UNKNOWN and verb == "delete_gallery":
                    continue  # it would take the others' objects with it
                told[whose] = await made.ask(role, row, whose)
                asked += 1
            where = (verb, role, told)
            if role == "nobody":
                assert {status for status, _ in told.values()} == {401}, where
                continue
            if not made.lets_in(role, row):
                assert {status for status, _ in told.values()} == {403}, where
                assert len({body for _, body in told.values()}) == 1, where
                continue
            if OWN in told:
                person = role in PEOPLE and row.persons is not None
                alone = verb in ("make_proposal", "approve_proposal") and role == "loopback"
                assert told[OWN][0] == (row.persons if person else 403 if alone else row.own), where
            if row.makes and role != "loopback":
                # A foreign object is answered exactly as one that never was.
                assert told[FOREIGN] == told[UNKNOWN], where
                if verb != "describe_subject":
                    assert told[FOREIGN][0] in (403, 404), where
    assert asked > 900


async def test_every_rpc_as_every_role_on_own_and_foreign_objects(made: World) -> None:
    address = f"127.0.0.1:{made.service.running.grpc_port}"
    async with grpc.aio.insecure_channel(address) as channel:
        for rpc, initials in RPCS.items():
            if rpc == "reflection":
                continue  # open on loopback; see below
            for role in ROLES:
                metadata = tuple((key.lower(), value) for key, value in made.headers(role).items())
                told = {whose: await _call(channel, rpc, made, whose, metadata) for whose in (OWN, FOREIGN, UNKNOWN)}
                where = (rpc, role, told)
                if role == "nobody":
                    assert {one[0] for one in told.values()} == {"UNAUTHENTICATED"}, where
                elif role not in who(initials) and role != "loopback":
                    assert {one[0] for one in told.values()} == {"PERMISSION_DENIED"}, where
                    assert len(set(told.values())) == 1, where
                else:
                    assert told[OWN][0] == "OK", where
                    if role != "loopback":
                        assert told[FOREIGN] == told[UNKNOWN], where


async def _call(channel: grpc.aio.Channel, rpc: str, made: World, whose: str, metadata: Any) -> tuple[str, str]:
    """(status, or the cause in the answer; the detail with the object's id blanked out)."""
    stub: Any = MatcherStub(channel)  # type: ignore[no-untyped-call]
    what = "deployment" if rpc in ("identify", "identify_stream", "watch_alerts") else "gallery"
    name = await made.an(what, whose, rpc == "withdraw")
    space = pb.TemplateSpace(**SPACE._asdict())
    stream: Any = None
    try:
        if rpc in ("identify", "identify_stream"):
            probes = pb.IdentifyRequest(
                space=space,
                dtype=pb.FLOAT32,
                templates=np.eye(8, dtype="<f4")[7].tobytes(),
                probe_ids=["p"],
                captured_at_ms=[now_ms()],
                deployment_id=name,
                stream_nonce=secrets.token_bytes(16),
                stream_sequence=1,
            )
            if rpc == "identify":
                await stub.Identify(probes, metadata=metadata)
                return "OK", ""
            stream = stub.IdentifyStream(metadata=metadata)
            await stream.write(probes)
            decision = (await stream.read()).decisions[0]
            stream.cancel()
            return decision.cause or "OK", decision.detail.replace(name, "#")
        if rpc == "enrol":
            stream = stub.Enrol(metadata=metadata)
            reference_id = secrets.token_hex(6)
            await stream.write(
                pb.EnrolRequest(
                    gallery_id=name,
                    space=space,
                    dtype=pb.FLOAT32,
                    templates=np.eye(8, dtype="<f4")[6].tobytes(),
                    reference_ids=[reference_id],
                    subject_ids=["s"],
                )
            )
            reply = await stream.read()
            stream.cancel()
            return reply.cause or "OK", reply.detail.replace(name, "#")
        if rpc == "withdraw":
            request = pb.WithdrawRequest(gallery_id=name, reason="a test")
            request.references.reference_ids.append("spare")
            await stub.Withdraw(request, metadata=metadata)
            return "OK", ""
        watch = stub.WatchAlerts(pb.WatchAlertsRequest(deployment_ids=[name]), metadata=metadata)
        await watch.initial_metadata()
        code = await watch.code() if watch.done() else None
        watch.cancel()
        return ("OK" if code is None else code.name), ""
    except grpc.aio.AioRpcError as broken:
        # A write to a stream that was ended meanwhile knows only that it failed; the stream knows why.
        code = broken.code() if stream is None else await stream.code()
        details = broken.details() if stream is None else await stream.details()
        return code.name, (details or "").replace(name, "#")


async def test_an_sre_and_a_person_without_roles_see_nobodys_data(made: World) -> None:
    provider_token = IdentityProvider.token
    for token in (made.tokens["sre"], provider_token(made._provider, "p-new")):
        headers = {"Authorization": f"Bearer {token}"}
        for row in HTTP.values():
            name = await made.an(row.makes, OWN, False) if row.makes else ""
            answer = await made.http.request(row.method, row.path.format(name), headers=headers)
            assert not any(text in answer.text for text in ("s-mine", "s-theirs", "subject_id", "Supt")), row


async def test_lists_hold_what_the_caller_has_rights_over(made: World) -> None:
    seen = {}
    for path, role in (
        ("galleries", "operator"),
        ("deployments", "operator"),
        ("deployments", "edge"),
        ("cases", "operator"),
        ("credentials", "operator"),
        ("proposals", "auditor"),
        ("alerts", "operator"),
    ):
        mine = await made.http.get(f"/v1/{path}", headers=made.headers(role))
        everything = await made.http.get(f"/v1/{path}", headers=made.headers("loopback"))
        seen[path, role] = len(mine.json()[path]), len(everything.json()[path])
        assert FOREIGN not in mine.text.replace("clothes", "")
        assert FOREIGN in everything.text or path == "credentials"
    assert all(0 < few < all_ for few, all_ in seen.values()), seen


async def test_by_hand_a_threshold_is_two_persons_business(made: World) -> None:
    """One authenticated person proposes, another approves; nobody does both, and the log says who."""
    proposer = made._provider.token("p-low", "gallery_manager", "authorising_officer", galleries=(OWN,))
    approver = made._provider.token("p-high", "authorising_officer", galleries=(OWN,))
    wish = {"action": "threshold", "gallery_id": OWN, "threshold": 0.3, "rates": RATES_JSON, **REASON}

    async def post(path: str, token: str, body: Any = REASON) -> httpx.Response:
        return await made.http.post(path, json=body, headers={"Authorization": f"Bearer {token}"})

    proposed = await post("/v1/proposals", proposer, wish)
    path = f"/v1/proposals/{proposed.json()['proposal_id']}/approve"
    before = made.service.running.service.catalogue.galleries[OWN].threshold
    assert (await post(path, proposer)).status_code == 403
    assert made.service.running.service.catalogue.galleries[OWN].threshold == before
    assert (await post(path, made.tokens["loopback"])).status_code == 403
    assert (await post(path, approver)).status_code == 200
    assert made.service.running.service.catalogue.galleries[OWN].threshold == 0.3
    again = await post(path, approver)
    assert (again.status_code, again.json()["cause"]) == (410, "GONE")
    audited = [
        one for one in await made.service.running.service.log.audit(0, 1000) if one["action"] == "threshold.changed"
    ]
    detail: Any = audited[-1]["detail"]
    assert (detail["proposed_by"], detail["approved_by"]) == ("p-low", "p-high")
    assert audited[-1]["actor"] == "person-p-high"


async def test_the_loopback_token_holds_every_scope_and_no_other_credential_does() -> None:
    assert {one.value for one in EVERY_SCOPE} == {*PEOPLE, "edge", "raw_scores"}


async def test_no_role_both_proposes_and_approves_and_only_auditors_read_the_audit() -> None:
    assert HTTP_VERBS["make_proposal"].isdisjoint(HTTP_VERBS["approve_proposal"])
    assert {one.value for one in HTTP_VERBS["list_audit"]} == {"auditor"}


async def test_an_auditor_reads_the_audit_with_rights_over_every_gallery(made: World) -> None:
    for galleries, status in ((("*",), 200), ((OWN, FOREIGN), 403), ((), 403)):
        token = made._provider.token("p-u", "auditor", galleries=galleries)
        answer = await made.http.get("/v1/audit", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == status
