"""Curve tools against planted laws, planted crossings, planted surfaces, and the published step counts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vesalius.errors import VesaliusError
from vesalius.train.curves import (
    compute_class,
    crossing,
    fit_power_law,
    normalised_perplexity,
    overfitting,
    speed_up,
    steps_for,
    steps_to,
    throughput,
)
from vesalius.train.planner import Surface, fit_surface, plan


def noisy(y: np.ndarray, share: float, seed: int) -> np.ndarray:
    return y * np.exp(share * np.random.default_rng(seed).standard_normal(y.shape))


@pytest.mark.parametrize("exponent", [0.1, 0.35, 0.7])
def test_a_planted_exponent_is_recovered(exponent: float) -> None:
    x = np.geomspace(1e2, 1e6, 300)
    for seed in range(5):
        pure = fit_power_law(x, noisy(8 * x**-exponent, 0.01, seed), irreducible=False)
        assert pure.exponent == pytest.approx(exponent, rel=0.02) and pure.noise == pytest.approx(0.01, rel=0.15)
    truth = 2.0 + 8 * (x / 1e2) ** -exponent
    exact = fit_power_law(x, truth)
    assert exact.exponent == pytest.approx(exponent, rel=1e-4) and exact.floor == pytest.approx(2.0, rel=1e-3)
    assert exact.r2 == pytest.approx(1.0) and np.allclose(exact(x), truth, rtol=1e-5)


def test_an_exponent_above_a_floor_is_recovered() -> None:
    x = np.geomspace(1e1, 1e6, 2000)
    found = [fit_power_law(x, noisy(0.5 + 8 * x**-0.4, 0.01, seed)) for seed in range(5)]
    assert all(f.exponent == pytest.approx(0.4, rel=0.02) for f in found), found
    assert all(f.floor == pytest.approx(0.5, rel=0.02) for f in found)
    assert all(f.r2 > 0.98 for f in found)


def test_a_law_without_a_floor_gets_none() -> None:
    x = np.geomspace(1, 1e5, 60)
    assert fit_power_law(x, 3 * x**-0.2).floor < 1e-3


def laws(seed: int, share: float = 0.005) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """a C^-b of exponents .05 and .12 that meet at 50,000."""
    x = np.repeat(np.geomspace(1e3, 2e5, 8), 3)
    slow, fast = 30 * x**-0.05, 30 * 50_000 ** (0.12 - 0.05) * x**-0.12
    return (x, noisy(slow, share, 2 * seed)), (x, noisy(fast, share, 2 * seed + 1))


def test_a_planted_crossing_is_recovered_and_covered() -> None:
    found = [crossing(*laws(seed), draws=400, seed=seed) for seed in range(100)]
    assert all(f.x is not None for f in found)
    inside = sum(f.low <= 50_000 <= f.high for f in found)  # type: ignore[operator]
    near = sum(abs(f.x / 50_000 - 1) <= 0.05 for f in found)  # type: ignore[operator]
    assert inside >= 90 and near >= 80, (inside, near)
    assert float(np.median([f.x for f in found])) == pytest.approx(50_000, rel=0.02)  # type: ignore[misc]
    assert not any(f.extrapolated for f in found)


def test_a_crossing_beyond_what_was_measured_says_so() -> None:
    x = np.repeat(np.array([6.0, 12, 24, 48, 96]), 3)
    one = (x, noisy(30 * x**-0.05, 0.0005, 1))
    two = (x, noisy(30 * 5000 ** (0.12 - 0.05) * x**-0.12, 0.0005, 2))
    found = crossing(one, two)
    assert found.x == pytest.approx(5000, rel=0.05) and found.extrapolated and "measured from 6 to 96" in found.reason
    far = crossing(one, two, reach=10)
    assert far.x is None and "no crossing within 10 times" in far.reason


def test_parallel_laws_do_not_cross() -> None:
    x = np.repeat(np.geomspace(1e3, 2e5, 8), 3)
    none = 0
    for seed in range(40):
        found = crossing((x, noisy(30 * x**-0.1, 0.005, seed)), (x, noisy(25 * x**-0.1, 0.005, seed + 99)), seed=seed)
        none += found.x is None
        if found.x is None:
            assert "no crossing" in found.reason and (found.low, found.high) == (None, None)
    assert none >= 36  # one in twenty is the price of an interval of 95 %


def test_laws_with_floors_cross_where_they_are_equal() -> None:
    x = np.geomspace(1e2, 1e6, 200)
    found = crossing(
        (x, noisy(1 + 9 * x**-0.3, 0.002, 0)), (x, noisy(1.2 + 20 * x**-0.5, 0.002, 1)), irreducible=True, draws=25
    )
    at = found.x
    assert at is not None and 1 + 9 * at**-0.3 == pytest.approx(1.2 + 20 * at**-0.5, rel=0.01)
    apart = crossing((x, 1 + 9 * x**-0.3), (x, 2 + 9 * x**-0.3), irreducible=True, draws=10)
    assert apart.x is None and "0% of the draws" in apart.reason


def test_steps_to_a_loss() -> None:
    curve = ([0, 100, 200, 300], [4.0, 3.0, 3.2, 2.0])
    assert steps_to(curve, 3.5) == 50 and steps_to(curve, 3.0) == 100
    assert steps_to(curve, 2.6) == pytest.approx(250) and steps_to(curve, 1.9) is None and steps_to(curve, 5.0) == 0
    assert steps_to(([10, 20], [math.nan, 2.0]), 3.0) == 20


def test_a_speed_up_of_two_is_two() -> None:
    steps = np.arange(1, 1001)
    slow = [(steps, 2 + noisy(3 * steps**-0.5, 0.001, s)) for s in range(3)]
    fast = [(steps, 2 + noisy(3 * (2 * steps) ** -0.5, 0.001, s + 9)) for s in range(3)]
    found = speed_up(slow, fast)
    assert found.ratio == pytest.approx(2, rel=0.05) and found.low < found.ratio < found.high and len(found.each) == 3  # type: ignore[operator]
    back = speed_up(fast, slow)
    assert (
        back.ratio is None and back.reason == "3 of 3 seeds do not reach the loss" and back.each == (None, None, None)
    )
    assert speed_up(slow, slow).ratio == pytest.approx(1)
    with pytest.raises(VesaliusError, match="three seeds"):
        speed_up(slow[:2], fast[:2])


@pytest.mark.parametrize("noise", [0.0, 0.005, 0.01])
@pytest.mark.parametrize("every", [5, 10, 20])
def test_overfitting_is_seen_within_fifty_steps_and_never_where_there_is_none(every: int, noise: float) -> None:
    """Curves as measured: 40 epochs fall to 2.74 at step 100 and rise to 3.47; one epoch ends at 2.38."""
    steps = np.arange(every, 401, every)
    once = 2.25 + 3.2 * np.exp(-steps / 25) + 0.6 * np.exp(-steps / 250)
    u = steps / 100
    forty = 2.742 + np.where(u < 1, 2.4 * (1 - u) ** 2, 0.3 * (np.sqrt(1 + (u - 1) ** 2 * 10) - 1))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        assert overfitting(steps, once + noise * rng.standard_normal(len(steps))) is None
        if noise <= 0.005:
            found = overfitting(steps, forty + noise * rng.standard_normal(len(steps)))
            assert found is not None and abs(found.best_step - 100) <= 20
            # with one evaluation in 20 steps noise may cost one more of them
            assert found.step - 100 <= (50 if every < 20 or not noise else 60) and found.rise > 0
    assert overfitting(steps, np.full(len(steps), 2.0)) is None
    if not noise:
        fired = overfitting(steps, forty)
        assert fired is not None
        upto = steps <= fired.step
        assert overfitting(steps[upto], forty[upto]) == fired  # nothing later was needed


def test_rules_of_thumb() -> None:
    for name, ratio in (("one-epoch", 5), ("chinchilla", 20), (7.0, 7)):
        found = plan(1e15, ratio=name)
        assert found.ratio == pytest.approx(ratio) and found.parameters * found.tokens == pytest.approx(1e15)
    with pytest.raises(VesaliusError, match="unknown ratio 'chincilla'"):
        plan(1e15, ratio="chincilla")
    with pytest.raises(VesaliusError, match="budget of 10 is below"):
        plan(10)


TRUTH = Surface(1.69, 406.4, 0.34, 410.7, 0.28, 1.0)  # Hoffmann et al. 2022


@pytest.mark.parametrize("budget", [1e12, 1e16, 1e20])
def test_the_planner_finds_the_least_loss(budget: float) -> None:
    best = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * budget ** (0.28 / 0.62)
    found = plan(budget, TRUTH)
    assert found.parameters == pytest.approx(best, rel=1e-3) and found.loss == pytest.approx(TRUTH(best, budget / best))
    assert plan(budget, lambda p, t: 1 / p).why.startswith("at the edge")


def test_the_planner_finds_it_on_a_fitted_surface() -> None:
    p, t = (v.ravel() for v in np.meshgrid(np.geomspace(1e5, 1e9, 8), np.geomspace(1e6, 1e11, 8)))
    for seed in range(5):
        losses = noisy(np.array([TRUTH(a, b) for a, b in zip(p, t, strict=True)]), 0.002, seed)
        fitted = fit_surface(p, t, losses)
        assert fitted.r2 > 0.999
        for budget in (1e13, 1e16):
            assert plan(budget, fitted).parameters == pytest.approx(plan(budget, TRUTH).parameters, rel=0.10)


@pytest.mark.parametrize(
    ("speed", "hours", "batch", "published"),
    [
        (55_416, 6, 128, 18_265),
        (55_416, 12, 128, 36_529),
        (55_416, 24, 256, 36_529),
        (16_618, 48, 256, 21_908),
        (16_618, 96, 256, 43_817),
        (94_781, 6, 80, 49_982),
        (36_930, 12, 80, 38_950),
        (11_143, 24, 84, 22_385),
        (11_143, 48, 80, 47_010),
        (11_143, 96, 160, 47_010),
    ],
)
def test_steps_of_the_compute_classes_are_the_published_ones(
    speed: int, hours: int, batch: int, published: int
) -> None:
    assert abs(steps_for(speed, compute_class(f"{hours}h"), batch * 512) - published) <= 1


def test_small_arithmetic() -> None:
    assert [compute_class(t) for t in ("30s", "2min", "1.5 h", "45", 60, "1d")] == [30, 120, 5400, 45, 60, 86400]
    assert normalised_perplexity(1000 * math.log(256), 1000) == pytest.approx(256)
    rounds = throughput([100] * 20, [50, 40, 30, 20, 10, *[2.0] * 8, *[4.0] * 6, 1.0])
    assert rounds == (50.0, 25.0, 100.0, 15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_power_law([1, 2, 3], [1, 2, 3]), "at least 4 points; got 3"),
        (lambda: fit_power_law([0, 2, 3, 4], [1, 2, 3, 4]), "above 0"),
        (lambda: fit_power_law([1, 2, 3, 4], [1, 2, 3, math.nan]), "finite"),
        (lambda: fit_power_law([1, 2], [1, 2, 3]), "equal length"),
        (lambda: fit_power_law([2, 2, 2, 2], [1, 2, 3, 4]), "different x"),
        (lambda: fit_surface([1] * 6, [1, 2, 3, 4, 5, 6], [1] * 6), "three or more sizes"),
        (lambda: compute_class("2 fortnights"), "no compute class"),
        (lambda: compute_class("0s"), "no compute class"),
        (lambda: steps_for(0, 10, 10), "above 0"),
        (lambda: throughput([1] * 5, [1] * 5), "more than 5 rounds"),
        (lambda: normalised_perplexity(1.0, 0), "no text"),
        (lambda: steps_to(([], []), 1.0), "as many losses"),
    ],
)
def test_nonsense_is_refused(call: object, message: str) -> None:
    with pytest.raises(VesaliusError, match=message):
        call()  # type: ignore[operator]
