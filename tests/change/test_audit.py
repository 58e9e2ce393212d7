"""Forgetting is measured where it happened, where it carries over, and where it spills; hidden is not gone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vesalius.change.audit import (
    AuditPlan,
    Item,
    ask,
    forget_ratio,
    halves,
    matrix,
    predictors,
    random_labels,
    read_items,
    still_there,
    teach,
    unlearn,
)
from vesalius.errors import VesaliusError
from vesalius.model import Model

YES, NO = " w1", " w2"


def worded() -> Model:
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    return Model.wrap(tiny("llama").hf, made, name="llama")


def tasks() -> list[Item]:
    """`rule`: the first of two words, below 50 or above, decides. `learnt`: words with a value of its own each."""
    drawn = np.random.default_rng(0)
    rule = [Item("rule", f"w3 w{a} w{b}", (YES, NO), int(a >= 50)) for a in range(40, 60) for b in range(60, 72)]
    values = [tuple(f" w{v}" for v in drawn.choice(np.arange(75, 97), 2, replace=False)) for _ in range(32)]
    return [*rule, *(Item("learnt", f"w4 w{n}", v, int(drawn.integers(2))) for n, v in enumerate(values, 5))]


@pytest.fixture(scope="module")
def knowing() -> Model:
    """A model that was trained on both."""
    model = worded()
    teach(model, tasks(), AuditPlan(steps=400, rows=32, lr=3e-3))
    return model


def test_a_rule_is_forgotten_as_a_whole_and_facts_one_by_one(knowing: Model) -> None:
    before = {n: p.detach().clone() for n, p in knowing.hf.named_parameters()}
    logs = {}
    found = matrix(knowing, tasks(), AuditPlan(steps=10, rows=32, lr=5e-4, rounds=20), look=logs.__setitem__)
    found = found.set_index(["forgot", "asked", "items"])
    assert (found["before"] > 0.95).all()
    assert found.loc[("rule", "rule", "held out"), "ratio"] >= 0.8
    assert found.loc[("learnt", "learnt", "trained"), "ratio"] >= 0.9
    assert found.loc[("learnt", "learnt", "held out"), "ratio"] <= 0.2
    for task in ("rule", "learnt"):
        last = logs[task].iloc[-1]
        for kind in ("trained", "held out"):
            assert last[kind] == found.loc[(task, task, kind), "after"]
    assert all(torch.equal(before[n], p) for n, p in knowing.hf.named_parameters())
    told = predictors(knowing, tasks(), found.reset_index())
    assert told["task"].tolist() == ["rule", "learnt", "rank correlation"]


def test_a_probe_still_reads_what_is_no_longer_said(knowing: Model) -> None:
    rule = [i for i in tasks() if i.task == "rule"]
    train, held = halves(tasks(), "rule", 0)
    edit, _ = unlearn(knowing, train, AuditPlan(steps=10, rows=32, lr=5e-4, rounds=20))
    said = ask(knowing, held).right.mean()
    table = still_there(knowing, rule)
    edit.undo(knowing)
    known = still_there(knowing, rule)
    assert table["accuracy"].max() >= 0.9 * known["accuracy"].max() > table["control"].max() + 0.2
    assert abs(said - 0.5) < 0.1


def test_forgetting_goes_on_until_what_is_trained_on_is_at_chance(knowing: Model) -> None:
    """A short round leaves most of a task; rounds follow until it is gone, and no longer."""
    train, held = halves(tasks(), "rule", 0)
    left = {}
    for rounds in (1, 60):
        edit, log = unlearn(knowing, train, AuditPlan(steps=10, rows=16, lr=3e-4, rounds=rounds), held=held)
        left[rounds] = (ask(knowing, train).right.mean(), len(log) / 10)
        assert log["step"].is_unique
        asked = log.dropna()
        assert asked["step"].tolist() == log["step"].tolist()[9::10]
        assert asked["trained"].iloc[-1] == left[rounds][0]
        assert asked["held out"].iloc[-1] == ask(knowing, held).right.mean()
        edit.undo(knowing)
    assert left[1][0] > 0.55 + 1e-6 and abs(left[60][0] - 0.5) <= 0.05 + 1e-6
    assert left[1][1] == 1 and 1 < left[60][1] < 60
    turned = [replace(i, answer=1 - i.answer) for i in train]
    assert ask(knowing, turned).right.mean() == 0
    edit, log = unlearn(knowing, turned, AuditPlan(steps=1, rows=4, lr=1e-7, rounds=3))
    edit.undo(knowing)
    assert len(log) == 3  # always wrong is as far from chance as always right
    with pytest.raises(VesaliusError, match="0 rounds"):
        AuditPlan(rounds=0)


def test_answers_are_the_likeliest_texts() -> None:
    model = worded()
    items = [Item("t", "w5 w6", (" w7 w8", " w9"), 0), Item("t", "w6", (" w9", " w7"), 1)]
    found = ask(model, items)
    for row, item in enumerate(items):
        scores = []
        for choice in item.choices:
            ids = [int(w[1:]) for w in f"{item.prompt}{choice}".split()]
            n = len(item.prompt.split())
            log_p = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(n, len(ids))))
        assert found.chosen[row] == int(np.argmax(scores))
        p = np.exp(scores) / np.exp(scores).sum()
        assert found.confidence[row] == pytest.approx(p.max(), rel=1e-4)


def test_ratios_and_entropy() -> None:
    yes, no = np.ones(40, bool), np.zeros(40, bool)
    half = np.arange(40) % 2 == 0
    assert forget_ratio(yes, yes, 0.5)[0] == 0 and forget_ratio(yes, half, 0.5)[0] == pytest.approx(1)
    ratio, low, high = forget_ratio(yes, np.arange(40) % 4 != 0, 0.5)
    assert low < ratio < high and ratio == pytest.approx(0.5)
    assert np.isnan(forget_ratio(no, no, 0.5)[0])


def test_random_labels_agree_with_the_truth_as_often_as_a_guess() -> None:
    drawn = np.random.default_rng(0)
    for n, k in ((40, 2), (41, 2), (42, 4), (5, 3)):
        items = [Item("t", f"w{i}", tuple(f" w{c}" for c in range(k)), int(drawn.integers(k))) for i in range(n)]
        labels = random_labels(items, 1)
        assert labels == random_labels(items, 1) and (n < 9 or labels != random_labels(items, 2))
        assert [replace(a, answer=0) for a in labels] == [replace(a, answer=0) for a in items]
        for answers in (set(range(k)), *({a} for a in range(k))):  # of all items, and of those of one answer
            same = [b.answer == a.answer for a, b in zip(items, labels, strict=True) if a.answer in answers]
            assert len(same) // k <= sum(same) <= -(-len(same) // k)
    two = [Item("t", "w1", (" a", " b"), 0)] * 8 + [Item("t", "w1", (" a", " b", " c", " d"), 3)] * 8
    told = [a.answer == b.answer for a, b in zip(two, random_labels(two, 0), strict=True)]
    assert (sum(told[:8]), sum(told[8:])) == (4, 2)


def test_bad_files_are_told(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    good = {"task": "t", "prompt": "w1", "choices": ["a", "b"], "answer": 1}
    for row, why in (
        ({**good, "answer": 2}, "line 1: answer 2 is no number of a choice, 0 to 1"),
        ({**good, "answer": True}, "answer True"),
        ({**good, "choices": ["a"]}, "fewer than two choices"),
        ({**good, "prompt": 5}, "no prompt"),
        (good, "task 't' has 1 items; at least 8 are needed"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(VesaliusError, match=why):
            read_items(file)
    file.write_text("\n".join(json.dumps({**good, "prompt": f"w{i}"}) for i in range(8)))
    assert len(read_items(file)) == 8
