"""KL(final || lens) of many states and its gradient, without a softmax that has to be kept.

With p the model's final distribution, y what the unembedding W reads, and z = W y + c the lens's logits,

    KL(p || softmax z) = sum p log p - y . u - p . c + log sum exp z,      u = W^T p
    dKL / dy           = W^T softmax(z) - u

so the final side is needed once for all layers, as two numbers and one vector u a state, and the lens's side is one
product with W each way. Logits live for a few rows at a time; autograd keeps the gradient at the state, (state, d), and
nothing of the size of the vocabulary. Heads that are more than a linear map (BERT's transform, Gemma 2's soft-cap) go
through autograd, a few rows at a time too.

`Candidates` estimates the one sum over the vocabulary from part of it: the words that the final distribution makes
likely, exactly, and a uniform sample of the others, weighted up. All other terms stay exact. The estimate of log sum
exp z is low by half the variance of the sum over its square (Jensen), which the sample's size bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.model import Model

BYTES = 32 * 2**20  # of logits that exist at once


@dataclass(frozen=True)
class Candidates:
    """Words that stand for the whole vocabulary.

    Attributes:
        ids: (word,). log_weights: logarithm of how many words each stands for, (word,).
        weight: their rows of the unembedding, (word, d). bias: theirs, or None.
    """

    ids: Tensor
    log_weights: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Final:
    """The final side of the divergence, for some states.

    Attributes:
        pull: u, (state, d); empty where the head is not linear.
        constant: sum p log p - p . c, (state,).
        log_p: (state, vocabulary) where the head is not linear, else None.
        mean: mean of p over the states, (vocabulary,).
    """

    pull: Tensor
    constant: Tensor
    log_p: Tensor | None
    mean: Tensor


def rows_at_once(vocabulary: int) -> int:
    """States whose logits fit into `BYTES`."""
    return max(1, BYTES // (4 * vocabulary))


@torch.no_grad()
def final_side(model: Model, hidden: Tensor) -> Final:
    """The final side from the residual stream after the last block, (state, d_model)."""
    linear = model.unembedding
    size = int(model.hf.config.vocab_size)
    pulls, constants, logs = [], [], []
    mean = hidden.new_zeros(size, dtype=torch.float32)
    for part in hidden.split(rows_at_once(size)):
        log_p = model.readout(part.to(model.dtype)).float().log_softmax(-1)
        p = log_p.exp()
        mean += p.sum(0) / len(hidden)
        constant = torch.where(p > 0, p * log_p, 0.0).sum(-1)
        if linear is None:
            logs.append(log_p)
        else:
            pulls.append((p.to(linear.weight.dtype) @ linear.weight).float())
            if linear.bias is not None:
                constant = constant - p @ linear.bias.float()
        constants.append(constant)
    none = hidden.new_zeros(len(hidden), 0)
    return Final(
        torch.cat(pulls) if linear is not None else none,
        torch.cat(constants),
        None if linear is not None else torch.cat(logs),
        mean,
    )


def candidates(linear: nn.Linear, mean: Tensor, number: int, generator: torch.Generator) -> Candidates:
    """Half the words by how likely the final distribution makes them, half drawn uniformly from the others.

    Args:
        linear: the unembedding. mean: the final distribution's mean over the states, (vocabulary,).
        number: words in all, below the size of the vocabulary. generator: draws (on the CPU).
    """
    likely = mean.topk(number // 2).indices
    rest = torch.ones(len(mean), dtype=torch.bool)
    rest[likely.cpu()] = False
    others = rest.nonzero()[:, 0]
    drawn = others[torch.randint(len(others), (number - len(likely),), generator=generator)]
    ids = torch.cat([likely, drawn.to(likely.device)])
    weights = torch.zeros(number, device=ids.device)
    weights[len(likely) :] = math.log(len(others) / len(drawn))
    bias = None if linear.bias is None else linear.bias[ids].float()
    return Candidates(ids, weights, linear.weight[ids], bias)


class _Divergence(torch.autograd.Function):
    """KL of each state, and its gradient kept from the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, model: Model, final: Final, words: Candidates | None) -> Tensor:
        pieces, gradients = [], []
        start = 0
        size = int(model.hf.config.vocab_size) if words is None else len(words.ids)
        for part in hidden.split(rows_at_once(size)):
            at = slice(start, start + len(part))
            value, gradient = _part(model, part, final, at, words)
            pieces.append(value)
            gradients.append(gradient)
            start += len(part)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return upstream[0].unsqueeze(-1) * gradient, None, None, None


def _part(model: Model, hidden: Tensor, final: Final, at: slice, words: Candidates | None) -> tuple[Tensor, Tensor]:
    """KL (state,) and its gradient (state, d) for the states `at`."""
    linear = model.unembedding
    norm = model.anatomy.main.final_norm
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        cast = leaf.to(model.dtype)
        normed = cast if norm is None else norm.module(cast)
        if linear is None:
            assert final.log_p is not None
            log_p = final.log_p[at]
            log_q = model.head(normed).float().log_softmax(-1)
            value = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            return value.detach(), gradient
        read = model.stem(normed)
    with torch.no_grad():
        weight = linear.weight if words is None else words.weight
        bias = linear.bias if words is None else words.bias
        logits = nn.functional.linear(read, weight).float()
        if bias is not None:
            logits += bias.float()
        if words is not None:
            logits += words.log_weights
        total = logits.logsumexp(-1)
        share = logits.sub_(total.unsqueeze(-1)).exp_()  # softmax, in place
        pull = final.pull[at]
        value = final.constant[at] - (read.float() * pull).sum(-1) + total
        slope = (share.to(weight.dtype) @ weight).float() - pull
    (gradient,) = torch.autograd.grad(read, leaf, slope.to(read.dtype))
    return value, gradient


def kl_to_final(model: Model, hidden: Tensor, final: Final, words: Candidates | None = None) -> Tensor:
    """KL(final || lens) of translated states, nats; differentiable in them, not in the model.

    Args:
        model: whose ending is used.
        hidden: what the lens hands to the final norm, (state, d_model), float32.
        final: from `final_side`, of the same states. words: estimate the sum over the vocabulary by these.

    Returns:
        (state,).
    """
    value: Tensor = _Divergence.apply(hidden, model, final, words)  # type: ignore[no-untyped-call]
    return value
