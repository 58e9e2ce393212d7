"""Previous-token, duplicate-token and induction heads, from where heads look on random tokens that come twice.

    previous-token    from every token to the one before it
    duplicate-token   from a token's second occurrence to its first
    induction         from a token's second occurrence to what followed the first (prefix matching)

Scores are mean attention, 0 to 1. Olsson et al., "In-context Learning and Induction Heads", arXiv 2209.11895.

Nulls: for the first, other earlier keys of the same queries; for the others, the same positions in prompts whose second
half is another prompt's, so that a head that looks a fixed distance back, whatever stands there, scores no higher.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from vesalius.find.detectors.base import HeadContext, head_scores
from vesalius.find.detectors.looks import Attended, Look, attend, joined
from vesalius.find.detectors.significance import exchange
from vesalius.find.detectors.stimuli import REPEATED_LENGTH, REPEATED_ROWS, causal, repeated, unrepeated
from vesalius.model import Model
from vesalius.scores import Scores

LOOKS = ("previous-token", "induction", "duplicate-token")
ROWS = 8  # prompts of a pass, each with its shuffled one


def looks_on_repeats(rows: int, length: int, seed: int = 0) -> dict[str, Look]:
    """Each of `LOOKS` on `rows` repeated rows of `length` tokens in all, their shuffled prompts standing after them."""
    half = length // 2
    before, follows, same = (torch.zeros(rows, length, length, dtype=torch.bool) for _ in range(3))
    every = torch.arange(1, length)
    before[:, every, every - 1] = True
    query = torch.arange(half, length - 1)  # the last token's successor was not seen
    follows[:, query, query - half + 1] = True
    same[:, query, query - half] = True
    earlier = causal(length).tril(-1).clone()
    earlier[2:, 0] = False  # where heads rest
    shuffled = rows + torch.arange(rows)[:, None]  # (row, 1)
    rng = torch.Generator().manual_seed(seed)
    return {
        "previous-token": Look.of(before, earlier.expand(rows, -1, -1), rng),
        "induction": Look.of(follows).in_prompts(shuffled),
        "duplicate-token": Look.of(same).in_prompts(shuffled),
    }


def on_repeats(model: Model, ids: Tensor) -> tuple[pd.DataFrame, float, float]:
    """Each head's attention on repeated tokens (row, 2 * length), and the mean loss the first and the second time."""
    half = ids.shape[1] // 2
    found = attend(model, ids, None, looks_on_repeats(*ids.shape), logits=True, chance=False)
    means = {name: found.score[name].mean(1).tolist() for name in LOOKS}
    rows: list[dict[str, Any]] = [
        {"part": str(p), "layer": p.layer, "index": p.index} | {name: means[name][i] for name in LOOKS}
        for i, p in enumerate(found.heads)
    ]
    assert found.logits is not None
    loss = torch.nn.functional.cross_entropy(
        found.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten().to(found.logits.device), reduction="none"
    ).view(len(ids), -1)  # (row, pos)
    return pd.DataFrame(rows), float(loss[:, : half - 1].mean()), float(loss[:, half:].mean())


def repeats(model: Model, context: HeadContext, rows: int, length: int) -> Attended:
    """The pass that all three detectors share."""

    def make() -> Attended:
        ids = repeated(model, context.seed, rows, length)
        pieces = []
        for first in range(0, rows, ROWS):
            group = ids[first : first + ROWS]
            both = torch.cat([group, unrepeated(group)])
            looks = looks_on_repeats(len(group), ids.shape[1], context.seed)
            pieces.append(attend(model, both, None, looks))
            if context.progress:
                context.progress(min(first + ROWS, rows), rows)
        return joined(pieces)

    return context.once(("repeats", rows, length), make)


def _scores(name: str, model: Model, context: HeadContext, rows: int, length: int) -> Scores:
    found = repeats(model, context, rows, length)
    each, chance = found.score[name].numpy(), found.chance[name].numpy()
    null = "other earlier tokens" if name == "previous-token" else "the same places in prompts that do not repeat"
    return head_scores(found.heads, each, exchange(each, chance, context.seed), null_is=null)


def previous_token(
    model: Model, context: HeadContext, *, rows: int = REPEATED_ROWS, length: int = REPEATED_LENGTH
) -> Scores:
    """Attention from every token to the one before it, on random tokens.

    Args:
        rows: prompts. length: tokens before they come again.
    """
    return _scores("previous-token", model, context, rows, length)


def duplicate_token(
    model: Model, context: HeadContext, *, rows: int = REPEATED_ROWS, length: int = REPEATED_LENGTH
) -> Scores:
    """Attention from a token's second occurrence to its first, on random tokens that come twice.

    Args:
        rows: prompts. length: tokens before they come again.
    """
    return _scores("duplicate-token", model, context, rows, length)


def induction(
    model: Model, context: HeadContext, *, rows: int = REPEATED_ROWS, length: int = REPEATED_LENGTH
) -> Scores:
    """Attention from a token's second occurrence to what followed the first, on random tokens that come twice.

    Args:
        rows: prompts. length: tokens before they come again.
    """
    return _scores("induction", model, context, rows, length)
