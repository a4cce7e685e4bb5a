"""Laws of model cards: no card, no embedder."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from matcher_service.errors import StartRefused
from matcher_service.models.embedder.card import BUILT_IN, ModelCard, find_files, parse_card, read_card

TEXT = (files("matcher_service.models.embedder") / "cards" / "dlib-resnet29.toml").read_text("utf-8")


def test_every_built_in_card_is_complete_and_its_prose_is_in_the_documents() -> None:
    """A built-in embedder states its origin, licence, data, limits and measured errors, in the card and for readers."""
    prose = (Path(__file__).resolve().parents[2] / "docs" / "MODELS.md").read_text("utf-8")
    for name in BUILT_IN:
        card = read_card(name)
        assert card.space.name == name
        assert all(card.statements.values())
        assert f"`{name}`" in prose
        for one in card.files:
            assert one.name in prose
            assert one.sha256 in prose
        for rate in card.measured[0].rates:
            assert f"{rate.threshold:.2f}" in prose


def test_the_built_in_embedder_never_uses_the_68_point_landmarks() -> None:
    """Their training set excludes commercial use: the card names the five-point model and no other."""
    assert [one.name for one in read_card("dlib-resnet29").files if "landmarks" in one.name] == [
        "shape_predictor_5_face_landmarks.dat"
    ]


@pytest.mark.parametrize("field", ["origin", "licence", "training_data", "intended_use", "limits"])
def test_a_card_that_leaves_something_unsaid_is_refused(field: str) -> None:
    """Each statement is required, and an empty one is none."""
    statement = re.compile(rf'^{field} = """.*?"""$', re.MULTILINE | re.DOTALL)
    assert statement.search(TEXT)
    for text in (statement.sub("", TEXT), statement.sub(f'{field} = " "', TEXT)):
        with pytest.raises(StartRefused) as refused:
            parse_card(text)
        assert refused.value.field == field


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ('kind = "magic"', 'kind = "dlib"'),
        ("version = 0", "version = 1"),
        ("dimension = 1", "dimension = 128"),
        ('name = "../weights.dat"', 'name = "dlib_face_recognition_resnet_model_v1.dat"'),
        ('sha256 = "55"', f'sha256 = "{read_card("dlib-resnet29").files[0].sha256}"'),
        ('channels = "GRB"', 'channels = "RGB"'),
        ("deviation = 0.0", "deviation = 1.0"),
        ("face_width_px_good = 20", "face_width_px_good = 64"),
        ("sharpness_min = 0", "sharpness_min = 0.13"),
        ('data = ""', re.search(r'data = "ORL[^"]*"', TEXT)[0]),  # type: ignore[index]
        ("false_match_rate = 1.5", "false_match_rate = 0.0"),
        ("[[nothing]]", "[[measured]]"),
        ("rates = []\nother = [", "rates = ["),
        ("[model", "[model]"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(wrong: str, right: str) -> None:
    """A kind that does not exist, a picture that cannot be made, an error rate that is none, and no rates at all."""
    assert right in TEXT
    with pytest.raises(StartRefused):
        parse_card(TEXT.replace(right, wrong, 1))


def test_without_a_card_there_is_no_embedder(tmp_path: Path) -> None:
    """Neither no name, nor a file that is missing, opens anything."""
    for missing in ("", str(tmp_path / "card.toml")):
        with pytest.raises(StartRefused, match="card"):
            read_card(missing)


def test_another_file_than_the_one_measured_is_refused(tmp_path: Path) -> None:
    """A card vouches for its very files: another content, or a file that is missing, is told by name."""
    card: ModelCard = read_card("dlib-resnet29")
    with pytest.raises(StartRefused, match="cannot read"):
        find_files(card, tmp_path)
    for one in card.files:
        (tmp_path / one.name).write_bytes(b"something else")
    with pytest.raises(StartRefused, match="not the file that the model card describes"):
        find_files(card, tmp_path)
