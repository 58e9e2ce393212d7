"""Step 1: the heads that bring the topic to END, and what shows that they do.

A head's effect on the answer is measured by path patching: its output as on the counterfactual prompt, all other heads
held still, MLPs recomputed (to the logits), or only the inputs of chosen MLPs changed (to the MLPs). What it brings is
read from its write a_h at END: the rank of the topic's own token in it, through the final norm at its actual scale and
the unembedding. Lv et al., arXiv 2403.19521, sec. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.find.base import find
from vesalius.model import Intervention, Model, Pairs, Site
from vesalius.model.contributions import Contributions, contributions, normed
from vesalius.model.sweep import BATCH, Progress, Recording, Store, sweep
from vesalius.model.weights import parameter_of
from vesalius.parts import Part
from vesalius.scores import Scores

Floats = NDArray[np.float64]
FAINT = 0.01  # of the answer's mean lead: parts with less are not named


@dataclass(frozen=True)
class Writes:
    """Everything written to END, for many prompts.

    Attributes:
        parts: embedding, heads, MLPs in forward order. raw: (prompt, part, d_model). seen: the same through the final
            norm at its actual scale. bias: what biases and the norm's offset add to `seen`, (prompt, d_model).
    """

    parts: list[Part]
    raw: Tensor
    seen: Tensor
    bias: Tensor

    def of(self, parts: Sequence[Part]) -> Tensor:
        """The normed writes of some parts, (prompt, part, d_model)."""
        return self.seen[:, [self.parts.index(p) for p in parts]]


@torch.no_grad()
def writes(model: Model, pairs: Pairs) -> Writes:
    """What every part writes at END of the clean prompts."""
    raw: list[Contributions] = []
    seen: list[Contributions] = []
    for group in pairs.batches(BATCH):
        raw.append(contributions(model, group.clean, group.mask, group.reads))
        seen.append(normed(model, raw[-1]))
    return Writes(
        raw[0].parts,
        torch.cat([r.values[:, :, 0].float().cpu() for r in raw]),
        torch.cat([r.values[:, :, 0].float().cpu() for r in seen]),
        torch.cat([r.bias[:, 0].float().cpu() for r in seen]),
    )


def unembedded(model: Model, x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Logits (..., token) that a normed write adds, before any soft cap."""
    stack = model.anatomy.main
    weight = None if stack.unembed is None else parameter_of(stack.unembed, "weight")
    assert weight is not None
    rows = weight if tokens is None else weight[tokens.to(weight.device)]
    with torch.no_grad():
        return model.stem(x.to(rows)).float() @ rows.float().T


@dataclass(frozen=True)
class TaskHeads:
    """The heads of step 1.

    Attributes:
        scores: every head's effect on the logits by path patching; columns `to_mlps` (through the inputs of `writers`),
            `attention` (from END to the topic), and for task heads `topic_rank` and `other_rank` (median ranks of the
            topic's and of other topics' tokens in the head's write; NaN for other heads).
        heads: task heads, the strongest first. writers: MLPs that write the answer, the strongest first.
        direct: every part's own contribution to the answer's lead.
    """

    scores: Scores
    heads: list[Part]
    writers: list[Part]
    direct: Scores


def writing_mlps(direct: Scores, k: int) -> list[Part]:
    """The k MLPs that raise the answer most themselves."""
    mlps, least = direct.kind("mlp"), FAINT * abs(float(direct.values.sum()))
    order = np.argsort(-mlps.values, kind="stable")[:k]
    return [mlps.parts[i] for i in order if mlps.values[i] >= least]


def task_heads(
    model: Model,
    pairs: Pairs,
    found: Writes,
    *,
    k: int = 10,
    patched: int = 24,
    mlps: int = 3,
    seed: int = 0,
    memory_gb: float = 1.0,
    progress: Progress | None = None,
    store: Store | None = None,
) -> TaskHeads:
    """Finds the task heads of some prompts.

    Args:
        pairs: prompts with counterfactuals. found: their writes. k: task heads at most; those count whose effect is
            above 0 (95 % interval over prompts) and 1 % of the answer's lead or more.
        patched: prompts for path patching, from the first on.
        mlps: writers whose inputs are patched. seed, memory_gb, progress, store: as in `vesalius.find`.
    """
    direct = find("direct", model, pairs, parts="head,mlp,embed", seed=seed)
    writers = writing_mlps(direct, mlps)
    some = pairs.take(range(min(patched, pairs.n_examples)))
    options = {"seed": seed, "memory_gb": memory_gb, "progress": progress, "store": store}
    scores = find("path-patching", model, some, receivers="unembed", **options)  # type: ignore[arg-type]
    through = np.full(len(scores), np.nan)
    if writers:
        mid = find("path-patching", model, some, receivers=[str(w) for w in writers], **options)  # type: ignore[arg-type]
        through = np.array([mid[p] for p in scores.parts])
    every = [p for p in scores.parts if isinstance(p, Part)]  # all of them: no edges are scored here
    low, _ = scores.interval(seed)
    order = np.argsort(-scores.values, kind="stable")[:k]
    least = FAINT * abs(float(direct.values.sum()))
    heads = [every[i] for i in order if scores.values[i] >= least and low[i] > 0]
    look = attention(model, pairs)
    ranks = topic_ranks(model, pairs, found, heads)
    place = {p: i for i, p in enumerate(heads)}
    both = [
        (float(ranks[place[p]][0]), float(ranks[place[p]][1])) if p in place else (np.nan, np.nan) for p in scores.parts
    ]
    columns = {
        "to_mlps": through,
        "attention": np.array([float(look[:, p.layer or 0, p.index or 0].mean()) for p in every]),
        "topic_rank": np.array([b[0] for b in both]),
        "other_rank": np.array([b[1] for b in both]),
    }
    return TaskHeads(replace(scores, columns=columns), heads, writers, direct)


@torch.no_grad()
def attention(model: Model, pairs: Pairs) -> Floats:
    """Attention of every head from END to the topic's last token, (prompt, layer, head)."""
    prefix = model.anatomy.main.prefix
    sites = [Site("pattern", layer, prefix) for layer in range(model.n_layers)]
    pieces = []
    for group in pairs.batches(BATCH):
        run = model.run(group.clean, group.mask, capture=sites)
        rows, topic, end = torch.arange(group.n_rows), group.positions["topic"], group.reads[:, 0]
        pieces.append(torch.stack([run[s][rows, :, end, topic] for s in sites], dim=1))  # (row, layer, head)
    return torch.cat(pieces).double().cpu().numpy()


def topic_tokens(pairs: Pairs) -> Tensor:
    """The topic's (last) token in each prompt, (prompt,)."""
    return pairs.clean[torch.arange(pairs.n_rows), pairs.positions["topic"]]


def topic_ranks(model: Model, pairs: Pairs, found: Writes, heads: Sequence[Part]) -> list[tuple[float, float]]:
    """For each head the median rank (1: first of the vocabulary) of the topic's token and of other prompts' topics."""
    tokens = topic_tokens(pairs)
    every = torch.unique(tokens)
    out = []
    for part in heads:
        logits = unembedded(model, found.of([part])[:, 0])  # (prompt, vocabulary)
        ordered = logits.sort(dim=-1, descending=True).values
        mine = logits[:, every.to(logits.device)]
        ranks = 1 + torch.searchsorted(-ordered, -mine.contiguous())  # (prompt, topic)
        own = every[None].to(logits.device) == tokens[:, None].to(logits.device)
        out.append(
            (float(ranks[own].double().median()), float(ranks[~own].double().median()) if len(every) > 1 else np.nan)
        )
    return out


def swapped(
    model: Model, pairs: Pairs, sets: Sequence[Sequence[Part]], memory_gb: float = 1.0, progress: Progress | None = None
) -> Floats:
    """The metric of every prompt, (set, prompt), with each set's heads at END as on the counterfactual prompt."""

    def variants(recording: Recording) -> list[list[Intervention]]:
        group = recording.pairs
        changed = []
        for heads in sets:
            items = []
            for p in heads:
                value = recording.source[Site("z", p.layer or 0, p.stack)][:, :, p.index]
                items.append(Intervention(p, value=value, positions=group.reads[:, 0]))
            changed.append(items)
        return changed

    every = {p for heads in sets for p in heads}
    sites = list(dict.fromkeys(Site("z", p.layer or 0, p.stack) for p in sorted(every, key=lambda p: p.order)))
    found = sweep(model, pairs, variants, base="clean", capture=sites, memory_gb=memory_gb, progress=progress)
    return found.values
