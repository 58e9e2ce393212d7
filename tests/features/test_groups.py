"""Groups of texts compared: differences, equivalence, and the honest middle."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vesalius.errors import VesaliusError
from vesalius.features.bias import compare, leans
from vesalius.features.bias.pipeline import false_alarms


def draw(mean: float, n: int, seed: int) -> np.ndarray:
    return mean + 0.5 * np.random.default_rng(seed).standard_normal(n)


def test_a_planted_difference_is_found_and_the_same_is_called_equivalent() -> None:
    found = compare({"a": draw(0.3, 200, 0), "b": draw(0.0, 200, 1), "c": draw(0.0, 200, 2)}, bound=0.2)
    pairs = found.pairs.set_index(["a", "b"])
    assert pairs.loc[("a", "b"), "p_holm"] < 0.001 and pairs.loc[("a", "b"), "low"] > 0
    assert not pairs.loc[("a", "b"), "equivalent"] and pairs.loc[("b", "c"), "equivalent"]
    assert pairs.loc[("a", "b"), "cohen_d"] == pytest.approx(0.6, abs=0.2)
    assert found.kruskal_p == pytest.approx(
        stats.kruskal(*(draw(m, 200, s) for m, s in ((0.3, 0), (0, 1), (0, 2)))).pvalue
    )


def test_too_few_texts_are_neither_different_nor_equivalent() -> None:
    row = compare({"a": draw(0.0, 6, 3), "b": draw(0.0, 6, 4)}, bound=0.1).pairs.iloc[0]
    assert row["p_holm"] > 0.05 and not row["equivalent"]


def test_intervals_end_where_values_do() -> None:
    groups = {"a": [1.0, 1.0, 1.0, 1.0, 0.5], "b": [-1.0, -1.0, -1.0, -1.0, -0.6]}
    found = compare(groups, bound=0.1, limits=(-1, 1))
    assert found.means["high"].max() == 1 and found.means["low"].min() == -1 and found.pairs["high"][0] == 2


def test_the_same_distribution_is_rarely_called_different() -> None:
    """200 divisions of one group: no more alarms than the 5 % that are promised, with room for 200 draws."""
    values = np.random.default_rng(7).choice([-1.0, -0.3, 1.0], 90, p=[0.5, 0.2, 0.3])
    assert false_alarms(values, 200) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def test_intervals_cover_what_they_say() -> None:
    rng = np.random.default_rng(8)
    covered = []
    for _ in range(200):
        groups = {"a": rng.exponential(1.0, 15), "b": rng.exponential(1.0, 15) + 0.5}
        row = compare(groups, bound=1).pairs.iloc[0]
        covered.append(row["low"] <= -0.5 <= row["high"])
    assert np.mean(covered) >= 0.95 - 2 * np.sqrt(0.05 * 0.95 / 200)


def test_two_one_sided_tests_are_scipys() -> None:
    x, y = draw(0.1, 40, 5), draw(0.0, 60, 6)
    row = compare({"x": x, "y": y}, bound=0.3).pairs.iloc[0]
    lower = stats.ttest_ind(x + 0.3, y, equal_var=False, alternative="greater").pvalue
    upper = stats.ttest_ind(x - 0.3, y, equal_var=False, alternative="less").pvalue
    assert row["p_equivalence"] == pytest.approx(max(lower, upper), abs=1e-9)
    welch = stats.ttest_ind(x, y, equal_var=False)
    assert row["p"] == pytest.approx(welch.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(welch.confidence_interval()))


def test_constant_groups_have_no_spread_to_test() -> None:
    row = compare({"a": [0.0] * 6, "b": [0.0] * 6}, bound=0.1).pairs.iloc[0]
    assert row["p"] == 1 and row["equivalent"] and np.isnan(row["cohen_d"])


def test_a_constant_group_beside_another_is_tested_without_a_warning() -> None:
    row = compare({"a": [1.0] * 20, "b": [1.0, -1.0] * 10}, bound=0.1).pairs.iloc[0]
    assert row["p"] < 0.001 and row["low"] > 0 and not row["equivalent"]


def test_bad_groups_are_refused() -> None:
    with pytest.raises(VesaliusError, match="group 'b' has 2 values; 5"):
        compare({"a": [0.0] * 9, "b": [1.0, 2.0, float("nan")]}, bound=0.1)
    with pytest.raises(VesaliusError, match="two or more"):
        compare({"a": [0.0] * 9}, bound=0.1)
    with pytest.raises(VesaliusError, match="bound of 0"):
        compare({"a": [0.0] * 9, "b": [1.0] * 9}, bound=0)


def test_the_lean_of_a_text_counts_its_gendered_words() -> None:
    found = leans(["The king and his queen", "Her mother", "He said", "A table"])
    assert found[:3].tolist() == pytest.approx([-1 / 3, 1, -1]) and np.isnan(found[3])
