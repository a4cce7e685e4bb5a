"""Templates of people who do not exist, for tests that need more people than there are templates of.

A person is a direction drawn from a Gaussian whose covariance is that of the real people's mean templates, shrunk
towards the isotropic one by as much as makes the mean square of two people's score that of the real ones. A capture is
the person plus variation with the covariance seen within real people, scaled by the capture's own quality (log-normal),
so that the median and the lowest twentieth of genuine scores are the real ones. Groups lean towards a direction of
their own; hubs lean towards the middle of many.

What it does not do: tails of real impostor scores are heavier than any Gaussian's (relatives, look-alikes, duplicates
under two names), and a made-up group differs in one way only. A false-match rate measured on synthetic templates is
evidence about the generator, and about the software; never about people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import InvalidInput
from matcher_service.evaluation.labelled import LabelledSet
from matcher_service.terms import Float32, Float64

_FIT_PEOPLE = 1500
_SEED_OF_FIT = 7


class ScoreMoments(NamedTuple):
    """What is compared between real and synthetic scores."""

    impostor_mean: float
    impostor_std: float
    impostor_99: float
    impostor_999: float
    genuine_05: float
    genuine_median: float


@dataclass(frozen=True, slots=True)
class Generator:
    """`between`, `within` float64 [d, d]: square roots of the covariances of people and of captures of one person.
    `quality_spread`: standard deviation of the logarithm of a capture's variation. `centre` [d] and `length`: from unit
    rows back to raw templates."""

    between: Float64
    within: Float64
    quality_spread: float
    centre: Float64
    length: float
    shrinkage: float

    @property
    def dimension(self) -> int:
        return len(self.between)


@dataclass(frozen=True, slots=True)
class Wish:
    """How many people with how many captures each. `groups`: names; people are dealt to them in turn, and score on
    average `group_likeness` higher within their group. `hub_share` of people lean by `hub_lean` towards the middle."""

    people: int
    captures: int
    groups: tuple[str, ...] = ()
    group_likeness: float = 0.0
    hub_share: float = 0.0
    hub_lean: float = 0.3


def plain(dimension: int, genuine_median: float = 0.7) -> Generator:
    """Without real data: people in every direction alike, and variation that gives this median genuine score."""
    if dimension < 2 or not 0.0 < genuine_median < 1.0:
        raise InvalidInput("not a template space", field="dimension", hint="give 2 or more, and a median in (0, 1)")
    root = np.eye(dimension) / np.sqrt(dimension)
    spread = np.sqrt(1.0 / genuine_median - 1.0)
    return Generator(root, root * spread, 0.0, np.zeros(dimension), 1.0, 1.0)


def fit(units: Float32, subjects: NDArray[np.str_], centre: Float32, raw_length: float) -> Generator:
    """To unit rows [n, d] of real people, several captures each. Raises InvalidInput with fewer than 3 people, or
    nobody captured twice."""
    names, code = np.unique(subjects, return_inverse=True)
    counts = np.bincount(code)
    if len(names) < 3 or counts.max() < 2:
        raise InvalidInput(
            "too few people, or nobody captured twice", field="like", hint="give several captures of many people"
        )
    rows = units.astype(np.float64)
    dimension = rows.shape[1]
    means = np.zeros((len(names), dimension))
    np.add.at(means, code, rows)
    means /= counts[:, None]
    apart = rows - means[code]
    within = apart.T @ apart / (counts - 1).sum()
    between = means.T @ means / len(names) - within * (1.0 / counts).mean()
    values, vectors = np.linalg.eigh(between)
    values = np.maximum(values, 0.0)
    share = values / values.sum()
    real = moments(units, subjects)
    # tr(D^2) is the mean square of the score of two directions with covariance D, which is shrunk until it fits.
    kept = _shrink(share, real)
    shrunk = kept * share + (1.0 - kept) / dimension
    between_root = vectors * np.sqrt(shrunk)
    spectrum, axes = np.linalg.eigh(within / np.trace(within))
    within_root = axes * np.sqrt(np.maximum(spectrum, 0.0))
    scale, spread = _variation(between_root, within_root, real)
    return Generator(
        between_root, within_root * scale, spread, centre.astype(np.float64), raw_length, float(1.0 - kept)
    )


def _shrink(share: Float64, real: ScoreMoments) -> float:
    dimension = len(share)
    wanted = real.impostor_std**2 + real.impostor_mean**2 - 1.0 / dimension
    # Two captures are as alike as their people, times the genuine median.
    wanted /= max(real.genuine_median, 0.1) ** 2
    excess = float(np.square(share).sum()) - 1.0 / dimension
    return float(np.sqrt(np.clip(wanted / excess, 0.0, 1.0))) if excess > 0 else 0.0


def _variation(between: Float64, within: Float64, real: ScoreMoments) -> tuple[float, float]:
    """Scale and quality spread at which simulated genuine scores have the real median and lowest twentieth."""
    rng = np.random.default_rng(_SEED_OF_FIT)
    dimension = len(between)
    people = _unit(rng.standard_normal((_FIT_PEOPLE, dimension)) @ between.T)
    noise = rng.standard_normal((2, _FIT_PEOPLE, dimension)) @ within.T
    quality = rng.standard_normal((2, _FIT_PEOPLE, 1))

    def simulated(scale: float, spread: float) -> Float64:
        first, second = (_unit(people + noise[at] * scale * np.exp(spread * quality[at])) for at in (0, 1))
        return np.asarray(np.quantile((first * second).sum(axis=1), [0.05, 0.5]))

    def median_too_high(spread: float, scale: float) -> bool:
        return bool(simulated(scale, spread)[1] > real.genuine_median)

    def lowest_too_high(scale: float, spread: float) -> bool:
        return bool(simulated(scale, spread)[0] > real.genuine_05)

    scale, spread = 0.5, 0.0
    for _ in range(4):
        scale = _bisect(partial(median_too_high, spread), 1e-3, 8.0)
        spread = _bisect(partial(lowest_too_high, scale), 0.0, 2.0)
    return scale, spread


def _bisect(goes_on: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if goes_on(middle) else (low, middle)
    return (low + high) / 2


def generate(generator: Generator, wish: Wish, rng: np.random.Generator) -> LabelledSet:
    """Raw templates [people * captures, d], every row marked synthetic. Raises InvalidInput for a senseless wish."""
    if wish.people < 1 or wish.captures < 1 or not 0 <= wish.hub_share <= 1 or not 0 <= wish.group_likeness < 1:
        raise InvalidInput("nobody to make up", field="people", hint="give at least one, and shares between 0 and 1")
    people = _unit(rng.standard_normal((wish.people, generator.dimension)) @ generator.between.T)
    belongs = np.arange(wish.people) % max(len(wish.groups), 1)
    if wish.groups and wish.group_likeness:
        leanings = _unit(rng.standard_normal((len(wish.groups), generator.dimension)) @ generator.between.T)
        weight = np.sqrt(wish.group_likeness)
        people = _unit(np.sqrt(1.0 - weight**2) * people + weight * leanings[belongs])
    is_hub = rng.random(wish.people) < wish.hub_share
    middle = _unit(rng.standard_normal((1, generator.dimension)) @ generator.between.T)
    people[is_hub] = _unit((1.0 - wish.hub_lean) * people[is_hub] + wish.hub_lean * middle)
    owner = np.repeat(np.arange(wish.people), wish.captures)
    quality = np.exp(generator.quality_spread * rng.standard_normal((len(owner), 1)))
    noise = rng.standard_normal((len(owner), generator.dimension)) @ generator.within.T
    units = _unit(people[owner] + quality * noise)
    raw = generator.centre + generator.length * units
    names = np.asarray([f"synthetic-{number:07d}" for number in range(wish.people)])
    labels = np.asarray(wish.groups)[belongs] if wish.groups else np.full(wish.people, "")
    return LabelledSet(raw.astype(np.float32), names[owner], labels[owner], np.ones(len(owner), dtype=bool))


def moments(units: Float32, subjects: NDArray[np.str_], rows_max: int = 3000) -> ScoreMoments:
    """Of the pairs of at most `rows_max` rows. Raises InvalidInput without impostor and genuine pairs."""
    rows = units[:rows_max].astype(np.float64)
    names = subjects[:rows_max]
    scores = rows @ rows.T
    same = names[:, None] == names[None, :]
    once = np.triu(np.ones_like(same), 1)
    impostor, genuine = scores[~same & once], scores[same & once]
    if not len(impostor) or not len(genuine):
        raise InvalidInput("no pairs to measure", field="subjects", hint="give several captures of several people")
    high = np.quantile(impostor, [0.99, 0.999])
    low = np.quantile(genuine, [0.05, 0.5])
    return ScoreMoments(
        float(impostor.mean()), float(impostor.std()), float(high[0]), float(high[1]), float(low[0]), float(low[1])
    )


def _unit(rows: Float64) -> Float64:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))
