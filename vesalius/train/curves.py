"""Learning curves read with care: power laws, where two cross, who is faster, when it overfits, what a budget buys.

Nothing here trains. Every answer that the data cannot give is None with the reason beside it.

Komatsuzaki 2019 (One Epoch Is All You Need), arXiv 1906.06669; Stanić et al. 2023 (Languini Kitchen), arXiv 2309.11197.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vesalius.errors import VesaliusError

Array = NDArray[np.float64]


def positive(what: str, *columns: ArrayLike, least: int = 1) -> list[Array]:
    """The columns as arrays, refused unless of equal length, finite and above 0."""
    arrays = [np.asarray(c, dtype=np.float64) for c in columns]
    if len({a.shape for a in arrays}) != 1 or arrays[0].ndim != 1:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise VesaliusError(f"{what} takes columns of equal length; got shapes {shapes}")
    if len(arrays[0]) < least:
        raise VesaliusError(f"{what} needs at least {least} points; got {len(arrays[0])}")
    if not all(np.isfinite(a).all() and (a > 0).all() for a in arrays):
        raise VesaliusError(f"{what} takes finite numbers above 0; leave out step 0 and diverged points")
    return arrays


# -- power laws -----------------------------------------------------------------------------------------------------


class PowerLaw(NamedTuple):
    """y = floor + scale x^-exponent.

    Attributes:
        r2: share of the variance of log y that is explained.
        noise: standard deviation of the residuals of log y.
        n: points fitted.
    """

    scale: float
    exponent: float
    floor: float
    r2: float
    noise: float
    n: int

    def __call__(self, x: ArrayLike) -> Array:
        """The law's value."""
        return np.asarray(self.floor + self.scale * np.asarray(x, dtype=np.float64) ** -self.exponent)


def fit_power_law(x: ArrayLike, y: ArrayLike, irreducible: bool = True) -> PowerLaw:
    """The power law nearest to the points, in relative error.

    Args:
        x: (point,) compute, steps or size, above 0.
        y: (point,) losses, above 0.
        irreducible: whether there is a floor that no x goes below; False fits a straight line in logarithms.

    Example:
        >>> law = fit_power_law([1, 10, 100, 1000], [2.5, 1.5, 1.1, 0.94], irreducible=False)
        >>> round(law.exponent, 2)
        0.14
    """
    x_, y_ = positive("a power-law fit", x, y, least=4 if irreducible else 3)
    if len(np.unique(x_)) < (3 if irreducible else 2):
        raise VesaliusError("a power-law fit needs different x; all points lie at one or two")
    log_x, log_y = np.log(x_), np.log(y_)
    if irreducible:
        scale, exponent, floor = _with_floor(log_x, log_y)
    else:
        slope, start = np.polyfit(log_x, log_y, 1)
        scale, exponent, floor = math.exp(start), -float(slope), 0.0
    residuals = log_y - np.log(floor + scale * x_**-exponent)
    left = float((residuals**2).sum())
    spread = float(((log_y - log_y.mean()) ** 2).sum())
    freedom = max(1, len(x_) - (3 if irreducible else 2))
    return PowerLaw(scale, exponent, floor, 1 - left / spread if spread else 0.0, math.sqrt(left / freedom), len(x_))


def _with_floor(log_x: Array, log_y: Array) -> tuple[float, float, float]:
    """Least squares of log y over (log scale at the middle x, log exponent, floor's share), from several starts."""
    from scipy.optimize import least_squares

    middle, low = float(log_x.mean()), float(np.exp(log_y).min())
    u = log_x - middle

    def unpack(p: Array) -> tuple[float, float, float]:
        share = 1 / (1 + math.exp(-min(50.0, max(-50.0, float(p[2])))))  # of the least y; noise may put it above
        return math.exp(float(p[0])), math.exp(float(p[1])), 1.1 * low * share

    def residual(p: Array) -> Array:
        scale, exponent, floor = unpack(p)
        return np.log(floor + scale * np.exp(-exponent * u)) - log_y

    best: Any = None
    for share in (0.01, 0.5, 0.8, 0.95):
        rest = np.log(np.maximum(np.exp(log_y) - share * low, 1e-3 * low))
        slope, start = np.polyfit(u, rest, 1)
        q = share / 1.1
        first = np.array([start, math.log(max(-float(slope), 1e-3)), math.log(q / (1 - q))])
        found = least_squares(residual, first, method="lm", max_nfev=2000)
        if best is None or found.cost < best.cost:
            best = found
    scale, exponent, floor = unpack(best.x)
    return scale * math.exp(exponent * middle), exponent, floor


class Crossing(NamedTuple):
    """Where two laws are equal.

    Attributes:
        x: the crossing; None where there is none to be had.
        low, high: its interval.
        reason: why there is none, or a warning ("" if all is well).
        extrapolated: whether it lies outside the measured range.
    """

    x: float | None
    low: float | None
    high: float | None
    reason: str
    extrapolated: bool


def crossing(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    *,
    irreducible: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    reach: float = 1e3,
    seed: int = 0,
) -> Crossing:
    """Where the power laws through two sets of points cross, with a parametric-bootstrap interval.

    Each draw adds noise of the residuals' size (itself drawn, as few points leave it uncertain) to the fitted laws and
    fits again. There is no crossing where the exponents cannot be told apart, or where too few draws cross.

    Args:
        first: (x, y) of one system.
        second: (x, y) of the other.
        irreducible: whether the laws have a floor; slower, take fewer draws.
        level: of the interval.
        draws: of the bootstrap.
        reach: how many times beyond the measured range a crossing is believed.
        seed: of the noise.
    """
    data = [positive("a crossing", *pair, least=4 if irreducible else 3) for pair in (first, second)]
    laws = [fit_power_law(x, y, irreducible) for x, y in data]
    low_x, high_x = min(d[0].min() for d in data), max(d[0].max() for d in data)
    span = (float(low_x) / reach, float(high_x) * reach)
    rng = np.random.default_rng(seed)
    noisy = []
    for (x, _), law in zip(data, laws, strict=True):
        freedom = max(1, law.n - (3 if irreducible else 2))
        sizes = law.noise * np.sqrt(freedom / rng.chisquare(freedom, (draws, 1)))
        noisy.append(np.log(law(x)) + sizes * rng.standard_normal((draws, law.n)))  # (draw, point) of log y
    tails = ((1 - level) / 2, (1 + level) / 2)
    if irreducible:
        pairs = [
            [fit_power_law(x, np.exp(row)) for (x, _), row in zip(data, rows, strict=True)]
            for rows in zip(*noisy, strict=True)
        ]
        found = [_root(a, b, *span) for a, b in pairs]
        centre = _root(laws[0], laws[1], *span)
        crossed = np.array([f for f in found if f is not None])
        if centre is None or len(crossed) < level * draws:
            share = len(crossed) / draws
            return Crossing(None, None, None, f"no crossing: {share:.0%} of the draws cross within {span}", False)
    else:
        lines = [_lines(np.log(x), rows) for (x, _), rows in zip(data, noisy, strict=True)]
        steeper = lines[0][0] - lines[1][0]  # (draw,) difference of slopes
        between = np.quantile(steeper, tails)
        if between[0] <= 0 <= between[1]:
            text = f"no crossing: exponents {laws[0].exponent:.4g} and {laws[1].exponent:.4g} cannot be told apart"
            return Crossing(None, None, None, text, False)
        with np.errstate(over="ignore"):
            crossed = np.exp((lines[1][1] - lines[0][1]) / steeper)
        gap = laws[0].exponent - laws[1].exponent
        exponent = math.log(laws[0].scale / laws[1].scale) / gap
        centre = math.exp(exponent) if abs(exponent) < 700 else math.inf
        if not span[0] <= centre <= span[1]:
            return Crossing(None, None, None, f"no crossing within {reach:g} times the measured range", False)
    low, high = (float(q) for q in np.quantile(crossed, tails))
    outside = not low_x <= centre <= high_x
    note = f"extrapolated: measured from {low_x:g} to {high_x:g}" if outside else ""
    return Crossing(centre, low, high, note, bool(outside))


def _lines(log_x: Array, log_y: Array) -> tuple[Array, Array]:
    """Slopes and intercepts (draw,) of straight lines through rows of (draw, point)."""
    centred = log_x - log_x.mean()
    slope = log_y @ centred / (centred @ centred)
    return slope, log_y.mean(axis=1) - slope * log_x.mean()


def _root(a: PowerLaw, b: PowerLaw, low: float, high: float) -> float | None:
    """The first x in the range at which two laws are equal."""
    from scipy.optimize import brentq

    def gap(log_x: float) -> float:
        return float(a(math.exp(log_x)) - b(math.exp(log_x)))

    grid = np.linspace(math.log(low), math.log(high), 400)
    signs = np.sign([gap(float(g)) for g in grid])
    at = np.nonzero(signs[1:] != signs[:-1])[0]
    return math.exp(float(brentq(gap, grid[at[0]], grid[at[0] + 1]))) if len(at) else None


# -- who is faster --------------------------------------------------------------------------------------------------

Curve = tuple[ArrayLike, ArrayLike]  # steps, losses


def steps_to(curve: Curve, loss: float) -> float | None:
    """The step at which a curve first comes down to a loss, between measured points in a straight line; None if never.

    Example:
        >>> steps_to(([0, 10, 20], [3.0, 2.0, 1.0]), 1.5)
        15.0
    """
    steps, losses = (np.asarray(c, dtype=np.float64) for c in curve)
    if steps.shape != losses.shape or not len(steps):
        raise VesaliusError(f"a curve needs as many losses as steps; got {losses.shape} and {steps.shape}")
    below = np.nonzero(losses <= loss)[0]
    if not len(below):
        return None
    i = int(below[0])
    if i == 0 or not np.isfinite(losses[i - 1]):
        return float(steps[i])
    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


class SpeedUp(NamedTuple):
    """How many times fewer steps one system takes to the same loss.

    Attributes:
        ratio: geometric mean over seeds; None where some run never gets there.
        low, high: its interval over seeds (Student's t of the logarithms).
        each: of every seed, in order; None where it is not reached.
        loss: the loss that was to be reached, of every seed.
        reason: why there is no ratio.
    """

    ratio: float | None
    low: float | None
    high: float | None
    each: tuple[float | None, ...]
    loss: tuple[float, ...]
    reason: str


def speed_up(
    baseline: Sequence[Curve], candidate: Sequence[Curve], loss: float | None = None, level: float = 0.95
) -> SpeedUp:
    """Steps of the baseline over steps of the candidate to the same loss, paired by seed.

    Args:
        baseline: a curve for each seed.
        candidate: likewise, the same seeds in the same order.
        loss: to be reached; by default each baseline run's last loss.
        level: of the interval.

    Raises:
        VesaliusError: for fewer than three seeds, or unequal numbers of them.
    """
    from scipy import stats

    if len(baseline) != len(candidate) or len(baseline) < 3:
        raise VesaliusError(f"a speed-up takes three seeds or more of each; got {len(baseline)} and {len(candidate)}")
    targets = [float(np.asarray(b[1], dtype=np.float64)[-1]) if loss is None else loss for b in baseline]
    each: list[float | None] = []
    for one, other, target in zip(baseline, candidate, targets, strict=True):
        a, b = steps_to(one, target), steps_to(other, target)
        each.append(a / b if a and b else None)
    known = [r for r in each if r is not None]
    if len(known) < len(each):
        reason = f"{len(each) - len(known)} of {len(each)} seeds do not reach the loss"
        return SpeedUp(None, None, None, tuple(each), tuple(targets), reason)
    logs = np.log(known)
    half = float(stats.t.ppf((1 + level) / 2, len(logs) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    middle = float(logs.mean())
    low, high = math.exp(middle - half), math.exp(middle + half)
    return SpeedUp(math.exp(middle), low, high, tuple(each), tuple(targets), "")


# -- overfitting ----------------------------------------------------------------------------------------------------


class Overfit(NamedTuple):
    """When held-out loss had turned: the step at which that was sure, and the best one before."""

    step: float
    best_step: float
    best: float
    rise: float


def overfitting(
    steps: ArrayLike, losses: ArrayLike, rise: float = 0.005, confirm: int = 2, noise: float = 5.0, window: int = 25
) -> Overfit | None:
    """The first evaluation at which a held-out curve has surely turned upwards; None if it never does.

    Uses only what was known at that evaluation, so that it can stop a run. Evaluate every 10 to 20 steps where a short
    run must be caught.

    Args:
        steps: (evaluation,).
        losses: (evaluation,) on held-out text.
        rise: least rise above the best loss, as a share of it.
        confirm: so many evaluations in a row must be above, none of them falling.
        noise: least rise in standard deviations of the noise, judged by third differences of the last evaluations. On
            planted curves 5 and a window of 25 gave no false alarm in 1200 runs with noise up to .02 nats.
        window: how many evaluations the noise is judged by.
    """
    s, y = (np.asarray(c, dtype=np.float64) for c in (steps, losses))
    if s.shape != y.shape or s.ndim != 1:
        raise VesaliusError(f"overfitting takes as many losses as steps; got {y.shape} and {s.shape}")
    for i in range(max(4, confirm), len(y)):
        best = int(np.nanargmin(y[: i + 1]))
        if i - best < confirm:
            continue
        recent = y[max(0, i + 1 - window) : i + 1]
        bends = np.abs(np.diff(recent, n=3))  # a smooth curve has none; noise of size 1 has sqrt(20)
        spread = float(np.median(bends)) / (0.6745 * math.sqrt(20)) if len(bends) else 0.0
        margin = max(rise * abs(float(y[best])), noise * spread)
        last = y[i + 1 - confirm : i + 1]
        if bool((last > y[best] + margin).all()) and bool((np.diff(y[i - confirm : i + 1]) >= 0).all()):
            return Overfit(float(s[i]), float(s[best]), float(y[best]), float(y[i] - y[best]))
    return None


# -- equal compute --------------------------------------------------------------------------------------------------

CLASSES_H = (6, 12, 24, 48, 96)  # hours on the reference accelerator
_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def compute_class(text: str | float) -> float:
    """Seconds of a compute class.

    Example:
        >>> compute_class("2min"), compute_class("6h"), compute_class("90")
        (120.0, 21600.0, 90.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or (match[2] or "s") not in _UNITS or float(match[1]) == 0:
        raise VesaliusError(f"'{text}' is no compute class; write 30s, 2min or 6h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def steps_for(tokens_per_second: float, seconds: float, tokens_per_step: int) -> int:
    """Steps that fit a compute class, to the nearest.

    Example:
        >>> steps_for(55_416, compute_class("6h"), 128 * 512)
        18265
    """
    if not (tokens_per_second > 0 and seconds > 0 and tokens_per_step > 0):
        given = f"{tokens_per_second} tokens/s, {seconds} s, {tokens_per_step} tokens a step"
        raise VesaliusError(f"a compute class takes numbers above 0; got {given}")
    return round(tokens_per_second * seconds / tokens_per_step)


class Throughput(NamedTuple):
    """Tokens a second over rounds: the median, the extremes, and how many rounds were kept."""

    median: float
    low: float
    high: float
    rounds: int


def throughput(tokens: Sequence[float], seconds: Sequence[float], warmup: int = 5) -> Throughput:
    """Median tokens a second, the first rounds left out (Languini: 5 and then 15)."""
    if len(tokens) != len(seconds) or len(tokens) <= warmup:
        raise VesaliusError(f"a throughput takes more than {warmup} rounds; got {len(tokens)} and {len(seconds)}")
    rates = [t / s for t, s in zip(tokens, seconds, strict=True)][warmup:]
    return Throughput(statistics.median(rates), min(rates), max(rates), len(rates))


def normalised_perplexity(total_nats: float, units: int) -> float:
    """exp(total loss / units), where units are bytes or characters (say which) of the same text for every tokenizer.

    Example:
        >>> round(normalised_perplexity(100 * math.log(256), 100), 6)
        256.0
    """
    if units <= 0:
        raise VesaliusError(f"a perplexity over {units} units: there is no text")
    return math.exp(total_nats / units)
