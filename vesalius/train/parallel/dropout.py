"""Dropout in a split model: common masks where activations are whole, each process's own where they are split.

Equal masks inside a split region would drop the same places of different heads; different masks outside would let the
copies of the residual stream drift apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vesalius.model.anatomy import Block, Stack


class Streams:
    """Random numbers for dropout: one stream for the whole group, and inside split regions one for each process.

    Entering draws a number from the common stream, so that what follows is a function of it (and a block that is
    computed again draws the same masks), and leaving takes the common stream up where it was left.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self.device, self.rank = device, rank
        self._common: Tensor | None = None

    def enter(self) -> None:
        if self._common is not None:
            return
        draw = int(torch.randint(2**40, ()))
        if self.device.type == "cuda":
            self._common = torch.cuda.get_rng_state(self.device)
            torch.cuda.manual_seed(draw + 1_000_003 * (self.rank + 1))
        else:
            self._common = torch.get_rng_state()
            torch.default_generator.manual_seed(draw + 1_000_003 * (self.rank + 1))

    def forget(self, *_: Any) -> None:
        """A forward pass begins: what an error, or a block computed again, left open is closed."""
        self._common = None

    def leave(self) -> None:
        if self._common is None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._common, self.device)
        else:
            torch.set_rng_state(self._common)
        self._common = None


def first_matrices(block: Block) -> list[nn.Module]:
    """The MLP's first matrix, or gate and up."""
    if isinstance(block.mlp_in, nn.Linear | Conv1D):
        return [block.mlp_in]
    matrices = [m for m in block.mlp_in.modules() if isinstance(m, nn.Linear | Conv1D)]
    return [m for m in matrices if m is not block.down]


def drops(model: PreTrainedModel) -> bool:
    """Whether anything in a model drops out, by its modules and its config."""
    modules = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    numbers = [v for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, float)]
    return modules or any(v > 0 for v in numbers)


def separate(model: nn.Module, stack: Stack, streams: Streams, sequence: bool) -> None:
    """Inside split regions, and wherever positions are split, each process drops out its own."""

    def entering(module: nn.Module, *_: Any) -> None:
        if module.training:
            streams.enter()

    def leaving(*_: Any) -> None:
        streams.leave()

    model.register_forward_pre_hook(streams.forget)
    if sequence:
        assert stack.final_norm is not None
        stack.blocks[0].module.register_forward_pre_hook(entering)
        stack.final_norm.module.register_forward_hook(leaving)
        return
    for block in stack.blocks:
        for module in {*block.projections.values(), *first_matrices(block)}:
            module.register_forward_hook(entering)
        for module in (block.o, block.down):
            module.register_forward_pre_hook(leaving)
