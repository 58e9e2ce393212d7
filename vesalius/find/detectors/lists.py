"""Lists of every series as prompts (" A, B, C," -> " D" rather than " C"), and what each head does for them.

Right is the successor, wrong the item just said: a head that only copies works against the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.errors import VesaliusError
from vesalius.find.detectors.kinds import Kind
from vesalius.model import Intervention, Model, Pairs
from vesalius.model.intervene import ablation_value, sites_of
from vesalius.model.sweep import Progress, Recording, sweep
from vesalius.parts import Part
from vesalius.tasks import Example, Task
from vesalius.tasks.base import UserRows


def list_task(kinds: Sequence[Kind], shown: int = 3, n: int = 64, seed: int = 0) -> Task:
    """Runs of `shown` items with commas, of all series in turn; the corrupted prompt begins its series elsewhere.

    Raises:
        VesaliusError: if no series has two runs of that length.
    """
    rng = random.Random(f"lists/{seed}")
    runs = {k.name: [r for start in range(len(k.tokens)) if len(r := _run(k, start, shown + 1)) > shown] for k in kinds}
    usable = [k for k in kinds if len(runs[k.name]) > 1]
    if not usable:
        raise VesaliusError(f"no series has two runs of {shown} single tokens and a successor; show fewer items")
    draws: list[Example] = []
    for kind in usable:
        for run in runs[kind.name]:
            other = rng.choice([r for r in runs[kind.name] if r != run])
            clean, corrupted = (",".join(kind.texts[i] for i in r[:-1]) + "," for r in (run, other))
            right, wrong = kind.texts[run[-1]], kind.texts[run[-2]]
            draws.append(Example(clean, corrupted, (right,), (wrong,), group=kind.name))
    rng.shuffle(draws)
    by_kind = {k.name: [e for e in draws if e.group == k.name] for k in usable}
    turns = [some[i] for i in range(max(map(len, by_kind.values()))) for some in by_kind.values() if i < len(some)]
    rows = UserRows("lists", tuple(turns[:n]), tuple(f"lists, {e.clean!r}" for e in turns[:n]))
    return Task("lists", None, seed, {}, rows, scoring="single", on_misaligned="skip")


def _run(kind: Kind, start: int, length: int) -> list[int]:
    found = [start]
    while len(found) < length and kind.follows[found[-1]] >= 0:
        found.append(kind.follows[found[-1]])
    return found


def mean_ablated(
    model: Model,
    pairs: Pairs,
    heads: Sequence[Part],
    memory_gb: float = DEFAULT_MEMORY_GB,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """How much each head's mean-ablation lowers the metric in each prompt, (head, example).

    A head's output is replaced, at every position, by its mean over the corrupted prompts.
    """

    def variants(recording: Recording) -> list[list[Intervention]]:
        return [[Intervention(p, value=ablation_value(recording.source, p, "mean"))] for p in heads]

    found = sweep(
        model, pairs, variants, base="clean", capture=sites_of(heads), paired=False, batch=pairs.n_examples,
        memory_gb=memory_gb, progress=progress,
    )  # fmt: skip
    return found.base[None] - found.values
