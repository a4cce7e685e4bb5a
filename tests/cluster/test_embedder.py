"""The embedder on drawn faces: what it judges, the same in process and on Triton, at the edge and as a command."""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageFilter

from matcher_service import __main__ as program
from matcher_service.errors import ModelsUnavailable, Overloaded, StartRefused
from matcher_service.models.embedder.card import parse_card, read_card
from matcher_service.models.embedder.embed import FaceEmbedder, open_embedder
from matcher_service.models.embedder.outcome import Embedding, Form, Judgement, Pixels
from matcher_service.models.embedder.quality import CHIP_PX, sharpness
from matcher_service.models.embedder.worker import PICTURES_WAITING_MAX, WorkerEmbedder
from matcher_service.models.triton import TritonEmbedder
from matcher_service.template_files import open_template_file
from matcher_service.triton_endpoints import TritonAddress, TritonEndpoints
from tests.cluster.fixtures import weights_folder
from tests.cluster.served_triton import ServedTriton
from tests.drawn_face import drawn_face, empty_room, encoded
from tests.running_service import settings_for

pytestmark = pytest.mark.cluster

CARD = "dlib-resnet29"


@pytest.fixture(scope="module")
def embedder() -> FaceEmbedder:
    return open_embedder(CARD)


@asynccontextmanager
async def on_triton(served: ServedTriton) -> AsyncIterator[TritonEmbedder]:
    way = TritonEndpoints(TritonAddress((served.grpc_endpoint,), 20.0, 20.0))
    try:
        yield await TritonEmbedder.open(way, read_card(CARD))
    finally:
        await way.close()


def blurred(sigma: float) -> bytes:
    return encoded(np.asarray(Image.fromarray(drawn_face(1)).filter(ImageFilter.GaussianBlur(sigma))))


def claiming(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header claims so many pixels."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


ONE_FACE = encoded(drawn_face(1))
PHOTOGRAPHS = {
    "png": (ONE_FACE, Judgement.TEMPLATE),
    "jpeg": (encoded(drawn_face(2), "JPEG", quality=92), Judgement.TEMPLATE),
    "grey": (encoded(drawn_face(1).mean(axis=2).astype(np.uint8)), Judgement.TEMPLATE),
    "large": (encoded(drawn_face(3, width=1400)), Judgement.TEMPLATE),
    "room": (encoded(empty_room()), Judgement.NO_FACE),
    "two": (encoded(np.concatenate([drawn_face(1), drawn_face(2)], axis=1)), Judgement.SEVERAL_FACES),
    "blurred": (blurred(5), Judgement.TOO_BLURRED),
    "nothing": (b"", Judgement.UNREADABLE),
    "text": (b"this is no picture", Judgement.UNREADABLE),
    "cut short": (ONE_FACE[: len(ONE_FACE) // 2], Judgement.UNREADABLE),
    "bomb": (claiming(60_000, 60_000), Judgement.UNREADABLE),
    "gif": (encoded(drawn_face(1), "GIF"), Judgement.UNREADABLE),
}


def equal(one: Embedding, other: Embedding) -> bool:
    if (one.template is None) != (other.template is None):
        return False
    same = one.template is None or other.template is None or one.template.tobytes() == other.template.tobytes()
    measures = [(each.quality, each.face_width_px, each.sharpness) for each in (one, other)]
    return same and one.judgement is other.judgement and one.detail == other.detail and np.allclose(*measures)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_picture_gives_a_template_or_says_why_not(embedder: FaceEmbedder, name: str) -> None:
    """One usable face gives a raw template of the card's dimension; anything else its own judgement, in words."""
    picture, judgement = PHOTOGRAPHS[name]
    (found,) = embedder.embed([picture], Form.PHOTOGRAPH)
    assert found.judgement is judgement
    if judgement is Judgement.TEMPLATE:
        assert found.template is not None
        assert found.template.shape == (embedder.card.space.dimension,)
        assert found.template.dtype == np.float32
        assert 1.0 < np.linalg.norm(found.template) < 2.0
        assert 0 < found.quality <= 1
    else:
        assert found.template is None
        assert found.quality == 0
        assert found.detail


def test_a_small_face_is_refused_and_a_turned_photograph_is_set_upright(embedder: FaceEmbedder) -> None:
    """A crop below the card's width is TOO_SMALL; a camera held sideways (EXIF) changes nothing."""
    small, enough = (
        embedder.embed([encoded(drawn_face(1, width=width))], Form.CROP)[0] for width in (29, 40)
    )  # the picture is the face
    assert (small.judgement, enough.judgement) == (Judgement.TOO_SMALL, Judgement.TEMPLATE)
    upright = Image.fromarray(drawn_face(1))
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    import io

    file = io.BytesIO()
    sideways.save(file, "PNG", exif=exif)
    assert equal(*embedder.embed([encoded(np.asarray(upright)), file.getvalue()], Form.PHOTOGRAPH))


def test_quality_falls_with_blur_and_with_size(embedder: FaceEmbedder) -> None:
    """The same face has less quality the more it is blurred, and the smaller it is."""
    by_blur = [embedder.embed([blurred(sigma)], Form.PHOTOGRAPH)[0].quality for sigma in (0.01, 1, 2, 3, 5)]
    assert by_blur == sorted(by_blur, reverse=True)
    assert by_blur[0] > by_blur[2] > by_blur[-1] == 0
    by_width = [embedder.embed([encoded(drawn_face(1, width=width))], Form.CROP)[0].quality for width in (120, 50, 35)]
    assert by_width[0] > by_width[1] > by_width[2]


def test_a_face_without_any_change_has_no_sharpness() -> None:
    """An even grey does not divide by zero."""
    assert sharpness(np.full((CHIP_PX, CHIP_PX, 3), 128, np.uint8)) == 0.0


def test_a_template_does_not_depend_on_its_company_and_is_not_printed(embedder: FaceEmbedder) -> None:
    """Alone or among others the same bits; and no log that prints an answer holds a template."""
    pictures = [encoded(drawn_face(person)) for person in range(3)]
    together = embedder.embed(pictures, Form.PHOTOGRAPH)
    for picture, found in zip(pictures, together, strict=True):
        assert equal(found, embedder.embed([picture], Form.PHOTOGRAPH)[0])
        assert "array" not in repr(found)
        assert "template" not in repr(found)


async def test_the_embedder_on_triton_gives_the_bits_of_the_one_in_process(
    embedder: FaceEmbedder, served_models: ServedTriton
) -> None:
    """Every judgement, template, measure and word is the same; more pictures than fit one request, in their order."""
    pictures = [picture for picture, _ in PHOTOGRAPHS.values()] + [encoded(drawn_face(n, width=90)) for n in range(8)]
    async with on_triton(served_models) as hosted:
        for form in Form:
            found = await hosted.embed(pictures, form)
            assert len(found) == len(pictures)
            assert all(map(equal, found, embedder.embed(pictures, form)))


async def test_law_6_a_server_that_saw_pictures_logs_nothing_of_them(served_models: ServedTriton) -> None:
    """Law 6: neither bytes of a picture nor a judgement of one is in the server's log."""
    async with on_triton(served_models) as hosted:
        await hosted.embed([b"GIVEAWAY" * 40, encoded(drawn_face(5))], Form.PHOTOGRAPH)
    log = served_models.log_file.read_text(errors="replace")
    assert "GIVEAWAY" not in log
    assert not any(judgement.value in log for judgement in Judgement if judgement is not Judgement.TEMPLATE)


async def test_a_server_with_another_embedder_than_the_card_is_refused(served_models: ServedTriton) -> None:
    """Both sides must mean the same template space."""
    text = (Path(program.__file__).parent / "models/embedder/cards" / f"{CARD}.toml").read_text()
    other = parse_card(text.replace("version = 1", "version = 2", 1))
    way = TritonEndpoints(TritonAddress((served_models.grpc_endpoint,), 20.0, 20.0))
    with pytest.raises(StartRefused, match="dlib-resnet29/1/128"):
        await TritonEmbedder.open(way, other)
    await way.close()


async def test_templates_are_made_over_http(tmp_path: Path) -> None:
    """POST /v1/templates: right answers in the order of the pictures, as JSON and for a picture as it is, and every
    wrong request refused by name."""
    from matcher_service.bootstrap import running

    async with running(settings_for(tmp_path, embedder={"card": CARD})) as service:
        base = f"http://127.0.0.1:{service.http_port}"
        headers = {"Authorization": f"Bearer {service.token}"}
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as client:
            body = {"pictures": [base64.b64encode(one).decode() for one, _ in PHOTOGRAPHS.values()]}
            answer = (await client.post("/v1/templates", json=body)).json()
            judgements = [one["judgement"] for one in answer["templates"]]
            assert judgements == [judgement.value for _, judgement in PHOTOGRAPHS.values()]
            assert answer["space"] == {"name": CARD, "version": 1, "dimension": 128}
            first = np.frombuffer(base64.b64decode(answer["templates"][0]["template"]), "<f4")

            alone = await client.post("/v1/templates", content=ONE_FACE, headers={"Content-Type": "image/png"})
            (found,) = alone.json()["templates"]
            assert np.frombuffer(base64.b64decode(found["template"]), "<f4").tobytes() == first.tobytes()

            for wrong, status, cause in (
                ({"json": {"pictures": []}}, 400, "EMPTY"),
                ({"json": {"pictures": ["?"]}}, 400, "MALFORMED"),
                ({"json": {"pictures": ["AA=="] * 17}}, 413, "TOO_MANY"),
                ({"json": {"pictures": ["AA=="], "form": "profile"}}, 400, "INVALID"),
                ({"json": {"pictures": ["AA=="], "name": "x"}}, 400, "UNKNOWN_FIELD"),
                ({"content": b"x", "headers": {"Content-Type": "image/gif"}}, 415, "INVALID"),
            ):
                refused = await client.post("/v1/templates", **wrong)
                assert (refused.status_code, refused.json()["cause"]) == (status, cause)
            assert (await client.post("/v1/templates", headers={"Authorization": ""}, json=body)).status_code == 401


async def test_without_an_embedder_there_are_no_templates_to_be_had(tmp_path: Path) -> None:
    """A service that none is configured for says so; one whose card is incomplete does not start."""
    from matcher_service.bootstrap import running

    async with running(settings_for(tmp_path / "a")) as service, httpx.AsyncClient() as client:
        refused = await client.post(
            f"http://127.0.0.1:{service.http_port}/v1/templates",
            headers={"Authorization": f"Bearer {service.token}"},
            json={"pictures": ["AA=="]},
        )
        assert refused.status_code == 404
        assert "embedder.card" in refused.json()["hint"]
    (tmp_path / "card.toml").write_text("[model]\n")
    with pytest.raises(StartRefused, match="model card"):
        async with running(settings_for(tmp_path / "b", embedder={"card": str(tmp_path / "card.toml")})):
            pass


async def test_law_3_the_embedder_beside_the_service_takes_a_bounded_number_of_pictures() -> None:
    """Law 3: beyond the bound a request is refused at once, and what was admitted is answered. It computes in a process
    of its own, because dlib would hold up every stream of the service."""
    worker = await WorkerEmbedder.open(CARD)
    try:
        assert [one.name for one in multiprocessing.active_children()]
        admitted = asyncio.create_task(worker.embed([b""] * PICTURES_WAITING_MAX, Form.PHOTOGRAPH))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await worker.embed([b""], Form.PHOTOGRAPH)
        assert refused.value.retry_after_ms
        # A caller who leaves frees nothing before the work is done.
        admitted.cancel()
        await asyncio.wait([admitted])
        with pytest.raises(Overloaded):
            await worker.embed([b""] * PICTURES_WAITING_MAX, Form.PHOTOGRAPH)
        while True:
            try:
                assert len(await worker.embed([b""] * PICTURES_WAITING_MAX, Form.PHOTOGRAPH)) == PICTURES_WAITING_MAX
                break
            except Overloaded:
                await asyncio.sleep(0.01)
        assert len(await worker.embed([b""], Form.PHOTOGRAPH)) == 1
    finally:
        await worker.close()
    assert not multiprocessing.active_children()


async def test_an_embedder_whose_process_died_is_started_again() -> None:
    """Killed, it fails the requests that it held as ModelsUnavailable, and answers the next."""
    worker = await WorkerEmbedder.open(CARD)
    try:
        before = await worker.embed([ONE_FACE], Form.PHOTOGRAPH)
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(ModelsUnavailable) as refused:
            await worker.embed([ONE_FACE], Form.PHOTOGRAPH)
        assert refused.value.retryable
        assert equal(*before, *await worker.embed([ONE_FACE], Form.PHOTOGRAPH))
    finally:
        await worker.close()


def onnx_card(digest: str, dimension: int = 16) -> str:
    landmarks = read_card(CARD).file("landmarks")
    return f"""
[model]
space = "tiles"
version = 1
dimension = {dimension}
kind = "onnx"
origin = "one layer, made for this test"
licence = "that of this repository"
training_data = "none: random numbers"
intended_use = "none"
limits = "tells nobody from anybody"
[[files]]
role = "network"
name = "tiles.onnx"
sha256 = "{digest}"
[[files]]
role = "landmarks"
name = "{landmarks.name}"
sha256 = "{landmarks.sha256}"
[network]
size_px = 32
padding = 0.25
channels = "BGR"
layout = "NCHW"
mean = 127.5
deviation = 128.0
[refusal]
face_width_px_min = 30
face_width_px_good = 64
sharpness_min = 0.13
sharpness_good = 0.35
[[measured]]
data = "none"
score = "cosine"
rates = [{{ threshold = 0.5, false_match_rate = 1.0, false_non_match_rate = 0.0 }}]
"""


def test_an_onnx_network_plugs_in_through_a_card(embedder: FaceEmbedder, tmp_path: Path) -> None:
    """The network sees the chip in the size, order, layout and scale of its card, and gives what it computes.

    tiles.onnx averages 8 x 8 tiles of a 32-pixel chip and multiplies them by a matrix of random numbers (seed 1)."""
    import hashlib

    network = Path(__file__).with_name("tiles.onnx")
    (tmp_path / network.name).write_bytes(network.read_bytes())
    landmarks = read_card(CARD).file("landmarks").name
    (tmp_path / landmarks).symlink_to(weights_folder() / landmarks)
    card = tmp_path / "card.toml"
    digest = hashlib.sha256(network.read_bytes()).hexdigest()
    card.write_text(onnx_card(digest))
    (found,) = open_embedder(str(card), tmp_path).embed([ONE_FACE], Form.PHOTOGRAPH)
    pixels: Pixels = drawn_face(1)
    (box,) = embedder._faces.find(pixels)
    chip = (embedder._faces.chip(pixels, box, 32, 0.25)[:, :, ::-1].astype(np.float64) - 127.5) / 128
    tiles = chip.transpose(2, 0, 1).reshape(3, 4, 8, 4, 8).mean(axis=(2, 4)).reshape(-1)
    weights = np.random.default_rng(1).standard_normal((48, 16)).astype("f4")
    np.testing.assert_allclose(found.template, tiles @ weights, rtol=1e-4, atol=1e-4)

    card.write_text(onnx_card(digest, dimension=17))
    with pytest.raises(StartRefused) as wrong_dimension:
        open_embedder(str(card), tmp_path)
    assert wrong_dimension.value.field == "dimension"
    (tmp_path / network.name).write_bytes(b"no network")
    card.write_text(onnx_card(hashlib.sha256(b"no network").hexdigest()))
    with pytest.raises(StartRefused, match=r"cannot load tiles\.onnx as onnx"):
        open_embedder(str(card), tmp_path)


def test_what_cannot_run_here_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose runtime is not installed names the package."""
    import hashlib
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "tiles.onnx").write_bytes(b"x")
    landmarks = read_card(CARD).file("landmarks").name
    (tmp_path / landmarks).symlink_to(weights_folder() / landmarks)
    card = tmp_path / "card.toml"
    card.write_text(onnx_card(hashlib.sha256(b"x").hexdigest()).replace('"onnx"', '"torchscript"'))
    with pytest.raises(StartRefused) as refused:
        open_embedder(str(card), tmp_path)
    assert "pip install torch" in refused.value.hint


def test_matcher_embed_writes_what_matcher_import_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row per usable picture, subjects by subfolder; the others are told with their judgement, and it exits 1."""
    for name, picture in {
        "anna/1.png": ONE_FACE,
        "anna/2.jpg": encoded(drawn_face(1, shift=6), "JPEG", quality=95),
        "ben/1.png": encoded(drawn_face(2)),
        "room.png": encoded(empty_room()),
    }.items():
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / name).write_bytes(picture)
    (tmp_path / "faces" / "notes.txt").write_text("not a picture")
    out = tmp_path / "faces.npz"
    assert program.run(["embed", str(tmp_path / "faces"), str(out), "--json"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["templates"], report["left_out"]) == (3, 1)
    assert report["refusals"][0]["judgement"] == "NO_FACE"
    file = open_template_file(out)
    (block,) = file.blocks(100, 128, ("reference_id", "subject_id"), ())
    assert block.texts["reference_id"] == ["anna/1", "anna/2", "ben/1"]
    assert block.texts["subject_id"] == ["anna", "anna", "ben"]
    assert block.templates.shape == (3, 128)
    assert not block.faults
    assert program.run(["embed", str(tmp_path / "faces" / "ben"), str(out)]) == 0
    assert "Every picture gave a template." in capsys.readouterr().out
    assert program.run(["embed", str(tmp_path), str(out), "--card", str(tmp_path / "none.toml")]) == 1
    assert "model card" in capsys.readouterr().err
