"""What wraps the keys of galleries: a key service instead of a file, away or back, and the change between them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from matcher_service.errors import DataDamaged, LogUnavailable, StartRefused
from matcher_service.gallery.keys import Keyring
from matcher_service.index import manifest as manifests
from matcher_service.index.manifest import GalleryFiles
from matcher_service.settings import KeySettings, load
from tests.key_service import ServedKeys, served_keys
from tests.running_service import WholeService, whole_service

DIMENSION = 8
FACES = np.random.default_rng(5).normal(size=(6, DIMENSION)).astype(np.float32)
NAMES = [f"r{row}" for row in range(6)]


@pytest.fixture
def key_service(tmp_path: Path) -> Iterator[ServedKeys]:
    with served_keys(tmp_path) as served:
        yield served


def key_files(data_dir: Path) -> dict[str, bytes]:
    """The wrapped keys, and the master key if there is one. That which signs the tokens of edge nodes is not
    wrapped."""
    files = (data_dir / "keys").rglob("*.key")
    return {one.name: one.read_bytes() for one in files if one.name != "edge-token.key"}


def files_with(content: bytes, folder: Path) -> list[Path]:
    return [one for one in folder.rglob("*") if one.is_file() and content in one.read_bytes()]


async def stocked(service: WholeService, gallery_id: str = "custody") -> None:
    space = await service.space(DIMENSION)
    await service.gallery(gallery_id, space)
    await service.enrol(gallery_id, space, FACES, NAMES)
    await service.deployment(gallery_id)


async def found(service: WholeService) -> set[str]:
    """Who is found when everybody enrolled is searched for."""
    space = next(iter(service.running.service.catalogue.galleries.values())).space
    answers = await service.ask(space, FACES)
    return {candidate.reference_id for one in answers.values() for candidate in one.decision.candidates}


async def ask(service: WholeService, method: str, path: str, status: int, **params: str) -> Any:
    base = f"http://127.0.0.1:{service.running.http_port}/v1/"
    headers = {"Authorization": f"Bearer {service.running.token}"}
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as http:
        answer = await http.request(method, path, params=params)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_a_key_service_wraps_every_key_and_may_be_away_while_keys_are_in_use(
    tmp_path: Path, key_service: ServedKeys
) -> None:
    data_dir = tmp_path / "data"
    async with whole_service(data_dir, keys=key_service.settings) as service:
        await stocked(service)
        kept = key_files(data_dir)
        assert "master.key" not in kept
        assert all(content.startswith(b"\x02\x07servicevault:v1:") for content in kept.values())

        key_service.stop()
        # What is in use goes on, what needs a new key is refused and says why.
        assert await found(service) == set(NAMES)
        space = service.running.service.catalogue.galleries["custody"].space
        await service.enrol("custody", space, -FACES[:1], ["late"])
        with pytest.raises(LogUnavailable, match="key service"):
            await service.gallery("other", space)
        refused = await ask(service, "POST", "galleries/custody/key", 503, reason="a test")
        assert refused["cause"] == "LOG_UNAVAILABLE"
        assert "key service" in refused["detail"]
        assert (await ask(service, "GET", "keys", 200))["keys"] == []

        key_service.start()
        await service.gallery("other", space)

    key_service.stop()
    with pytest.raises(StartRefused, match="key service") as refusal:
        async with whole_service(data_dir, keys=key_service.settings):
            pytest.fail("started without its keys")
    assert "keys.service_url" in refusal.value.hint
    key_service.start()
    async with whole_service(data_dir, keys=key_service.settings) as service:
        assert await found(service) == set(NAMES)


async def test_keys_go_from_a_file_to_a_service_and_back(tmp_path: Path, key_service: ServedKeys) -> None:
    data_dir = tmp_path / "data"
    async with whole_service(data_dir) as service:
        await stocked(service)
    master = (data_dir / "keys" / "master.key").read_bytes()
    async with whole_service(data_dir, keys=key_service.settings) as service:
        assert await found(service) == set(NAMES)
        done = await ask(service, "POST", "keys/rewrap", 200)
        # The gallery's, the system's, and that which signs the audit.
        assert done == {"keys": 3, "by": "service", "left": 0}
        assert files_with(master, tmp_path) == []
        records = (await ask(service, "GET", "audit", 200, limit="1000"))["records"]
        assert [one["facts"] for one in records if one["action"] == "keys.rewrapped"] == [done]
        # When the key is rotated there, wrapping anew takes up its newest version.
        key_service.rotate()
        await ask(service, "POST", "keys/rewrap", 200)
        assert all(b"vault:v2:" in content for content in key_files(data_dir).values())
    async with whole_service(data_dir, keys=key_service.settings | {"wrapped_by": "file"}) as service:
        assert (await ask(service, "POST", "keys/rewrap", 200))["by"].startswith("file:")
    key_service.stop()
    async with whole_service(data_dir) as service:
        assert await found(service) == set(NAMES)


def test_a_service_that_answers_nonsense_or_refuses_is_told_from_damage(
    tmp_path: Path, key_service: ServedKeys
) -> None:
    settings = KeySettings(**key_service.settings)
    keyring = Keyring.open(tmp_path / "keys", settings)
    keyring.prepare(fresh=True)
    keyring.create("a")
    (path,) = (tmp_path / "keys" / "galleries").glob("*.key")
    kept = path.read_bytes()
    key_service.token_file.write_text("another")
    with pytest.raises(StartRefused, match="status 403"):
        Keyring.open(tmp_path / "keys", settings)
    key_service.token_file.unlink()
    with pytest.raises(LogUnavailable, match=r"transit\.token"):
        keyring.create("b")
    key_service.token_file.write_text("s.token-of-the-matcher")
    for damage in (kept[:-4] + b"AAA=", kept[:20], (tmp_path / "keys" / "system.key").read_bytes()):
        path.write_bytes(damage)
        with pytest.raises(DataDamaged, match="authentication"):
            Keyring.open(tmp_path / "keys", settings).key("a")
    path.write_bytes(kept)
    assert Keyring.open(tmp_path / "keys", settings).key("a") == keyring.key("a")
    # Without the settings that name it, the start says what is missing.
    unaware = Keyring.open(tmp_path / "keys")
    with pytest.raises(StartRefused, match=r"keys\.service_url"):
        unaware.prepare(fresh=False)


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"wrapped_by": "service"}, "service_url is not set"),
        ({"service_url": "http://vault.example:8200/v1/transit"}, "must be https"),
        ({"service_url": "ftp://127.0.0.1/v1"}, "must be https"),
        ({"service_answers_within_s": 60}, "less than or equal to 4"),
        ({"service_key": "a/b"}, "pattern"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, Any], wrong: str) -> None:
    with pytest.raises(StartRefused, match=wrong):
        load(keys=keys)


def galleries_in_files(data_dir: Path) -> Mapping[str, GalleryFiles]:
    """The index's files of each gallery; none while there is no manifest."""
    try:
        return manifests.decode((data_dir / "index" / manifests.NAME).read_bytes()).galleries
    except FileNotFoundError:
        return {}


async def test_a_gallerys_key_is_rotated_in_tables_and_files_while_it_is_searched(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with whole_service(data_dir, storage={"erase_within_h": 4 / 3600}) as service:
        await stocked(service)
        space = service.running.service.catalogue.galleries["custody"].space
        # The first manifest may be of a moment before the gallery was created.
        async with asyncio.timeout(60):
            while "custody" not in await asyncio.to_thread(galleries_in_files, data_dir):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        begun = await ask(service, "POST", "galleries/custody/key", 202, reason="a test", backups_too="true")
        assert begun["generation"] == 2
        async with asyncio.timeout(60):
            searches = 0
            while True:
                assert await found(service) == set(NAMES)
                (told,) = (await ask(service, "GET", "keys", 200))["keys"]
                if told["retired_at_ms"] is not None:
                    break
                searches += 1
                await service.enrol("custody", space, -FACES[:1], [f"more{searches}"])
                await asyncio.sleep(0.05)
        assert told["resealed"] >= len(NAMES)
        assert len(list((data_dir / "keys" / "galleries").glob("*.2.key"))) == 1
        # The old key is destroyed once it stands in the tables that it is retired, a moment later.
        async with asyncio.timeout(10):
            while len(list((data_dir / "keys" / "galleries").glob("*.key"))) != 1:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        files = galleries_in_files(data_dir)["custody"]
        assert {one.generation for one in (files.state, *files.segments)} == {2}
    async with whole_service(data_dir) as service:
        assert await found(service) == set(NAMES)
