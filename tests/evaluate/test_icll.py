"""Readers of random languages: n-gram learners against counting by hand, and models whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import tiny

from vesalius.corpus.automata import RegularLanguages
from vesalius.errors import VesaliusError
from vesalius.evaluate.icll import check_model, measure, model_guesses, ngram_learner, prompts_of


def by_hand(row: list[int], order: int, symbols: int) -> list[float]:
    """Witten and Bell's back-off for the next symbol after `row`, counted with lists."""
    if order == 0:
        return [1 / symbols] * symbols

    def context(at: int) -> tuple[int, ...]:
        """The last order - 1 tokens up to `at`; before a string's beginning, the separator again."""
        found: list[int] = []
        for back in range(order - 1):
            found.append(symbols if symbols in found else row[at - back])
        return tuple(found)

    here = context(len(row) - 1)
    after = [row[t + 1] for t in range(len(row) - 1) if context(t) == here and row[t + 1] != symbols]
    kinds = len(set(after))
    lower = by_hand(row, order - 1, symbols)
    if not after:
        return lower
    return [(after.count(w) + kinds * lower[w]) / (len(after) + kinds) for w in range(symbols)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_learners_are_counting_by_hand(order: int) -> None:
    ids = RegularLanguages(rows=3, length=40, symbols=4).batch(0).ids[:, :-1]
    found = ngram_learner(ids, order, 4)
    np.testing.assert_allclose(found.sum(-1), 1)
    for row in range(3):
        for t in range(40):
            np.testing.assert_allclose(found[row, t], by_hand(ids[row, : t + 1].tolist(), order, 4), atol=1e-12)


def test_learners_come_nearer_with_every_string_and_order_two_beats_one() -> None:
    p = prompts_of(RegularLanguages(rows=200, split="test"))
    far = {n: 0.5 * np.abs(ngram_learner(p.ids, n, 10) - p.truth).sum(-1) for n in (1, 2, 3)}
    early, late = p.scored & (p.said < 2), p.scored & (p.said >= 8)
    for n in (2, 3):
        assert far[n][late].mean() < 0.7 * far[n][early].mean()
    assert far[2][late].mean() < far[1][late].mean() and far[3][late].mean() < far[2][late].mean()


def speaking(task: RegularLanguages, guesses: np.ndarray) -> SimpleNamespace:
    """Something that looks like a model and says given distributions."""
    logits = torch.log(torch.from_numpy(guesses).clamp(min=1e-30))
    said = torch.cat([logits, torch.full((*logits.shape[:2], 1), 30.0)], dim=-1)  # and insists on the separator

    def answer(ids: torch.Tensor) -> torch.Tensor:
        return said[: len(ids)]

    return SimpleNamespace(
        name="told", kind="causal", logits=answer, hf=SimpleNamespace(config=SimpleNamespace(vocab_size=11))
    )


def test_who_says_the_truth_is_perfect_and_a_bigram_is_found_out() -> None:
    task = RegularLanguages(rows=24, split="test")
    p = prompts_of(task)
    knows = measure(speaking(task, p.truth), task, steps=1)  # type: ignore[arg-type]
    first = knows.readers.iloc[0]
    assert first["tvd"] == pytest.approx(0, abs=1e-12) and first["valid"] == 1
    assert first["right"] == pytest.approx(task.optimal, abs=0.05)
    table = knows.readers.set_index("reader")
    np.testing.assert_allclose(table["away"], table["tvd"], atol=1e-12)  # for it, away from it is away from the truth
    assert table.loc["uniform", "valid"] == pytest.approx(0.2, abs=0.03)  # two edges of ten symbols
    for order in (1, 2, 3):
        copy = measure(speaking(task, ngram_learner(p.ids, order, 10)), task, steps=1)  # type: ignore[arg-type]
        assert copy.nearest == f"{order}-gram"
        assert copy.readers.set_index("reader").loc[f"{order}-gram", "away"] == pytest.approx(0, abs=1e-9)


def test_guesses_are_shares_of_the_symbols() -> None:
    model, ids = tiny("llama"), np.zeros((2, 5), dtype=np.int64)
    found = model_guesses(model, ids, 10)
    np.testing.assert_allclose(found.sum(-1), 1)
    np.testing.assert_allclose(found, torch.softmax(model.logits(torch.from_numpy(ids))[..., :10].double(), -1))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_cannot_be_asked_are_refused(name: str) -> None:
    with pytest.raises(VesaliusError, match="train a causal model on it"):
        check_model(tiny(name), RegularLanguages())
