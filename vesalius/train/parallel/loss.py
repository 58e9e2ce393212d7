r"""Cross-entropy over a vocabulary that no process holds whole (Megatron-LM, arXiv 1909.08053, section 3).

Each process of a tensor group has the logits of its own slice of the vocabulary. Three numbers per position travel: the
largest logit, the sum of exponentials and the target's logit,

    log Z = m + log \sum_ranks \sum_v exp(x_v - m),        -log p(y) = log Z - x_y,

and the gradient, softmax(x) - onehot(y), is local. The same code serves logits that are whole, where nothing travels.
Also here, for reading: f and g, the two operators that all of tensor parallelism is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

IGNORED = -100  # the target that carries no loss


class TokenLosses(NamedTuple):
    """Per target, in float32: -log p (0 where ignored) and log of the softmax's denominator (also where ignored)."""

    nll: Tensor
    log_z: Tensor


class LossSum(NamedTuple):
    """The sum to differentiate, and detached sums for the log."""

    total: Tensor
    logs: Mapping[str, Tensor]


def local_range(size: int, ranks: int, rank: int) -> range:
    """The slice of `size` items that a rank holds when they are dealt in equal chunks, the last ones shorter or empty.

    Example:
        >>> [local_range(7, 3, r) for r in range(3)]
        [range(0, 3), range(3, 6), range(6, 7)]
    """
    chunk = -(-size // ranks)
    return range(min(rank * chunk, size), min((rank + 1) * chunk, size))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, targets: Tensor, start: int, group: Any) -> tuple[Tensor, Tensor]:
        width = local.shape[-1]
        x = local.float()  # (..., local vocabulary)
        lowest = torch.finfo(torch.float32).min
        top = x.amax(-1) if width else x.new_full(x.shape[:-1], lowest)
        if group is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        place = targets - start
        mine = (place >= 0) & (place < width)
        place = place.clamp(0, max(width - 1, 0))
        sum_exp = (x - top.unsqueeze(-1)).exp_().sum(-1)
        own = x.gather(-1, place.unsqueeze(-1)).squeeze(-1).where(mine, 0.0) if width else torch.zeros_like(top)
        if group is not None:
            both = torch.stack([sum_exp, own])
            dist.all_reduce(both, group=group)
            sum_exp, own = both.unbind()
        log_z = top + sum_exp.log()
        valid = targets != IGNORED
        ctx.save_for_backward(local, log_z, place, mine, valid)
        return (log_z - own).where(valid, 0.0), log_z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        local, log_z, place, mine, valid = ctx.saved_tensors
        of_nll = grads[0].where(valid, 0.0)
        p = (local.float() - log_z.unsqueeze(-1)).exp_()
        p.mul_((of_nll + grads[1]).unsqueeze(-1))
        if local.shape[-1]:
            p.scatter_add_(-1, place.unsqueeze(-1), -(of_nll * mine).unsqueeze(-1))
        return p.to(local.dtype), None, None, None


def token_losses(logits: Tensor, targets: Tensor) -> TokenLosses:
    """Cross-entropy of each target, with logits whole or split over the vocabulary.

    Args:
        logits: (..., vocabulary), a plain tensor, or a DTensor whose last axis is split over the tensor group.
        targets: (...) ids aligned with the logits; -100 carries no loss.
    """
    if not isinstance(logits, DTensor):
        return TokenLosses(*_CrossEntropy.apply(logits, targets, 0, None))  # type: ignore[no-untyped-call]
    mesh, last = logits.device_mesh, logits.ndim - 1
    if logits.placements not in ((Shard(last),), (Shard(-1),)):
        logits = logits.redistribute(placements=[Shard(last)])
    start = local_range(logits.shape[-1], mesh.size(), mesh.get_local_rank()).start
    return TokenLosses(*_CrossEntropy.apply(logits.to_local(), targets, start, mesh.get_group()))  # type: ignore[no-untyped-call]


def loss_sum(logits: Tensor, targets: Tensor, z_loss: float = 0.0, weights: Tensor | None = None) -> LossSum:
    """Sum over targets of cross-entropy, plus `z_loss` x log^2 Z (PaLM, arXiv 2204.02311) where asked.

    Args:
        logits, targets: as `token_losses` takes them.
        z_loss: factor of the squared log of the softmax's denominator.
        weights: (...) factor of each target's loss; None for 1.

    Returns:
        `total` to differentiate; `logs` with "nll" and, where asked, "z_loss", as sums over targets.

    Example:
        >>> round(loss_sum(torch.zeros(1, 2, 8), torch.tensor([[3, -100]])).total.item(), 4)  # log 8
        2.0794
    """
    nll, log_z = token_losses(logits, targets)
    if weights is not None:
        nll = nll * weights
    total = nll.sum()
    logs = {"nll": total.detach()}
    if z_loss:
        squares = log_z.square() * (targets != IGNORED)
        z = z_loss * (squares if weights is None else squares * weights).sum()
        total, logs["z_loss"] = total + z, z.detach()
    return LossSum(total, logs)


# -- for reading: the operators DTensor inserts on its own -------------------------------------------------------


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def f(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Before a matrix split by columns: identity forward, sum over the group backward.

    Each process sees only part of what x feeds, so that its gradient of x is one addend of the whole.
    """
    return _F.apply(x, group)  # type: ignore[no-untyped-call]


def g(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """After a matrix split by rows: sum over the group forward, identity backward."""
    return _G.apply(x, group)  # type: ignore[no-untyped-call]
