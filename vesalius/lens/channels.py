"""What channels do on prompts: a component taken out where the answer is read, and where a later head then looks.

Merullo et al. 2024 (arXiv 2406.09519): without one component of an inhibition head the mover looks back at the
name it was told to avoid. `measure` gives metric, answers and attention under any interventions; `inhibition` asks it
about every component of a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.errors import UnknownName, VesaliusError
from vesalius.lens.edits import ComponentEdit
from vesalius.lens.wiring import Wiring
from vesalius.model import Intervention, Model, Pairs, Site
from vesalius.model.intervene import first_layer, taps
from vesalius.model.replay import Tape
from vesalius.model.sweep import BATCH, Progress, metric_values
from vesalius.parts import Edge, Part
from vesalius.scores import Scores, bootstrap_mean
from vesalius.tasks.base import Task
from vesalius.tasks.metrics import LogitDiff, accuracy

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """What prompts give under several variants of a pass.

    Attributes:
        metric: (variant, example). preferred: the right answer beats the other options, (variant, example).
        attention: of watched heads from where the answer is read, (variant, head, example, place).
        places: names of the token positions attended to. unit: of the metric.
    """

    metric: Floats
    preferred: NDArray[np.bool_]
    attention: Floats
    places: tuple[str, ...]
    unit: str


Variants = Callable[[Pairs], Sequence[Sequence[Intervention]]]


def measure(
    model: Model,
    task: Task | Pairs,
    variants: Variants,
    *,
    watch: Sequence[Part] = (),
    places: Sequence[str] = (),
    memory_gb: float = DEFAULT_MEMORY_GB,
    progress: Progress | None = None,
) -> Measured:
    """The metric, the answers, and where watched heads look from END, under interventions on the clean prompts.

    Args:
        model: the model. task: prompts with answers of one token.
        variants: of a batch of prompts, the interventions of each variant; an empty list changes nothing.
        watch: heads whose attention is measured. places: names of positions of the task; NaN where a prompt lacks one.
        memory_gb: working memory, GiB. progress: called with (done, total) prompts.
    """
    pairs = task if isinstance(task, Pairs) else task.pairs(model)
    if pairs.targets is not None:
        raise VesaliusError("channels are measured on answers of one token; build the task with scoring='single'")
    for name in places:
        if name not in pairs.positions:
            raise UnknownName("position", name, pairs.positions)
    for head in watch:
        model.anatomy.require(head)
    pieces, done = [], 0
    for group in pairs.batches(BATCH):
        pieces.append(_measure_batch(model, group, variants(group), watch, places, memory_gb))
        done += group.n_examples
        if progress is not None:
            progress(done, pairs.n_examples)
    joined = [np.concatenate([p[i] for p in pieces], axis=axis) for i, axis in ((0, 1), (1, 1), (2, 2))]
    return Measured(joined[0], joined[1].astype(bool), joined[2], tuple(places), pairs.metric.unit)


def _measure_batch(
    model: Model,
    pairs: Pairs,
    variants: Sequence[Sequence[Intervention]],
    watch: Sequence[Part],
    places: Sequence[str],
    memory_gb: float,
) -> tuple[Floats, Floats, Floats]:
    changed = [i.positions for v in variants for i in v]
    first = [0 if at is None else int(at[at >= 0].min()) for at in changed if at is None or (at >= 0).any()]
    start = min([int(pairs.reads.min()), *first])
    tape = Tape(model, pairs.clean, pairs.mask, pairs.reads, start=start, decoder=pairs.decoder)
    sites = list(dict.fromkeys(_pattern_site(model, h) for h in watch))
    n, at_once = len(variants), tape.copies_within(memory_gb)
    metric, preferred = np.zeros((n, pairs.n_examples)), np.zeros((n, pairs.n_examples))
    attention = np.full((n, len(watch), pairs.n_examples, len(places)), np.nan)
    order = sorted(range(n), key=lambda i: first_layer(variants[i]) if variants[i] else model.n_layers)
    tokens = LogitDiff().tokens(pairs)
    for lo in range(0, n, at_once):
        chosen = order[lo : lo + at_once]
        copies = len(chosen)
        functions = taps([variants[i] for i in chosen], tape.rows, tape.start)
        seen: dict[Site, Tensor] = {}
        for site in sites:
            functions.setdefault(site, []).append(lambda x, s=site, seen=seen: seen.__setitem__(s, x))  # type: ignore[misc]
        layers = [first_layer(variants[i]) for i in chosen if variants[i]] + [s.layer for s in sites]
        with torch.no_grad():
            hidden = tape.replay(min([*layers, model.n_layers - 1]), copies, functions)
            metric[chosen] = metric_values(model, pairs, hidden, copies).double().numpy()
            logits = model.readout(hidden, tokens).float().cpu().unflatten(0, (copies, -1))
        preferred[chosen] = np.stack([accuracy(one, pairs).preferred.numpy() for one in logits])
        for h, head in enumerate(watch):
            pattern = seen[_pattern_site(model, head)][:, head.index]
            pattern = pattern.unflatten(0, (copies, -1))  # (copy, row, query, key)
            rows = torch.arange(tape.rows)
            from_end = pattern[:, rows, (pairs.reads[:, 0] - tape.start).to(pattern.device)].float().cpu()
            for p, name in enumerate(places):
                at = pairs.positions[name]
                share = from_end[:, rows, at.clamp(min=0)].double()  # (copy, row)
                attention[chosen, h, :, p] = torch.where(at >= 0, share, float("nan")).numpy()
    return metric, preferred, attention


def _pattern_site(model: Model, head: Part) -> Site:
    name = "cross_pattern" if head.kind == "xhead" else "pattern"
    return Site(name, head.layer or 0, head.stack or model.anatomy.main.prefix)


def inhibition(
    model: Model | Wiring,
    task: Task | Pairs,
    edges: Sequence[Edge],
    *,
    right: str = "IO",
    wrong: str = "S2",
    factor: float = 0.0,
    components: Sequence[Sequence[int]] | None = None,
    at_end: bool = True,
    seed: int = 0,
    memory_gb: float = DEFAULT_MEMORY_GB,
    progress: Progress | None = None,
) -> Scores:
    """What a channel does: one component of the sender taken out, and where the receiver then looks.

    The inhibition score is the change, by the component, of the receiver's attention from END to the right name less
    that to the wrong one: positive when the channel helps the receiver to the right name.

    Args:
        model: the model or its `Wiring`. task: prompts with named positions.
        edges: channels; a side is ignored. components: of each edge; by default every one of the sender.
        right, wrong: positions of the task. factor: 0 takes the component out, other numbers scale it.
        at_end: the component is changed where the answer is read; False: at every position.
        seed: of the intervals.

    Returns:
        A row for each edge and component: the score (attention, per prompt), with columns `component`, `logit_effect`
        (metric lost without the component), `to_right`, `to_wrong` (attention with it).
    """
    wired = Wiring.of(model)
    bench = wired.model
    pairs = task if isinstance(task, Pairs) else task.pairs(bench)
    if components is None:
        components = [range(wired.locate(e.sender)[0].components.s.shape[-1]) for e in edges]
    jobs = [(e, c) for e, numbers in zip(edges, components, strict=True) for c in numbers]
    if not jobs:
        raise VesaliusError("no channel was given; name one such as L5.H1->L9.H6.q")
    watch = list(dict.fromkeys(e.receiver.output for e, _ in jobs))
    maps = {
        (part, c): ComponentEdit(part, {c: factor}, wired.fold).matrix(bench)
        for part, c in dict.fromkeys((e.sender.output, c) for e, c in jobs)
    }

    def variants(group: Pairs) -> list[list[Intervention]]:
        end = group.reads[:, :1] if at_end else None
        return [[], *[[Intervention(part, "map", z, end)] for (part, _), z in maps.items()]]

    found = measure(bench, pairs, variants, watch=watch, places=(right, wrong), memory_gb=memory_gb, progress=progress)
    number = {key: 1 + i for i, key in enumerate(maps)}
    gap = found.attention[..., 0] - found.attention[..., 1]  # (variant, head, example)
    rows = [(number[e.sender.output, c], watch.index(e.receiver.output)) for e, c in jobs]
    each = np.stack([gap[0, h] - gap[v, h] for v, h in rows])
    lost = np.stack([found.metric[0] - found.metric[v] for v, _ in rows])
    low, high = bootstrap_mean(lost, seed)
    columns = {
        "component": np.array([c for _, c in jobs], dtype=float),
        "logit_effect": lost.mean(1),
        "logit_low": low,
        "logit_high": high,
        "to_right": np.array([np.nanmean(found.attention[0, h, :, 0]) for _, h in rows]),
        "to_wrong": np.array([np.nanmean(found.attention[0, h, :, 1]) for _, h in rows]),
    }
    info = {
        "method": "inhibition",
        "task": getattr(task, "name", "pairs"),
        "model": bench.name,
        "fingerprint": bench.fingerprint,
        "unit": "attention",
        "metric_unit": found.unit,
        "n": pairs.n_examples,
        "factor": factor,
        "right": right,
        "wrong": wrong,
        "seed": seed,
    }
    return Scores([e for e, _ in jobs], each.mean(1), each, info=info, columns=columns)
