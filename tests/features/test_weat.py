"""Association tests: planted effects come back, chance is chance, and the numbers are those of WEFE."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from features_helpers import spoken, words
from scipy import stats

from vesalius.errors import VesaliusError
from vesalius.features.bias import Test, WordSet, audit, holm, profile, weat
from vesalius.features.bias import tests as known_tests
from vesalius.features.bias.weat import associations
from vesalius.features.bias.words import bland

DATA = Path(__file__).parent / "data"


def planted(s: np.ndarray) -> np.ndarray:
    """Vectors (word, 3) of length 1 whose cosine with the first axis is s / 10 and with the second 0."""
    near = s / 10
    return np.stack([near, np.zeros_like(near), np.sqrt(1 - near**2)], axis=1)


A, B = np.tile([1.0, 0.0, 0.0], (4, 1)), np.tile([0.0, 1.0, 0.0], (4, 1))


@pytest.mark.parametrize("d", [0.0, 0.8, 1.6])
def test_planted_effects_are_recovered(d: float) -> None:
    rng = np.random.default_rng(3)
    gap = d / np.sqrt(1 - d**2 / 4)  # of two normal sets whose union has the effect size d
    x, y = (planted(rng.standard_normal(1500) + side * gap / 2) for side in (1, -1))
    found = weat(x, y, A, B, permutations=200, draws=200)
    assert abs(found.d - d) < 0.1
    assert found.low < found.d + 0.02 and found.d - 0.02 < found.high
    assert (found.p < 0.01) == (d > 0)


def test_p_is_uniform_where_there_is_no_effect() -> None:
    rng = np.random.default_rng(0)
    ps = []
    for seed in range(500):
        x, y, a, b = (rng.standard_normal((n, 12)) for n in (7, 7, 6, 6))
        found = weat(x, y, a, b, permutations=999, draws=0, seed=seed)
        assert found.exact
        ps.append(found.p)
    assert stats.kstest(ps, "uniform").pvalue > 0.05
    sampled = [
        weat(*(rng.standard_normal((n, 12)) for n in (25, 25, 6, 6)), permutations=999, draws=0, seed=s)
        for s in range(200)
    ]
    assert not any(f.exact for f in sampled)
    assert stats.kstest([f.p for f in sampled], "uniform").pvalue > 0.05


def test_exact_permutation_equals_brute_force() -> None:
    rng = np.random.default_rng(5)
    for _ in range(5):
        x, y, a, b = (rng.standard_normal((4, 7)) + s for s in (0.2, -0.2, 0.4, -0.4))
        s = associations(np.concatenate([x, y]), a, b)
        observed = s[:4].sum() - s[4:].sum()
        every = []
        for chosen in combinations(range(8), 4):
            rest = [i for i in range(8) if i not in chosen]
            every.append(s[list(chosen)].sum() - s[rest].sum() >= observed - 1e-12)
        assert len(every) == 70
        assert weat(x, y, a, b, draws=0).p == pytest.approx(np.mean(every), abs=1e-12)


def test_unequal_sets_keep_their_sizes() -> None:
    x, y = planted(np.array([5.0, 5.1, 5.2])), planted(np.array([0.0, 0.1, 0.2, 0.3, 0.4]))
    found = weat(x, y, A, B, draws=0)
    assert found.exact and found.p == pytest.approx(1 / 56)  # 8 over 3 divisions, the observed one the largest
    assert weat(y, x, A, B, draws=0).d == pytest.approx(-found.d)


@pytest.mark.parametrize("case", json.loads((DATA / "wefe.json").read_text())["cases"])
def test_the_numbers_are_those_of_wefe(case: dict) -> None:  # type: ignore[type-arg]
    """Effect size and statistic as wefe 1.0.1 gave them for the same vectors."""
    found = weat(*(np.array(s) for s in case["sets"]), draws=0)
    assert found.d == pytest.approx(case["d"], abs=1e-9)
    assert found.statistic == pytest.approx(case["statistic"], abs=1e-9)


def test_sentences_are_no_new_words() -> None:
    """Repeating each word's vector in six sentences changes neither d nor p."""
    rng = np.random.default_rng(2)
    sets = [rng.standard_normal((6, 9)) + s for s in (0.3, -0.3, 0.5, -0.5)]
    once, often = weat(*sets, draws=0), weat(*(np.repeat(s[:, None], 6, axis=1) for s in sets), draws=0)
    assert often.p == pytest.approx(once.p) and often.d == pytest.approx(once.d) and often.n_x == 6


def test_published_lists_are_whole() -> None:
    known = known_tests()
    sizes = {n: tuple(len(s.words) for s in (t.x, t.y, t.a, t.b)) for n, t in known.items()}
    assert sizes == {
        "1": (25,) * 4, "2": (25,) * 4, "3": (32, 32, 25, 25), "4": (18, 18, 25, 25), "5": (18, 18, 8, 8),
        "6": (8,) * 4, "7": (8,) * 4, "8": (8,) * 4, "9": (6, 6, 7, 7), "10": (8,) * 4,
    }  # fmt: skip
    for test in known.values():
        for one in (test.x, test.y, test.a, test.b):
            assert len(set(one.words)) == len(one.words)
            made = bland(one)
            assert all(w in s for w, sentences in made.items() for s in sentences)
            assert len({len(s) for s in made.values()}) == 1  # as many sentences for each word


def test_holm_is_the_step_down_rule() -> None:
    p = np.array([0.01, 0.04, 0.03, np.nan])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, np.nan])


@pytest.fixture(scope="module")
def small() -> Test:
    sets = [
        WordSet(n, tuple(words(i) for i in range(k, k + 4))) for n, k in (("x", 5), ("y", 10), ("a", 20), ("b", 30))
    ]
    return Test("mine", "numbers by numbers", *sets)


def test_a_model_is_audited_word_by_word(small: Test) -> None:
    from vesalius.features.vectors import vectors

    model = spoken("llama")
    table = audit(model, [small], reading="mean@2").iloc[0]
    by_hand = weat(*(vectors(model, s.words, "mean@2") for s in (small.x, small.y, small.a, small.b)))
    assert table["d"] == pytest.approx(by_hand.d) and table["p"] == pytest.approx(by_hand.p)
    layers = profile(model, [small], form="words")
    assert layers["layer"].tolist() == [0, 1, 2]
    assert layers["d"].iloc[2] == pytest.approx(by_hand.d, abs=1e-5)


def test_bad_tests_are_refused(small: Test, tmp_path: Path) -> None:
    model = spoken("llama")
    with pytest.raises(VesaliusError, match="unknown association test '11'"):
        audit(model, ["11"])
    with pytest.raises(VesaliusError, match="set Y has 1 words"):
        weat(A, B[:1], A, B)
    with pytest.raises(VesaliusError, match="'w5' is in both"):
        Test("t", "", small.x, small.x, small.a, small.b)
    path = tmp_path / "mine.yaml"
    path.write_text("sets: {x: [a, b], y: [c, d], a: [e, f]}\ntests: {1: {x: x, y: y, a: a, b: bb}}")
    with pytest.raises(VesaliusError, match="unknown word set of test 1 'bb'"):
        known_tests(path)
    path.write_text("sets: [")
    with pytest.raises(VesaliusError, match="not a YAML file"):
        known_tests(path)
    path.write_text("sets: {x: [a, b]}")
    with pytest.raises(VesaliusError, match="no 'tests'"):
        known_tests(path)
