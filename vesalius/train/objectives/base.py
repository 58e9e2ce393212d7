"""What a model is trained to do: from rows of tokens to inputs, targets and a loss.

An objective is made of two pure functions. `sample` turns the whole batch of a step into what the model reads and what
it must foretell; its randomness is a function of (seed, step), so it needs no state. `loss` compares the model's logits
with the targets, as a sum and a count: the trainer adds both over micro-batches and processes before it divides, so
that neither changes the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vesalius.corpus.batches import Batch
from vesalius.registry import Registry

IGNORED = -100  # the target that carries no loss


@dataclass(frozen=True)
class Sample:
    """What one step reads and foretells; the first axis of every tensor is the row.

    Attributes:
        inputs: what the model's `forward` takes: `input_ids` (row, pos), and where needed `attention_mask` ((row, pos),
            or (row, 1, query, key) bool), `position_ids`, `token_type_ids`, `decoder_input_ids`, ...
        targets: (row, pos) ids, already aligned with the logits (no shift follows); -100 carries no loss.
        weights: (row, pos) factor of each target's loss; None for 1.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: slice) -> Sample:
        """A part of the rows."""
        weights = None if self.weights is None else self.weights[rows]
        return Sample({k: v[rows] for k, v in self.inputs.items()}, self.targets[rows], weights)

    def to(self, device: torch.device | str) -> Sample:
        """On another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return Sample({k: v.to(device) for k, v in self.inputs.items()}, self.targets.to(device), weights)

    def count(self) -> float:
        """What the sum of losses is divided by: the number of targets, or the sum of their weights."""
        valid = self.targets != IGNORED
        return float(valid.sum() if self.weights is None else (self.weights * valid).sum())


class Loss(NamedTuple):
    """A sum over targets, to be divided by the count over all processes; and numbers for the log, summed likewise."""

    total: Tensor  # what is differentiated
    logs: Mapping[str, Tensor] = {}  # sums over targets: nll, z_loss, ...


class Objective(Protocol):
    """Turns batches into samples, and logits into a loss."""

    def sample(self, batch: Batch, seed: int) -> Sample:
        """The whole batch of a step; the same for the same (batch, seed), whatever came before."""
        ...

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """The sum of losses over the sample's targets, given the model's output (with `.logits`)."""
        ...


@dataclass(frozen=True)
class Needs:
    """What an objective must know of the model and the tokenizer it trains."""

    vocab_size: int
    special: dict[str, int] = field(default_factory=dict)  # ids by name: pad, eos, bos, mask, cls, sep, sentinels...
    kind: str = "causal"  # causal, masked, encoder-decoder


OBJECTIVES: Registry[Any] = Registry("objective")


def generator(seed: int, step: int, stream: str = "objective") -> np.random.Generator:
    """Random numbers that belong to one step and one use."""
    return np.random.default_rng([seed, step, *stream.encode()])
