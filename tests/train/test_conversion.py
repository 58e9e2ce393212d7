"""A causal decoder made non-causal and back: objective and mask change, no tensor does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import VOCAB, some_ids, tiny_hf

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.conversion import conversion, prefix_logits
from vesalius.train.masks import Mask, leaks
from vesalius.train.objectives import Needs, make_objective
from vesalius.train.objectives.samples import model_inputs

SPECIAL = {"pad": 0, "eos": 1} | {f"sentinel_{i}": 2 + i for i in range(12)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
def test_no_prefix_is_the_causal_model(family):
    model = tiny_hf(family)
    ids = some_ids(3, 9)
    causal = model(ids).logits
    assert torch.allclose(prefix_logits(model, ids, torch.zeros(3, dtype=torch.long)), causal, atol=1e-5)
    seen = prefix_logits(model, ids, torch.tensor([0, 5, 9]))
    assert torch.allclose(seen[0], causal[0], atol=1e-5)
    assert not torch.allclose(seen[1], causal[1], atol=1e-2)


def test_a_causal_model_learns_as_a_non_causal_one_and_comes_back():
    model = tiny_hf("llama").train()
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    there = conversion("CD:FLM", "ND:MLM", model)
    objective = make_objective(there.objective, Needs(VOCAB, SPECIAL), **there.settings)
    ids = np.random.default_rng(0).integers(20, VOCAB, (8, 33))
    sample = objective.sample(Batch(0, ids, np.zeros_like(ids)), 0)
    assert leaks(tiny_hf("llama"), sample[0:2].mask, sample[0:2].given["input_ids"]) == (0, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = objective.loss(model(**model_inputs(sample, model)), sample).total / sample.count()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    back = conversion("ND:MLM", "CD:FLM")
    assert back.objective == "causal-lm" and back.settings == {}
    plain = make_objective(back.objective, Needs(VOCAB, SPECIAL)).sample(Batch(0, ids, np.zeros_like(ids)), 0)
    assert set(plain.inputs) == {"input_ids"}
    assert leaks(model.eval(), Mask.causal(torch.zeros(2, 9, dtype=torch.long)), some_ids(2, 9)) == (0, 0)


def test_what_changes_is_said():
    made = conversion("CD:FLM", "ND:UL2")
    assert "both ways" in made.changes[0] and "was on all tokens" in made.changes[1] and "modes" in made.changes[2]
    assert conversion("CD:PLM", "ND:PLM").changes == (
        "inputs are read both ways, targets from the left (mask: prefix)",
    )
    assert conversion("CD:FLM", "CD:FLM").changes == ()


@pytest.mark.parametrize(
    ("cells", "family", "words"),
    [
        (("CD:FLM", "ED:MLM"), None, "encoder-decoder"),
        (("CD:FLM", "ND:FLM"), None, "ND:PLM"),
        (("CD:FLM", "ND:MLN"), None, "did you mean 'ND:MLM'"),
        (("CD:FLM", "ND:MLM"), "bloom", "bloom"),
    ],
)
def test_refusals(cells, family, words):
    with pytest.raises(VesaliusError, match=words):
        conversion(*cells, tiny_hf(family) if family else None)
