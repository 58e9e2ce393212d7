"""Attribution: first-order estimates of activation patching, for all parts or all edges, from one backward pass.

    score(u) = (u(clean) - u(corrupted)) . coefficient(u)

The methods differ in the coefficient alone:
    attribution patching   the metric's gradient on the patched-into run (Nanda 2023)
    EAP                    the metric's gradient on the clean run (Syed et al. 2023)
    EAP-IG                 gradients averaged along the line between the embeddings (Hanna et al. 2024, eq. 3)
    RelP                   relevance coefficients, from a backward pass with changed rules (Jafari et al. 2025)
Positive where the part helps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vesalius.errors import VesaliusError
from vesalius.find.base import Context, Direction, base_side, named_parts, per_example, resolve_positions, table
from vesalius.model import Model, Pairs
from vesalius.model.edges import edge_scores, edge_sites
from vesalius.model.gradients import Differences
from vesalius.model.graph import universe_of
from vesalius.model.intervene import locate, sites_of
from vesalius.model.memory import memory_errors
from vesalius.model.relevance import Rules
from vesalius.model.sweep import BATCH, Side
from vesalius.scores import Scores


def attribution_patching(
    model: Model,
    pairs: Pairs,
    context: Context,
    *,
    direction: Direction = "denoise",
    parts: str = "head,mlp",
    position: str | None = None,
) -> Scores:
    """The gradient on the run that would be patched into, times the difference of activations.

    Args:
        direction: `denoise`: gradient on the corrupted run; `noise`: on the clean run.
        parts: kinds of part (node level). position: a named position, or `each`; default summed over positions.
    """
    return _attribute(model, pairs, context, base_side(direction), 0, None, parts, position, direction=direction)


def eap(
    model: Model,
    pairs: Pairs,
    context: Context,
    *,
    direction: Direction = "noise",
    parts: str = "head,mlp",
    position: str | None = None,
) -> Scores:
    """Edge attribution patching: by default the gradient on the clean run, as published."""
    return _attribute(model, pairs, context, base_side(direction), 0, None, parts, position, direction=direction)


def eap_ig(
    model: Model,
    pairs: Pairs,
    context: Context,
    *,
    steps: int = 5,
    parts: str = "head,mlp",
    position: str | None = None,
) -> Scores:
    """EAP with integrated gradients over the input embeddings.

    Args:
        steps: points on the line from the corrupted to the clean embedding.
    """
    if steps < 1:
        raise VesaliusError(f"steps is {steps}; integrated gradients need at least 1")
    return _attribute(model, pairs, context, "corrupted", steps, None, parts, position, direction="path")


def relp(
    model: Model,
    pairs: Pairs,
    context: Context,
    *,
    direction: Direction = "denoise",
    pattern_rule: bool = False,
    parts: str = "head,mlp",
    position: str | None = None,
) -> Scores:
    """Relevance patching: LN-rule, identity rule and half rule in place of the gradient.

    Args:
        direction: `denoise` (as published): coefficients on the corrupted run; `noise`: on the clean run.
        pattern_rule: also hold attention patterns fixed (the AH-rule); off as in the paper's IOI experiments, since it
            hides query and key paths.
    """
    rules = Rules(pattern=pattern_rule)
    return _attribute(model, pairs, context, base_side(direction), 0, rules, parts, position, direction=direction)


def _attribute(
    model: Model,
    pairs: Pairs,
    context: Context,
    side: Side,
    steps: int,
    rules: Rules | None,
    parts: str,
    position: str | None,
    **info: Any,
) -> Scores:
    if context.level == "edge":
        return _edges(model, pairs, context, side, steps, rules, **info)
    chosen = named_parts(model, parts)
    places = resolve_positions(pairs, position)
    groups = pairs.batches(BATCH)
    pieces = []
    for number, group in enumerate(groups):
        diff = Differences(model, group, sites_of(chosen))
        with memory_errors():
            if steps:
                grads = diff.path_gradients(steps, rules)
                own = diff.activations(side)
            else:
                run = diff.gradients(side, rules)
                grads, own = run.grads, run.acts
        other = diff.activations("clean" if side == "corrupted" else "corrupted")
        clean, corrupted = (own, other) if side == "clean" else (other, own)
        rows = []
        for part in chosen:
            where = locate(part)
            product = where.read(grads[where.site]) * (
                where.read(clean[where.site]) - where.read(corrupted[where.site])
            )
            by_position = product.flatten(2).sum(2) if product.dim() > 2 else product  # (row, pos)
            if places is None:
                rows.append(by_position.sum(1))
                continue
            for name, _ in places:
                at = group.positions[name] if name in group.positions else torch.full((group.n_rows,), int(name))
                index = (at - diff.start).to(by_position.device)
                inside = (index >= 0) & (at.to(index) >= 0)
                picked = by_position.gather(1, index.clamp(min=0).unsqueeze(1)).squeeze(1)
                rows.append(torch.where(inside, picked, torch.zeros_like(picked)))
        pieces.append(per_example(torch.stack(rows), group))
        if context.progress:
            context.progress(number + 1, len(groups))
    labels = None if places is None else [name for _ in chosen for name, _ in places]
    named = [p for p in chosen for _ in range(1 if places is None else len(places))]
    return table(named, np.concatenate(pieces, axis=1), labels, **info)


def _edges(
    model: Model, pairs: Pairs, context: Context, side: Side, steps: int, rules: Rules | None, **info: Any
) -> Scores:
    universe = universe_of(model)
    groups = pairs.batches(BATCH)
    pieces = []
    for number, group in enumerate(groups):
        diff = Differences(model, group, edge_sites(model))
        scores = edge_scores(model, diff, steps, side, rules)  # (row, sender, receiver)
        by_edge = scores.transpose(1, 2)[
            :, torch.from_numpy(universe.exists.T)
        ]  # (row, edge), by receiver, then sender
        pieces.append(per_example(by_edge.T, group))
        if context.progress:
            context.progress(number + 1, len(groups))
    return table(universe.edges, np.concatenate(pieces, axis=1), **info)
