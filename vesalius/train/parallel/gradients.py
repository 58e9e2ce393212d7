"""Gradients over processes: when they are summed, and their norm.

Three kinds of gradient stand side by side in one model: of whole parameters, which every process has alike; of split
ones, of which each has a piece; and of whole ones that saw only a part of the heads or positions, of which each has an
addend. DDP and FSDP sum over the data ranks on their own. For the rest, `sum_after_backward` hangs
one callback on the end of each backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

BUCKET_BYTES = 25 * 2**20  # summed in one message; the size DDP uses
_SUMS = "_vesalius_gradient_sums"


class GradientSums:
    """Completes the gradients of one model at the end of a backward pass, unless told to wait.

    Args:
        model: its parameters are watched.
        group: data ranks to average over; None if someone else does.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.group = group
        self.last = True
        self._due = False
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._seen)

    def _seen(self, _: Tensor) -> None:
        if self.last and not self._due:
            self._due = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    @torch.no_grad()
    def _finish(self) -> None:
        self._due = False
        for p in self.parameters:
            if isinstance(p.grad, DTensor) and isinstance(p, DTensor) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements)
        if self.group is not None:
            average([_local(p.grad) for p in self.parameters if p.grad is not None], self.group)


def sum_after_backward(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Installs `GradientSums` on a model."""
    setattr(model, _SUMS, GradientSums(model, group))


def average(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Averages tensors over a group in place, in few messages."""
    size = dist.get_world_size(group)
    bucket: list[Tensor] = []
    waiting: list[tuple[Tensor, list[Tensor], Any]] = []

    def send() -> None:
        if bucket:
            flat = torch.cat([t.reshape(-1) for t in bucket]).div_(size)
            waiting.append((flat, list(bucket), dist.all_reduce(flat, group=group, async_op=True)))
            bucket.clear()

    for tensor in tensors:
        full = sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            send()
        bucket.append(tensor)
    send()
    for flat, members, work in waiting:
        work.wait()
        for tensor, piece in zip(members, flat.split([t.numel() for t in members]), strict=True):
            tensor.copy_(piece.view_as(tensor))


@contextlib.contextmanager
def synchronised(model: nn.Module, last: bool = True) -> Iterator[None]:
    """Around the forward pass of a micro-batch: gradients travel only in the backward pass of the last one.

    Example:
        >>> with synchronised(torch.nn.Linear(2, 2), last=False):
        ...     pass
    """
    plain = unwrap(model)
    sums = getattr(plain, _SUMS, None)
    if sums is not None:
        sums.last = last  # holds through the backward pass that follows
    if isinstance(plain, FSDPModule):
        plain.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients as one process would see them: pieces are summed over processes, wholes counted once."""
    local: dict[tuple[str, ...], list[Tensor]] = {}
    groups: dict[tuple[str, ...], list[dist.ProcessGroup]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        key: tuple[str, ...] = ()
        if isinstance(grad, DTensor):
            if any(p.is_partial() for p in grad.placements):
                grad = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
            over = [
                grad.device_mesh.get_group(axis)
                for axis, placement in enumerate(grad.placements)
                if not placement.is_replicate()
            ]
            key = tuple(g.group_name for g in over)
            groups[key] = over
        local.setdefault(key, []).append(_local(grad))
    if not local:
        return torch.zeros(())
    totals = []
    for key in sorted(local):
        norms = torch.stack([n.float() for n in torch._foreach_norm(local[key])])
        square = norms.square().sum()
        for group in groups.get(key, []):
            dist.all_reduce(square, group=group)
        totals.append(square)
    return torch.stack(totals).sum().sqrt()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales all gradients so that their common norm is at most `max_norm`; returns the norm before.

    Works on any mixture of plain tensors and DTensors, over one mesh or several; called by all processes.

    Args:
        parameters: whose `grad` is scaled in place.
        max_norm: the limit; None only measures.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> float(clip_grad_norm([p], 1.0)), p.grad.norm().item() < 1.0001
        (5.0, True)
    """
    listed = list(parameters)
    norm = grad_norm(listed)
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
        for parameter in listed:
            if parameter.grad is not None:
                piece = _local(parameter.grad)
                piece.mul_(factor.to(piece.device, piece.dtype))
    return norm


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
