"""Circuits laid side by side: several tasks in one model, or one task in several models.

For each: the circuit (the same share of heads and MLPs for all, by |effect|), its faithfulness on held-out prompts
against random circuits, and the role of every head. For every two of one shape: what they share against chance. For the
first two tasks of one model: the transplant (`vesalius.prove.transplant`). Merullo et al. 2023 (arXiv 2310.08744).

Why a fixed share and not the smallest faithful circuit: the second task of a transplant is one the model does badly, so
that there is no behaviour to be faithful to; and circuits of one size are easily compared. The paper keeps the top 2 %
of heads in each of four stages of path patching and all MLPs; here it is a quarter of the heads and MLPs by exact
activation patching, about the size at which IOI in SmolLM2-135M becomes faithful (docs/results/reuse.md). Parts that
work against the answer belong to the circuit, so that the ranking is by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vesalius.defaults import DEFAULT_HELD_OUT, DEFAULT_MEMORY_GB
from vesalius.errors import TaskError, VesaliusError
from vesalius.find import find
from vesalius.find.base import METHODS, parameters
from vesalius.find.detectors.roles import ROLES, Roles, roles
from vesalius.model import Model, Pairs
from vesalius.model.graph import universe_of
from vesalius.model.sweep import Prefixed, Progress, Store
from vesalius.parts import Part
from vesalius.prove.areas import faithfulness_curve
from vesalius.prove.circuit import Circuit, grow
from vesalius.prove.faithfulness import evaluate
from vesalius.prove.overlap import Overlap, overlap
from vesalius.prove.proof import controls, smallest
from vesalius.prove.transplant import MOST, MOVER_ROLES, Transplant, donors, transplant
from vesalius.scores import Scores
from vesalius.tasks.performance import Performance, performance

SHARE = 0.25  # of the heads and MLPs
CONTROLS = 5  # random circuits beside each


class Splittable(Protocol):
    """A task that can give other prompts of its kind; `vesalius.task` makes them."""

    name: str

    def pairs(self, model: Model) -> Pairs: ...

    def held_out(self, n: int | None = None) -> Splittable: ...

    def halves(self) -> tuple[Splittable, Splittable]: ...


@dataclass(frozen=True)
class Item:
    """One circuit among those laid side by side.

    Attributes:
        name: what it is called in the tables: the task, or the model where several are compared.
        model, task: names. scores, circuit, roles: as measured on the finding prompts.
        performance: how well the model does the task, on the held-out prompts.
        faithfulness: mean, low, high on held-out prompts, counterfactual ablation; None where it means nothing.
        random: faithfulness of random circuits of its size, (draw,).
        shape: layers and heads, or None where the model's parts do not add up in one stream.
        total: how many heads and MLPs the model has.
    """

    name: str
    model: str
    task: str
    scores: Scores
    circuit: Circuit
    roles: Roles | None
    performance: Performance
    faithfulness: dict[str, float] | None
    random: NDArray[np.float64]
    total: dict[str, int]

    def role(self, part: Part) -> str:
        return self.roles[part] if self.roles is not None else ""

    def summary(self) -> dict[str, Any]:
        """Its entry in the report's summary."""
        found: dict[str, Any] = {
            "name": self.name,
            "model": self.model,
            "task": self.task,
            "accuracy": self.performance.accuracy,
            "chance": self.performance.chance,
            "logit_diff": self.performance.estimate("clean"),
            "faithfulness": self.faithfulness,
            "size": {"heads": len(self.circuit.heads), "mlps": len(self.circuit.mlps)},
            "total": self.total,
        }
        if len(self.random):
            found["random"] = {"mean": float(self.random.mean()), "max": float(self.random.max())}
        if self.roles is not None:
            heads = [self.role(p) for p in self.circuit.heads]
            found["roles"] = {r: heads.count(r) for r in [*ROLES, ""] if r in heads}
        return found

    def members(self) -> dict[str, Any]:
        """The circuit as `circuit_<i>.json` of the report."""
        rows = self.circuit.to_frame().to_dict("records")
        roles_ = {str(p): self.role(p) for p in self.circuit.nodes}
        return {
            "parts": [{"part": r["part"], "role": roles_.get(r["part"], ""), "score": r["score"]} for r in rows],
            "edges": [],
        }


@dataclass(frozen=True)
class Reuse:
    """Circuits side by side, what they share, and the transplant.

    Attributes:
        items: the circuits, in the order asked for.
        overlaps: of every two of one shape, by (index, index).
        transplant: from the first task to the second, or None (a note says why).
        info: method, share, seeds. notes: what was not measured, and why.
    """

    items: list[Item]
    overlaps: dict[tuple[int, int], Overlap]
    transplant: Transplant | None
    info: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def overlap_frame(self) -> pd.DataFrame:
        """a, b, kind (all, head, mlp), shared, sizes, jaccard, chance_shared, chance_high, p, and score correlations.

        Random circuits keep the numbers of heads and of MLPs; `p_layer` is of ones that keep them layer by layer.
        """
        rows = []
        for (i, j), found in self.overlaps.items():
            a, b = self.items[i], self.items[j]
            for row in found.to_frame().to_dict("records"):
                kind = str(row["kind"])
                r = (
                    _correlation(a.scores, b.scores, kind, "pearson"),
                    _correlation(a.scores, b.scores, kind, "spearman"),
                )
                rows.append({"a": a.name, "b": b.name, **row, "pearson": r[0], "spearman": r[1]})
                rows[-1]["p_layer"] = self.info.get("p_layer", {}).get(f"{i}-{j}", {}).get(kind, np.nan)
        columns = ["a", "b", "kind", "shared", "size_a", "size_b", "jaccard", "of_a", "of_b", "chance_shared"]
        columns += ["chance_jaccard", "chance_high", "p", "p_layer", "pearson", "spearman"]
        return pd.DataFrame(rows, columns=columns)

    def parts_frame(self) -> pd.DataFrame:
        """A row for each part in any circuit: part, where (shared, or the names), and each circuit's role and score."""
        everything = sorted({p for item in self.items for p in item.circuit.nodes}, key=lambda p: p.order)
        rows = []
        for part in everything:
            users = [i.name for i in self.items if part in i.circuit.nodes]
            row: dict[str, Any] = {
                "part": str(part),
                "where": "shared" if len(users) == len(self.items) else ", ".join(users),
            }
            for i in self.items:
                inside = part in i.circuit.nodes
                row[f"{i.name}: role"] = i.role(part) if inside else ""
                row[f"{i.name}: score"] = i.scores[part] if inside else np.nan
            rows.append(row)
        return pd.DataFrame(rows)

    def depth_frame(self) -> pd.DataFrame:
        """How circuits spread over relative depth, for models of different shape: name, depth (fifths), heads, mlps."""
        rows = []
        for item in self.items:
            layers = max(1, item.total["layers"])
            for fifth in range(5):
                here = [p for p in item.circuit.nodes if min(4, 5 * (p.layer or 0) // layers) == fifth]
                heads = [p for p in here if p.kind == "head"]
                row = {"name": item.name, "depth": f"{20 * fifth}-{20 * fifth + 20} %", "heads": len(heads)}
                named = [item.role(p) for p in heads]
                said = ", ".join(f"{named.count(r)} {r}" for r in ROLES if r in named)
                rows.append(row | {"mlps": len(here) - len(heads), "roles": said})
        return pd.DataFrame(rows)

    def transplant_frame(self) -> pd.DataFrame | None:
        """The transplant's numbers (condition, metric, value, low, high, draw), or None without one."""
        return None if self.transplant is None else self.transplant.to_frame()

    def summary(self) -> dict[str, Any]:
        """The report's `summary.json`, less command and versions."""
        found: dict[str, Any] = {
            "method": self.info.get("method"),
            "unit": self.info.get("unit"),
            "items": [item.summary() for item in self.items],
            "notes": list(self.notes),
        }
        if self.transplant is not None:
            t = self.transplant
            low, high = t.lift_interval()
            found["transplant"] = {
                "source": self.items[0].name,
                "target": self.items[1].name,
                "heads": [str(h) for h in t.heads],
                "random_draws": len(t.random.metric),
                "n": t.n,
                "lift": {"mean": t.lift, "low": low, "high": high},
                "random_lift": None if np.isnan(t.random_lift) else t.random_lift,
                **{k: t.info[k] for k in ("development_prompts", "candidates", "order", "movers", "movers_downstream")},
            }
        return found

    def tables(self) -> dict[str, Any]:
        """Everything the report reads, by name: frames to store as tables, the rest as JSON."""
        found: dict[str, Any] = {
            "summary": self.summary(),
            "overlap": self.overlap_frame(),
            "parts": self.parts_frame(),
        }
        for i, item in enumerate(self.items):
            found[f"circuit_{i}"] = item.members()
            found[f"scores_{i}"] = item.scores.to_frame()
            if item.roles is not None:
                found[f"roles_{i}"] = item.roles.to_frame()
        if len({(i.total["layers"], i.total["heads"]) for i in self.items}) > 1:
            found["depth"] = self.depth_frame()
        if self.transplant is not None:
            found["transplant"] = self.transplant.to_frame()
            found["transplant_curve"] = self.transplant.curve
            found["transplant_control"] = self.transplant.chosen_frame()
        return found

    def __repr__(self) -> str:
        lines = [f"Reuse({len(self.items)} circuits by {self.info.get('method')})"]
        for item in self.items:
            heads, mlps = len(item.circuit.heads), len(item.circuit.mlps)
            lines.append(f"  {item.name}: accuracy {item.performance.accuracy:.3f}, {heads} heads, {mlps} MLPs")
        lines += [f"  {self.items[i].name} / {self.items[j].name}: {o!r}" for (i, j), o in self.overlaps.items()]
        if self.transplant is not None:
            lines.append(f"  {self.transplant!r}")
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def reuse(
    model: Model | Sequence[Model],
    tasks: Splittable | Sequence[Splittable],
    *,
    method: str = "activation-patching",
    options: dict[str, Any] | None = None,
    share: float = SHARE,
    target: float | None = None,
    with_roles: bool = True,
    with_transplant: bool = True,
    held_out: int = DEFAULT_HELD_OUT,
    most: int = MOST,
    seed: int = 0,
    memory_gb: float = DEFAULT_MEMORY_GB,
    stage: Callable[[str], Progress | None] | None = None,
    store: Store | None = None,
) -> Reuse:
    """Lays circuits side by side: of several tasks in one model, or of one task in several models.

    Args:
        model: one model or several. tasks: several tasks, or one; their prompts are those circuits are found on.
        method: how parts are scored; patching with `noise` (parts of the clean run are replaced) unless options say.
        options: the method's own parameters.
        share: of heads and MLPs together, the size of every circuit.
        target: instead of a share, the smallest circuit of this faithfulness on the finding prompts.
        with_roles: measure roles. with_transplant: try the transplant from the first task to the second.
        held_out: prompts the transplant is reported on; the finding prompts of the second task choose the heads.
        most: heads to transplant at most.
        seed: for everything drawn here; prompts have their tasks' own seeds.
        stage: called with the name of each long step; returns its progress callback.
        store: keeps finished pieces of scoring, so that a killed run goes on.

    Returns:
        A `Reuse`.

    Raises:
        VesaliusError: for fewer than two circuits, or several tasks in several models.

    Example:
        >>> reuse(model, [vesalius.task("ioi", n=32), vesalius.task("colored-objects", n=48)])   # doctest: +SKIP
    """
    models = [model] if isinstance(model, Model) else list(model)
    wanted = list(tasks) if isinstance(tasks, Sequence) else [tasks]
    if len(models) > 1 and len(wanted) > 1:
        raise VesaliusError(
            f"{len(wanted)} tasks in {len(models)} models; compare tasks in one model, or models on one"
        )
    pairs_of = [(m, t) for m in models for t in wanted]
    if len(pairs_of) < 2:
        raise VesaliusError("one circuit has nothing to be compared with; give two tasks, or two models")
    names = _names([m.name for m in models] if len(models) > 1 else [_short(t.name) for t in wanted])
    chosen = dict(options or {})
    if "direction" in parameters(method) and method == "activation-patching":
        chosen.setdefault("direction", "noise")
    levels = METHODS.entry(method).info.get("levels", ("node",))
    if "node" not in levels:
        raise VesaliusError(f"{method} scores {' and '.join(levels)}s; circuits are compared by parts: choose another")
    report = stage if stage is not None else lambda _: None
    notes: list[str] = []
    items = []
    for number, ((m, t), name) in enumerate(zip(pairs_of, names, strict=True)):
        kept = None if store is None else Prefixed(store, f"{number}:")
        items.append(_item(m, t, name, method, chosen, share, target, with_roles, seed, memory_gb, report, kept, notes))
    overlaps, by_layer = _overlaps(items, [m for m, _ in pairs_of], seed, notes)
    moved = None
    if with_transplant and len(models) == 1:
        moved = _transplant(models[0], wanted, items, held_out, most, seed, memory_gb, report, notes)
    elif with_transplant:
        notes.append("no transplant: it takes two tasks in one model")
    info = {
        "method": method,
        "options": chosen,
        "share": share if target is None else None,
        "target": target,
        "seed": seed,
        "unit": items[0].scores.info.get("unit"),
        "p_layer": by_layer,
    }
    return Reuse(items, overlaps, moved, info, tuple(dict.fromkeys(notes)))


def _short(task: str) -> str:
    """A user's file by its stem, so that tables stay readable; a registered task by its name."""
    return Path(task).stem if Path(task).suffix else task


def _names(names: Sequence[str]) -> list[str]:
    """The same, numbered where they repeat."""
    return [n if names.count(n) == 1 else f"{n} ({names[:i].count(n) + 1})" for i, n in enumerate(names)]


def _item(
    model: Model,
    task: Splittable,
    name: str,
    method: str,
    options: dict[str, Any],
    share: float,
    target: float | None,
    with_roles: bool,
    seed: int,
    memory_gb: float,
    stage: Callable[[str], Progress | None],
    store: Store | None,
    notes: list[str],
) -> Item:
    finding, proving = (half.pairs(model) for half in task.halves())
    does = performance(model, proving)
    label = f"{name}: {method}"
    scores = find(method, model, finding, seed=seed, memory_gb=memory_gb, progress=stage(label), store=store, **options)
    scores.info["task"] = task.name
    parts = model.parts(("head", "xhead", "mlp"))
    ranked = scores.select([i for i, p in enumerate(scores.parts) if p in set(parts)])
    if target is None:
        circuit = grow(ranked, fraction=share, level="node")
    else:
        circuit, _ = smallest(ranked, model, finding, target=target, memory_gb=memory_gb)
        if not circuit.info["target_reached"]:
            notes.append(f"{name}: no circuit reached faithfulness {target}; the most faithful one is shown")
    if model.kind != "encoder-decoder" and not model.anatomy.post_norm:
        circuit.info["universe"] = asdict(universe_of(model))
    progress = stage(f"{name}: faithfulness")
    values, ends = evaluate(
        model, proving, [circuit, *controls(circuit, model, CONTROLS, seed)], memory_gb=memory_gb, progress=progress
    )
    size = [circuit.size] * len(values)
    point = faithfulness_curve(values, ends.full, ends.empty, size, [0.0] * len(values), "counterfactual", seed=seed)
    faith: dict[str, float] | None = None
    if np.isnan(point.low[0]):
        notes.append(
            f"{name}: the model does not settle this task on these prompts (accuracy {does.accuracy:.2f}, chance "
            f"{does.chance:.2f}), so faithfulness has no meaning there; its circuit is what moves the metric most"
        )
    else:
        faith = {"mean": float(point.values[0]), "low": float(point.low[0]), "high": float(point.high[0])}
    found = None
    if with_roles:
        try:
            found = roles(model, finding, scores=scores, seed=seed, progress=stage(f"{name}: roles"))
            found.info["task"] = task.name
            notes += [f"{name}: {n}" for n in found.notes]
        except VesaliusError as error:
            notes.append(f"{name}: roles were not measured: {error}")
    total = {
        "heads": sum(p.kind != "mlp" for p in parts),
        "mlps": sum(p.kind == "mlp" for p in parts),
        "layers": model.n_layers,
    }
    random = np.asarray(point.values[1:] if faith is not None else [], dtype=np.float64)
    return Item(name, model.name, task.name, scores, circuit, found, does, faith, random, total)


def _overlaps(
    items: Sequence[Item], models: Sequence[Model], seed: int, notes: list[str]
) -> tuple[dict[tuple[int, int], Overlap], dict[str, dict[str, float]]]:
    found: dict[tuple[int, int], Overlap] = {}
    by_layer: dict[str, dict[str, float]] = {}
    for i, j in combinations(range(len(items)), 2):
        a, b = items[i].circuit.universe, items[j].circuit.universe
        if a is None or b is None:
            notes.append(
                f"{items[i].name} and {items[j].name}: no overlap, parts of these models do not form one stream"
            )
            continue
        if a != b:
            notes.append(
                f"{items[i].name} and {items[j].name} have different shapes, so no part of one is a part of the other; "
                "compare their depths and roles instead"
            )
            continue
        if models[i] is not models[j]:
            notes.append(
                f"{items[i].name} and {items[j].name}: heads are matched by address, which means something only if one "
                "model was trained from the other"
            )
        found[i, j] = overlap(items[i].circuit, items[j].circuit, a, seed, match="kind")
        stricter = overlap(items[i].circuit, items[j].circuit, a, seed, match="layer").to_frame()
        by_layer[f"{i}-{j}"] = dict(zip(stricter["kind"].astype(str), stricter["p"].astype(float), strict=True))
    return found, by_layer


def _transplant(
    model: Model,
    tasks: Sequence[Splittable],
    items: Sequence[Item],
    held_out: int,
    most: int,
    seed: int,
    memory_gb: float,
    stage: Callable[[str], Progress | None],
    notes: list[str],
) -> Transplant | None:
    """From the first task to the second, or None with a note."""
    source, target = items[0], items[1]
    if source.roles is None:
        notes.append(f"no transplant: the roles of heads in {source.name} were not measured")
        return None
    candidates = donors(source.roles, source.scores, most=most)
    if not candidates:
        notes.append(f"no transplant: {source.name} has no inhibition head, suppressor or negative mover to make act")
        return None
    movers = source.roles.heads(*MOVER_ROLES)
    development, rest = tasks[1].halves()
    try:
        rest = development.held_out(held_out)
    except TaskError:
        notes.append(f"transplant: {target.name} has fewer than {held_out} prompts left; all that are left are used")
    try:
        found = transplant(
            model,
            development,
            rest,
            candidates,
            movers=movers,
            most=most,
            seed=seed,
            memory_gb=memory_gb,
            stage=stage,
        )
    except VesaliusError as error:
        notes.append(f"no transplant to {target.name}: {error}")
        return None
    notes += [f"transplant: {n}" for n in found.notes]
    return found


def _correlation(a: Scores, b: Scores, kind: str, how: Any) -> float:
    """Over heads, MLPs, or both; NaN where there are too few."""
    a, b = (s if kind == "all" else s.kind(kind) for s in (a, b))
    try:
        return a.correlation(b, how)
    except VesaliusError:
        return float("nan")
