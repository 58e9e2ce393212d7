"""Ways to share the work of training one model among processes, through torch.distributed alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from vesalius.errors import ModelError, UnknownName
from vesalius.model.anatomy import read_anatomy
from vesalius.train.parallel.gradients import sum_after_backward
from vesalius.train.parallel.state import ORDERS
from vesalius.train.parallel.tensor import split_model
from vesalius.train.parallel.world import ParallelError, World

STRATEGIES = ("ddp", "fsdp", "tensor", "ddp+tensor", "fsdp+tensor")


def parallelize(model: nn.Module, world: World, strategy: str = "ddp", *, sequence_parallel: bool = False) -> nn.Module:
    """Makes a model train on all processes of `world` together; one process alone gets it back as it is.

    Every process brings the same model (rank 0's weights are sent to all). Build the optimizer afterwards, over the
    parameters of `unwrap(model)`.

    Args:
        model: an ordinary transformers model; data parallelism takes any module. Changed in place.
        world: the processes. A tensor axis longer than 1 splits the matrices, whatever the strategy says.
        strategy: how the data ranks share: `ddp` keeps the model whole on each and averages gradients; `fsdp` keeps a
            piece of every parameter, gradient and optimizer state, and gathers one block at a time. `tensor` alone,
            or `ddp+tensor`, is `ddp`.
        sequence_parallel: with tensor parallelism, also split the positions between the split matrices.

    Raises:
        ParallelError: if the model cannot be split so.
    """
    ways = set(strategy.split("+"))
    if not ways <= {"ddp", "fsdp", "tensor"} or {"ddp", "fsdp"} <= ways:
        raise UnknownName("strategy", strategy, STRATEGIES)
    if "tensor" in ways and world.tensor == 1:
        raise ParallelError(f"strategy {strategy} needs a tensor group; start with --tensor-parallel 2 or more")
    if sequence_parallel and world.tensor == 1:
        raise ParallelError("sequence parallelism needs tensor parallelism; give --tensor-parallel 2 or more")
    if world.mesh is None or world.size == 1:
        return model.to(world.device)
    _same_weights(model)
    if world.tensor > 1:
        if not isinstance(model, PreTrainedModel):
            raise ParallelError(
                f"tensor parallelism splits transformers models, and this is {type(model).__name__}; train it with "
                "--tensor-parallel 1"
            )
        orders = split_model(model, world.mesh["tensor"], world.device, sequence=sequence_parallel)
        setattr(model, ORDERS, orders)
    if "fsdp" in ways:
        return _fully_shard(model, world)
    model.to(world.device)
    if world.tensor > 1:  # DDP does not take DTensors
        sum_after_backward(model, world.mesh["data"].get_group() if world.data > 1 else None)
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before 2.13
    options: dict[str, Any] = {"device_ids": ids, "init_sync": False, buffers: False}
    return DistributedDataParallel(model, process_group=world.mesh["data"].get_group(), **options)


def _same_weights(model: nn.Module) -> None:
    """Rank 0's weights on every process."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, 0)


def _fully_shard(model: nn.Module, world: World) -> nn.Module:
    """FSDP2, one group of parameters for each block and one for the rest."""
    assert world.mesh is not None
    mesh = world.mesh["data"]
    try:
        blocks = [b.module for stack in read_anatomy(model).stacks.values() for b in stack.blocks]
    except (ModelError, AttributeError):
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        blocks = list(max(lists, key=lambda found: len(list(found)))) if lists else []
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to(world.device)
