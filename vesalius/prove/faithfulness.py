"""The metric under circuits: everything outside a circuit ablated, many circuits at once.

At node level a part outside the circuit writes its ablated activation; at edge level every receiver reads, over the
edges outside the circuit, what their sender writes in the ablated run (the input construction of ACDC and EAP, which
the MIB benchmark uses). What is put in the place of the rest:

    counterfactual   the paired counterfactual prompt's activation (resample ablation with the pair; MIB's `patching`)
    mean             the mean over counterfactual prompts of the same length, at each position
    resample         the activation of another counterfactual prompt of the same length
    zero             nothing

The empty circuit ablates the embedding too, as in MIB; larger circuits keep it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.errors import PartError, VesaliusError
from vesalius.model import Model, Pairs, Site
from vesalius.model.crew import Crew
from vesalius.model.edges import EdgeRun, write_sites, writes
from vesalius.model.graph import universe_of
from vesalius.model.hooks import Tap
from vesalius.model.intervene import Ablation, locate
from vesalius.model.reference import Reference
from vesalius.model.replay import Tape
from vesalius.model.sweep import BATCH, Progress, Store, activations, metric_values, record
from vesalius.parts import Part
from vesalius.prove.circuit import Circuit

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ends:
    """The metric of each prompt with everything kept and with everything ablated, (example,)."""

    full: Floats
    empty: Floats


def evaluate(
    model: Model,
    pairs: Pairs,
    circuits: Sequence[Circuit],
    *,
    ablation: Ablation = "counterfactual",
    seed: int = 0,
    memory_gb: float = DEFAULT_MEMORY_GB,
    progress: Progress | None = None,
    store: Store | None = None,
    key: str = "circuits",
) -> tuple[Floats, Ends]:
    """The metric of every prompt under every circuit.

    Args:
        circuits: all of one level.
        store: finished batches are kept there under `key`.

    Returns:
        Values (circuit, example), and the two ends of the scale.
    """
    if not circuits:
        raise VesaliusError("there are no circuits to evaluate")
    levels = {c.level for c in circuits}
    if len(levels) > 1:
        raise VesaliusError("circuits of nodes and of edges cannot be evaluated in one call")
    edges = levels == {"edge"}
    universe = universe_of(model) if edges else None
    parts = model.parts(("head", "xhead", "mlp"))
    strange = {p for c in circuits for p in c.nodes} - {*parts, *model.parts(("embed",)), Part("unembed")}
    if strange:
        named = ", ".join(sorted(map(str, strange))[:5])
        raise PartError(f"{model.name} has no {named}: the circuit was made for another model")
    if pairs.n_examples == 0:
        raise VesaliusError("there are no prompts to evaluate on; give a task with n of at least 1")
    asked = repr(([sorted(map(str, c.nodes if c.edges is None else c.edges)) for c in circuits], model.fingerprint))
    digest = hashlib.sha256((asked + pairs.fingerprint).encode()).hexdigest()[:12]
    sites = (
        write_sites(model) if edges else [*dict.fromkeys(locate(p).site for p in [*parts, *model.parts(("embed",))])]
    )
    reference = Reference(model, pairs, "corrupted", sites) if ablation in ("mean", "resample") else None
    pieces: list[Floats] = []
    groups, offset = pairs.batches(BATCH), 0
    with model.alone(), Crew(model) as crew:
        for number, group in enumerate(groups):
            name = f"{key}:{digest}:{ablation}:{seed}:{number}"
            values = store.get(name) if store else None
            if values is None:
                rest = _rest(model, group, sites, ablation, reference, seed, offset)

                def done(i: int, number: int = number) -> None:
                    if progress:
                        progress(number * len(circuits) + i, len(groups) * len(circuits))

                if universe is not None:
                    masks = [c.mask(universe) for c in circuits]
                    values = _edge_values(model, group, masks, rest, done)
                else:
                    keep = torch.tensor([[p in c.nodes for p in parts] for c in circuits])
                    values = _node_values(model, group, parts, keep, rest, memory_gb, crew, done)
                if store:
                    store.put(name, values)
            pieces.append(values)
            offset += group.n_rows
    joined = np.concatenate(pieces, axis=1)
    return joined[:-2], Ends(joined[-2], joined[-1])


def _rest(
    model: Model,
    pairs: Pairs,
    sites: Sequence[Site],
    ablation: Ablation,
    reference: Reference | None,
    seed: int,
    offset: int,
) -> Mapping[Site, Tensor] | None:
    """What ablated parts do, by site (row, pos, ...); None for the paired prompt, which is recorded with the base."""
    if reference is not None:
        return reference.means(pairs) if ablation == "mean" else reference.resamples(pairs, seed, offset)
    if ablation == "zero":
        first = record(model, pairs, "clean", [], paired=False, capture_base=sites)
        return {s: torch.zeros_like(x) for s, x in first.base.items()}
    return None


def _node_values(
    model: Model,
    pairs: Pairs,
    parts: Sequence[Part],
    keep: Tensor,
    rest: Mapping[Site, Tensor] | None,
    memory_gb: float,
    crew: Crew,
    done: Callable[[int], None],
) -> Floats:
    """Rows: every circuit, then the full model, then the empty circuit."""
    sites = [*dict.fromkeys(locate(p).site for p in [*parts, *model.parts(("embed",))])]
    recording = record(model, pairs, "clean", sites if rest is None else [], paired=rest is None)
    tape = recording.tape
    other = recording.source if rest is None else rest
    at_once = tape.copies_within(memory_gb / crew.workers)
    starts = range(0, len(keep), at_once)

    def replay(mine: Tape, lo: int) -> Tensor:
        chunk = keep[lo : lo + at_once]
        with torch.no_grad():
            hidden = mine.replay(0, len(chunk), _keep_taps(parts, chunk, other, mine.rows, mine.start))
            return metric_values(mine.model, pairs, hidden, len(chunk))

    by_start: dict[int, Tensor] = {}
    for lo, values in crew.run(tape, starts, replay):
        by_start[lo] = values
        done(min(len(by_start) * at_once, len(keep)))
    out = [by_start[lo] for lo in starts]
    with torch.no_grad():
        out.append(metric_values(model, pairs, tape.final))
        none = torch.zeros(1, len(parts), dtype=torch.bool)
        taps = _keep_taps(parts, none, other, tape.rows, tape.start)
        for part in model.parts(("embed",)):
            site = locate(part).site
            taps[site] = [lambda x, s=site: _fit(other[s], x, tape.start)]  # type: ignore[misc]
        out.append(metric_values(model, pairs, tape.replay(0, 1, taps)))
    found = torch.cat(out).double()
    found[:-2][~keep.any(1)] = found[-1]  # a circuit without parts is the empty circuit
    return found.numpy()


def _fit(value: Tensor, like: Tensor, start: int) -> Tensor:
    """An ablation value at the positions computed."""
    return value[:, start:] if value.shape[1] == like.shape[1] + start else value


def _keep_taps(
    parts: Sequence[Part], keep: Tensor, other: Mapping[Site, Tensor], rows: int, start: int
) -> dict[Site, list[Tap]]:
    """Taps under which variant i keeps the parts where keep[i] is True; keep is (variant, part)."""
    columns: dict[Site, list[tuple[int, int | None]]] = {}
    for i, part in enumerate(parts):
        where = locate(part)
        columns.setdefault(where.site, []).append((i, where.head))
    copies = len(keep)

    def make(site: Site, items: Sequence[tuple[int, int | None]]) -> Tap:
        mine = keep[:, [i for i, _ in items]]  # (variant, part here), heads in order

        def tap(x: Tensor) -> Tensor:
            rest = _fit(other[site], x, start).to(x)
            rest = rest.repeat(copies, *[1] * (rest.dim() - 1))
            mask = mine.repeat_interleave(rows, dim=0).to(x.device)  # (variant * row, part here)
            shape = (mask.shape[0], 1, -1, 1) if items[0][1] is not None else (mask.shape[0], 1, 1)
            return torch.where(mask.view(shape), x, rest)

        return tap

    return {
        site: [make(site, items)] for site, items in columns.items() if not bool(keep[:, [i for i, _ in items]].all())
    }


def _edge_values(
    model: Model, pairs: Pairs, masks: Sequence[Tensor], rest: Mapping[Site, Tensor] | None, done: Callable[[int], None]
) -> Floats:
    recording = record(model, pairs, "clean", [], paired=False)
    if rest is None:
        rest = activations(model, pairs.corrupted, pairs, write_sites(model), recording.tape)
    run = EdgeRun(model, pairs, "clean", writes(model, rest))
    out = []
    for i, mask in enumerate(masks):
        out.append(run.values(~mask))
        done(i + 1)
    out.append(run.values(torch.zeros_like(masks[0])))
    out.append(run.values(torch.ones_like(masks[0])))
    return torch.stack(out).double().numpy()
