"""Filling in: asked as denoisers are trained, read both ways, decoded greedily."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny_hf

from vesalius.corpus.batches import Batch
from vesalius.corpus.grammar import LookupGrammar
from vesalius.errors import VesaliusError
from vesalius.evaluate.infill import infill, question
from vesalius.model import Model
from vesalius.train.masks import Mask, attention_inputs
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.denoising import splice
from vesalius.train.objectives.special import needs_for

GRAMMAR = LookupGrammar(8, seed=0)
TOKENIZER = GRAMMAR.tokenizer(("<extra_id_0>", "<extra_id_1>", "[NLU]"))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.wrap(tiny_hf("llama"), tokenizer=TOKENIZER, name="tiny")


def test_the_question_is_what_span_corruption_trains_on(model: Model):
    needs = needs_for(model.hf, TOKENIZER)
    objective = make_objective("span-corruption", needs, rate=0.15, span=3.0, end=False, mode_tokens=True)
    ids, _ = GRAMMAR.rows(6, 6)  # rows of 18 tokens: one span
    sample = objective.sample(Batch(0, ids, np.zeros_like(ids), None), seed=1)
    sentinel, mode = needs.special["sentinel_0"], needs.special["mode_r"]
    for row, targets in zip(sample.given["input_ids"].numpy(), sample.targets.numpy(), strict=True):  # type: ignore[attr-defined]
        start, asks = np.flatnonzero(row == sentinel)
        told = targets[targets != -100]
        text = splice(row[:asks], told, needs)
        assert told[0] == sentinel
        assert np.array_equal(
            question(text[None], np.array([start - 1]), len(told) - 1, sentinel, [mode])[0], row[: asks + 1]
        )


@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_tokens_are_those_of_a_plain_greedy_loop(model: Model, mask: str):
    ids, starts = GRAMMAR.rows(5, 5)
    found = infill(model, ids, starts, 2, mask=mask, batch=2)  # type: ignore[arg-type]
    sentinel = TOKENIZER.convert_tokens_to_ids("<extra_id_0>")
    for row, start, said in zip(ids, starts, found.tokens, strict=True):
        text = [*row[:start], sentinel, *row[start + 2 :], sentinel]
        for token in said:
            read = torch.tensor([text])
            prefix = torch.tensor([len(row) - 1]) if mask == "prefix" else torch.zeros(1, dtype=torch.long)
            more = attention_inputs(Mask.prefix(torch.zeros_like(read), prefix), model.hf)
            with torch.no_grad():
                text.append(int(model.hf(read, **more).logits[0, -1].argmax()))
            assert text[-1] == token
    assert np.array_equal(found.right, found.tokens == ids[np.arange(5)[:, None], starts[:, None] + range(2)])
    assert not np.array_equal(infill(model, ids, starts, 2, mask="prefix").tokens, ids[:, :2])


def test_what_follows_is_read_under_the_prefix_mask_alone(model: Model):
    ids, _ = GRAMMAR.rows(1, 6)
    sentinel = TOKENIZER.convert_tokens_to_ids("<extra_id_0>")
    given = torch.from_numpy(question(ids, np.array([4]), 1, sentinel))
    prefix = Mask.prefix(torch.zeros_like(given), torch.tensor([given.shape[1] - 1]))
    allowed = prefix.allowed()[0, 0]
    assert allowed[4, 5] and not allowed[4, -1]  # the first sentinel reads what follows, not the one that asks


def test_only_the_options_are_said(model: Model):
    ids, starts = GRAMMAR.rows(30, 5)
    among = infill(model, ids, starts, among=range(8, 16))
    assert ((among.tokens >= 8) & (among.tokens < 16)).all()
    assert among.accuracy == np.mean(among.tokens[:, 0] == ids[np.arange(30), starts])


def test_refusals_name_what_is_missing(model: Model):
    ids, starts = GRAMMAR.rows(2, 5)
    plain = Model.wrap(tiny_hf("llama"), tokenizer=GRAMMAR.tokenizer(), name="plain")
    with pytest.raises(VesaliusError, match="<sentinel_0>|extra_id"):
        infill(plain, ids, starts)
    with pytest.raises(VesaliusError, match="S2S"):
        infill(model, ids, starts, mode="S")
    with pytest.raises(VesaliusError, match="leave rows of 15"):
        infill(model, ids, starts, 20)
