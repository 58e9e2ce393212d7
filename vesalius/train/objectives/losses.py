"""The loss of one token, its sum over targets, and the penalty that keeps the softmax's normaliser near one.

    nll = log Z - logit[target],   z-loss = lambda log^2 Z,   Z = sum exp(logits)

z-loss: Chowdhery et al. 2022, PaLM (arXiv 2204.02311), lambda 1e-4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from vesalius.train.objectives.base import IGNORED, Loss, Sample
from vesalius.train.parallel.loss import loss_sum


def token_loss(logits: Tensor, sample: Sample, z_loss: float = 0.0, chunk: int = 0) -> Loss:
    """The sum of weighted losses over the sample's targets.

    Args:
        logits: (row, pos, vocabulary), of any floating dtype; the loss is computed in float32 or wider.
        sample: targets and weights.
        z_loss: lambda; 0 for none.
        chunk: rows whose float32 copies exist at once, to save memory: beside the logits only their gradient is kept,
            in their dtype, made in the forward pass, so that the loss can be differentiated once. 0: by autograd.
    """
    if isinstance(logits, DTensor):  # split over the vocabulary by tensor parallelism
        found = loss_sum(logits, sample.targets, z_loss, sample.weights)
        return Loss(found.total, found.logs)
    if chunk and chunk < len(logits):
        chunked: Any = _Chunked.apply
        total, nll, z = chunked(logits, sample.targets, sample.weights, z_loss, chunk)
    else:
        total, nll, z = _sums(logits, sample.targets, sample.weights, z_loss)
    return Loss(total, {"nll": nll, "z_loss": z} if z_loss else {"nll": nll})


def _sums(logits: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is differentiated, nll, and the penalty, summed; the latter two without a gradient."""
    flat, aim = _wide(logits.flatten(0, -2)), targets.flatten()  # (row pos, vocabulary), (row pos,)
    if not z_loss and weights is None:
        total = F.cross_entropy(flat, aim, ignore_index=IGNORED, reduction="sum")
        return total, total.detach(), total.detach().new_zeros(())
    each = F.cross_entropy(flat, aim, ignore_index=IGNORED, reduction="none")
    nll = each.sum() if weights is None else each @ weights.flatten().to(each)
    if not z_loss:
        return nll, nll.detach(), nll.detach().new_zeros(())
    normaliser = each + flat.gather(-1, aim.clamp_min(0)[:, None])[:, 0]  # log Z, from what is computed anyway
    penalty = z_loss * (normaliser.square() @ _factor(aim, weights).to(each))
    return nll + penalty, nll.detach(), penalty.detach()


class _Chunked(torch.autograd.Function):
    """`_sums`, some rows at a time: d total / d logits = w ((1 + 2 lambda log Z) softmax - onehot), made at once."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums = []
        for start in range(0, len(logits), chunk):
            rows = slice(start, start + chunk)
            flat, aim = _wide(logits[rows].flatten(0, -2)), targets[rows].flatten()
            factor = _factor(aim, None if weights is None else weights[rows]).to(flat)
            at = aim.clamp_min(0)[:, None]
            chance = flat.log_softmax(-1)
            each = -chance.gather(-1, at)[:, 0]
            normaliser = each + flat.gather(-1, at)[:, 0]
            sums.append(torch.stack([each @ factor, z_loss * (normaliser.square() @ factor)]))
            if gradient is not None:
                chance.exp_().mul_((factor * (1 + 2 * z_loss * normaliser))[:, None])
                chance.scatter_add_(-1, at, -factor[:, None])
                gradient[rows] = chance.view(logits[rows].shape)
        nll, penalty = torch.stack(sums).sum(0)
        total = nll + penalty
        ctx.gradient = gradient
        ctx.mark_non_differentiable(nll, penalty)
        return total, nll, penalty

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("a loss computed in chunks was differentiated twice; set chunk to 0")
        return gradient.mul_(outer[0]), None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _factor(aim: Tensor, weights: Tensor | None) -> Tensor:
    """The weight of each target, 0 where there is none."""
    valid = aim != IGNORED
    return valid if weights is None else valid * weights.flatten()
