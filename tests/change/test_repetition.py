"""Repeats: made as described, believed less after training, and loops are counted where they are."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import VOCAB, some_ids, tiny

from vesalius.build.planted import planted
from vesalius.change.repetition import DittoPlan, Repeated, break_loops, has_loop, reinforcement
from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.train.learning import TextRows, learn
from vesalius.train.objectives import IGNORED, Needs, make_objective
from vesalius.train.objectives.ditto import Repeats, repeated

ENDS = (1, 2)


def objective(**settings: object) -> object:
    return make_objective("ditto", Needs(VOCAB, {}, "causal"), ends=ENDS, **settings)


def test_a_row_of_repeats_has_prefix_sentence_sentence() -> None:
    row = np.array([5, 6, 1, 7, 8, 9, 10, 2, 11, 12, 13, 14, 15, 1, 20, 21])
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        made, period, start = repeated(row, np.array(ENDS), 40, rng)
        sentence = tuple(made[start : start + period])
        seen.add((tuple(made[:start]), sentence))
        assert len(made) == 40
        assert all(made[i] == made[i - period] for i in range(start + period, 40))
    assert seen == {((5, 6, 1), (7, 8, 9, 10, 2)), ((7, 8, 9, 10, 2), (11, 12, 13, 14, 15, 1))}


def test_the_loss_is_the_papers_one_token_at_a_time() -> None:
    made = objective(gamma=0.5, rate=1.0)
    ids = np.array([[5, 6, 1, 7, 8, 9, 10, 2, 11, 12, 13, 14, 15, 1, 20, 21, 22, 23, 24, 25]])
    sample = made.sample(Batch(0, ids, np.zeros_like(ids)), seed=0)
    assert isinstance(sample, Repeats)
    logits = torch.randn(1, 19, VOCAB, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)[0]
    period = int(sample.period[0])
    read = sample.inputs["input_ids"][0]
    places = [t for t in range(19) if int(sample.targets[0, t]) != IGNORED]
    assert places == list(range(places[0], 19))
    wanted = 0.0
    for t in places:
        token = int(sample.targets[0, t])
        assert token == int(read[t - period + 1])  # the same token one repeat earlier
        wanted -= math.log(1 - abs(float(p[t, token]) - 0.5 * float(p[t - period, token])))
    found = made.loss(SimpleNamespace(logits=logits), sample)
    assert float(found.total) == pytest.approx(wanted, rel=1e-5)
    with_grad = logits.clone().requires_grad_()
    made.loss(SimpleNamespace(logits=with_grad), sample).total.backward()
    assert with_grad.grad is not None
    before = places[0] - period  # what is compared with is held
    assert float(with_grad.grad[0, before].abs().sum()) == 0


def test_some_steps_are_plain_text_and_the_same_ones_again() -> None:
    made = objective(rate=0.5)
    batches = [Batch(i, some_ids(2, 20).numpy(), np.zeros((2, 20), int)) for i in range(60)]
    kinds = [isinstance(made.sample(b, 7), Repeats) for b in batches]
    assert kinds == [isinstance(made.sample(b, 7), Repeats) for b in batches]
    assert 18 <= sum(kinds) <= 42


def test_an_induction_model_reinforces_itself_until_it_is_trained_not_to() -> None:
    """Planted induction heads repeat what they have read; training makes each repeat less likely than the last."""
    model = Model.wrap(planted("induction").hf)
    drawn = np.random.default_rng(0)
    asked = [Repeated((int(r[0]),), tuple(int(x) for x in r[1:])) for r in drawn.integers(8, 31, (8, 6))]
    before = reinforcement(model, asked, 5)
    assert before["TP"][1] > 10 * before["TP"][0] and before["IP"][1] > 0.9 and before["TP"][4] > 0.8
    text = torch.from_numpy(drawn.integers(8, 31, (32, 31)))
    model.hf.requires_grad_(True)
    made = make_objective("ditto", Needs(31, {}, "causal"), ends=ENDS, gamma=0.5, rate=1.0)
    log = learn(model, TextRows(text, 8, 0, 31), made, steps=40, lr=1e-3)
    after = reinforcement(model, asked, 5)
    assert after["TP"][4] < 0.2 and after["TP"][4] <= after["TP"][1]
    assert log["repeat"].iloc[-1] < log["repeat"].iloc[0] / 3
    with pytest.raises(VesaliusError, match="steps=0"):
        DittoPlan(steps=0)


def test_probabilities_by_repeat_against_one_prompt_at_a_time() -> None:
    model = tiny("gpt2")
    one = Repeated((5, 9), (11, 12, 13))
    table = reinforcement(model, [one], 4)
    ids = torch.tensor([[5, 9, *(11, 12, 13) * 4]])
    p = model.hf(ids).logits[0].softmax(-1)
    for n in range(4):
        each = [float(p[1 + 3 * n + i, t]) for i, t in enumerate((11, 12, 13))]
        assert table["TP"][n] == pytest.approx(np.mean(each), rel=1e-5)
        if n:
            was = [float(p[1 + 3 * (n - 1) + i, t]) for i, t in enumerate((11, 12, 13))]
            assert table["IP"][n] == pytest.approx(np.mean([a > b for a, b in zip(each, was, strict=True)]))
    assert math.isnan(table["IP"][0])


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("The cat sat down. The cat sat down. It slept.", True),
        ("The cat sat down. It slept. The cat sat down.", False),
        ("Yes. Yes. Yes.", False),
        ("a b c d\na b c d\n", True),
        ("The  cat sat down! the cat sat down!", True),
        ("", False),
    ],
)
def test_a_loop_is_a_sentence_after_itself(text: str, loop: bool) -> None:
    assert has_loop(text) == loop


def test_the_whole_training_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
    monkeypatch.setattr("vesalius.change.repetition.make_objective", lambda *a, **k: objective(rate=1.0))
    monkeypatch.setattr("vesalius.change.repetition.needs_for", lambda *a: None)
    edit, log = break_loops(model, some_ids(4, 30), DittoPlan(steps=2, rows=2, lr=1e-3))
    assert len(log) == 2 and len(edit) > 5 and not any(p.requires_grad for p in model.hf.parameters())
    edit.undo(model)
    assert all(torch.equal(before[n], p) for n, p in model.hf.named_parameters())
