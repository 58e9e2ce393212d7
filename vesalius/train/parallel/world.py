"""The processes that train one model: who they are, how they are grouped, and sums over them.

torchrun starts `world size` processes and tells each its rank. They form a grid of (data, tensor): ranks i ... i+t-1
hold the pieces of one copy of the model (a tensor group), ranks at equal positions in those groups hold the same piece
and read different rows (a data group).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vesalius.errors import VesaliusError
from vesalius.train.parallel.gradients import synchronised

Number = TypeVar("Number", float, Tensor)


class ParallelError(VesaliusError):
    """A split over processes that cannot be made, and which ones can."""


@dataclass(frozen=True)
class World:
    """One process's view of all of them; a context manager that leaves the group at its end.

    Attributes:
        rank, size: this process among all.
        mesh: grid with the axes "data" and "tensor"; None for one process outside torchrun.
        device: where this process computes.
        backend: "gloo" on CPU, "nccl" on CUDA (with gloo for tensors on CPU), "none" for one process outside torchrun.

    Example:
        >>> with World.single() as world:
        ...     world.is_main, world.rows(8), world.sum(2.5)
        (True, slice(0, 8, None), 2.5)
    """

    rank: int
    size: int
    mesh: DeviceMesh | None
    device: torch.device
    backend: str

    @classmethod
    def single(cls, device: torch.device | str | None = None) -> World:
        """One process alone."""
        return cls(0, 1, None, torch.device(device) if device is not None else _device(0), "none")

    @classmethod
    def start(cls, tensor_parallel: int = 1, device: str | None = None) -> World:
        """Joins the processes torchrun started, as its environment tells; alone when there is none.

        Args:
            tensor_parallel: processes that share one copy of the model.
            device: "cpu" or "cuda"; by default CUDA where there is a card for each process of this machine.

        Raises:
            ParallelError: if `tensor_parallel` does not divide the number of processes.
        """
        if tensor_parallel < 1:
            raise ParallelError(f"--tensor-parallel {tensor_parallel} is not a number of processes; give 1 or more")
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            if tensor_parallel > 1:
                raise ParallelError(
                    f"--tensor-parallel {tensor_parallel} needs {tensor_parallel} processes, and this is one; start "
                    f"with: torchrun --nproc-per-node {tensor_parallel} -m vesalius train ..."
                )
            return cls.single(device)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if size % tensor_parallel:
            works = ", ".join(str(t) for t in range(1, size + 1) if size % t == 0)
            raise ParallelError(
                f"--tensor-parallel {tensor_parallel} does not divide {size} processes; these would: {works}"
            )
        local = int(os.environ.get("LOCAL_RANK", rank))
        where = _device(local, device, processes=int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        backend = "nccl" if where.type == "cuda" else "gloo"
        if where.type == "cuda":
            torch.cuda.set_device(where)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo", rank=rank, world_size=size)
        shape = (size // tensor_parallel, tensor_parallel)
        return cls(rank, size, init_device_mesh(where.type, shape, mesh_dim_names=("data", "tensor")), where, backend)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    @property
    def data(self) -> int:
        """Groups that read different rows."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def tensor(self) -> int:
        """Processes that share one copy of the model."""
        return 1 if self.mesh is None else self.mesh["tensor"].size()

    @property
    def data_rank(self) -> int:
        """Which rows this process reads; the number to seed dropout with, so that a tensor group agrees."""
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """Which piece of the model this process holds."""
        return self.rank % self.tensor

    def rows(self, n: int) -> slice:
        """The rows of a batch of `n` that this process reads.

        Raises:
            ParallelError: if the data ranks do not divide the batch.
        """
        if n % self.data:
            near = max(n // self.data, 1) * self.data
            raise ParallelError(
                f"{n} rows do not divide among {self.data} data-parallel processes; a batch of {near} would"
            )
        each = n // self.data
        return slice(self.data_rank * each, (self.data_rank + 1) * each)

    def sum(self, value: Number) -> Number:
        """The sum over the data ranks of a number or a tensor (which is not changed)."""
        if self.mesh is None or self.data == 1:
            return value.detach().clone() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            total = value.detach().clone().contiguous()
            dist.all_reduce(total, group=self.mesh["data"].get_group())
            return total
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.mesh["data"].get_group())
        return float(total)

    def scale(self, count: float) -> float:
        """What a local sum of losses is multiplied by before `backward`, given the global count it is divided by.

        Data parallelism averages gradients over D data ranks, so that D / count x the local sum has the gradient of
        (sum over all ranks) / count: the one-process gradient.
        """
        return self.data / count

    def agree(self, value: bool) -> bool:
        """Whether any process says so; the same answer on all."""
        if self.mesh is None or self.size == 1:
            return value
        votes = torch.tensor(int(value), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)

    def local(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward pass of a micro-batch: all but the last keep their gradients to themselves."""
        return synchronised(model, last)

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.mesh is not None:
            dist.barrier()

    def close(self) -> None:
        """Leaves the process group; harmless when called twice or alone."""
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _device(local: int, wanted: str | None = None, processes: int = 1) -> torch.device:
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= processes else "cpu"
    return torch.device(wanted, local) if wanted == "cuda" else torch.device(wanted)
