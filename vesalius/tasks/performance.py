"""How well a model does a task: a circuit for a task that the model cannot do means nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.model import Model, Pairs
from vesalius.model.sweep import BATCH, read_logits
from vesalius.scores import bootstrap_mean
from vesalius.tasks.metrics import accuracy


@dataclass(frozen=True)
class Performance:
    """A model's answers on some prompts.

    Attributes:
        accuracy: share of prompts on which a right answer beats every wrong one; chance: what guessing gives.
        top1: share on which a right answer is the likeliest token of all.
        clean, corrupted: the metric of each prompt (example,).
    """

    accuracy: float
    chance: float
    top1: float | None
    clean: NDArray[np.float64]
    corrupted: NDArray[np.float64]

    def estimate(self, side: str, seed: int = 0) -> dict[str, float]:
        """Mean metric with its bootstrap interval."""
        values = self.clean if side == "clean" else self.corrupted
        low, high = bootstrap_mean(values, seed)
        return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def performance(model: Model, pairs: Pairs) -> Performance:
    """Runs both prompts of every pair once and scores the answers to the clean ones."""
    preferred, top, clean, corrupted, chances = [], [], [], [], []
    for group in pairs.batches(BATCH):
        logits, values = read_logits(model, group, "clean")
        found = accuracy(logits, group)
        preferred.append(found.preferred)
        chances += [found.chance] * group.n_examples
        if found.top1 is not None:
            top.append(found.top1)
        clean.append(values)
        corrupted.append(read_logits(model, group, "corrupted")[1])
    return Performance(
        float(torch.cat(preferred).float().mean()),
        float(np.mean(chances)),
        float(torch.cat(top).float().mean()) if top else None,
        torch.cat(clean).double().numpy(),
        torch.cat(corrupted).double().numpy(),
    )
