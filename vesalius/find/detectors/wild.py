"""A head in the wild: the tokens of real text that are foretold worst without it, and what kind of token they are.

The head's output is replaced by its mean over the text. Kinds, the first that fits:

    succession     the token is an item of a series, and the item before it stands among the last `NEAR` tokens
    greater-than   the token is an item of a series, and a smaller one of the series stands there
    acronym        a capital letter or several, after words whose first letters they continue or are
    copying        the same token stands there
    other

Gould et al. 2023, arXiv 2312.09230, sec. 5, on one head of Pythia-1.4B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from vesalius.find.detectors.kinds import series
from vesalius.find.detectors.looks import run
from vesalius.find.detectors.portrait import texts
from vesalius.model import Model, Site
from vesalius.model.hooks import Tap
from vesalius.parts import Part

NEAR = 32  # tokens before that count as near
ROWS = 8  # of a pass
KINDS = ("succession", "greater-than", "acronym", "copying", "other")


def hurt_most(model: Model, head: Part, ids: Tensor, top: int = 50) -> pd.DataFrame:
    """The tokens whose loss the head's mean-ablation raises most.

    Args:
        ids: rows of text, (row, pos). top: how many.

    Returns:
        row, pos, before (the text up to it), token, loss (nats, whole model), without (it), increase, kind; largest
        increase first.
    """
    site, index = Site("z", head.layer or 0, head.stack), head.index or 0
    groups = list(ids.split(ROWS))
    total, count = torch.zeros(model.d_head), 0
    for group in groups:
        seen: list[Tensor] = []
        run(model, group, None, {site: [lambda x, seen=seen: seen.append(x)]})  # type: ignore[misc]
        total += seen[0][:, :, index].float().sum((0, 1)).cpu()
        count += group.numel()
    mean = total / count

    def ablate(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, index] = mean.to(z)
        return z

    plain, without = (torch.cat([_losses(model, g, taps) for g in groups]) for taps in ({}, {site: [ablate]}))
    increase = without - plain  # (row, pos - 1)
    order = increase.flatten().argsort(descending=True)[:top].tolist()
    rows = []
    for flat in order:
        row, at = divmod(flat, increase.shape[1])
        shown = texts(model, ids[row, : at + 2].tolist())
        rows.append(
            {
                "row": row,
                "pos": at + 1,
                "before": "".join(shown[:-1])[-120:],
                "token": shown[-1],
                "loss": float(plain[row, at]),
                "without": float(without[row, at]),
                "increase": float(increase[row, at]),
                "kind": kind_of(shown[:-1], shown[-1]),
            }
        )
    return pd.DataFrame(rows)


def _losses(model: Model, ids: Tensor, taps: Mapping[Site, Sequence[Tap]]) -> Tensor:
    """Loss of every token but the first, (row, pos - 1), nats."""
    logits = model.run(ids, taps=taps).logits
    assert logits is not None
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="none"
    )
    return flat.view(len(ids), -1).cpu()


def kind_of(before: Sequence[str], token: str) -> str:
    """Which kind of token this is after those; see the module.

    Example:
        >>> kind_of(["On", " Monday", " and", " on"], " Tuesday"), kind_of([" a", " b"], " c")
        ('succession', 'succession')
        >>> kind_of([" the", " dog", " saw", " the"], " dog"), kind_of([" from", " 2", " to"], " 5")
        ('copying', 'greater-than')
    """
    near = [t.strip().casefold() for t in before[-NEAR:]]
    said = token.strip().casefold()
    larger = False
    for items, around in series().values():
        names = [i.casefold() for i in items]
        if said not in names:
            continue
        at = names.index(said)
        if (at or around) and names[at - 1] in near:
            return "succession"
        larger = larger or any(n in near for n in names[:at])
    if larger:
        return "greater-than"
    letters = token.strip()
    capitals = "".join(t.strip()[0] for t in before[-NEAR:] if t.strip()[:1].isupper())
    if letters.isalpha() and letters.isupper() and letters in capitals:
        return "acronym"
    return "copying" if said in near else "other"
