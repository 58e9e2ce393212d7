"""Training in a few lines: the update is that of the optimizer that was named."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, some_ids, tiny

from vesalius.errors import UnknownName
from vesalius.train.learning import TextRows, learn
from vesalius.train.objectives import Needs, make_objective


def updates(optimizer: str) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """What one step changed in every parameter, the gradients of its loss, and its rate."""
    model, rows = tiny("gpt2"), some_ids(4, 9)
    model.hf.requires_grad_(True)
    with torch.enable_grad():
        logits = model.hf(input_ids=rows[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    grads = [p.grad.clone() for p in model.hf.parameters() if p.grad is not None]
    before = [p.detach().clone() for p in model.hf.parameters()]
    model.hf.zero_grad(set_to_none=True)
    source = TextRows(rows.numpy(), 4, 0, VOCAB)
    log = learn(model, source, make_objective("causal-lm", Needs(VOCAB, {}, "causal")), 1, 0.1, optimizer=optimizer)
    changed = [p - b for p, b in zip(model.hf.parameters(), before, strict=True)]
    return changed, grads, float(log["lr"].iloc[0])


def test_one_step_of_a_named_optimizer() -> None:
    changed, grads, rate = updates("sgdm")
    scale = torch.cat([g.flatten() for g in grads]).norm()
    clipped = min(1.0, 1.0 / float(scale))  # the trainer clips at 1
    for moved, grad in zip(changed, grads, strict=True):
        assert torch.allclose(moved, -rate * clipped * grad, atol=1e-5)
    moved, grads, rate = updates("adamw")
    for change, grad in zip(moved, grads, strict=True):  # a first step of Adam goes by the rate, whatever the size
        large = grad.abs() > 1e-4
        assert torch.allclose(change[large], -rate * grad[large].sign(), rtol=2e-3)
    with pytest.raises(UnknownName, match="adamw"):
        updates("adamsky")
