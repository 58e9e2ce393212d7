"""Vesalius, by its public interface, on the same token ids as every other engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vesalius
from bench.hooks import fingerprint, logit_difference, tensors
from bench.work import Job, Outcome, PromptSet, Work
from vesalius.find import find
from vesalius.model import Model, Pairs
from vesalius.tasks.metrics import LogitDiff


def load(work: Work) -> Model:
    """Opens the same local folder."""
    return vesalius.open(work.folder, dtype=getattr(torch, work.dtype), device=work.device)


def pairs(prompts: PromptSet) -> Pairs:
    """The prompts as a task would hand them over, from the ids themselves."""
    clean, corrupted = torch.tensor(prompts.clean), torch.tensor(prompts.corrupted)
    n, length = clean.shape
    return Pairs(
        clean=clean,
        corrupted=corrupted,
        mask=torch.ones_like(clean),
        reads=torch.full((n, 1), length - 1),
        read_mask=torch.ones(n, 1, dtype=torch.bool),
        row_example=torch.arange(n),
        row_right=torch.ones(n, dtype=torch.bool),
        answers=[[a] for a in prompts.answer],
        wrong=[[w] for w in prompts.wrong],
        metric=LogitDiff(),
    )


def _by_head(scores: vesalius.Scores, heads: list[tuple[int, int]]) -> list[float]:
    values = {(p.layer, p.index): float(v) for p, v in zip(scores.parts, scores.values, strict=True)}  # type: ignore[union-attr]
    return [values[key] for key in heads]


def _plain(model: Model, ids: Tensor) -> Callable[[], Any]:
    return torch.no_grad()(lambda: model.hf(input_ids=ids, use_cache=False).logits)


def forward(model: Model, work: Work, prompts: PromptSet) -> Job:
    """One forward of all clean prompts, nothing captured."""
    clean, _, answer, wrong = tensors(prompts, work.device)

    def run() -> Outcome:
        return Outcome(logit_difference(model.logits(clean), answer, wrong).tolist())

    return Job(run, _plain(model, clean))


def capture(model: Model, work: Work, prompts: PromptSet) -> Job:
    """One forward that keeps every head's output at every position."""
    clean = tensors(prompts, work.device)[0]
    sites = [("z", layer) for layer in range(work.n_layers)]

    def run() -> Outcome:
        kept = model.run(clean, capture=sites)
        return Outcome(fingerprint([kept[site].flatten(2) for site in sites], work.n_heads))

    return Job(run, _plain(model, clean))


def patch(model: Model, work: Work, prompts: PromptSet) -> Job:
    """Exact patching of every head."""

    def run() -> Outcome:
        scores = find("activation-patching", model, pairs(prompts), parts="head")
        return Outcome(_by_head(scores, work.heads), all_heads=True)

    return Job(run)


def nodes(model: Model, work: Work, prompts: PromptSet) -> Job:
    """Attribution scores of every head."""
    heads = [(layer, head) for layer in range(work.n_layers) for head in range(work.n_heads)]

    def run() -> Outcome:
        scores = find("attribution-patching", model, pairs(prompts), parts="head")
        return Outcome(_by_head(scores, heads))

    return Job(run, _plain(model, tensors(prompts, work.device)[0]))


def edges(model: Model, work: Work, prompts: PromptSet) -> Job:
    """Attribution scores of every edge; summed by sending head they must be that head's own score."""

    def run() -> Outcome:
        scores = find("attribution-patching", model, pairs(prompts), level="edge")
        totals = np.zeros((work.n_layers, work.n_heads))
        for edge, value in zip(scores.parts, scores.values, strict=True):
            sender = edge.sender  # type: ignore[union-attr]
            if sender.kind == "head":
                totals[sender.layer, sender.index] += value
        return Outcome(totals.flatten().tolist(), f"{len(scores):,} edges")

    return Job(run, _plain(model, tensors(prompts, work.device)[0]))


JOBS = {"forward": forward, "capture": capture, "patch": patch, "nodes": nodes, "edges": edges}
