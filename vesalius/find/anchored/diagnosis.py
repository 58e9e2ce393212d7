"""Who writes the letter A: direct attribution of logit(A) less the other letters' mean, down to neurons.

The terms of all parts (final norm at its actual scale) add up to the difference itself. Neuron i of an MLP writes
c_i v_i, its activation times its value vector; a neuron *anchors* if that write raises A on the mean question.
Li and Gao, arXiv 2405.03205, sec. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.find.anchored.bias import letter_tokens, rows_of
from vesalius.find.anchored.questions import Choice
from vesalius.find.base import find
from vesalius.find.recall.questions import OverOthers
from vesalius.model import Model, Pairs, Site
from vesalius.model.sweep import BATCH
from vesalius.model.weights import matrix
from vesalius.parts import Part
from vesalius.scores import Scores

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Diagnosis:
    """Who writes A.

    Attributes:
        scores: every part's contribution to logit(A) less the other letters' mean. difference: what the model says,
            mean. residue: largest difference of the sum of terms from it. top_share: of the difference, by the last
            three layers.
    """

    scores: Scores
    difference: float
    residue: float
    top_share: float


def pairs_of_questions(model: Model, questions: Sequence[Choice]) -> Pairs:
    """Questions as pairs whose "right answer" is A: for attribution alone, so clean and corrupted are the same."""
    rows, letters = (
        rows_of(model, [q.prompt for q in questions]),
        letter_tokens(model, len(questions[0].options)).tolist(),
    )
    n = rows.n
    # a counterfactual is never run; one token differs, as `find` wants
    other = rows.ids.clone()
    other[:, -1] = letters[0]
    return Pairs(
        rows.ids, other, rows.mask, rows.reads, torch.ones(n, 1, dtype=torch.bool), torch.arange(n),
        torch.ones(n, dtype=torch.bool), [[letters[0]]] * n, [letters[1:]] * n, OverOthers(), options=[letters] * n,
    )  # fmt: skip


@torch.no_grad()
def diagnose(model: Model, questions: Sequence[Choice]) -> Diagnosis:
    """Direct attribution of the preference for A."""
    pairs = pairs_of_questions(model, questions)
    scores = find("direct", model, pairs, parts="head,mlp,embed")
    said = []
    for group in pairs.batches(BATCH):
        logits = model.run(group.clean, group.mask).logits
        assert logits is not None
        said.append(group.value(logits[:, -1:].float().cpu()))
    difference = torch.cat(said).double().numpy()
    last = model.n_layers - 3
    late = [isinstance(p, Part) and p.kind != "embed" and (p.layer or 0) >= last for p in scores.parts]
    top = float(scores.values[np.array(late)].sum())
    total = float(scores.info["sum"])
    return Diagnosis(scores, float(difference.mean()), abs(total - float(difference.mean())), top / total)


@dataclass(frozen=True)
class Firing:
    """Neurons of one layer at the end of questions: mean and spread of activations; their size in plain text (rms)."""

    layer: int
    mean: Tensor
    spread: Tensor
    usual: Tensor


@torch.no_grad()
def firing(model: Model, layers: Sequence[int], questions: Sequence[Choice], text: Tensor) -> list[Firing]:
    """How neurons fire at the end of questions and in plain text (row, pos)."""
    prefix = model.anatomy.main.prefix
    sites = [Site("neurons", layer, prefix) for layer in layers]
    sums, powers = ({s: torch.zeros(model.d_mlp) for s in sites} for _ in range(2))
    for rows in rows_of(model, [q.prompt for q in questions]).batches():
        run = model.run(rows.ids, rows.mask, capture=sites)
        for s in sites:
            sums[s] += run[s][:, -1].float().sum(0).cpu()
            powers[s] += run[s][:, -1].float().square().sum(0).cpu()
    squares, count = {s: torch.zeros(model.d_mlp) for s in sites}, 0
    for lo in range(0, len(text), BATCH):
        run = model.run(text[lo : lo + BATCH], capture=sites)
        count += run[sites[0]][:, 1:].flatten(0, 1).shape[0]
        for s in sites:
            squares[s] += run[s][:, 1:].float().square().flatten(0, 1).sum(0).cpu()
    n = len(questions)
    spread = {s: (powers[s] / n - (sums[s] / n).square()).clamp(min=0).sqrt() for s in sites}
    return [Firing(s.layer, sums[s] / n, spread[s], (squares[s] / max(count, 1)).sqrt()) for s in sites]


def value_vectors(model: Model, layer: int) -> Tensor:
    """Value vectors of every neuron, (neuron, d_model): a view of the MLP's last matrix, to be edited through."""
    return matrix(model.anatomy.block(layer, model.anatomy.main.prefix).down)


def neuron(layer: int, index: int, model: Model) -> Part:
    """A neuron's address."""
    return Part("neuron", layer, int(index), stack=model.anatomy.main.prefix)
