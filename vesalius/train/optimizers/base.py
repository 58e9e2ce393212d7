"""What our own optimizers share: checked settings, clipping inside, state of tensors alone, blocks that stay in cache.

The arithmetic has two forms. On accelerators lists of tensors go through `torch._foreach_*`, one kernel for many
tensors; elsewhere each tensor is walked in flat blocks small enough for the processor's cache, with two buffers used
over and over. Both give the same numbers to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vesalius.errors import VesaliusError

BLOCK = 131_072  # elements: half a megabyte of float32 a stream; measured best of 8 k to whole tensors
Work = list[tuple[Tensor, Tensor, dict[str, Tensor]]]  # parameter, gradient, state


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself. It shares memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Blocks:
    """Equal flat blocks of several tensors of one shape, and buffers of a block's size."""

    def __init__(self, buffers: int) -> None:
        self.count = buffers
        self._pool: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def __call__(self, *tensors: Tensor) -> Iterator[tuple[tuple[Tensor, ...], list[Tensor]]]:
        """Pairs (the tensors' blocks, buffers of their size); whole tensors where memory is not contiguous."""
        first = tensors[0]
        if not all(t.is_contiguous() for t in tensors) or any(t.dtype != first.dtype for t in tensors):
            yield tensors, [torch.empty_like(first) for _ in range(self.count)]
            return
        size = BLOCK * max(1, torch.get_num_threads())
        key = (first.dtype, first.device)
        if key not in self._pool:
            self._pool[key] = [torch.empty(0, dtype=first.dtype, device=first.device) for _ in range(self.count)]
        room = self._pool[key]
        if room and room[0].numel() < min(size, first.numel()):
            self._pool[key] = room = [
                torch.empty(min(size, first.numel()), dtype=first.dtype, device=first.device) for _ in room
            ]
        for parts in zip(*(t.view(-1).split(size) for t in tensors), strict=True):
            n = parts[0].numel()
            yield parts, [b[:n] for b in room]


class TensorOptimizer(Optimizer):
    """An optimizer whose whole state is tensors, so that it goes into safetensors and comes back to the bit.

    A parameter without a gradient is left alone, with its state. Steps are counted for each parameter (`step`, int64),
    gradients are never changed, and a step that is not taken (an overflow skipped by the trainer) changes nothing.

    Args:
        params: parameters or groups, as everywhere in torch.
        defaults: settings of a group; `max_grad_norm` (0 for none) and `foreach` are those of the first group.
    """

    buffers = 0  # blocks of scratch that `_one` wants

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._blocks = Blocks(self.buffers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._blocks = Blocks(self.buffers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A further group; its settings are checked as those of the first."""
        super().add_param_group(param_group)
        self._check(self.param_groups[-1])

    def _check(self, group: dict[str, Any]) -> None:
        """Refuses settings that cannot work."""
        for key in ("lr", "eps", "weight_decay", "max_grad_norm"):
            if key in group and not 0 <= float(group[key]) < float("inf"):
                raise VesaliusError(f"{key} = {group[key]} of {type(self).__name__}: give a number of 0 or more")
        for beta in (*group.get("betas", ()), *([group["momentum"]] if "momentum" in group else [])):
            if not 0 <= beta < 1:
                raise VesaliusError(f"a decay rate of {beta} for {type(self).__name__}: give one in [0, 1)")

    # -- one step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss (and the gradients) anew; rarely needed.

        Returns:
            What the closure gave, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor = self._clip()
        for index, group in enumerate(self.param_groups):
            work: Work = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise VesaliusError(f"{type(self).__name__} takes no sparse gradients; make the embedding dense")
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.int64)
                    self._start(group, p, state)
                work.append((p, p.grad if factor == 1 else p.grad * factor, state))
            self._group(index, group, work)
        return loss

    def _clip(self) -> float:
        """The factor that brings the norm of all gradients down to `max_grad_norm`; 1 where that is not asked."""
        limit = float(self.param_groups[0].get("max_grad_norm", 0.0))
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if limit == 0 or not grads:
            return 1.0
        norms = [whole(torch.linalg.vector_norm(g)).to(grads[0].device) for g in grads if g.numel()]
        total = float(torch.stack(norms).norm()) if norms else 0.0
        return min(1.0, limit / (total + float(self.param_groups[0].get("eps", 1e-8))))

    def _start(self, group: dict[str, Any], p: Tensor, state: dict[str, Tensor]) -> None:
        """Makes the state of a parameter that is seen for the first time."""
        raise NotImplementedError

    def _group(self, index: int, group: dict[str, Any], work: Work) -> None:
        """Updates the parameters of one group."""
        raise NotImplementedError

    # -- saving ---------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State as it was saved, in the precision it was saved in (torch casts it to the parameter's)."""
        super().load_state_dict(state_dict)
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        here = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(order, here, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                place = value.device if key == "step" else p.device
                self.state[p][key] = value.detach().to(place, copy=True)


def use_foreach(group: dict[str, Any], tensors: Iterable[Tensor]) -> bool:
    """Whether lists of tensors go through one kernel: as set, by default on accelerators."""
    chosen = group.get("foreach")
    return bool(chosen) if chosen is not None else all(t.device.type != "cpu" for t in tensors)


def by_step(work: Work) -> dict[int, Work]:
    """The work of a group by how many steps each parameter has taken before; counts this one."""
    found: dict[int, Work] = {}
    for item in work:
        found.setdefault(int(item[2]["step"]), []).append(item)
        item[2]["step"] += 1
    return found
