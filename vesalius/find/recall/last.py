"""Step 4: what the last block does to the answer, and whether it holds it back.

Each head's and the MLP's own contribution to the answer's lead (direct attribution, final norm at its actual scale),
with bootstrap intervals over prompts. A part *suppresses* if its whole interval is below 0 (and it takes 1 % of the
lead or more); only then is a remedy offered: the part's output at END scaled down, by how much chosen on half of the
prompts and measured on the other half.
Lv et al., arXiv 2403.19521, sec. 6, find such a last layer in GPT-2, OPT and Llama-2; it is tested here, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.find.recall.heads import FAINT
from vesalius.find.recall.questions import First
from vesalius.find.recall.vectors import Change, at_end
from vesalius.model import Model, Pairs, Site
from vesalius.model.sweep import BATCH
from vesalius.parts import Part
from vesalius.scores import Scores, bootstrap_mean
from vesalius.tasks.metrics import LogProb

Floats = NDArray[np.float64]
SCALES = (0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Floats, seed: int = 0) -> Estimate:
        low, high = bootstrap_mean(np.asarray(values, dtype=float), seed)
        return cls(float(np.mean(values)), float(low), float(high))


@dataclass(frozen=True)
class Mitigation:
    """A last block's suppressors scaled down.

    Attributes:
        parts: what is scaled. scale: by what, chosen on other prompts. n: prompts measured.
        before, after: probability of the right answer. first_before, first_after: share with it on top.
    """

    parts: list[str]
    scale: float
    n: int
    before: Estimate
    after: Estimate
    first_before: float
    first_after: float

    @property
    def helps(self) -> bool:
        """Probability at least 5 % up, and no fewer right answers."""
        return self.after.mean >= 1.05 * self.before.mean and self.first_after >= self.first_before


@dataclass(frozen=True)
class LastBlock:
    """What the last block does.

    Attributes:
        scores: its heads' and MLP's direct contribution to the answer's lead. total: of all of them together.
        before, after: probability of the right answer if the model ended before the block, and as it is.
        suppressors: parts whose interval is below 0. mitigation: what scaling them down does; None if there are none.
    """

    scores: Scores
    total: Estimate
    before: Estimate
    after: Estimate
    suppressors: list[Part]
    mitigation: Mitigation | None


def last_block(model: Model, pairs: Pairs, direct: Scores, seed: int = 0) -> LastBlock:
    """Direct attribution of the last block's parts, and a remedy where they suppress.

    Args:
        pairs: prompts. direct: every part's contribution on them (`find("direct", ...)`).
    """
    last = model.n_layers - 1
    rows = [i for i, p in enumerate(direct.parts) if isinstance(p, Part) and p.layer == last and p.kind != "embed"]
    scores = direct.select(rows)
    assert scores.per_example is not None
    _, high = scores.interval(seed)
    lead = abs(float(direct.values.sum()))
    down = [
        p for p, v, top in zip(scores.parts, scores.values, high, strict=True) if top < 0 and abs(v) >= FAINT * lead
    ]
    before, after = _probabilities(model, pairs)
    return LastBlock(
        scores,
        Estimate.of(scores.per_example.sum(0), seed),
        Estimate.of(before, seed),
        Estimate.of(after, seed),
        down,  # type: ignore[arg-type]
        mitigate(model, pairs, down, seed) if down else None,  # type: ignore[arg-type]
    )


@torch.no_grad()
def _probabilities(model: Model, pairs: Pairs) -> tuple[Floats, Floats]:
    """p(right) by the model's ending before and after the last block, (prompt,) each."""
    prefix = model.anatomy.main.prefix
    sites = [Site("resid_pre", model.n_layers - 1, prefix), Site("resid_post", model.n_layers - 1, prefix)]
    found: list[list[float]] = [[], []]
    for group in pairs.batches(BATCH):
        run = model.run(group.clean, group.mask, capture=sites)
        rows, right = torch.arange(group.n_rows), torch.tensor([a[0] for a in group.answers])
        for site, out in zip(sites, found, strict=True):
            p = model.readout(run[site][rows, group.reads[:, 0]]).float().softmax(-1)
            out += p[rows, right].tolist()
    return np.array(found[0]), np.array(found[1])


def mitigate(model: Model, pairs: Pairs, parts: Sequence[Part], seed: int = 0) -> Mitigation:
    """Scales parts down at END: by how much is chosen on every other prompt, measured on the rest."""
    order = np.random.default_rng(seed).permutation(pairs.n_examples)
    dev, test = sorted(map(int, order[::2])), sorted(map(int, order[1::2]))
    changes = [Change(tuple(parts), "scale", s) for s in SCALES]
    tried, _ = at_end(model, pairs.take(dev), changes, LogProb())
    best = int(np.exp(tried).mean(1).argmax())
    held = pairs.take(test)
    after, before = at_end(model, held, changes[best : best + 1], LogProb())
    first, first_before = at_end(model, held, changes[best : best + 1], First())
    return Mitigation(
        [str(p) for p in parts], SCALES[best], len(test), Estimate.of(np.exp(before), seed),
        Estimate.of(np.exp(after[0]), seed), float(first_before.mean()), float(first[0].mean()),
    )  # fmt: skip
