"""The generalised Pareto law of excesses over a high threshold: fit, survival, goodness of fit. Pure.

Survival S(z) = (1 + shape z / scale)^(-1 / shape) for z >= 0. A negative shape ends at -scale / shape, as scores must
that cannot exceed 1. Fitted by maximum likelihood along the profile of shape / scale (Grimshaw, Technometrics 35,
1993), for shapes of at least -0.5, where the likelihood is regular.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from matcher_service.terms import Float64

SHAPE_MIN = -0.5
_ROWS_AT_ONCE = 4_000_000
_GOLDEN = (np.sqrt(5.0) - 1.0) / 2.0
_NEARLY_ZERO = 1e-7

# Upper quantiles of the Anderson-Darling statistic when both parameters are fitted, by shape; 20,000 samples of 400
# each. `simulated_quantiles` makes them again; a test compares.
AD_LEVELS = (0.5, 0.25, 0.1, 0.05, 0.025, 0.01, 0.005)
AD_SHAPES = (-0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5)
AD_QUANTILES: tuple[tuple[float, ...], ...] = (
    (0.4845, 0.7190, 1.0327, 1.2868, 1.5522, 1.9289, 2.1884),
    (0.4448, 0.6522, 0.9276, 1.1323, 1.3437, 1.6537, 1.8701),
    (0.4289, 0.6276, 0.8920, 1.1093, 1.3221, 1.6377, 1.9102),
    (0.4168, 0.5998, 0.8514, 1.0354, 1.2534, 1.5353, 1.7424),
    (0.4077, 0.5823, 0.8211, 1.0070, 1.1861, 1.4650, 1.6927),
    (0.3956, 0.5648, 0.7970, 0.9716, 1.1736, 1.4279, 1.6076),
    (0.3847, 0.5481, 0.7612, 0.9223, 1.1011, 1.3548, 1.5494),
    (0.3753, 0.5357, 0.7461, 0.9112, 1.0662, 1.2751, 1.4266),
    (0.3584, 0.5009, 0.6864, 0.8241, 0.9823, 1.1848, 1.3495),
)


class Pareto(NamedTuple):
    shape: float
    scale: float


def fit(excesses: Float64) -> tuple[Float64, Float64]:
    """Shapes and scales [...] of samples of positive excesses [..., n]."""
    mean = excesses.mean(axis=-1)
    scaled = excesses / mean[..., None]
    highest = scaled.max(axis=-1)
    # theta = shape / scale; the grid is fine where the likelihood bends, near the least that the highest allows.
    steps = np.linspace(0.0, 1.0, 40)
    lowest = -(1.0 - 1e-9) / highest
    grid = np.concatenate(
        [lowest[..., None] * (1.0 - steps) ** 1.5, np.broadcast_to(4.0 * steps[1:] ** 2, (*mean.shape, 39))], axis=-1
    )
    heights = np.stack([_profile(scaled, grid[..., at]) for at in range(grid.shape[-1])], axis=-1)
    best = np.clip(heights.argmax(axis=-1), 1, grid.shape[-1] - 2)[..., None]
    low = np.take_along_axis(grid, best - 1, -1)[..., 0]
    high = np.take_along_axis(grid, best + 1, -1)[..., 0]
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    left_height, right_height = _profile(scaled, left), _profile(scaled, right)
    for _ in range(32):
        keep_left = left_height >= right_height
        low, high = np.where(keep_left, low, left), np.where(keep_left, right, high)
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        left_height, right_height = _profile(scaled, left), _profile(scaled, right)
    theta = (low + high) / 2.0
    theta = np.where(np.abs(theta) < _NEARLY_ZERO, _NEARLY_ZERO, theta)
    shape = np.maximum(np.log1p(theta[..., None] * scaled).mean(axis=-1), SHAPE_MIN)
    scale = np.where(shape > SHAPE_MIN, shape / theta, np.maximum(-shape * highest * (1 + 1e-9), shape / theta))
    return np.asarray(shape), np.asarray(scale * mean)


def _profile(scaled: Float64, theta: Float64) -> Float64:
    """Mean log-likelihood at the best scale for each theta [...]."""
    theta = np.where(np.abs(theta) < _NEARLY_ZERO, _NEARLY_ZERO, theta)
    shape = np.log1p(theta[..., None] * scaled).mean(axis=-1)
    height = -np.log(shape / theta) - shape - 1.0
    return np.asarray(np.where(shape >= SHAPE_MIN, height, -1e30 + shape))


def log_survival(excess: Float64, shape: Float64 | float, scale: Float64 | float) -> Float64:
    """log S; -inf beyond the end of the law."""
    shape = np.where(np.abs(shape) < _NEARLY_ZERO, _NEARLY_ZERO, shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.maximum(shape * excess / scale, -1.0)
        return np.asarray(-np.log1p(inside) / shape)


def log_likelihood(excesses: Float64, shapes: Float64, scales: Float64) -> Float64:
    """Sum over excesses [n] for each pair of parameters [m]; -inf where an excess is impossible."""
    shapes = np.where(np.abs(shapes) < _NEARLY_ZERO, _NEARLY_ZERO, shapes)
    result = np.empty(len(shapes))
    step = max(1, _ROWS_AT_ONCE // max(len(excesses), 1))
    for start in range(0, len(shapes), step):
        shape, scale = shapes[start : start + step], scales[start : start + step]
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = 1.0 + (shape / scale)[:, None] * excesses
            logs = np.log(np.maximum(inside, 0.0)).sum(axis=1)
            height = -len(excesses) * np.log(scale) - (1.0 / shape + 1.0) * logs
        result[start : start + step] = np.where((inside > 0).all(axis=1), height, -np.inf)
    return result


def information(law: Pareto) -> Float64:
    """Expected Fisher information [2, 2] of one excess about (shape, scale)."""
    shape, scale = max(law.shape, SHAPE_MIN + 0.02), law.scale
    both = (1.0 + shape) * (1.0 + 2.0 * shape)
    return np.array(
        [[2.0 / both, 1.0 / (scale * both)], [1.0 / (scale * both), 1.0 / (scale**2 * (1.0 + 2.0 * shape))]]
    )


def scores(excesses: Float64, law: Pareto) -> Float64:
    """Gradient [n, 2] of each excess's log-likelihood in (shape, scale)."""
    shape, scale = _regular(law)
    inside = scale + shape * excesses
    by_shape = np.log(inside / scale) / shape**2 - (1.0 / shape + 1.0) * excesses / inside
    by_scale = -1.0 / scale + (1.0 + shape) * excesses / (scale * inside)
    return np.stack([by_shape, by_scale], axis=-1)


def log_survival_gradient(excess: Float64, law: Pareto) -> Float64:
    """Gradient [n, 2] of log S in (shape, scale)."""
    shape, scale = _regular(law)
    inside = scale + shape * excess
    return np.stack([np.log(inside / scale) / shape**2 - excess / (shape * inside), excess / (scale * inside)], axis=-1)


def _regular(law: Pareto) -> Pareto:
    # Differences of nearly equal terms lose all digits for tiny shapes.
    return Pareto(law.shape if abs(law.shape) > 1e-4 else 1e-4, law.scale)


def anderson_darling(excesses: Float64, shape: Float64, scale: Float64) -> Float64:
    """The statistic [...] of samples [..., n] against laws [...]."""
    count = excesses.shape[-1]
    log_upper = log_survival(np.sort(excesses, axis=-1), shape[..., None], scale[..., None])
    log_upper = np.clip(log_upper, -700.0, -1e-15)
    log_lower = np.log(-np.expm1(log_upper))
    weights = (2.0 * np.arange(1, count + 1) - 1.0) / count
    return np.asarray(-count - (weights * (log_lower + log_upper[..., ::-1])).sum(axis=-1))


def goodness_of_fit(excesses: Float64, law: Pareto) -> float:
    """The p-value of the Anderson-Darling test with fitted parameters (after Choulakian and Stephens, Technometrics
    43, 2001), between 0.001 and 1."""
    statistic = float(anderson_darling(excesses, np.asarray(law.shape), np.asarray(law.scale)))
    table = np.asarray(AD_QUANTILES)
    row = np.array([np.interp(law.shape, AD_SHAPES, table[:, at]) for at in range(len(AD_LEVELS))])
    levels = np.log(AD_LEVELS)
    if statistic <= row[0]:
        return float(1.0 - 0.5 * statistic / row[0])
    if statistic > row[-1]:
        slope = (levels[-1] - levels[-2]) / (row[-1] - row[-2])
        return float(max(0.001, np.exp(levels[-1] + slope * (statistic - row[-1]))))
    return float(np.exp(np.interp(statistic, row, levels)))


def draw(law: Pareto, shape_of_sample: tuple[int, ...], rng: np.random.Generator) -> Float64:
    """Samples of the law."""
    uniform = rng.exponential(size=shape_of_sample)
    if abs(law.shape) < _NEARLY_ZERO:
        return np.asarray(law.scale * uniform)
    return np.asarray(law.scale * np.expm1(law.shape * uniform) / law.shape)


def simulated_quantiles(shape: float, samples: int, count: int, rng: np.random.Generator) -> Float64:
    """Upper quantiles, at AD_LEVELS, of the statistic of `samples` samples of `count` excesses, refitted each."""
    found = []
    for start in range(0, samples, 1000):
        drawn = draw(Pareto(shape, 1.0), (min(1000, samples - start), count), rng)
        found.append(anderson_darling(drawn, *fit(drawn)))
    return np.asarray(np.quantile(np.concatenate(found), 1.0 - np.asarray(AD_LEVELS)))
