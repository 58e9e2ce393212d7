"""Activation patching: replace one part by what it does on the other prompt, and measure.

    denoise: score = metric(corrupted with the part's clean activation) - metric(corrupted)
    noise:   score = metric(clean) - metric(clean with the part's corrupted activation)

Both are positive for a part that helps. Vig et al. 2020 (arXiv 2004.12265); which direction tells what: Heimersheim &
Nanda 2024 (arXiv 2404.15255). Edges are measured the same way, through one receiver alone.

With a budget, a gradient screen (relevance patching by default) orders the candidates, the largest are verified
exactly, and a random sample of the rest is verified too: what was missed is then bounded, not hoped away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.base import Context, Direction, base_side, named_parts, resolve_positions, table
from vesalius.model import Intervention, Model, Pairs
from vesalius.model.edges import EdgeRun, write_sites, writes
from vesalius.model.graph import universe_of
from vesalius.model.intervene import Ablation, locate, sites_of
from vesalius.model.reference import Reference
from vesalius.model.sweep import BATCH, Recording, activations, record, sweep
from vesalius.parts import Part
from vesalius.scores import Scores

SAMPLE_SHARE = 0.2  # share of a budget spent on a random sample of the unscreened, for the bound
CONFIDENCE = 0.95


def activation_patching(
    model: Model,
    pairs: Pairs,
    context: Context,
    *,
    direction: Direction = "denoise",
    ablation: Ablation = "counterfactual",
    parts: str = "head,mlp",
    position: str | None = None,
    budget: int | None = None,
    screen: str = "relp",
) -> Scores:
    """Exact effect of patching each part (or edge).

    Args:
        direction: `denoise` or `noise`.
        ablation: what is put in: the paired prompt's activation (`counterfactual`), `mean` or `resample` over the
            other prompts, or `zero`. All but the first only make sense with `noise`.
        parts: kinds of part: head, mlp, attn, neuron, resid_pre, resid_mid, resid_post, embed, xhead.
        position: patch only at this named position; `each`: every token apart; default all positions together.
        budget: verify at most this many parts exactly; the rest keep the screen's estimate.
        screen: the attribution method that chooses them.
    """
    if context.level == "edge":
        return _edges(model, pairs, context, direction, budget, screen)
    if ablation not in get_args(Ablation):
        raise UnknownName("ablation", ablation, get_args(Ablation))
    if ablation != "counterfactual" and direction == "denoise":
        raise VesaliusError(f"ablation '{ablation}' removes information; use it with direction 'noise'")
    candidates = named_parts(model, parts)
    places = resolve_positions(pairs, position)
    if budget is not None and budget < len(candidates):
        if places is not None:
            raise VesaliusError("--budget and --position cannot be combined")
        return _screened(model, pairs, context, direction, ablation, candidates, budget, screen)
    values, labels, named = _exact(model, pairs, context, direction, ablation, candidates, places)
    return table(named, values, labels, direction=direction, ablation=ablation)


def _exact(
    model: Model,
    pairs: Pairs,
    context: Context,
    direction: Direction,
    ablation: Ablation,
    parts: Sequence[Part],
    places: Sequence[tuple[str, torch.Tensor]] | None = None,
    key: str = "patch",
) -> tuple[NDArray[np.float64], list[str] | None, list[Part]]:
    """Scores (part x place, example), with the labels of places and the parts of rows."""
    base = base_side(direction)
    other = "corrupted" if base == "clean" else "clean"
    reference = Reference(model, pairs, other, sites_of(parts)) if ablation in ("mean", "resample") else None

    def variants(recording: Recording) -> list[list[Intervention]]:
        group = recording.pairs
        here: list[tuple[str, torch.Tensor | None]] = [("", None)]
        if places is not None:
            here = [
                (name, group.positions.get(name, torch.full((group.n_rows,), int(name) if name.isdigit() else -1)))
                for name, _ in places
            ]
        values = recording.source
        if reference is not None:
            mean = ablation == "mean"
            values = reference.means(group) if mean else reference.resamples(group, context.seed, recording.first_row)
        found = []
        for part in parts:
            where = locate(part)
            value = 0.0 if ablation == "zero" else where.read(values[where.site])
            found += [[Intervention(part, value=value, positions=p)] for _, p in here]
        return found

    result = sweep(
        model,
        pairs,
        variants,
        base=base,
        capture=sites_of(parts) if ablation == "counterfactual" else (),
        paired=ablation == "counterfactual",
        memory_gb=context.memory_gb,
        progress=context.progress,
        store=context.store,
        key=f"{key}:{ablation}",
    )
    change = result.values - result.base
    labels = None if places is None else [name for _ in parts for name, _ in places]
    named = [p for p in parts for _ in range(1 if places is None else len(places))]
    return (change if direction == "denoise" else -change), labels, named


def _screened(
    model: Model,
    pairs: Pairs,
    context: Context,
    direction: Direction,
    ablation: Ablation,
    candidates: Sequence[Part],
    budget: int,
    screen: str,
) -> Scores:
    kinds = ",".join(dict.fromkeys(p.kind for p in candidates))
    estimate = _estimate(screen, model, pairs, Context(seed=context.seed), direction=direction, parts=kinds)
    by_part = {p: i for i, p in enumerate(estimate.parts)}
    guess = np.stack([estimate.per_example[by_part[p]] for p in candidates])  # type: ignore[index]
    chosen, sample = choose(np.abs(guess.mean(1)), budget, context.seed)
    both = sorted([*chosen, *sample])
    exact, _, _ = _exact(
        model, pairs, context, direction, ablation, [candidates[i] for i in both], key=f"budget{budget}"
    )
    return merge_verified(candidates, guess, both, sample, exact, direction=direction, ablation=ablation, screen=screen)


def _estimate(screen: str, model: Model, pairs: Pairs, context: Context, **options: Any) -> Scores:
    """The screen's scores; of the options those it takes (integrated gradients have no direction)."""
    from vesalius.find.base import METHODS, parameters

    known = parameters(screen)
    return METHODS.get(screen)(model, pairs, context, **{k: v for k, v in options.items() if k in known})


def choose(estimate: NDArray[np.float64], budget: int, seed: int) -> tuple[list[int], list[int]]:
    """The rows to verify: the largest estimates, and a random sample of the others."""
    if budget < 2:
        raise VesaliusError(f"a budget of {budget} verifies nothing; give at least 2")
    n_sample = max(1, int(budget * SAMPLE_SHARE))
    order = np.argsort(-estimate, kind="stable")
    top = order[: budget - n_sample]
    rest = order[budget - n_sample :]
    sample = np.random.default_rng(seed).choice(rest, size=min(n_sample, len(rest)), replace=False)
    return [int(i) for i in top], [int(i) for i in sample]


def merge_verified(
    parts: Sequence[Any],
    estimate: NDArray[np.float64],
    verified: Sequence[int],
    sample: Sequence[int],
    exact: NDArray[np.float64],
    **info: Any,
) -> Scores:
    """Exact values where verified and estimates elsewhere, with a bound on what the estimates hide.

    The random sample of m unscreened parts gives a distribution-free bound on the others: `missed_share`.
    """
    values = estimate.copy()
    values[list(verified)] = exact
    mask = np.zeros(len(parts), dtype=bool)
    mask[list(verified)] = True
    where = {row: i for i, row in enumerate(verified)}
    sampled = np.abs(exact[[where[i] for i in sample]].mean(1)) if sample else np.array([np.nan])
    error = np.abs(exact.mean(1) - estimate[list(verified)].mean(1))
    rest = np.abs(estimate.mean(1))[~mask]
    info["verification"] = {
        "verified": len(verified),
        "estimated": int((~mask).sum()),
        "largest_estimate_left": float(rest.max()) if len(rest) else 0.0,
        "largest_error_of_the_screen": float(error.max()),
        "missed_effect_bound": float(sampled.max()),
        "missed_share_above_bound": missed_share(len(sample), int((~mask).sum())),
        "confidence": CONFIDENCE,
    }
    return Scores(parts, values.mean(1), values, verified=mask, info=info)


def missed_share(sampled: int, left: int) -> float:
    """The largest share of the parts left that may exceed the sample's largest |effect|, at 95 % confidence.

    If k + 1 of the n = sampled + left parts exceed it, the sample missed all of them, which happens with probability
    C(n - k - 1, sampled) / C(n, sampled): the share is the first k / left for which that is at most 5 %.

    Example:
        >>> round(missed_share(59, 10**6), 3), missed_share(6, 14)
        (0.05, 0.42857142857142855)
    """
    missed, chance = 0, 1.0
    while missed < left:
        chance *= (left - missed) / (sampled + left - missed)
        if chance <= 1 - CONFIDENCE:
            break
        missed += 1
    return missed / left if left else 0.0


def _edges(
    model: Model, pairs: Pairs, context: Context, direction: Direction, budget: int | None, screen: str
) -> Scores:
    """Exact edge patching: one forward pass an edge, so a budget on anything but a small model."""
    universe = universe_of(model)
    edges = universe.edges
    estimate: NDArray[np.float64] | None = None
    todo = list(range(len(edges)))
    sample: list[int] = []
    if budget is not None and budget < len(edges):
        scored = _estimate(screen, model, pairs, Context("edge", context.seed), direction=direction)
        estimate = np.asarray(scored.per_example, dtype=np.float64)
        chosen, sample = choose(np.abs(estimate.mean(1)), budget, context.seed)
        todo = sorted([*chosen, *sample])
    base = base_side(direction)
    columns = []
    groups = pairs.batches(BATCH)
    for g, group in enumerate(groups):
        recording = record(model, group, base, [], paired=False)
        ids = group.corrupted if base == "clean" else group.clean
        other = writes(model, activations(model, ids, group, write_sites(model), recording.tape))
        run = EdgeRun(model, group, base, other)
        none = torch.zeros(universe.n_senders, universe.n_receivers, dtype=torch.bool)
        plain = run.values(none).double().numpy()
        rows = []
        for done, i in enumerate(todo):
            name = f"edge:{base}:{g}:{i}"
            kept = context.store.get(name) if context.store else None
            if kept is None:
                kept = run.values(universe.mask([edges[i]])).double().numpy()
                if context.store:
                    context.store.put(name, kept)
            rows.append(kept - plain if direction == "denoise" else plain - kept)
            if context.progress:
                context.progress(g * len(todo) + done + 1, len(groups) * len(todo))
        columns.append(np.stack(rows))
    exact = np.concatenate(columns, axis=1)
    if estimate is None:
        return table(edges, exact, direction=direction)
    return merge_verified(edges, estimate, todo, sample, exact, direction=direction, screen=screen)
