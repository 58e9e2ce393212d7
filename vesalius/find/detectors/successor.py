"""Successor heads: heads whose value-output circuit maps an item of a series to the next, in series of every kind.

Score: the share of items whose successor has the top logit among the items of its own series, when the head attends to
the item alone (`ov`). With tied embeddings many heads copy, so column `masked` gives the same with the item itself left
out of the race, and `greater` the chance that a later item of the series gets more than an earlier one (0.5: no bias).
Null: successors shuffled within each series.

Gould, Ong, Ogden and Conmy, "Successor Heads: Recurring, Interpretable Attention Heads In The Wild", arXiv 2312.09230.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.find.detectors.base import HeadContext, head_scores
from vesalius.find.detectors.kinds import Kind, kinds_of
from vesalius.find.detectors.ov import Form, head_values, ov_logits
from vesalius.find.detectors.significance import DRAWS, against
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.scores import Scores

Ints = NDArray[np.int64]


def successor(model: Model, context: HeadContext, *, form: Form = "contextual", kinds: str = "all") -> Scores:
    """How often a head's value-output circuit names the successor of the item it reads.

    Args:
        form: contextual, embedding+mlp0 or mlp0: what the head reads at an item.
        kinds: all series, or some (`days,months`).
    """
    return succession(model, kinds_of(model, kinds), form, context.seed)


def succession(model: Model, kinds: Sequence[Kind], form: Form = "contextual", seed: int = 0) -> Scores:
    """As `successor`, for given series; `per_example` has a column for each item that has a successor."""
    tokens = list(dict.fromkeys(t for k in kinds for t in k.tokens))
    place = {t: i for i, t in enumerate(tokens)}
    values = head_values(model, tokens, form)
    rng = np.random.default_rng([seed, len(tokens)])
    labels = [_shuffles(kind, rng) for kind in kinds]
    parts: list[Part] = []
    hits, masked, centred, greater, drawn, drawn_masked, drawn_centred = [], [], [], [], [], [], []
    for layer, logits in ov_logits(model, values, tokens):
        parts += [Part("head", layer, h, stack=model.anatomy.main.prefix) for h in range(logits.shape[0])]
        rows = [_Hits(logits[:, [place[t] for t in k.tokens]][:, :, [place[t] for t in k.tokens]], k, s)
                for k, s in zip(kinds, labels, strict=True)]  # fmt: skip
        hits.append(np.concatenate([r.hits for r in rows], axis=1))
        masked.append(np.concatenate([r.masked for r in rows], axis=1))
        centred.append(np.concatenate([r.centred for r in rows], axis=1))
        greater.append(np.stack([r.greater for r in rows]).mean(0))
        drawn.append(sum(r.drawn for r in rows) / hits[-1].shape[1])
        drawn_masked.append(sum(r.drawn_masked for r in rows) / hits[-1].shape[1])
        drawn_centred.append(sum(r.drawn_centred for r in rows) / hits[-1].shape[1])
    each, without, varying = np.concatenate(hits), np.concatenate(masked), np.concatenate(centred)
    columns = against(each.mean(1), np.concatenate(drawn))
    own = against(without.mean(1), np.concatenate(drawn_masked))
    columns |= {"masked": without.mean(1), "masked_null": own["null"], "masked_q": own["q"]}
    own = against(varying.mean(1), np.concatenate(drawn_centred))
    columns |= {"centred": varying.mean(1), "centred_null": own["null"], "centred_q": own["q"]}
    found = head_scores(parts, each, {**columns, "greater": np.concatenate(greater)}, unit="share of items")
    found.info.update(
        null_is="successors shuffled within each series",
        form=form,
        kinds={k.name: len(k.pairs) for k in kinds},
        items=[k.texts[i] for k in kinds for i, _ in k.pairs],
    )
    return found


def _shuffles(kind: Kind, rng: np.random.Generator) -> Ints:
    """Shuffled successors of a series, (draw, item with a successor)."""
    after = np.array([j for _, j in kind.pairs])
    return np.stack([rng.permutation(after) for _ in range(DRAWS)])


class _Hits:
    """What heads make of one series: hits (head, item), and hits under shuffled labels summed, (head, draw)."""

    def __init__(self, logits: torch.Tensor, kind: Kind, labels: Ints) -> None:
        items, after = (np.array(x) for x in zip(*kind.pairs, strict=True))
        top = logits[:, items].argmax(2).numpy()  # (head, item)
        alone = logits.clone()
        alone.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        best = alone[:, items].argmax(2).numpy()
        self.hits, self.masked = (top == after).astype(float), (best == after).astype(float)
        varying = (logits - logits.mean(1, keepdim=True))[:, items].argmax(2).numpy()
        self.centred = (varying == after).astype(float)
        self.drawn, self.drawn_masked, self.drawn_centred = (_under(labels, x) for x in (top, best, varying))
        n = logits.shape[1]
        column = torch.arange(n)
        compared = []
        for i in range(1, n - 1):  # a later item against an earlier one
            later, earlier = logits[:, i, column > i], logits[:, i, column < i]
            compared.append((later[:, :, None] > earlier[:, None]).float().mean((1, 2)))
        self.greater = torch.stack(compared).mean(0).numpy()


def _under(labels: Ints, best: Ints) -> NDArray[np.float64]:
    """How many items each head would get right under each shuffling, (head, draw)."""
    out = np.zeros((best.shape[0], labels.shape[0]))
    for answer, wanted in zip(best.T, np.ascontiguousarray(labels.T), strict=True):  # an item's
        out += answer[:, None] == wanted
    return out
