"""KL and its gradient without a kept softmax: the same as autograd through the whole head, on every family."""

from __future__ import annotations

import math

import pytest
import torch
from families import ALL, some_ids, tiny

from vesalius.lens import divergence
from vesalius.lens.base import residuals
from vesalius.lens.divergence import candidates, final_side, kl_to_final
from vesalius.model import Model

DECODER = torch.tensor([[0, 7, 8], [0, 9, 3], [0, 5, 6]])


def states(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Some states of the middle layer and the last, (state, d)."""
    found = residuals(model, some_ids(), decoder=DECODER if model.kind == "encoder-decoder" else None).states
    return found[1].flatten(0, 1).clone(), found[-1].flatten(0, 1).clone()


def plain(model: Model, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """KL through autograd and the model's whole ending."""
    log_p, log_q = (model.readout(h).log_softmax(-1) for h in (last, hidden))
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("family", ALL)
def test_value_and_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    hidden, last = states(model)
    weights = torch.linspace(0.5, 2, len(hidden))
    leaf = hidden.clone().requires_grad_()
    want = plain(model, leaf, last)
    (slope,) = torch.autograd.grad((want * weights).sum(), leaf)
    for rows in (None, 4):  # all at once, and a few at a time
        if rows is not None:
            monkeypatch.setattr(divergence, "BYTES", 4 * 97 * rows)
        again = hidden.clone().requires_grad_()
        got = kl_to_final(model, again, final_side(model, last))
        (got * weights).sum().backward()
        assert torch.allclose(got, want, atol=2e-4, rtol=1e-4)
        assert again.grad is not None and torch.allclose(again.grad, slope, atol=1e-4, rtol=1e-3)
    assert kl_to_final(model, last, final_side(model, last)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi", "opt-350m"])
def test_a_sample_of_words_estimates_the_sum_over_all(family: str) -> None:
    """Without bias: the mean over draws of the estimated sum is the sum; and all words give it exactly."""
    model = tiny(family)
    hidden, last = states(model)
    final = final_side(model, last)
    linear = model.unembedding
    assert linear is not None
    whole = kl_to_final(model, hidden, final)
    ratios = []
    for seed in range(200):
        words = candidates(linear, final.mean, 40, torch.Generator().manual_seed(seed))
        assert len(set(words.ids[:20].tolist())) == 20  # the likely ones, once each
        assert words.log_weights[20:].exp().sum() == pytest.approx(97 - 20)
        ratios.append((kl_to_final(model, hidden, final, words) - whole).exp())  # estimated sum over true one
    found = torch.stack(ratios)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - 1).abs() < 5 * error + 1e-5).all()
    assert (found.mean(0).log() >= torch.stack([r.log() for r in ratios]).mean(0)).all()


def test_the_estimates_gradient_is_its_own_derivative() -> None:
    model = tiny("phi")
    hidden, last = states(model)
    final, linear = final_side(model, last), model.unembedding
    assert linear is not None
    words = candidates(linear, final.mean, 30, torch.Generator().manual_seed(0))
    leaf = hidden.clone().requires_grad_()
    kl_to_final(model, leaf, final, words).sum().backward()
    move = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)) * 1e-2
    up, down = (kl_to_final(model, hidden + s * move, final, words).double().sum() for s in (1, -1))
    assert leaf.grad is not None
    assert float((leaf.grad * move).sum()) == pytest.approx(float(up - down) / 2, rel=2e-2)
