"""How a finding came to be: the same measurements on one checkpoint of a training run after another.

For every checkpoint:

- the task: accuracy and the metric's mean, and a score for every head and MLP, by the same `find` that `circuit` uses;
- in-context learning: loss late in a row of held-out text minus loss early in it (nats; below 0 when context helps).
  Olsson et al. compare token 500 with token 50; here late is the last tenth of the row and early the tokens around its
  first tenth (5 to 15 %), since rows of small models are shorter;
- every head's attention on random tokens that are repeated once: `previous-token`, from each token to the one before;
  `induction` (prefix matching), from each repeated token to the one that followed it the first time;
  `duplicate-token`, to the same token's first occurrence. Averages of attention, 0 to 1. Random tokens say nothing
  themselves, so a high score is the head's own mechanism;
- loss on those repeats, first time and second time.

Olsson et al., "In-context Learning and Induction Heads", arXiv 2209.11895.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from vesalius.corpus.batches import Source
from vesalius.find import find
from vesalius.find.base import PairsSource
from vesalius.find.detectors.looks import require_causal
from vesalius.find.detectors.repeats import on_repeats
from vesalius.find.detectors.stimuli import repeated
from vesalius.model import Model
from vesalius.scores import Scores
from vesalius.tasks.performance import performance

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moment:
    """What was measured on one checkpoint.

    Attributes:
        step: the checkpoint.
        numbers: accuracy, metric, held_out (nats a token), in_context, repeat_first, repeat_second (nats).
        heads: part, layer, index, and a column for each of `detectors.repeats.LOOKS`.
        scores: of all parts in the task, or None without a task.
    """

    step: int
    numbers: dict[str, float]
    heads: pd.DataFrame
    scores: Scores | None


def moment(
    model: Model,
    step: int,
    *,
    task: PairsSource | None = None,
    method: str = "activation-patching",
    held_out: Source | None = None,
    batches: int = 4,
    seed: int = 0,
    memory_gb: float = 1.0,
) -> Moment:
    """Measures one checkpoint.

    Args:
        model: the checkpoint, opened on the bench; a causal language model.
        step: its step. task: what the parts are scored on, by `method`; None for none.
        held_out: rows the model was not trained on; the first `batches` batches are read.
        seed: of the repeated random tokens.

    Raises:
        VesaliusError: if the model is not causal.
    """
    require_causal(model, "dynamics")
    numbers: dict[str, float] = {}
    ids = repeated(model, seed)
    heads, first, second = on_repeats(model, ids)
    numbers |= {"repeat_first": first, "repeat_second": second}
    if held_out is not None:
        found = position_loss(model, held_out, batches)
        numbers |= {"held_out": found.targets, "in_context": in_context(found.by_position)}
    scores = None
    if task is not None:
        pairs = task.pairs(model)
        answers = performance(model, pairs)
        numbers |= {"accuracy": answers.accuracy, "chance": answers.chance, "metric": float(answers.clean.mean())}
        scores = find(method, model, pairs, seed=seed, memory_gb=memory_gb)
    return Moment(step, numbers, heads, scores)


class PositionLoss(NamedTuple):
    """Loss on rows of a source, in nats.

    Attributes:
        by_position: mean at each position over all tokens, (pos,).
        targets: mean over what the source calls targets (a synthetic task scores only some tokens).
    """

    by_position: Floats
    targets: float


@torch.no_grad()
def position_loss(model: Model, source: Source, batches: int) -> PositionLoss:
    """The loss of a model on the first batches of a source."""
    total, count = np.zeros(source.length), np.zeros(source.length)
    aimed, aims = 0.0, 0
    for step in range(batches):
        batch = source.batch(step)
        ids = torch.from_numpy(batch.ids)
        real = batch.segments[:, 1:] >= 0
        logits = model.logits(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="none"
        ).view(len(ids), -1)
        found = loss.cpu().double().numpy()  # (row, pos)
        total += (found * real).sum(0)
        count += real.sum(0)
        target = real if batch.mask is None else real & batch.mask[:, 1:]
        aimed, aims = aimed + float(found[target].sum()), aims + int(target.sum())
    by_position = np.divide(total, count, out=np.full(source.length, np.nan), where=count > 0)
    return PositionLoss(by_position, aimed / max(aims, 1))


def in_context(by_position: Sequence[float] | Floats) -> float:
    """The in-context-learning score: mean loss of the last tenth of the positions minus that around the first tenth.

    Example:
        >>> round(in_context([2.0] * 50 + [1.5] * 50), 3)
        -0.5
    """
    losses = np.asarray(by_position, dtype=float)
    n = len(losses)
    early = losses[n // 20 : max(n // 20 + 1, 3 * n // 20)]
    late = losses[min(n - 1, 9 * n // 10) :]
    if np.isnan(early).all() or np.isnan(late).all():
        return float("nan")
    return float(np.nanmean(late) - np.nanmean(early))
