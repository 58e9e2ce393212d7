"""Few-shot questions: log-probabilities against a plain loop, and examples that are what they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny_hf

from vesalius.corpus.symbols import symbol_tokenizer
from vesalius.errors import VesaliusError
from vesalius.evaluate.shots import Item, examples, few_shot, log_probs, relation, relations
from vesalius.model import Model

WORDS = symbol_tokenizer(90)


def say(*ids: int) -> str:
    return WORDS.decode(list(ids))


def model(family: str) -> Model:
    return Model.wrap(tiny_hf(family), tokenizer=WORDS, name=family)


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gpt2", "bloom"])
@pytest.mark.parametrize("head", [(), (3, 4, 5, 6)])
def test_log_probabilities_are_those_of_one_row_at_a_time(family: str, head: tuple[int, ...]):
    tiny = model(family)
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(0, 90, n).tolist(), rng.integers(0, 90, k).tolist()) for n, k in ((2, 1), (5, 3), (1, 2), (4, 1))
    ]
    pairs = [(say(*head, *p), " " + say(*a)) for p, a in rows]
    found = log_probs(tiny, pairs, batch=3)
    for (prompt, answer), value in zip(rows, found, strict=True):
        ids = torch.tensor([[*head, *prompt, *answer]])
        with torch.no_grad():
            chance = tiny.hf(ids).logits[0].log_softmax(-1)
        start = len(head) + len(prompt)
        plain = sum(float(chance[start + i - 1, a]) for i, a in enumerate(answer))
        assert value == pytest.approx(plain, abs=1e-4)
    assert np.allclose(log_probs(tiny, pairs, "token"), found / [1, 3, 2, 1])


def test_the_likeliest_option_is_said_and_the_margin_has_its_sign():
    tiny = model("llama")
    items = [Item(say(i), (say(i + 20), say(i + 40), say(i + 60)), "g") for i in range(6)]
    shown = [Item(say(i), (say(i + 20),)) for i in range(10, 16)]
    found = few_shot(tiny, items, shown, k=2, seed=1, pattern="{ask} {answer} ")
    head = examples(shown, 2, 1, pattern="{ask} {answer} ")[0]
    for item, row in zip(items, found.to_dict("records"), strict=True):
        each = log_probs(tiny, [(head + item.ask, " " + o) for o in item.options])
        assert row["said"] == item.options[int(each.argmax())] and row["right"] == (row["said"] == item.answer)
        assert row["margin"] == pytest.approx(each[0] - max(each[1:]), abs=1e-5) and (row["margin"] > 0) == row["right"]


def test_shuffled_labels_are_the_same_labels_and_none_is_right():
    ask, show = relation("capital")
    true, drawn = examples(show, 5, seed=4)
    wrong, same = examples(show, 5, seed=4, labels="shuffled")
    assert drawn == same and sorted(true.split()) == sorted(wrong.split())
    assert not set(true.splitlines()) & set(wrong.splitlines())
    assert examples(show, 0)[0] == ""


def test_the_relations_ask_a_hundred_questions_of_four_different_options():
    asked = [item for name in relations() for item in relation(name)[0]]
    assert len(asked) == 100
    for name in relations():
        ask, show = relation(name)
        assert len(show) == 8 and not {i.ask for i in ask} & {i.ask for i in show}
        assert all(len(set(i.options)) == 4 and i.ask in i.options for i in (*ask, *show))


def test_what_cannot_be_asked_is_refused():
    ask, show = relation("plural")
    with pytest.raises(VesaliusError, match="both asked and shown"):
        few_shot(model("llama"), ask, ask, k=1)
    with pytest.raises(VesaliusError, match="9 examples of 8"):
        examples(show, 9)
    with pytest.raises(VesaliusError, match="no answer"):
        log_probs(model("llama"), [(say(1), "")])
