"""A split model's weights and optimizer state in the layout of one process, and back.

What one process would have saved is what is saved, so that a run may go on with another number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from vesalius.train.parallel.gradients import unwrap
from vesalius.train.parallel.tensor import Orders, local_piece
from vesalius.train.parallel.world import ParallelError

ORDERS = "_vesalius_orders"


class State(NamedTuple):
    """Plain tensors on the CPU, on rank 0; both empty elsewhere.

    Attributes:
        model: by the model's own names; tied entries share memory.
        optimizer: by "parameter name.key", such as "lm_head.weight.exp_avg".
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


@torch.no_grad()
def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> State:
    """Weights and optimizer state as one process would have them; called by all processes, filled on rank 0.

    Raises:
        ParallelError: if the optimizer keeps something that is not a tensor.
    """
    plain = unwrap(model)
    if isinstance(plain, FSDPModule):
        plain.reshard()  # an evaluation, which no backward pass follows, leaves the outer parameters gathered
    orders: Orders = getattr(plain, ORDERS, {})
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    weights: dict[str, Tensor] = {}
    seen: dict[int, Tensor | None] = {}  # tied tensors travel once
    tensors = {**dict(plain.named_parameters(remove_duplicate=False)), **dict(plain.named_buffers())}
    for name in plain.state_dict():
        source = tensors[name]
        if id(source) not in seen:
            seen[id(source)] = _gather(source, orders.get(name), main)
        whole = seen[id(source)]
        if whole is not None:
            weights[name] = whole
    kept: dict[str, Tensor] = {}
    for name, parameter in plain.named_parameters() if optimizer is not None else ():
        assert optimizer is not None
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ParallelError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as {type(value).__name__}; only tensors can be "
                    "saved"
                )
            whole = _gather(value, orders.get(name), main)
            if whole is not None:
                kept[f"{name}.{key}"] = whole
    return State(weights, kept)


@torch.no_grad()
def load_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Takes up what `gather_state` gave; every process is given all of it and keeps its piece.

    Args:
        model: parallelised as one likes, not only as it was when saved.
        optimizer: of the same class over the same parameters; None to load weights only.
        weights, tensors: the two parts of a `State`. Of tied weights one name is enough.

    Raises:
        KeyError: if a weight is missing, or a name belongs to no parameter.
        ValueError: if a shape differs.
    """
    plain = unwrap(model)
    orders: Orders = getattr(plain, ORDERS, {})
    targets = {**dict(plain.named_parameters(remove_duplicate=False)), **dict(plain.named_buffers())}
    wanted = {name: targets[name] for name in plain.state_dict()}
    if unknown := [name for name in weights if name not in targets]:
        raise KeyError(f"{unknown[0]} is no weight of this model ({len(unknown)} such)")
    given = {id(targets[name]) for name in weights}
    if missing := [name for name, target in wanted.items() if id(target) not in given]:
        raise KeyError(f"{missing[0]} is missing ({len(missing)} such)")
    for name, value in weights.items():
        target = targets[name]
        if value.shape != target.shape:
            raise ValueError(f"{name} is {tuple(value.shape)} in the file and {tuple(target.shape)} in the model")
        _local(target).copy_(_place(value, target, orders.get(name), of_local=True))
    if optimizer is not None and tensors is not None:
        _load_optimizer(dict(plain.named_parameters()), optimizer, tensors, orders)


def _load_optimizer(
    named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], orders: Orders
) -> None:
    names = {id(p): name for name, p in named.items()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for entry, value in tensors.items():
        name, _, key = entry.rpartition(".")
        if name not in named:
            raise KeyError(f"{entry} belongs to no parameter of this model")
        by_name.setdefault(name, {})[key] = value
    packed = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for group, numbers in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        for parameter, number in zip(group["params"], numbers["params"], strict=True):
            name = names[id(parameter)]
            if name in by_name:
                saved = by_name.pop(name)
                state[number] = {k: _place(v, parameter, orders.get(name)) for k, v in saved.items()}
    if by_name:
        raise KeyError(f"the optimizer does not train {next(iter(by_name))}, of which state was saved")
    optimizer.load_state_dict({**packed, "state": state})


def _gather(tensor: Tensor, order: tuple[int, Tensor] | None, main: bool) -> Tensor | None:
    whole = tensor
    if isinstance(tensor, DTensor):
        for axis in range(tensor.device_mesh.ndim):  # one after the other, in the reverse of the order of cutting
            done = [Replicate() if i <= axis else p for i, p in enumerate(tensor.placements)]
            if tuple(done) != tensor.placements:
                tensor = tensor.redistribute(placements=done)
        whole = tensor.to_local()
    if not main:
        return None
    whole = _reorder(whole.detach(), order, back=True)
    return whole.cpu().clone().contiguous()


def _place(whole: Tensor, like: Tensor, order: tuple[int, Tensor] | None, of_local: bool = False) -> Tensor:
    """The piece of a whole tensor that goes with a parameter: cut as the parameter is, if it has its shape."""
    whole = _reorder(whole, order)
    if not isinstance(like, DTensor) or (whole.ndim == 0 and not of_local):
        return whole if of_local else whole.clone()
    mesh = like.device_mesh
    same = whole.shape == like.shape
    placements = like.placements if same else tuple(Replicate() for _ in like.placements)
    piece = local_piece(whole, mesh, placements)
    if of_local:
        return piece
    piece = piece.clone().contiguous().to(mesh.device_type)
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _reorder(tensor: Tensor, order: tuple[int, Tensor] | None, back: bool = False) -> Tensor:
    """Deals the entries of the axis that was dealt, in a tensor that has it (row and column statistics may not)."""
    if order is None:
        return tensor
    axes = [axis for axis, size in enumerate(tensor.shape) if size == len(order[1])]
    if not axes:
        return tensor
    index = order[1].argsort() if back else order[1]
    return tensor.index_select(axes[-1] if len(axes) > 1 else axes[0], index.to(tensor.device))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
