"""The permutation tests against scipy's, and their p-values under the null."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vesalius.find.detectors.significance import against, both, corrected, exchange, positive


def test_with_one_draw_it_is_scipys_paired_permutation_test() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 10)) + np.array([0.0, 0.5, 1.0])[:, None]
    chance = rng.normal(size=(3, 10, 1))
    found = exchange(values, chance, seed=1)
    for head in range(3):
        exact = stats.permutation_test(
            (values[head], chance[head, :, 0]),
            lambda a, b, axis: a.mean(axis) - b.mean(axis),
            permutation_type="samples", alternative="greater", n_resamples=np.inf,
        )  # fmt: skip
        assert found["p"][head] == pytest.approx(exact.pvalue, abs=0.012)
    assert found["null"] == pytest.approx(chance.mean((1, 2)))


@pytest.mark.parametrize("draws", [1, 16])
def test_p_is_uniform_where_nothing_distinguishes_the_real_value(draws: int) -> None:
    """Skewed values, with prompts of very different sizes, as attention has them."""
    rng = np.random.default_rng(draws)
    scale = rng.lognormal(size=(1, 12, 1))
    every = rng.gamma(0.5, size=(400, 12, draws + 1)) * scale
    p = exchange(every[..., 0], every[..., 1:], seed=0)["p"]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    better = exchange(every[..., 0] + 0.8 * scale[..., 0], every[..., 1:], seed=0)["p"]
    assert stats.kstest(better, "uniform").pvalue < 1e-6


def test_prompts_that_say_nothing_are_left_out() -> None:
    rng = np.random.default_rng(3)
    values, chance = rng.normal(size=(2, 8)), rng.normal(size=(2, 8, 4))
    holed = np.concatenate([values, np.full((2, 3), np.nan)], axis=1)
    more = np.concatenate([chance, np.full((2, 3, 4), np.nan)], axis=1)
    whole, left = exchange(values, chance, 5), exchange(holed, more, 5)
    assert all(np.array_equal(whole[k], left[k]) for k in whole)
    nothing = exchange(np.full((2, 3), np.nan), np.full((2, 3, 4), np.nan), 5)
    assert all(np.isnan(v).all() for v in nothing.values())


def test_the_95_percent_point_is_that_of_means_over_prompts() -> None:
    rng = np.random.default_rng(4)
    chance = rng.exponential(size=(1, 20, 200))
    high = exchange(np.ones((1, 20)), chance, 0)["null_high"][0]
    means = rng.exponential(size=(4000, 20)).mean(1)
    assert high == pytest.approx(np.quantile(means, 0.95), rel=0.06)


def test_shuffled_labels_and_corrections_are_those_of_their_definitions() -> None:
    scores, draws = (
        np.array([0.5, 0.1, 0.3]),
        np.array([[0.1, 0.5, 0.2, 0.0], [0.2, 0.3, 0.1, 0.4], [0.0, 0.1, 0.2, 0.1]]),
    )
    found = against(scores, draws)
    assert found["p"] == pytest.approx([2 / 5, 5 / 5, 1 / 5])
    assert found["q"] == pytest.approx(stats.false_discovery_control([2 / 5, 1, 1 / 5]))
    p = np.array([0.01, np.nan, 0.04])
    assert corrected(p)[[0, 2]] == pytest.approx(stats.false_discovery_control([0.01, 0.04])) and np.isnan(
        corrected(p)[1]
    )
    joint = both({"p": np.array([0.01, 0.5]), "q": np.zeros(2)}, np.array([0.2, 0.1]))
    assert joint["p"] == pytest.approx([0.2, 0.5])


def test_a_positive_mean_is_told_from_a_negative_one() -> None:
    rng = np.random.default_rng(5)
    even = rng.normal(0, 1, 20)
    p = positive(np.stack([rng.normal(1, 1, 20), even - even.mean(), rng.normal(-1, 1, 20)]), seed=0)
    assert p[0] < 0.01 and p[1] == pytest.approx(0.5, abs=0.05) and p[2] > 0.99
