"""What changes by the step beside the parameters: plugs of the trainer.

A plug is told of every step, may add a term to the loss, keeps tensors of its own in checkpoints, and may change what
of the model is written there. Removal of norms (`train.norms`) is one, masks over weights are another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vesalius.train.objectives.base import Sample

KEPT = "plug/"  # before the number of the plug and the tensor's name, in a checkpoint's state


class Plug:
    """Does nothing; a subclass overrides what it needs."""

    def begin(self, step: int) -> None:
        """Before the forward pass of a step; what `end` did not follow is forgotten."""

    def read(self, micro: Sample) -> None:
        """Before the forward pass over some rows, in training and in evaluation."""

    def terms(self) -> Mapping[str, Tensor]:
        """Means over the rows just read, by name: their sum is added to the mean loss. In training alone."""
        return {}

    def ready(self, step: int) -> None:
        """When a step's gradients are complete, before they are clipped and used; may change or drop them."""

    def end(self, step: int) -> None:
        """After the update of a step."""

    def tensors(self) -> dict[str, Tensor]:
        """What a run that goes on needs."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Takes up what `tensors` gave after `done` steps; called after the model's weights were loaded."""

    def weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's weights as they are to be written."""
        return weights

    def written(self, folder: Path) -> None:
        """The model's files lie in a folder that is not yet a checkpoint."""
