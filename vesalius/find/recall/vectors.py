"""Step 3: an MLP's intercept as a function vector: what it adds whatever the topic turns the topic into its answer.

The intercept b of an MLP (see `regression`) is added to the stream at END of prompts that hold a topic there and ask
nothing ("We talked about France"), after the block it comes from. If b carries the relation, the answer's lead over the
relation's other answers grows. Control: random vectors of the same length. Lv et al., arXiv 2403.19521, sec. 5; the
name is from Todd et al. 2023, arXiv 2310.15213.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.find.path_patching import AtReads
from vesalius.find.recall.questions import Asked, First, tensors
from vesalius.find.recall.regression import Mixing
from vesalius.model import Intervention, Model, Pairs
from vesalius.model.intervene import Op
from vesalius.model.pairs import Metric
from vesalius.model.sweep import Recording, sweep
from vesalius.parts import Part, parse_part
from vesalius.scores import bootstrap_mean
from vesalius.tasks.encode import Encoder, problem
from vesalius.tasks.facts import examples

Floats = NDArray[np.float64]
NEUTRAL = "We talked about {topic}"
RANDOM = 1  # vectors of a control, each


@dataclass(frozen=True)
class Change:
    """One change at END: parts scaled by a number, or a vector added to one."""

    parts: tuple[Part, ...]
    op: Op
    value: Tensor | float


def at_end(
    model: Model, pairs: Pairs, changes: Sequence[Change], metric: Metric | None = None
) -> tuple[Floats, Floats]:
    """The metric under each change at END, (change, prompt), and without any, (prompt,)."""
    pairs = AtReads(**vars(pairs if metric is None else replace(pairs, metric=metric)))

    def variants(recording: Recording) -> list[list[Intervention]]:
        where = recording.pairs.reads[:, 0]
        return [[Intervention(p, c.op, c.value, where) for p in c.parts] for c in changes]

    found = sweep(model, pairs, variants, base="clean")
    return found.values, found.base


def neutral(model: Model, asked: Asked, answers: Mapping[str, str], seed: int = 0) -> Pairs:
    """The topics of some prompts at END of a prompt that asks nothing."""
    encoder = Encoder(model.tokenizer)
    topics = list(dict.fromkeys(asked.topics))
    made = examples(
        {t: answers[t] for t in topics}, [(NEUTRAL, t) for t in topics], dict.fromkeys(topics, 1),
        random.Random(f"neutral/{seed}"),
    )  # fmt: skip
    return tensors(model, [e for e in made if problem(encoder, e, "") is None])


def effects(
    model: Model, pairs: Pairs, mixings: Sequence[Mixing], scales: Sequence[float] = (1.0, 3.0), seed: int = 0
) -> pd.DataFrame:
    """What adding each MLP's intercept does to the answer's lead.

    Args:
        pairs: prompts that hold a topic at END. mixings: regressions whose intercepts are added. scales: times.

    Returns:
        A row for each MLP and scale: part, scale, before, moved (mean growth of the lead), low, high, random (that of
        random vectors as long), first_before and first (share of topics whose answer leads its relation's answers).
    """
    generator = torch.Generator().manual_seed(seed)
    changes, labels = [], []
    for mixing in mixings:
        part = parse_part(mixing.part)
        b = torch.from_numpy(mixing.intercept).float()
        for scale in scales:
            changes.append(Change((part,), "add", scale * b))
            for _ in range(RANDOM):
                r = torch.randn(b.shape, generator=generator)
                changes.append(Change((part,), "add", scale * b.norm() * r / r.norm()))
            labels.append((mixing.part, scale))
    values, base = at_end(model, pairs, changes)
    first, first_base = at_end(model, pairs, changes, First("answers"))
    rows = []
    for i, (name, scale) in enumerate(labels):
        at = i * (1 + RANDOM)
        moved = values[at] - base
        low, high = bootstrap_mean(moved, seed)
        rows.append(
            {"part": name, "scale": scale, "before": float(base.mean()), "moved": float(moved.mean()),
             "low": float(low), "high": float(high), "random": float((values[at + 1 : at + 1 + RANDOM] - base).mean()),
             "first_before": float(first_base.mean()), "first": float(first[at].mean()), "n": len(base)}
        )  # fmt: skip
    return pd.DataFrame(rows)
