"""Model cards: where an embedder comes from, under which terms, and how often it errs. No card, no embedder.

A card is a TOML file beside or instead of which nothing else configures an embedder; docs/MODELS.md explains its
fields. Whoever compares faces with a model has to be able to say these things about it.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from matcher_service.errors import StartRefused
from matcher_service.terms import SpaceId

BUILT_IN = ("dlib-resnet29",)
KINDS = ("dlib", "onnx", "torchscript")

# What a card must say in words.
_STATEMENTS = ("origin", "licence", "training_data", "intended_use", "limits")


@dataclass(frozen=True, slots=True)
class CardFile:
    """A file of the model: what it is for, its name, and the SHA-256 of its contents."""

    role: str
    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Network:
    """How a face is shown to an ONNX or TorchScript network: a square chip of `size_px`, the face with `padding` of
    its width around it, pixels (value - mean) / deviation in `channels` order and `layout`."""

    size_px: int
    padding: float
    channels: str
    layout: str
    mean: float
    deviation: float


@dataclass(frozen=True, slots=True)
class Rate:
    """One measured operating point: at `threshold`, so many non-mates (FMR) and mates (FNMR) were judged wrongly."""

    threshold: float
    false_match_rate: float
    false_non_match_rate: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Error rates as measured on named data; `score` says what the threshold is compared with."""

    data: str
    score: str
    rates: tuple[Rate, ...]
    notes: str


@dataclass(frozen=True, slots=True)
class ModelCard:
    """All that is stated of an embedder. `statements` holds the required texts by name."""

    space: SpaceId
    kind: str
    files: tuple[CardFile, ...]
    network: Network
    face_width_px_min: float
    face_width_px_good: float
    sharpness_min: float
    sharpness_good: float
    statements: Mapping[str, str]
    measured: tuple[Measured, ...]

    def file(self, role: str) -> CardFile:
        """Raises StartRefused if the card names no file for this role."""
        for one in self.files:
            if one.role == role:
                return one
        raise StartRefused(f"the model card of {self.space} names no file for {role}", field="files", hint=_HINT)


_HINT = "docs/MODELS.md says what a model card holds"


def read_card(name_or_path: str) -> ModelCard:
    """The built-in card of that name, else the card in that file. Raises StartRefused if there is none, or if it does
    not say all that a card must say."""
    if not name_or_path:
        raise StartRefused("an embedder without a model card is not loaded", field="card", hint=_HINT)
    if name_or_path in BUILT_IN:
        text = (files("matcher_service.models.embedder") / "cards" / f"{name_or_path}.toml").read_text("utf-8")
    else:
        try:
            text = Path(name_or_path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StartRefused(
                f"cannot read the model card {name_or_path}: {error}",
                field="card",
                hint=f"name a card file, or one of {', '.join(BUILT_IN)}; an embedder without a card is not loaded",
            ) from error
    return parse_card(text)


def parse_card(text: str) -> ModelCard:
    """Raises StartRefused, naming the field, unless the text is a complete card."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StartRefused(f"the model card is not TOML: {error}", field="card", hint=_HINT) from error
    try:
        card = _card(found)
    except KeyError as missing:
        raise StartRefused(
            f"the model card does not state {missing.args[0]}", field=str(missing.args[0]), hint=_HINT
        ) from missing
    except (TypeError, ValueError) as error:
        raise StartRefused(f"the model card makes no sense: {error}", field="card", hint=_HINT) from error
    _check(card)
    return card


def find_files(card: ModelCard, folder: Path) -> dict[str, Path]:
    """The card's files by role, each with the contents that the card is about.

    Raises StartRefused for one that is missing or has other contents: error rates were measured on this model, and
    say nothing of another.
    """
    found = {}
    for one in card.files:
        path = folder / one.name
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StartRefused(
                f"cannot read {path}: {error.strerror}",
                field="files",
                hint="install the extra `embedder`, or name the folder with the files of the card",
            ) from error
        if digest != one.sha256:
            raise StartRefused(
                f"{path} is not the file that the model card describes (SHA-256 {digest[:16]}…)",
                field="files",
                hint="get the file named in the card, or write a card for this one",
            )
        found[one.role] = path
    return found


def _card(found: Mapping[str, Any]) -> ModelCard:
    model, network, refusal = found["model"], found["network"], found["refusal"]
    return ModelCard(
        space=SpaceId(str(model["space"]), int(model["version"]), int(model["dimension"])),
        kind=str(model["kind"]),
        files=tuple(CardFile(str(one["role"]), str(one["name"]), str(one["sha256"])) for one in found["files"]),
        network=Network(
            size_px=int(network["size_px"]),
            padding=float(network["padding"]),
            channels=str(network["channels"]),
            layout=str(network["layout"]),
            mean=float(network["mean"]),
            deviation=float(network["deviation"]),
        ),
        face_width_px_min=float(refusal["face_width_px_min"]),
        face_width_px_good=float(refusal["face_width_px_good"]),
        sharpness_min=float(refusal["sharpness_min"]),
        sharpness_good=float(refusal["sharpness_good"]),
        statements={name: str(model[name]).strip() for name in _STATEMENTS},
        measured=tuple(_measured(one) for one in found["measured"]),
    )


def _measured(found: Mapping[str, Any]) -> Measured:
    return Measured(
        data=str(found["data"]).strip(),
        score=str(found["score"]).strip(),
        rates=tuple(
            Rate(float(one["threshold"]), float(one["false_match_rate"]), float(one["false_non_match_rate"]))
            for one in found["rates"]
        ),
        notes=str(found.get("notes", "")).strip(),
    )


def _check(card: ModelCard) -> None:
    def refuse(field: str, what: str) -> StartRefused:
        return StartRefused(f"the model card {what}", field=field, hint=_HINT)

    for name, text in card.statements.items():
        if not text:
            raise refuse(name, f"leaves {name} empty")
    if card.kind not in KINDS:
        raise refuse("kind", f"names the kind {card.kind!r}; there are {', '.join(KINDS)}")
    if not card.space.name or card.space.version < 1 or card.space.dimension < 2:
        raise refuse("space", f"names no template space: {card.space}")
    if not card.files or any(len(one.sha256) != 64 for one in card.files):
        raise refuse("files", "must name every file with its SHA-256")
    if any(Path(one.name).name != one.name for one in card.files):
        raise refuse("files", "names a file by its path; name it alone, its folder is a setting")
    if not card.measured or any(not one.rates or not one.data or not one.score for one in card.measured):
        raise refuse("measured", "states no measured error rates with the data that they were measured on")
    if not all(0 <= rate <= 1 for one in card.measured for each in one.rates for rate in _rates(each)):
        raise refuse("measured", "states an error rate that is none")
    network = card.network
    if network.size_px < 16 or network.padding < 0 or network.deviation <= 0:
        raise refuse("network", "describes a picture that cannot be made")
    if network.channels not in ("RGB", "BGR") or network.layout not in ("NCHW", "NHWC"):
        raise refuse("network", "must say channels RGB or BGR, and layout NCHW or NHWC")
    if not 0 < card.face_width_px_min <= card.face_width_px_good:
        raise refuse("refusal", "must have 0 < face_width_px_min <= face_width_px_good")
    if not 0 < card.sharpness_min <= card.sharpness_good:
        raise refuse("refusal", "must have 0 < sharpness_min <= sharpness_good")


def _rates(one: Rate) -> tuple[float, float]:
    return one.false_match_rate, one.false_non_match_rate
