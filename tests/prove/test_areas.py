"""Faithfulness, CPR and CMD against plain loops and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vesalius.errors import VesaliusError
from vesalius.prove.areas import MIB_FRACTIONS, FaithfulnessCurve, areas, cmd, cpr, faithfulness_curve, mib_sizes


def loops(x: list[float], f: list[float], log: bool) -> tuple[float, float]:
    """CPR and CMD from the definition: trapezoids between neighbouring circuit sizes."""
    performance = distance = 0.0
    for i in range(len(f) - 1):
        left, right = (math.log(x[i]), math.log(x[i + 1])) if log else (x[i], x[i + 1])
        performance += (right - left) * (f[i] + f[i + 1]) / 2
        distance += (right - left) * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    return performance, distance


@pytest.mark.parametrize("log", [False, True])
def test_areas_are_the_trapezoids_of_the_definition(log: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        f = rng.normal(0.7, 0.6, size=10).tolist()
        expected = loops(list(MIB_FRACTIONS), f, log)
        assert (float(cpr(MIB_FRACTIONS, f, log)), float(cmd(MIB_FRACTIONS, f, log))) == pytest.approx(expected)


def curve(values: list[float], fractions: tuple[float, ...] = MIB_FRACTIONS) -> FaithfulnessCurve:
    nan = np.full(len(values), np.nan)
    return FaithfulnessCurve(mib_sizes(1000, fractions), fractions, np.array(values), nan, nan, "resample")


def test_closed_forms() -> None:
    full = areas(curve([1.0] * 10))
    assert float(full.cpr) == pytest.approx(0.999) and float(full.cmd) == 0
    assert float(full.cpr_log) == pytest.approx(math.log(1000)) and float(full.cmd_log) == 0
    assert float(full.cpr_share) == pytest.approx(1) and float(full.cpr_log_share) == pytest.approx(1)
    nothing = areas(curve([0.0] * 10))
    assert float(nothing.cpr) == 0 and float(nothing.cmd) == pytest.approx(0.999)
    assert float(nothing.cmd_share) == pytest.approx(1) and float(nothing.cmd_log_share) == pytest.approx(1)
    line = areas(curve(list(MIB_FRACTIONS)))  # f = x: (1 - 0.001^2) / 2
    assert float(line.cpr) == pytest.approx((1 - 1e-6) / 2) and float(line.cmd) == pytest.approx(0.999**2 / 2)
    logarithmic = areas(curve([math.log(x) for x in MIB_FRACTIONS]))  # integral of t from -ln 1000 to 0
    assert float(logarithmic.cpr_log) == pytest.approx(-(math.log(1000) ** 2) / 2)


def test_distance_is_not_aware_of_crossings_as_in_mib() -> None:
    # f goes from 0 to 2: the true area of |1 - f| is half of what the endpoints give
    assert float(cmd([0.0, 1.0], [0.0, 2.0])) == 1.0 and float(cpr([0.0, 1.0], [0.0, 2.0])) == 1.0


def test_the_last_stretches_carry_four_fifths_of_the_linear_score() -> None:
    late = [0.0] * 7 + [1.0] * 3
    assert float(cpr(MIB_FRACTIONS, late)) > 0.8 * 0.999
    assert float(areas(curve(late)).cpr_log_share) < 0.3


def test_sizes_are_rounded_down_as_in_mib() -> None:
    assert mib_sizes(32491) == [32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491]


def test_a_missing_point_makes_a_missing_area_with_its_reason() -> None:
    broken = FaithfulnessCurve(
        [1, 2], [0.5, 1.0], np.array([np.nan, 1.0]), np.zeros(2), np.zeros(2), "mean", ("why", "")
    )
    found = areas(broken)
    assert math.isnan(float(found.cpr)) and found.cpr.note == "why" and found.cmd_log_share.note == "why"
    from_zero = areas(curve([0.0, 1.0], (0.0, 1.0)))
    assert float(from_zero.cpr) == 0.5 and math.isnan(float(from_zero.cpr_log)) and "log" in from_zero.cpr_log.note
    for axis in ([0.5], [1.0, 0.5], [-1.0, 1.0]):
        with pytest.raises(VesaliusError, match="fractions"):
            cpr(axis, [1.0] * len(axis))


def measured(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 1, size=n)
    full, empty = 4 + shared + rng.normal(0, 0.3, n), shared + rng.normal(0, 0.3, n)
    truth = np.array([0.2, 0.6, 1.0])
    circuits = truth[:, None] * 4 + shared + rng.normal(0, 0.3, (3, n))
    return circuits, full, empty


def test_faithfulness_is_the_ratio_of_means() -> None:
    circuits, full, empty = measured(40, 0)
    found = faithfulness_curve(circuits, full, empty, [1, 5, 10], [0.1, 0.5, 1.0], "resample")
    for i in range(3):
        plain = (circuits[i].mean() - empty.mean()) / (full.mean() - empty.mean())
        assert found.values[i] == pytest.approx(plain) and found.low[i] < plain < found.high[i]
    both = np.stack([full, empty, full])
    exact = faithfulness_curve(both, full, empty, [1, 5, 10], [0.1, 0.5, 1.0], "resample")
    assert exact.values.tolist() == [1, 0, 1]
    # the same prompts are drawn for circuit, full and empty model, so these are certain
    assert np.allclose(exact.low, [1, 0, 1]) and np.allclose(exact.high, [1, 0, 1])
    assert found.to_frame()["faithfulness"].tolist() == found.values.tolist()


def test_resampling_is_that_of_a_plain_loop() -> None:
    circuits, full, empty = measured(12, 3)
    found = faithfulness_curve(circuits, full, empty, [1, 5, 10], [0.1, 0.5, 1.0], "mean", seed=7, draws=50)
    counts = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=50)
    for d, count in enumerate(counts):
        rows = np.repeat(np.arange(12), count)
        gap = full[rows].mean() - empty[rows].mean()
        assert found.draws is not None
        assert found.draws[d] == pytest.approx((circuits[:, rows].mean(axis=1) - empty[rows].mean()) / gap)
    sampled = [loops([0.1, 0.5, 1.0], list(row), False)[0] for row in found.draws]
    interval = areas(found).cpr
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(sampled, [0.025, 0.975])))


def test_intervals_cover_the_truth() -> None:
    covered = np.zeros(3)
    area_covered = 0
    truth = loops([0.1, 0.5, 1.0], [0.2, 0.6, 1.0], False)[0]
    for seed in range(200):
        circuits, full, empty = measured(40, seed + 100)
        found = faithfulness_curve(circuits, full, empty, [1, 5, 10], [0.1, 0.5, 1.0], "resample", seed=seed, draws=300)
        covered += (found.low <= [0.2, 0.6, 1.0]) & (found.high >= [0.2, 0.6, 1.0])
        interval = areas(found).cpr
        area_covered += interval.low <= truth <= interval.high
    assert (covered >= 175).all() and area_covered >= 175  # 190 expected; 175 is five standard errors below


def test_no_effect_of_the_model_is_missing_not_infinite() -> None:
    rng = np.random.default_rng(0)
    circuits, full, _ = measured(40, 0)
    same = faithfulness_curve(circuits, full, full.copy(), [1, 2, 3], [0.1, 0.5, 1.0], "mean")
    assert np.isnan(same.values).all() and all("nothing to be faithful to" in note for note in same.notes)
    assert math.isnan(float(areas(same).cpr)) and "alike" in areas(same).cpr.note
    zero = faithfulness_curve(np.zeros((1, 3)), np.zeros(3), np.zeros(3), [1], [1.0], "zero")
    assert np.isnan(zero.values).all()
    noisy = faithfulness_curve(circuits, rng.normal(size=40), rng.normal(size=40), [1, 2, 3], [0.1, 0.5, 1.0], "mean")
    assert np.isfinite(noisy.values).all() and np.isnan(noisy.low).all() and "not told from zero" in noisy.notes[0]


def test_missing_measurements_are_counted() -> None:
    circuits, full, empty = measured(40, 0)
    circuits[1, 3] = np.nan
    circuits[1, 4] = np.inf
    found = faithfulness_curve(circuits, full, empty, [1, 5, 10], [0.1, 0.5, 1.0], "resample")
    assert np.isnan(found.values).tolist() == [False, True, False] and "2 of 40" in found.notes[1]
    assert np.isfinite(found.low[[0, 2]]).all() and math.isnan(float(areas(found).cmd))
    full[0] = np.inf
    assert "1 of 40" in faithfulness_curve(circuits, full, empty, [1, 5, 10], [0.1, 0.5, 1.0], "mean").notes[0]
    one = faithfulness_curve(np.ones((1, 1)), np.full(1, 2.0), np.zeros(1), [1], [1.0], "mean")
    assert one.values.tolist() == [0.5] and "one prompt" in one.notes[0]
    with pytest.raises(VesaliusError, match="do not fit"):
        faithfulness_curve(circuits, full[:5], empty, [1, 5, 10], [0.1, 0.5, 1.0], "mean")
