"""Samples whose attention mask is written out only when it is read, row by row and on the device.

A mask of pairs takes length x length bytes a row: for a whole batch that is more than the tokens and the model's
activations together. So a sample keeps the description (`Mask`), which is sliced and moved like any tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vesalius.model.global_attention import global_attention
from vesalius.train.masks import Mask, attention_inputs, positions
from vesalius.train.objectives.base import Sample


class MaskedSample(Sample):
    """A sample with a described mask; `inputs` holds it as (row, 1, query, key) bool, made at first use.

    Args:
        given: the inputs beside the mask and the positions.
        mask: who may read whom.
        targets: see `Sample`.
        weights: see `Sample`.
        restart_positions: count positions from the start of each document.
    """

    def __init__(
        self,
        given: dict[str, Tensor],
        mask: Mask,
        targets: Tensor,
        weights: Tensor | None = None,
        restart_positions: bool = False,
    ) -> None:
        for name, value in {
            "given": given,
            "mask": mask,
            "targets": targets,
            "weights": weights,
            "restart_positions": restart_positions,
            "_made": {},
        }.items():
            object.__setattr__(self, name, value)

    given: dict[str, Tensor]
    mask: Mask
    restart_positions: bool
    _made: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"MaskedSample({len(self)} rows, {sorted(self.given)}, {self.mask.shape} mask)"

    @property
    def inputs(self) -> dict[str, Tensor]:
        if not self._made:
            self._made.update(self.given)
            self._made["attention_mask"] = self.mask.allowed()
            if self.restart_positions:
                self._made["position_ids"] = positions(self.mask.query)
        return self._made

    def __getitem__(self, rows: slice) -> MaskedSample:
        weights = None if self.weights is None else self.weights[rows]
        given = {k: v[rows] for k, v in self.given.items()}
        return MaskedSample(given, self.mask[rows], self.targets[rows], weights, self.restart_positions)

    def to(self, device: torch.device | str) -> MaskedSample:
        weights = None if self.weights is None else self.weights.to(device)
        given = {k: v.to(device) for k, v in self.given.items()}
        return MaskedSample(given, self.mask.to(device), self.targets.to(device), weights, self.restart_positions)


def model_inputs(sample: Sample, model: nn.Module) -> dict[str, Any]:
    """What the model's `forward` is called with: the sample's inputs, the mask in the form this model takes it.

    Raises:
        VesaliusError: if the model cannot attend as the objective asks, naming the family and what to do.
    """
    given = sample.given if isinstance(sample, MaskedSample) else sample.inputs
    more = global_attention(model, given["input_ids"]) if "input_ids" in given else {}
    if not isinstance(sample, MaskedSample):
        return {**given, **more}
    return {**given, **more, **attention_inputs(sample.mask, model, sample.restart_positions)}


def read_tokens(sample: Sample) -> int:
    """How many tokens the model reads, without writing a mask out."""
    given = sample.given if isinstance(sample, MaskedSample) else sample.inputs
    return sum(v.numel() for k, v in given.items() if k.endswith("input_ids"))
