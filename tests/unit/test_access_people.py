"""Persons by their tokens: everything is pinned by settings, nothing by the token."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc.jwk import ECKey, OctKey, RSAKey

from matcher_service.access.key_sets import (
    KEY_SET_BYTES_MAX,
    REFRESH_S,
    RETRY_S,
    STALE_S,
    KeySet,
    from_file,
    from_url,
    parsed,
)
from matcher_service.access.people import People
from matcher_service.errors import ServiceFault, StartRefused, Unauthenticated
from matcher_service.settings import load
from matcher_service.terms import Actor, Cause, Scope
from tests.fake_clock import FakeClock
from tests.identity_provider import AUDIENCE, ISSUER, IdentityProvider

NOW_S = 1_800_000_000


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> IdentityProvider:
    return IdentityProvider(tmp_path_factory.mktemp("provider"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOW_S * 1000)


Read = Callable[..., Awaitable[Actor]]


@pytest.fixture
def read(provider: IdentityProvider, clock: FakeClock) -> Read:
    """Reads a token that is made with the given changes, or the one given."""

    async def reading(*roles: str, text: str = "", settings: dict[str, Any] | None = None, **changes: Any) -> Actor:
        access = load(access=provider.settings(**(settings or {}))).access
        people = People(access, KeySet(from_file(provider.file), clock))
        token = text or provider.token("p-17", *roles, now_s=NOW_S, **changes)
        return await people.read(token, clock.wall_ms())

    return reading


async def test_a_good_token_names_the_person_and_what_their_roles_stand_for(read: Read) -> None:
    actor = await read("operator", "auditor", galleries=("custody",))
    assert actor.name == "person-p-17"
    assert actor.person == "p-17"
    assert actor.scopes == {Scope.OPERATOR, Scope.AUDITOR}
    assert actor.galleries == {"custody"}
    assert actor.ends_at_ms == (NOW_S + 600 + 30) * 1000
    assert (await read("operator", kid="rsa-1", algorithm="RS256")).galleries is None


async def test_by_default_a_person_may_do_nothing(read: Read) -> None:
    actor = await read()
    assert actor.scopes == frozenset()
    unnamed = await read("somebody", "admin", "*", galleries=())
    assert unnamed.scopes == frozenset()
    assert unnamed.galleries == frozenset()


async def test_no_role_makes_a_person_an_edge_node_or_an_exchange(read: Read) -> None:
    assert (await read("edge", "token_exchange")).scopes == frozenset()


async def test_roles_are_mapped_where_the_provider_calls_them_otherwise(read: Read) -> None:
    settings = {
        "oidc_roles": {"LFR-Cmdr": ("authorising_officer", "operator"), "operator": ()},
        "oidc_roles_claim": "realm.roles",
    }
    actor = await read(settings=settings, realm={"roles": ["LFR-Cmdr", "operator"]})
    assert actor.scopes == {Scope.AUTHORISING_OFFICER, Scope.OPERATOR}
    assert (await read("operator", settings=settings)).scopes == frozenset()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"iss": "https://elsewhere.example"}, "another issuer"),
        ({"iss": None}, "another issuer"),
        ({"aud": "payroll"}, "another audience"),
        ({"aud": None}, "another audience"),
        ({"aud": {"matcher": 1}}, "another audience"),
        ({"exp": NOW_S - 31}, "expired"),
        ({"exp": None}, "must say"),
        ({"exp": "tomorrow"}, "must say"),
        ({"exp": True}, "must say"),
        ({"iat": None}, "must say"),
        ({"iat": NOW_S + 60, "exp": NOW_S + 120}, "not valid yet"),
        ({"nbf": NOW_S + 60}, "not valid yet"),
        ({"exp": NOW_S + 3601}, "lives longer"),
        ({"sub": None}, "no usable subject"),
        ({"sub": "a\nb"}, "no usable subject"),
        ({"sub": "a" * 121}, "no usable subject"),
        ({"kid": "ec-1", "header": {"kid": "gone"}}, "not one of the issuer's"),
    ],
    ids=lambda one: str(one)[:40],
)
async def test_a_token_with_one_fault_opens_nothing_and_says_why(read: Read, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(Unauthenticated, match=why) as refused:
        await read("operator", **changes)
    assert refused.value.hint


async def test_leeway_covers_a_clock_that_is_a_little_off_and_no_more(read: Read) -> None:
    assert await read("operator", exp=NOW_S - 29)
    assert await read("operator", iat=NOW_S + 29)
    assert await read("operator", aud=["payroll", AUDIENCE])
    with pytest.raises(Unauthenticated):
        await read("operator", exp=NOW_S - 29, settings={"oidc_leeway_s": 10.0})


def forged(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


CLAIMS = {"iss": ISSUER, "aud": AUDIENCE, "sub": "p", "iat": NOW_S, "exp": NOW_S + 60, "roles": ["auditor"]}


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "", None, "HS256", "PS256", "RS512", ["ES256"], 7])
async def test_a_token_chooses_no_algorithm_of_its_own(read: Read, alg: Any) -> None:
    for signature in (b"", b"x" * 64):
        with pytest.raises(Unauthenticated):
            await read(text=forged({"alg": alg, "kid": "ec-1"}, CLAIMS, signature))


async def test_a_public_key_is_no_secret_key(read: Read, provider: IdentityProvider) -> None:
    """The confusion of an HMAC under the text of a public key, in each form in which that key is known."""
    key = provider.keys["rsa-1"]
    public = key.raw_value.public_key() if hasattr(key.raw_value, "public_key") else key.raw_value
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for secret in (pem, pem.strip(), provider.file.read_bytes()):
        unsigned = forged({"alg": "HS256", "kid": "rsa-1"}, CLAIMS).removesuffix(".")
        signature = base64.urlsafe_b64encode(hmac.digest(secret, unsigned.encode(), "sha256")).rstrip(b"=").decode()
        with pytest.raises(Unauthenticated):
            await read(text=f"{unsigned}.{signature}")
    with pytest.raises(Unauthenticated, match="names no key"):
        await read(text=forged({"alg": "ES256", "kid": 7}, CLAIMS))


async def test_a_key_of_another_kind_than_the_algorithm_verifies_nothing(
    read: Read, provider: IdentityProvider
) -> None:
    with pytest.raises(Unauthenticated):
        await read("auditor", algorithm="RS256", kid="rsa-1", header={"kid": "ec-1"})
    stranger = ECKey.generate_key("P-256", auto_kid=False)
    with pytest.raises(Unauthenticated, match="signature"):
        await read("auditor", key=stranger)
    good = provider.token("p", "operator", now_s=NOW_S)
    head, payload, signature = good.split(".")
    other = provider.token("q", "auditor", now_s=NOW_S).split(".")[1]
    for text in (
        f"{head}.{other}.{signature}",
        f"{head}.{payload}.",
        f"{head}.{payload}",
        f"{head}..{signature}",
        "...",
        "a.b.c",
    ):
        with pytest.raises(Unauthenticated):
            await read(text=text)
    with pytest.raises(Unauthenticated, match="too long"):
        await read(text="a" * 20_000 + ".b.c")


# --- keys ------------------------------------------------------------------------------------------------


def public(kid: str, key: Any, **other: Any) -> dict[str, Any]:
    return {**key.as_dict(private=False), "kid": kid, **other}


async def test_a_rotated_key_is_found_and_a_withdrawn_one_forgotten(tmp_path: Path, clock: FakeClock) -> None:
    provider = IdentityProvider(tmp_path)
    keys = KeySet(from_file(provider.file), clock)
    assert await keys.key("ec-1")
    provider.add("ec-2", ECKey.generate_key("P-256", auto_kid=False))
    assert await keys.key("ec-2") is None  # asked for too soon after the last fetch
    clock.advance(RETRY_S)
    assert await keys.key("ec-2")
    del provider.keys["ec-1"]
    provider.publish()
    assert await keys.key("ec-1")
    clock.advance(REFRESH_S + 1)
    assert await keys.key("ec-1") is None


async def test_unknown_keys_cost_one_fetch_in_ten_seconds(clock: FakeClock) -> None:
    fetches = 0

    async def fetch() -> bytes:
        nonlocal fetches
        fetches += 1
        return b'{"keys": []}'

    keys = KeySet(fetch, clock)
    for number in range(50):
        assert await keys.key(f"k{number}") is None
    assert fetches == 1
    clock.advance(RETRY_S)
    await keys.key("k")
    assert fetches == 2


async def test_keys_outlive_a_short_failure_of_the_provider_and_not_a_long_one(clock: FakeClock) -> None:
    answers: list[bytes | Exception] = [json.dumps({"keys": [public("k", ECKey.generate_key("P-256"))]}).encode()]

    async def fetch() -> bytes:
        answer = answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    keys = KeySet(fetch, clock)
    assert await keys.key("k")
    answers[0] = httpx.ConnectError("gone")
    clock.advance(REFRESH_S + 1)
    assert await keys.key("k")
    clock.advance(STALE_S)
    with pytest.raises(ServiceFault) as refused:
        await keys.key("k")
    assert refused.value.cause is Cause.IDENTITY_UNAVAILABLE
    assert refused.value.retry_after_ms


async def test_before_a_first_fetch_succeeds_nobody_is_let_in(clock: FakeClock) -> None:
    async def fetch() -> bytes:
        return b"<html>"

    with pytest.raises(ServiceFault, match="cannot be read"):
        await KeySet(fetch, clock).key("k")


def test_secret_keys_and_keys_for_other_uses_verify_nothing() -> None:
    good = ECKey.generate_key("P-256")
    found = parsed(
        json.dumps(
            {
                "keys": [
                    public("good", good, use="sig"),
                    public("sealing", good, use="enc"),
                    {**OctKey.generate_key(256).as_dict(private=True), "kid": "secret"},
                    {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
                    {"kty": "EC", "crv": "P-256", "kid": "partial"},
                    {**good.as_dict(private=False), "kid": ""},
                    "text",
                ]
            }
        ).encode()
    )
    assert set(found) == {"good"}
    for data in (b"[]", b"{}", b'{"keys": {}}', b"nonsense", b" " * (KEY_SET_BYTES_MAX + 1)):
        with pytest.raises(ValueError):  # noqa: PT011
            parsed(data)


async def test_keys_are_fetched_from_an_address_within_bounds(clock: FakeClock) -> None:
    keys = json.dumps({"keys": [public("k", RSAKey.generate_key(2048))]}).encode()
    served = {b"/good": (b"200 OK", keys), b"/long": (b"200 OK", b" " * (KEY_SET_BYTES_MAX + 1))}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
        status, body = served.get(path, (b"302 Found\r\nLocation: /good", b""))
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        at = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert await KeySet(from_url(f"{at}/good"), clock).key("k")
        for path in ("long", "moved"):
            with pytest.raises(ServiceFault):
                await KeySet(from_url(f"{at}/{path}"), clock).key("k")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"oidc_audience": ""}, "oidc_audience"),
        ({"oidc_algorithms": ("HS256",)}, "oidc_algorithms"),
        ({"oidc_algorithms": ("none",)}, "oidc_algorithms"),
        ({"oidc_algorithms": ()}, "oidc_algorithms"),
        ({"oidc_jwks_file": None}, "oidc_jwks_file"),
        ({"oidc_jwks_url": "https://id.example/keys"}, "oidc_jwks_file"),
        ({"oidc_jwks_file": None, "oidc_jwks_url": "http://id.example/keys"}, "https"),
        ({"oidc_roles": {"cmdr": ("edge",)}}, "cmdr"),
        ({"oidc_roles": {"cmdr": ("root",)}}, "cmdr"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_settings_that_would_let_in_too_many_refuse_the_start(
    provider: IdentityProvider, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(StartRefused, match=why):
        load(access=provider.settings(**changes))
