"""DITTO: a model that grows less sure of a sentence each time it is repeated.

Half of the steps are ordinary language modelling. In the others every row becomes a pseudo-repetition: a sentence of
the row, the sentence before it as a prefix, and the sentence again and again until the row is full. With p_n,l the
probability of token l in repeat n, from the second repeat on

    loss = - sum log(1 - | p_n,l - gamma sg[p_n-1,l] |)

where sg stops the gradient: the model learns to give each repeat gamma times the probability of the one before. gamma 0
is unlikelihood training on repeats (Welleck et al. 2019, arXiv 1908.04319). `one-sided` leaves probabilities that are
low enough alone, `mse` takes 3 (p - gamma p')^2.

Xu et al. 2022, "Learning to Break the Loop", arXiv 2206.02369, eq. 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.masks import PADDING
from vesalius.train.objectives import settings
from vesalius.train.objectives.base import IGNORED, Loss, Needs, Sample, generator
from vesalius.train.objectives.causal import CausalLM

Kind = Literal["nl", "one-sided", "mse"]
SURE = 1e-6  # keeps log(1 - x) finite
SHORTEST, LONGEST = 4, 48  # tokens of a sentence that is repeated
MSE = 3.0


@dataclass(frozen=True)
class Repeats(Sample):
    """Rows of repeats. period: tokens of the repeated sentence, (row,)."""

    period: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __getitem__(self, rows: slice) -> Repeats:
        return Repeats({k: v[rows] for k, v in self.inputs.items()}, self.targets[rows], None, self.period[rows])

    def to(self, device: torch.device | str) -> Repeats:
        inputs = {k: v.to(device) for k, v in self.inputs.items()}
        return Repeats(inputs, self.targets.to(device), None, self.period.to(device))


@dataclass(frozen=True)
class Ditto:
    """Objective `ditto`: language modelling, and repeats that are to be believed less and less.

    Attributes:
        needs: nothing beside the kind of model.
        ends: ids of tokens that end a sentence; see `sentence_ends`.
        gamma: what share of its probability a repeat may keep. rate: share of the steps that are repeats.
        kind: `nl`, `one-sided` or `mse`, see the module.
    """

    needs: Needs
    ends: tuple[int, ...] = ()
    gamma: float = 0.5
    rate: float = 0.5
    kind: Kind = "nl"
    _text: CausalLM = field(init=False, repr=False)

    def __post_init__(self) -> None:
        settings.kinds("ditto", self.needs.kind, ("causal",))
        settings.choice("ditto", "kind", self.kind, ("nl", "one-sided", "mse"))
        settings.number("ditto", "gamma", self.gamma, 0, 1)
        settings.number("ditto", "rate", self.rate, 0, 1)
        if not self.ends:
            raise VesaliusError("ditto.ends is empty; give the ids of the tokens that end a sentence")
        object.__setattr__(self, "_text", CausalLM(self.needs))

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Repeats in a share `rate` of the steps, the text as it is in the others."""
        rng = generator(seed, batch.step, "ditto")
        if rng.random() >= self.rate:
            return self._text.sample(batch, seed)
        ids, periods, starts = [], [], []
        for row, segments in zip(batch.ids, batch.segments, strict=True):
            made, period, start = repeated(row[segments != PADDING], np.array(self.ends), len(row), rng)
            ids.append(made)
            periods.append(period)
            starts.append(start)
        full = np.stack(ids)
        targets = full[:, 1:].copy()
        first = np.array(starts) + np.array(periods)  # the second repeat begins here
        targets[np.arange(targets.shape[1])[None] + 1 < first[:, None]] = IGNORED
        return Repeats(
            {"input_ids": torch.from_numpy(np.ascontiguousarray(full[:, :-1]))},
            torch.from_numpy(targets),
            None,
            torch.tensor(periods),
        )

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`; logs `repeat`, the mean probability of repeated tokens, in steps of repeats."""
        if not isinstance(sample, Repeats):
            return self._text.loss(outputs, sample)
        at = sample.targets != IGNORED
        aim = sample.inputs["input_ids"].roll(-1, 1)
        aim = torch.where(at, sample.targets, aim)
        log_p = outputs.logits.float().log_softmax(-1).gather(-1, aim.clamp_min(0)[..., None])[..., 0]  # (row, pos)
        p = log_p.exp()
        back = torch.arange(p.shape[1], device=p.device)[None] - sample.period[:, None]
        before = p.detach().gather(1, back.clamp_min(0))
        gap = p - self.gamma * before
        if self.kind == "mse":
            each = MSE * gap.square()
        else:
            away = gap.clamp_min(0) if self.kind == "one-sided" else gap.abs()
            each = -torch.log1p(-away.clamp(max=1 - SURE))
        return Loss(each[at].sum(), {"repeat": p.detach()[at].sum()})


def repeated(
    row: NDArray[np.int64], ends: NDArray[np.int64], length: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], int, int]:
    """A row of so many tokens: a prefix, and one sentence again and again.

    Where the row has no whole sentence of a fitting length, a stretch drawn from it stands for one.

    Returns:
        ids, tokens of the sentence, and where its first occurrence begins.
    """
    stops = np.flatnonzero(np.isin(row, ends))
    spans = [(int(a) + 1, int(b) + 1) for a, b in zip(stops, stops[1:], strict=False)]
    most = min(LONGEST, max(length // 4, 1))
    fitting = [s for s in spans if SHORTEST <= s[1] - s[0] <= most]
    if fitting:
        start, end = fitting[int(rng.integers(len(fitting)))]
        before = stops[stops < start - 1]
        first = int(before[-1]) + 1 if len(before) else max(0, start - most)
        first = max(first, start - most)
    else:
        size = int(rng.integers(min(SHORTEST, most), most + 1))
        start = int(rng.integers(0, max(1, len(row) - size)))
        start, end = start, min(start + size, len(row))
        first = max(0, start - most)
    prefix, sentence = row[first:start], row[start:end]
    times = -(-(length - len(prefix)) // len(sentence))
    made = np.concatenate([prefix, np.tile(sentence, times)])[:length]
    return made, len(sentence), len(prefix)


def sentence_ends(tokenizer: Any) -> tuple[int, ...]:
    """Ids of tokens whose text ends with a full stop, a question or exclamation mark, or holds a line break."""
    found = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if text.rstrip("\"')]» ").endswith((".", "?", "!", "。")) or "\n" in text:
            found.append(token)
    return tuple(found)
