"""What a model hosted by Triton does with the requests of a batch; knows arrays and keys, not Triton.

A hosted model keeps no registry of its own: a server can be restarted, or be one of many. What a row is computed
with (a pair of template spaces, a score table) is a *record*, named by its *key*, the first bytes of its digest. A
row carries the key only. A model that does not know a key says so (UNKNOWN_KEY), and the caller sends the same rows
again with the record beside them. Since a key is made from the content, a record never goes stale.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from matcher_service.errors import DataDamaged, InvalidInput, MatcherError
from matcher_service.models.score_calibrator import check_table, false_match_rates
from matcher_service.models.template_adapter import adapt, check_space, map_between
from matcher_service.records import decode_space, encode_space
from matcher_service.terms import Float32, Float64, Int64, ScoreTable, SpaceId, TemplateSpace

UNKNOWN_KEY = "UNKNOWN_KEY"

# Names the computation whose input and result both sides know; warm-up requests use it, so that a model is not ready
# before values have passed through the server unharmed. No record has this key.
CHECK_KEY = 0
CHECK_DIMENSION = 64

# A record is a few kilobytes to some megabytes; a service uses a handful.
RECORDS_MAX = 64

Meaning = TypeVar("Meaning")
Values = TypeVar("Values", Float32, Float64)


class UnknownKey(MatcherError):
    """The model does not hold the record of a key; the caller sends it along."""


class ValuesHarmed(MatcherError):
    """Values do not arrive as they were sent: nothing that this process answers can be trusted."""


@dataclass(frozen=True)
class Rows(Generic[Values]):
    """The rows of one request: `values` [n, ...], `keys` int64 [n], and the records that were sent along."""

    values: Values
    keys: Int64
    records: tuple[bytes, ...] = ()


class Records(Generic[Meaning]):
    """Records by key, the most recently used ones."""

    def __init__(self, decode: Callable[[bytes], Meaning]) -> None:
        self._decode = decode
        self._held: OrderedDict[int, Meaning] = OrderedDict()

    def learn(self, record: bytes) -> None:
        """Hold what a record means. Raises InvalidInput or DataDamaged if it makes no sense."""
        self._held[key_of(record)] = self._decode(record)
        while len(self._held) > RECORDS_MAX:
            self._held.popitem(last=False)

    def __getitem__(self, key: int) -> Meaning:
        """Raises UnknownKey."""
        if key not in self._held:
            raise UnknownKey(f"{UNKNOWN_KEY} {key}", hint="send the record along")
        self._held.move_to_end(key)
        return self._held[key]


def key_of(record: bytes) -> int:
    """The key of a record: a signed 64-bit number that is not CHECK_KEY."""
    digest = hashlib.sha256(record).digest()
    return int.from_bytes(digest[:8], "little", signed=True) or 1


# --- template_adapter -------------------------------------------------------------------------------------


def adaptation_record(source: TemplateSpace, target: TemplateSpace) -> bytes:
    """What adapting from `source` to `target` needs. Raises InvalidInput (WRONG_SPACE) if there is no map."""
    maps = () if source.id == target.id else (map_between(source, target),)
    return (
        encode_space(TemplateSpace(source.id, source.centre))
        + b"\n"
        + encode_space(TemplateSpace(target.id, target.centre, maps))
    )


def decode_adaptation(record: bytes) -> tuple[TemplateSpace, TemplateSpace]:
    """(source, target); raises InvalidInput or DataDamaged if the record makes no sense."""
    source_text, _, target_text = record.partition(b"\n")
    source, target = decode_space(source_text), decode_space(target_text)
    check_space(source)
    check_space(target)
    return source, target


def adapt_batch(known: Records[tuple[TemplateSpace, TemplateSpace]], batch: Sequence[Rows[Float32]]) -> list[Any]:
    """For each request its adapted rows float32 [n, target dimension], or the MatcherError that refuses it."""

    def adapted(key: int, rows: Float32) -> Float32:
        if key == CHECK_KEY:
            check_values(rows)
            return adapt(rows, _CHECK_SPACE, _CHECK_SPACE)
        return adapt(rows, *known[key])

    return _answered(known, batch, adapted)


# --- score_calibrator -------------------------------------------------------------------------------------


def table_record(table: ScoreTable) -> bytes:
    return orjson.dumps({"scores": table.scores, "rates": table.rates})


def decode_table(record: bytes) -> ScoreTable:
    """Raises InvalidInput or DataDamaged if the record makes no sense."""
    try:
        found = orjson.loads(record)
        table = ScoreTable(tuple(found["scores"]), tuple(found["rates"]), "")
    except (KeyError, TypeError, ValueError) as error:
        raise DataDamaged(f"this is no score table: {error!r}") from error
    check_table(table)
    return table


def rates_batch(known: Records[ScoreTable], batch: Sequence[Rows[Float32]]) -> list[Any]:
    """For each request of scores float32 [n, 1] its false-match rates float64 [n, 1], or what refuses it."""

    def rates(key: int, rows: Float32) -> Float64:
        if key == CHECK_KEY:
            check_scores(rows)
            return false_match_rates(_CHECK_TABLE, rows)
        return false_match_rates(known[key], rows)

    return _answered(known, batch, rates)


def _answered(
    known: Records[Any], batch: Sequence[Rows[Float32]], compute: Callable[[int, Float32], NDArray[Any]]
) -> list[Any]:
    """Requests of one key are computed together; a refusal stays with the request that earned it.

    A row's result does not depend on its batch, so neither does an answer on the company of a request.
    """
    answers: list[Any] = [None] * len(batch)
    together: dict[int, list[int]] = {}
    for place, one in enumerate(batch):
        try:
            for record in one.records:
                known.learn(record)
            together.setdefault(_one_key(one.keys), []).append(place)
        except MatcherError as refusal:
            answers[place] = refusal
    for key, places in together.items():
        try:
            computed = compute(key, np.concatenate([batch[place].values for place in places]))
        except ValuesHarmed:
            raise
        except MatcherError as refusal:
            for place in places:
                answers[place] = refusal
            continue
        first = 0
        for place in places:
            answers[place] = computed[first : first + len(batch[place].values)]
            first += len(batch[place].values)
    return answers


def _one_key(keys: Int64) -> int:
    if len(keys) == 0 or (keys != keys.flat[0]).any():
        raise InvalidInput("the rows of a request name more than one key", field="KEY", hint="send one key per request")
    return int(keys.flat[0])


# --- proof that values arrive unharmed --------------------------------------------------------------------


def check_row() -> Float32:
    """The known row float32 [CHECK_DIMENSION]: no two values alike, all within [-1, 1].

    Made of operations that every machine rounds alike: a power would differ between processors by its last bit.
    """
    step = np.arange(1 - CHECK_DIMENSION, CHECK_DIMENSION, 2, dtype=np.float64) / (CHECK_DIMENSION - 1)
    return (step * step * step).astype(np.float32)


def check_values(rows: Float32) -> None:
    """Raises ValuesHarmed unless every row is the known one, bit for bit."""
    if rows.shape[1:] != (CHECK_DIMENSION,) or not (rows == check_row()).all():
        raise _harmed()


def check_scores(rows: Float32) -> None:
    """Raises ValuesHarmed unless every score is one of the known row. A warm-up request has a single row, so the order
    of many is proved by the client, which sends all of them."""
    if not np.isin(rows, check_row()).all():
        raise _harmed()


def check_exchange(tensor: Any) -> None:
    """Proves, before a model may become ready, that this Python backend and this numpy exchange values.

    `tensor` is the backend's Tensor class. A backend built against numpy 1 fills every tensor that it hands to numpy 2
    with its first element, sends empty ones back, and reports nothing. Raises ValuesHarmed.
    """
    sent = tensor("CHECK", check_row()[None])
    # Through DLPack, because a tensor made from an array hands back that very array, unread.
    check_values(tensor.from_dlpack("CHECK", sent.to_dlpack()).as_numpy())


def _harmed() -> ValuesHarmed:
    return ValuesHarmed(
        "tensors do not arrive as they were sent",
        hint=f"this Python backend needs another numpy than {np.__version__}: most need numpy below 2",
    )


_CHECK_SPACE = TemplateSpace(SpaceId("check", 1, CHECK_DIMENSION), np.full(CHECK_DIMENSION, 0.25, np.float32))
_CHECK_TABLE = ScoreTable((-1.0, 0.0, 1.0), (1.0, 0.5, 0.01), "")


def check_adapted() -> Float32:
    """What template_adapter answers to the known row, float32 [1, CHECK_DIMENSION]."""
    return adapt(check_row()[None], _CHECK_SPACE, _CHECK_SPACE)


def check_rates() -> Float64:
    """What score_calibrator answers to the known row as scores, float64 [CHECK_DIMENSION]."""
    return false_match_rates(_CHECK_TABLE, check_row())
