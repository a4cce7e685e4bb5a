"""Edge credentials: one deployment, one window, its cameras and galleries; cut off within a second (law 11)."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from matcher_service.client import MatcherClient, Probes, Tls
from matcher_service.errors import (
    Conflict,
    Forbidden,
    Gone,
    InvalidInput,
    MatcherError,
    NotFound,
    Overloaded,
    Unauthenticated,
)
from matcher_service.terms import EdgeCredential, EndDeployment, IssueCredential, Outcome, SpaceId
from matcher_service.wire import matcher_pb2 as pb
from matcher_service.wire.matcher_pb2_grpc import MatcherStub
from tests.edges import until
from tests.running_service import DAY_MS, TESTER, WholeService, whole_service

SPACE = SpaceId("test", 1, 8)
ROWS = np.eye(8, dtype=np.float32)
VAN_NAME = "spiffe://force.example/van-7"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def probes(deployment_id: str = "op", rows: Any = None, **more: Any) -> Probes:
    rows = ROWS[[0]] if rows is None else rows
    ids = more.pop("probe_ids", [f"p{at}" for at in range(len(rows))])
    return Probes(
        space=SPACE,
        probe_ids=ids,
        templates=rows,
        captured_at_ms=more.pop("captured_at_ms", [now_ms()] * len(rows)),
        deployment_id=deployment_id,
        **more,
    )


@dataclass
class World:
    service: WholeService
    http: httpx.AsyncClient
    tls: dict[str, Any] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.service.running.grpc_port}"

    async def post(self, path: str, body: Any = None, token: str = "", status: int = 201) -> Any:
        headers = {"Authorization": f"Bearer {token or self.service.running.token}"}
        answer = await self.http.post(path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def issue(self, deployment_id: str = "op", **other: Any) -> dict[str, Any]:
        issued: dict[str, Any] = await self.post("/v1/credentials", {"deployment_id": deployment_id, **other})
        return issued

    async def token(self, secret: str) -> str:
        return str((await self.post("/v1/tokens", token=secret))["token"])

    def client(self, token: str, **options: Any) -> MatcherClient:
        return MatcherClient(self.address, token, deadline_s=30.0, **options)


@asynccontextmanager
async def world(tmp_path: Path, **sections: Any) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(whole_service(tmp_path / "data", **sections))
        await service.space(8)
        for at, gallery_id in enumerate(("custody", "other")):
            await service.gallery(gallery_id, SPACE)
            await service.enrol(gallery_id, SPACE, ROWS[[at]], ["r"], [f"s-{gallery_id}"])
        await service.deployment("custody")
        await service.deployment("other", deployment_id="elsewhere")
        url = f"http://127.0.0.1:{service.running.http_port}"
        yield World(service, await stack.enter_async_context(httpx.AsyncClient(base_url=url, trust_env=False)))


async def test_law_11_a_credential_reaches_its_own_deployment_and_nothing_else(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        token = await made.token((await made.issue())["secret"])
        async with made.client(token) as van:
            assert (await van.identify(probes())).decisions[0].outcome is Outcome.ALERT
            for wish, refusal in (
                (probes("elsewhere"), NotFound),
                (probes("nowhere"), NotFound),
                (probes(gallery_ids=["other"]), NotFound),  # the answer of an unknown gallery
                (probes(rank_max=101), InvalidInput),
            ):
                with pytest.raises(refusal):
                    await van.identify(wish)
            with pytest.raises(Forbidden):
                await van.withdraw("custody", reference_ids=["r"], reason="a test")


async def test_a_secret_is_exchanged_and_does_nothing_else(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        issued = await made.issue()
        async with made.client(issued["secret"]) as van:
            with pytest.raises(Forbidden):
                await van.identify(probes())
        answered = await made.post("/v1/tokens", token=issued["secret"])
        assert answered["deployment_id"] == "op"
        assert 0 < answered["expires_at_ms"] - now_ms() <= 900_000
        for wrong in (issued["secret"] + "x", issued["secret"][:-1], f"edge.{issued['credential_id']}.", "edge.x.y"):
            await made.post("/v1/tokens", token=wrong, status=401)
        # Nothing that was told or could open anything is in the log, the files or the audit.
        listed = await made.http.get(
            "/v1/credentials", headers={"Authorization": f"Bearer {made.service.running.token}"}
        )
        assert issued["secret"] not in listed.text
        assert "secret_sha256" not in listed.text
        secret = issued["secret"].rpartition(".")[2].encode()
        assert not any(secret in path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())


async def test_deployments_are_bound_to_their_cameras(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        body = {
            "deployment_id": "square",
            "gallery_ids": ["custody"],
            "closes_at_ms": now_ms() + DAY_MS,
            "probe_age_ms_max": 60_000,
            "authorised_by": "Supt. Gray",
            "reason": "a test",
            "cameras": ["north", "south"],
            "threshold": 0.8,
        }
        await made.post("/v1/deployments", body)
        issued = await made.issue("square", cameras=["north"])
        async with made.client(await made.token(issued["secret"])) as van:
            answered = await van.identify(probes("square", camera_id="north"))
            assert answered.thresholds == {"custody": pytest.approx(0.8)}
            for camera in ("south", "", "elsewhere"):
                with pytest.raises(Forbidden) as refused:
                    await van.identify(probes("square", camera_id=camera))
                assert refused.value.field == "camera_id"
        await made.post("/v1/credentials", {"deployment_id": "square", "cameras": ["east"]}, status=400)
        await made.post("/v1/deployments", {**body, "deployment_id": "low", "threshold": 0.4}, status=400)


async def test_law_11_revocation_ends_open_and_idle_streams_and_tokens_within_a_second(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        issued = await made.issue()
        token = await made.token(issued["secret"])
        metadata = (("authorization", f"Bearer {token}"),)
        async with grpc.aio.insecure_channel(made.address) as channel:
            stub: Any = MatcherStub(channel)  # type: ignore[no-untyped-call]
            idle, watch = (
                stub.IdentifyStream(metadata=metadata),
                stub.WatchAlerts(pb.WatchAlertsRequest(), metadata=metadata),
            )
            await idle.wait_for_connection()
            await watch.initial_metadata()
            began = time.monotonic()
            path = f"/v1/credentials/{issued['credential_id']}/revoke"
            await made.post(path, {"reason": "the van was stolen"}, status=200)
            assert await idle.code() is grpc.StatusCode.UNAUTHENTICATED
            assert await watch.code() is grpc.StatusCode.UNAUTHENTICATED
            took_s = time.monotonic() - began
            again = stub.IdentifyStream(metadata=metadata)
            assert await again.code() is grpc.StatusCode.UNAUTHENTICATED
        print(f"cut off {took_s:.3f} s after the request to revoke")
        await made.post("/v1/tokens", token=issued["secret"], status=401)
        await made.post("/v1/identify", {}, token=token, status=401)
        audited = await made.service.running.service.log.audit(0, 1000)
        said = {one["action"]: one for one in audited}
        assert said["credential.issued"]["subject"] == issued["credential_id"]
        assert said["credential.revoked"]["detail"]["reason"] == "the van was stolen"


async def test_law_11_the_end_of_a_deployment_ends_its_streams(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        token = await made.token((await made.issue())["secret"])
        async with grpc.aio.insecure_channel(made.address) as channel:
            stub: Any = MatcherStub(channel)  # type: ignore[no-untyped-call]
            idle = stub.IdentifyStream(metadata=(("authorization", f"Bearer {token}"),))
            mine = stub.IdentifyStream(metadata=(("authorization", f"Bearer {made.service.running.token}"),))
            await idle.wait_for_connection()
            await mine.wait_for_connection()
            await made.service.running.service.change(EndDeployment("op"), TESTER)
            assert await idle.code() is grpc.StatusCode.NOT_FOUND  # Gone
            assert not mine.done()
        async with made.client(token) as van:
            with pytest.raises(Gone):
                await van.identify(probes())


async def test_rotation_leaves_no_gap_and_the_old_credential_ends_after_it(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        old = await made.issue(probes_per_s=7)
        new = await made.post(f"/v1/credentials/{old['credential_id']}/rotate", {"overlap_s": 3600})
        assert (new["replaces"], new["probes_per_s"]) == (old["credential_id"], 7)
        for secret in (old["secret"], new["secret"]):
            async with made.client(await made.token(secret)) as van:
                assert await van.identify(probes())
        last = await made.post(f"/v1/credentials/{new['credential_id']}/rotate", {})
        await made.post("/v1/tokens", token=new["secret"], status=401)
        assert await made.token(last["secret"])
        assert await made.token(old["secret"])


async def test_revocation_holds_after_a_restart(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        stays, ends = await made.issue(), await made.issue()
        token = await made.token(ends["secret"])
        await made.post(f"/v1/credentials/{ends['credential_id']}/revoke", {"reason": "a test"}, status=200)
    async with whole_service(tmp_path / "data") as service:
        url = f"http://127.0.0.1:{service.running.http_port}"
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            for text, status in ((stays["secret"], 201), (ends["secret"], 401)):
                answer = await http.post("/v1/tokens", headers={"Authorization": f"Bearer {text}"})
                assert answer.status_code == status
            refused = await http.post("/v1/identify", json={}, headers={"Authorization": f"Bearer {token}"})
            assert refused.json()["cause"] == "UNAUTHENTICATED"


async def test_a_message_that_is_sent_twice_is_accepted_once(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        token = await made.token((await made.issue())["secret"])
        request = pb.IdentifyRequest(
            space=pb.TemplateSpace(**SPACE._asdict()),
            dtype=pb.FLOAT32,
            templates=ROWS[0].tobytes(),
            probe_ids=["p"],
            captured_at_ms=[now_ms()],
            deployment_id="op",
        )
        async with grpc.aio.insecure_channel(made.address) as channel:
            stub: Any = MatcherStub(channel)  # type: ignore[no-untyped-call]
            stream = stub.IdentifyStream(metadata=(("authorization", f"Bearer {token}"),))

            async def cause(message: pb.IdentifyRequest) -> str:
                await stream.write(message)
                return str((await stream.read()).decisions[0].cause)

            assert await cause(request) == "INVALID"  # an edge node numbers what it sends
            request.stream_nonce, request.stream_sequence = secrets.token_bytes(16), 1
            assert [await cause(request) for _ in range(3)] == ["", "REPLAYED", "REPLAYED"]
            request.stream_sequence = 2
            assert await cause(request) == ""


async def test_a_probe_sent_again_after_a_break_is_one_alert(tmp_path: Path) -> None:
    """The same probe of the same stream, under another number on another connection, also after a restart."""
    at, nonce = now_ms(), secrets.token_bytes(16)

    async def ask(service: WholeService, number: int, row: int = 0) -> str:
        address = f"127.0.0.1:{service.running.grpc_port}"
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = MatcherStub(channel)  # type: ignore[no-untyped-call]
            reply = await stub.Identify(
                pb.IdentifyRequest(
                    space=pb.TemplateSpace(**SPACE._asdict()),
                    dtype=pb.FLOAT32,
                    templates=ROWS[row].tobytes(),
                    probe_ids=["p"],
                    captured_at_ms=[at],
                    deployment_id="op",
                    stream_nonce=nonce,
                    stream_sequence=number,
                ),
                metadata=(("authorization", f"Bearer {service.running.token}"),),
            )
        return str(reply.decisions[0].alert_id)

    async with world(tmp_path) as made:
        await made.service.enrol("custody", SPACE, ROWS[[2]], ["another"])
        first = await ask(made.service, 1)
        assert await ask(made.service, 2) == first
        assert await ask(made.service, 3, row=2) != first  # another finding is another alert
        assert len(await made.service.running.service.log.alerts("op", "", 10)) == 2
    async with whole_service(tmp_path / "data") as service:
        # The very message as well: what it says was recorded, and is so once.
        assert await ask(service, 1) == await ask(service, 4) == first
        assert len(await service.running.service.log.alerts("op", "", 10)) == 2


async def test_a_credential_sends_no_more_than_its_rate_and_is_told_when_to_come_again(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        token = await made.token((await made.issue(probes_per_s=1))["secret"])
        async with made.client(token) as van:
            rows = np.repeat(ROWS[[7]], 4, axis=0)
            await van.identify(probes(rows=rows))
            with pytest.raises(Overloaded) as refused:
                await van.identify(probes(rows=rows, deadline_s=0.5))
            assert 1000 < (refused.value.retry_after_ms or 0) <= 4000


async def test_scores_are_bands_unless_the_scope_says_otherwise(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        near = (0.82 * ROWS[[0]] + np.sqrt(1 - 0.82**2) * ROWS[[7]]).astype(np.float32)
        token = await made.token((await made.issue())["secret"])
        async with made.client(token) as van:

            async def watched() -> Any:
                async with made.client(token) as watcher, aclosing(watcher.watch_alerts()) as alerts:
                    return await anext(alerts)

            watch = asyncio.create_task(watched())
            streams_open = made.service.running.service.metrics.streams_open
            await until(lambda: streams_open._value.get() == 1)
            seen = (await van.identify(probes(rows=near))).decisions[0].candidates[0]
            assert (seen.score, seen.score_step) == (pytest.approx(0.8), pytest.approx(0.05))
            told = (await watch).candidates[0]
            assert (told.score, told.score_step) == (pytest.approx(0.8), pytest.approx(0.05))
            with pytest.raises(InvalidInput):
                await van.identify(probes(rows=near, threshold=0.812))
            assert (await van.identify(probes(rows=near, threshold=0.8))).decisions[0].outcome is Outcome.ALERT
        exact = (await made.service.client.identify(probes(rows=near))).decisions[0].candidates[0]
        assert (exact.score, exact.score_step) == (pytest.approx(0.82, abs=1e-3), 0.0)


async def test_a_climb_is_stopped_audited_and_counted(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        token = await made.token((await made.issue(probes_per_s=5000))["secret"])
        cosines = np.repeat(np.linspace(0.55, 0.95, 20), 16)
        rows = (cosines[:, None] * ROWS[[0]] + np.sqrt(1 - cosines[:, None] ** 2) * ROWS[[7]]).astype(np.float32)
        async with made.client(token) as van:
            refusals = []
            for at in range(0, len(rows), 16):
                try:
                    await van.identify(probes(rows=rows[at : at + 16]))
                except MatcherError as refusal:
                    refusals.append(refusal)
            assert refusals
            assert {one.cause for one in refusals} == {"COOLING_DOWN"}
            assert refusals[0].retry_after_ms
        log = made.service.running.service.log
        audited = [one for one in await log.audit(0, 2000) if one["action"] == "credential.cooling_down"]
        assert len(audited) == 1
        assert made.service.running.service.metrics.climbs._value.get() == 1
        # Others are answered as ever.
        assert (await made.service.client.identify(probes())).decisions[0].outcome is Outcome.ALERT


# --- mutual TLS --------------------------------------------------------------------------------------------


@dataclass
class Authority:
    """An authority of certificates, the service's own, and those of two vans."""

    ca: trustme.CA
    folder: Path

    def settings(self) -> dict[str, Any]:
        served = self.ca.issue_cert("127.0.0.1", "localhost")
        paths = {name: self.folder / f"{name}.pem" for name in ("ca", "key", "chain")}
        self.ca.cert_pem.write_to_path(paths["ca"])
        served.private_key_pem.write_to_path(paths["key"])
        for pem in served.cert_chain_pems:
            pem.write_to_path(paths["chain"])
        return {
            "tls_certificate_file": paths["chain"],
            "tls_key_file": paths["key"],
            "tls_client_ca_file": paths["ca"],
        }

    def tls(self, certificate: trustme.LeafCert | None) -> Tls:
        return Tls(
            root_certificates=self.ca.cert_pem.bytes(),
            certificate=certificate.cert_chain_pems[0].bytes() if certificate else None,
            key=certificate.private_key_pem.bytes() if certificate else None,
            server_name="localhost",
        )


def fingerprint(certificate: trustme.LeafCert) -> str:
    found = x509.load_pem_x509_certificate(certificate.cert_chain_pems[0].bytes())
    return f"sha256:{found.fingerprint(hashes.SHA256()).hex()}"


async def bind(service: WholeService, credential_id: str, certificate: str, deployment_id: str = "op") -> None:
    credential = EdgeCredential(
        credential_id, deployment_id, "tester", now_ms(), now_ms() + DAY_MS // 2, certificate=certificate
    )
    await service.running.service.change(IssueCredential(credential), TESTER)


@asynccontextmanager
async def mutual(tmp_path: Path) -> AsyncIterator[tuple[WholeService, Authority]]:
    authority = Authority(trustme.CA(), tmp_path)
    clerk = authority.ca.issue_cert("clerk.force.example")
    async with whole_service(
        tmp_path / "data", client_tls=authority.tls(clerk), server=authority.settings()
    ) as service:
        await service.space(8)
        await service.gallery("custody", SPACE)
        await service.enrol("custody", SPACE, ROWS[[0]], ["r"])
        await service.deployment("custody")
        yield service, authority


async def test_law_11_a_client_certificate_is_an_edge_nodes_identity_and_ends_with_its_credential(
    tmp_path: Path,
) -> None:
    async with mutual(tmp_path) as (service, authority):
        van, renewed = authority.ca.issue_cert("van-7.force.example"), authority.ca.issue_cert("van-7.force.example")
        address = f"127.0.0.1:{service.running.grpc_port}"

        async def asks(certificate: trustme.LeafCert | None, **wish: Any) -> Outcome:
            async with MatcherClient(address, "", tls=authority.tls(certificate), deadline_s=5.0) as client:
                return (await client.identify(probes(**wish))).decisions[0].outcome

        with pytest.raises(Unauthenticated, match="no edge credential is bound"):
            await asks(van)
        await bind(service, "by-fingerprint", fingerprint(van))
        assert await asks(van) is Outcome.ALERT
        with pytest.raises(Unauthenticated):
            await asks(renewed)
        await bind(service, "by-name", "san:van-7.force.example")
        assert await asks(renewed) is Outcome.ALERT
        stranger = trustme.CA().issue_cert("van-7.force.example")
        for certificate in (None, stranger):
            with pytest.raises(MatcherError):
                await asks(certificate, deadline_s=1.0)
        async with grpc.aio.secure_channel(
            address,
            grpc.ssl_channel_credentials(
                authority.ca.cert_pem.bytes(), van.private_key_pem.bytes(), van.cert_chain_pems[0].bytes()
            ),
            options=[("grpc.ssl_target_name_override", "localhost")],
        ) as channel:
            stub: Any = MatcherStub(channel)  # type: ignore[no-untyped-call]
            stream = stub.IdentifyStream()
            await stream.wait_for_connection()
            context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
            url = f"https://localhost:{service.running.http_port}"
            async with httpx.AsyncClient(base_url=url, verify=context, trust_env=False) as http:
                headers = {"Authorization": f"Bearer {service.running.token}"}
                for name in ("by-fingerprint", "by-name"):
                    body = {"reason": "the van was stolen"}
                    done = await http.post(f"/v1/credentials/{name}/revoke", json=body, headers=headers)
                    assert done.status_code == 200
            assert await stream.code() is grpc.StatusCode.UNAUTHENTICATED
        for certificate in (van, renewed):
            with pytest.raises(Unauthenticated, match="revoked"):
                await asks(certificate)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_beyond_loopback_reflection_is_told_to_who_has_a_credential(tmp_path: Path, host: str) -> None:
    authority = Authority(trustme.CA(), tmp_path)
    server = {**authority.settings(), "host": host}
    del server["tls_client_ca_file"]
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(
            whole_service(tmp_path / "data", client_tls=authority.tls(None), server=server)
        )
        async with grpc.aio.secure_channel(
            f"127.0.0.1:{service.running.grpc_port}",
            grpc.ssl_channel_credentials(authority.ca.cert_pem.bytes()),
            options=[("grpc.ssl_target_name_override", "localhost")],
        ) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            wish = reflection_pb2.ServerReflectionRequest(list_services="")

            async def listed(metadata: Any) -> list[str]:
                call = stub.ServerReflectionInfo(iter([wish]), metadata=metadata)
                reply = await call.read()
                call.cancel()
                return [one.name for one in reply.list_services_response.service]

            if host == "127.0.0.1":
                assert "matcher.v1.Matcher" in await listed(())
            else:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await listed(())
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "matcher.v1.Matcher" in await listed((("authorization", f"Bearer {service.running.token}"),))


async def test_conflict_is_what_a_replay_is_called() -> None:
    from matcher_service.client import error_for

    assert isinstance(error_for("REPLAYED", "x"), Conflict)
    assert isinstance(error_for("COOLING_DOWN", "x"), Overloaded)
