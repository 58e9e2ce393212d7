"""Probes: a planted property is read where it is and nowhere else; controls tell memory from meaning."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from features_helpers import spoken, words

from vesalius.errors import VesaliusError
from vesalius.features import probe
from vesalius.features.probes import _Examples, _one

RNG = np.random.default_rng(0)
TEXTS = [words(*RNG.integers(5, 90, 6)) for _ in range(60)]


def examples(n: int = 120, types: Any = None, groups: Any = None, labels: Any = None, seed: int = 0) -> _Examples:
    labels = ["yes" if i % 2 else "no" for i in range(n)] if labels is None else labels
    texts = [f"t{i}" for i in range(n)]
    return _Examples.of(texts, labels, None, groups, types or texts, False, 5, np.random.default_rng(seed))


def test_a_planted_property_is_read_and_noise_is_not() -> None:
    it = examples()
    x = RNG.standard_normal((120, 200))
    noise, right = _one(x, it, True, 0)
    axis = RNG.standard_normal(200)
    x += np.outer(it.target * 2 - 1, 3 * axis / np.linalg.norm(axis))
    told, _ = _one(x, it, True, 0)
    assert told["accuracy"] > 0.8 > 0.65 > noise["accuracy"]
    assert told["low"] <= told["accuracy"] <= told["high"]
    assert told["selectivity"] == told["accuracy"] - told["control"] and told["selectivity"] > 0.2
    assert told["compression"] > noise["compression"] and noise["compression"] < 1.05
    assert right.shape == (120,)


def test_a_probe_that_knows_words_by_heart_shows_in_its_control() -> None:
    """Twenty words, each a point of its own: any labels of words can be read, so accuracy says nothing."""
    places = RNG.standard_normal((20, 300)) * 3
    kinds = [i % 20 for i in range(200)]
    labels = ["a" if k < 10 else "b" for k in kinds]
    it = examples(200, types=kinds, labels=labels)
    told, _ = _one(places[kinds] + 0.1 * RNG.standard_normal((200, 300)), it, False, 0)
    assert told["accuracy"] > 0.95 and told["control"] > 0.9 and told["selectivity"] < 0.1
    apart = examples(200, types=kinds, groups=kinds, labels=labels)  # no word on both sides
    told, _ = _one(places[kinds], apart, False, 0)
    assert told["accuracy"] < 0.75


def test_folds_divide_no_group_and_controls_no_type() -> None:
    groups = [i // 4 for i in range(120)]
    it = examples(types=[i % 7 for i in range(120)], groups=groups)
    for g in set(groups):
        assert len({it.fold[i] for i in range(120) if groups[i] == g}) == 1
    for t in range(7):
        assert len({it.control[i] for i in range(120) if it.types[i] == t}) == 1
    assert sorted(set(it.fold)) == [0, 1, 2, 3, 4]


def test_intervals_are_over_groups() -> None:
    """Twenty copies of ten texts say no more than ten texts: the interval is as wide as theirs."""
    it = examples(200, groups=[i // 20 for i in range(200)], labels=["a" if i // 20 % 2 else "b" for i in range(200)])
    x = np.repeat(RNG.standard_normal((10, 4)), 20, axis=0)
    grouped, _ = _one(x, it, False, 0)
    single, _ = _one(x, dataclasses.replace(it, groups=list(range(200))), False, 0)
    assert grouped["accuracy"] == single["accuracy"]
    assert grouped["high"] - grouped["low"] > 3 * (single["high"] - single["low"])


def test_numbers_are_read_by_a_ridge() -> None:
    y = [float(v) for v in RNG.standard_normal(150)]
    it = _Examples.of([f"t{i}" for i in range(150)], y, None, None, list(range(150)), True, 5, np.random.default_rng(0))
    x = RNG.standard_normal((150, 40))
    x[:, 3] = np.array(y) + 0.3 * RNG.standard_normal(150)
    told, _ = _one(x, it, False, 0)
    assert told["r2"] > 0.7 and told["control"] < 0.1


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "neurons", "head"])
def test_a_words_identity_is_read_at_every_site_of_a_model(site: str) -> None:
    """Which of two words ends a text is in the last token's states of any random model, behind its own embedding."""
    model = spoken("llama")
    texts = [t + " " + words(3 if i % 2 else 4) for i, t in enumerate(TEXTS)]
    found = probe(model, texts, ["odd" if i % 2 else "even" for i in range(60)], site=site)
    best = found.best()
    assert best["accuracy"] > 0.9 and best["baseline"] == 0.5
    scores = found.scores()
    assert len(scores) == (model.n_layers * model.n_heads if site == "head" else model.n_layers)
    assert scores.parts[0].kind == {"mlp_out": "mlp", "head": "head"}.get(site, "resid_post")
    again = probe(model, texts, ["odd" if i % 2 else "even" for i in range(60)], site=site)
    assert again.table.equals(found.table)


def test_layers_are_chosen_and_counted_from_the_end() -> None:
    found = probe(spoken("llama"), TEXTS, ["a", "b"] * 30, layers=[0, -1], pool="mean")
    assert found.table["part"].tolist() == ["L0.resid_post", "L2.resid_post"]


def test_too_few_examples_are_refused_with_how_many_are_needed() -> None:
    model = spoken("llama")
    with pytest.raises(VesaliusError, match="4 examples of 'b'; a probe needs 10 or more of each"):
        probe(model, TEXTS[:20], ["a"] * 16 + ["b"] * 4)
    with pytest.raises(VesaliusError, match="all 20 examples have the label 'a'"):
        probe(model, TEXTS[:20], ["a"] * 20)
    with pytest.raises(VesaliusError, match="50 of 'a' and 10 of 'b'; add 3 of the latter, or balance .* 10 of each"):
        probe(model, TEXTS, ["a"] * 50 + ["b"] * 10)
    assert probe(model, TEXTS, ["a"] * 50 + ["b"] * 10, balance=True, layers=[0]).n == 20
    with pytest.raises(VesaliusError, match="3 groups for 5 folds"):
        probe(model, TEXTS, ["a", "b"] * 30, groups=[i % 3 for i in range(60)])
    with pytest.raises(VesaliusError, match="a regression probe needs 50"):
        probe(model, TEXTS[:30], [float(i) + 0.5 for i in range(30)])
    with pytest.raises(VesaliusError, match="60 texts but 59 labels"):
        probe(model, TEXTS, ["a"] * 59)
    with pytest.raises(VesaliusError, match="60 texts but 2 groups"):
        probe(model, TEXTS, ["a", "b"] * 30, groups=[1, 2])
    with pytest.raises(VesaliusError, match="unknown site 'resid_pst'"):
        probe(model, TEXTS, ["a", "b"] * 30, site="resid_pst")


def test_an_example_that_stands_twice_is_never_trained_and_tried_on() -> None:
    """Forty random vectors, each three times: no label of theirs can be read off one that was left out."""
    labels = [["a", "b"][k] for k in np.random.default_rng(3).permutation([0, 1] * 20)] * 3
    texts = [f"t{i}" for i in range(40)] * 3
    it = _Examples.of(texts, labels, None, None, texts, False, 5, np.random.default_rng(0))
    assert all(len({it.fold[i + 40 * k] for k in range(3)}) == 1 for i in range(40))
    x = np.tile(RNG.standard_normal((40, 300)), (3, 1))
    told, _ = _one(x, it, False, 0)
    assert told["accuracy"] < 0.75 and told["high"] - told["low"] > 0.2  # forty examples, not 120
    with pytest.raises(VesaliusError, match="2 different examples for 5 folds"):
        probe(spoken("llama"), TEXTS[:2] * 30, ["a", "b"] * 30)
    with pytest.raises(VesaliusError, match="1 of 'c07', 52 labels more"):
        probe(spoken("llama"), TEXTS, [f"c{i:02}" for i in range(60)])
