"""The models as Triton hosts them: the cluster's implementation of the Models seam, and the embedder's.

What the arguments of a call deserve is judged here, before anything is sent, with the same code as in process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import ModelsUnavailable, Overloaded, StartRefused, TooLarge
from matcher_service.models import hosted, hosted_pictures
from matcher_service.models.embedder.card import ModelCard
from matcher_service.models.embedder.outcome import Embedding, Form
from matcher_service.models.spaces import Spaces
from matcher_service.models.template_adapter import check_templates
from matcher_service.terms import Float32, Float64, SpaceId, TemplateSpace
from matcher_service.triton_endpoints import Asking, ModelRefused, TritonEndpoints, Unreached, bytes_column

# max_batch_size of the models in triton_models/.
TEMPLATES_MAX = 1024
SCORES_MAX = 8192

# Pictures are slow to look at, and large: how long a call may take, and how many may be on their way at once.
PICTURES_S_MAX = 10.0
PICTURES_WAITING_MAX = 256
PICTURE_BYTES_MAX = 32 << 20


class TritonModels:
    """template_adapter and score_calibrator. Made by `open`; the endpoints stay the caller's to close."""

    def __init__(self, endpoints: TritonEndpoints) -> None:
        self._endpoints = endpoints
        self._spaces = Spaces()
        self._adaptations: dict[tuple[SpaceId, SpaceId], bytes] = {}

    @classmethod
    async def open(cls, endpoints: TritonEndpoints, *, one_is_enough: bool = False) -> TritonModels:
        """Prove with known values that every endpoint computes and hands over what it should. A server whose Python
        backend and numpy do not fit together answers everybody wrongly, without knowing it.

        Raises ModelsUnavailable if an endpoint does not answer (with `one_is_enough`: if none does, so that a gateway
        starts while a server is down), StartRefused if one answers wrongly.
        """
        row = hosted.check_row()[None]
        silent: list[ModelsUnavailable] = []
        around = endpoints.each(endpoints.deadline())
        for asking in around:
            try:
                adapted = await _known(asking, "template_adapter", "TEMPLATES", row, "ADAPTED")
                rates = await _known(asking, "score_calibrator", "SCORE", row.T, "RATE")
            except ModelsUnavailable as error:
                silent.append(error)
                if not one_is_enough or len(silent) == len(around):
                    raise
                continue
            _prove(asking, "template_adapter", adapted, hosted.check_adapted())
            _prove(asking, "score_calibrator", rates, hosted.check_rates()[:, None])
        return cls(endpoints)

    async def register(self, space: TemplateSpace) -> None:
        """As `Spaces.register`. Servers are sent what they need of it when they first need it."""
        self._spaces.register(space)
        self._adaptations.clear()

    async def adapt(self, source: SpaceId, target: SpaceId, templates: Float32) -> Float32:
        """As the Models seam says; ModelsUnavailable if no endpoint answers in time."""
        from_space, to_space = self._spaces.get(source), self._spaces.get(target)
        record = self._adaptations.get((source, target))
        if record is None:
            record = self._adaptations[source, target] = hosted.adaptation_record(from_space, to_space)
        check_templates(templates, from_space)
        adapted = np.empty((len(templates), target.dimension), dtype=np.float32)
        await self._in_parts("template_adapter", "TEMPLATES", "ADAPTED", templates, record, TEMPLATES_MAX, adapted)
        return adapted

    async def false_match_rates(self, space: SpaceId, scores: Float32) -> Float64:
        """As the Models seam says; ModelsUnavailable if no endpoint answers in time."""
        table = self._spaces.get(space).score_table
        if table is None:
            return np.full(len(scores), np.nan)
        column = np.asarray(scores, dtype=np.float32)[:, None]
        rates = np.empty((len(scores), 1))
        record = hosted.table_record(table)
        await self._in_parts("score_calibrator", "SCORE", "RATE", column, record, SCORES_MAX, rates)
        return rates[:, 0]

    async def _in_parts(
        self,
        model: str,
        tensor: str,
        output: str,
        values: Float32,
        record: bytes,
        rows_max: int,
        into: NDArray[Any],
    ) -> None:
        """Fill `into` with the model's answer to `values`, row by row, in requests of at most `rows_max` rows."""
        until = self._endpoints.deadline()
        key = hosted.key_of(record)
        for first in range(0, len(values), rows_max):
            part = values[first : first + rows_max]
            wanted = into[first : first + rows_max]

            async def call(asking: Asking, part: Float32 = part, wanted: NDArray[Any] = wanted) -> None:
                wanted[:] = await _computed(asking, model, tensor, output, part, key, record, wanted)

            await self._endpoints.ask(model, call, until)


async def _computed(
    asking: Asking,
    model: str,
    tensor: str,
    output: str,
    values: Float32,
    key: int,
    record: bytes,
    like: NDArray[Any],
) -> NDArray[Any]:
    """The model's answer to rows; its record goes along only if the server does not hold it."""
    inputs: dict[str, NDArray[Any]] = {tensor: values, "KEY": np.full((len(values), 1), key, dtype=np.int64)}
    try:
        (answer,) = await asking(model, inputs, [output])
    except ModelRefused as refused:
        if hosted.UNKNOWN_KEY not in refused.message:
            raise
        records = bytes_column([record] + [b""] * (len(values) - 1))
        (answer,) = await asking(model, {**inputs, "RECORD": records}, [output])
    if answer.shape != like.shape or answer.dtype != like.dtype:
        raise ModelRefused(f"{answer.dtype} {answer.shape} in answer to {len(values)} rows; another release?")
    return answer


async def _known(asking: Asking, model: str, tensor: str, values: Float32, output: str) -> NDArray[Any]:
    keys = np.full((len(values), 1), hosted.CHECK_KEY, dtype=np.int64)
    return (await _first_answer(asking, model, {tensor: values, "KEY": keys}, [output]))[0]


async def _first_answer(
    asking: Asking, model: str, inputs: dict[str, NDArray[Any]], outputs: list[str]
) -> list[NDArray[Any]]:
    try:
        return await asking(model, inputs, outputs)
    except Unreached as error:
        raise ModelsUnavailable(
            f"{model} at {asking.endpoint} does not answer: {error}",
            hint="start the Triton server, or wait until it is ready",
            retry_after_ms=1000,
        ) from error
    except ModelRefused as error:
        raise StartRefused(
            f"{model} at {asking.endpoint} refuses known values: {error.message}",
            hint="it needs the models of this release, and numpy below 2 beside its Python backend",
        ) from error


def _prove(asking: Asking, model: str, answer: NDArray[Any], expected: NDArray[Any]) -> None:
    if answer.shape != expected.shape or not np.allclose(answer, expected, rtol=1e-6, atol=0):
        raise StartRefused(
            f"{model} at {asking.endpoint} answers wrong values",
            hint="its Python backend and its numpy do not fit together: install numpy below 2 there",
        )


class TritonEmbedder:
    """face_embedder, as the protocol `TemplateMaker` says. Made by `open`."""

    def __init__(self, endpoints: TritonEndpoints, card: ModelCard) -> None:
        self._endpoints = endpoints
        self._card = card
        self._waiting = 0

    @classmethod
    async def open(cls, endpoints: TritonEndpoints, card: ModelCard) -> TritonEmbedder:
        """Prove that every endpoint hands over known values, and that its embedder is the one of the card.

        Raises ModelsUnavailable if an endpoint does not answer, StartRefused if it answers wrongly.
        """
        expected = hosted_pictures.check_embedding(card.space.dimension)
        inputs = _picture_tensors([hosted_pictures.CHECK_PICTURE], Form.PHOTOGRAPH)
        for asking in endpoints.each(endpoints.deadline()):
            answer = await _first_answer(asking, "face_embedder", inputs, list(hosted_pictures.TENSORS))
            space = answer[-1].flat[0].decode()
            if space != hosted_pictures.space_text(card.space):
                raise StartRefused(
                    f"face_embedder at {asking.endpoint} makes templates of {space}, the model card is of {card.space}",
                    field="card",
                    hint="give both the same model card",
                )
            (found,) = hosted_pictures.embeddings(*answer[:-1])
            assert expected.template is not None
            given = np.zeros(0) if found.template is None else found.template
            _prove(asking, "face_embedder", given, expected.template)
        return cls(endpoints, card)

    @property
    def card(self) -> ModelCard:
        return self._card

    async def embed(self, pictures: Sequence[bytes], form: Form) -> list[Embedding]:
        """As `TemplateMaker.embed`. Raises TooLarge for a picture beyond PICTURE_BYTES_MAX."""
        if self._waiting + len(pictures) > PICTURES_WAITING_MAX:
            raise Overloaded(
                f"{self._waiting} pictures wait already", hint="send fewer pictures at a time", retry_after_ms=1000
            )
        self._waiting += len(pictures)
        try:
            return await self._embedded(pictures, form)
        finally:
            self._waiting -= len(pictures)

    async def _embedded(self, pictures: Sequence[bytes], form: Form) -> list[Embedding]:
        until = self._endpoints.deadline(PICTURES_S_MAX)
        found: list[Embedding] = []
        for part in _parts(pictures):
            inputs = _picture_tensors(part, form)

            async def call(asking: Asking, inputs: dict[str, NDArray[Any]] = inputs) -> list[Embedding]:
                answer = await asking("face_embedder", inputs, list(hosted_pictures.TENSORS))
                try:
                    return hosted_pictures.embeddings(*answer[:-1])
                except (ValueError, IndexError) as error:
                    raise ModelRefused(f"the answer makes no sense: {error}") from error

            found += await self._endpoints.ask("face_embedder", call, until, PICTURES_S_MAX)
        return found

    async def close(self) -> None:
        """Nothing: the endpoints are closed by whoever opened them."""


def _picture_tensors(pictures: Sequence[bytes], form: Form) -> dict[str, NDArray[Any]]:
    return {"PICTURE": bytes_column(pictures), "CROP": np.full((len(pictures), 1), form is Form.CROP)}


def _parts(pictures: Sequence[bytes]) -> list[list[bytes]]:
    """The pictures in order, in requests that are neither too many nor too large."""
    parts: list[list[bytes]] = []
    size = 0
    for number, picture in enumerate(pictures):
        if len(picture) > PICTURE_BYTES_MAX:
            raise TooLarge(
                f"picture {number} has {len(picture):,} bytes",
                field="pictures",
                hint=f"send at most {PICTURE_BYTES_MAX:,}",
            )
        if not parts or len(parts[-1]) == hosted_pictures.PICTURES_MAX or size + len(picture) > PICTURE_BYTES_MAX:
            parts.append([])
            size = 0
        parts[-1].append(picture)
        size += len(picture)
    return parts
