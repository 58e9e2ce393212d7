"""Proving a circuit on prompts that were not used to find it.

Faithfulness against size under several ablations, with random circuits of equal size beside it; MIB's two areas, and
the same on a log axis; completeness (Wang et al. 2022, arXiv 2211.00593, sec. 4); everything with bootstrap intervals
over the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vesalius.defaults import DEFAULT_MEMORY_GB
from vesalius.errors import VesaliusError
from vesalius.find.base import PairsSource, pairs_of
from vesalius.model import Model, Pairs
from vesalius.model.graph import Level, universe_of
from vesalius.model.intervene import Ablation
from vesalius.model.sweep import Progress, Store
from vesalius.parts import Part
from vesalius.prove.areas import MIB_FRACTIONS, Areas, FaithfulnessCurve, areas, faithfulness_curve
from vesalius.prove.circuit import Circuit, grow, random_circuit
from vesalius.prove.faithfulness import Ends, evaluate
from vesalius.scores import Scores

Floats = NDArray[np.float64]
Stage = Callable[[str], Progress | None]
DEFAULT_ABLATIONS: tuple[Ablation, ...] = ("counterfactual", "mean")
CONTROLS = 10  # random circuits at the chosen size
CURVE_CONTROLS = 3  # random circuits at each size of the curve


@dataclass(frozen=True)
class Proof:
    """What was measured of a circuit on held-out prompts.

    Attributes:
        circuit: the circuit. n: prompts.
        faithfulness: of the circuit by ablation, as one-point curves with intervals.
        random: faithfulness of random circuits of its size by ablation, (draw,).
        curves: by ablation and ranking (`value` for CPR, `magnitude` for CMD).
        areas: of each curve.
        control: random circuits on the curve: ablation, size, fraction, draw, faithfulness.
        completeness: see `completeness`.
    """

    circuit: Circuit
    n: int
    faithfulness: dict[str, FaithfulnessCurve]
    random: dict[str, Floats]
    curves: dict[tuple[str, str], FaithfulnessCurve]
    areas: dict[tuple[str, str], Areas]
    control: pd.DataFrame
    completeness: pd.DataFrame
    info: dict[str, Any] = field(default_factory=dict)

    def curve_frame(self) -> pd.DataFrame:
        """Every point: ablation, by, size, fraction, faithfulness, low, high, kind (circuit or random), draw."""
        frames = []
        for (ablation, by), curve in self.curves.items():
            f = curve.to_frame()
            frames.append(
                pd.DataFrame(
                    {
                        "ablation": ablation,
                        "by": by,
                        "size": f["size"],
                        "fraction": f["fraction"],
                        "faithfulness": f["faithfulness"],
                        "low": f["low"],
                        "high": f["high"],
                        "kind": "circuit",
                        "draw": -1,
                    }
                )
            )
        frames.append(self.control)
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row an ablation: faithfulness with interval, random circuits, areas."""
        rows = []
        for ablation, point in self.faithfulness.items():
            cpr = self.areas.get((ablation, "value"))
            cmd = self.areas.get((ablation, "magnitude"))
            rows.append(
                {
                    "ablation": ablation,
                    "faithfulness": float(point.values[0]),
                    "low": float(point.low[0]),
                    "high": float(point.high[0]),
                    "random_mean": float(np.nanmean(self.random[ablation])),
                    "random_max": float(np.nanmax(self.random[ablation])),
                    "cpr": cpr.cpr.value if cpr else np.nan,
                    "cpr_log": cpr.cpr_log_share.value if cpr else np.nan,
                    "cmd": cmd.cmd.value if cmd else np.nan,
                    "cmd_log": cmd.cmd_log_share.value if cmd else np.nan,
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        table = self.summary().to_string(index=False, float_format="{:.3f}".format)
        return f"Proof({self.circuit!r}; {self._prompts()})\n{table}"

    def _prompts(self) -> str:
        """What it was measured on, in words."""
        seen = self.info.get("seen_prompts", 0)
        text = f"{self.n} held-out prompts"
        if seen:
            text = f"{self.n} prompts, {seen} of which it was found on: this is no proof, give held-out ones"
        return text + ("; in another model than it was found in" if self.info.get("other_model") else "")

    def _repr_html_(self) -> str:
        table = self.summary().to_html(index=False, float_format=lambda v: f"{v:.3f}")
        return f"{self.circuit._repr_html_()}<p><b>Proof</b> on {self._prompts()}</p>{table}"


def sizes_for(level: Level, total: int) -> list[tuple[float, int]]:
    """MIB's fractions of the parts or edges, with those that round down to nothing left out."""
    return [(f, int(f * total)) for f in MIB_FRACTIONS if int(f * total) > 0]


def circuits_of(
    scores: Scores, model: Model, by: str, grown: str = "top"
) -> tuple[list[Circuit], list[tuple[float, int]]]:
    """The growing circuits of one ranking at MIB's fractions, with (fraction, size asked for)."""
    edge = scores.info.get("level") == "edge"
    universe = universe_of(model) if edge else None
    ranked = scores if edge else _nodes_only(scores)
    points = sizes_for("edge" if edge else "node", len(ranked))
    made = [grow(ranked, size, by=by, method=grown, universe=universe) for _, size in points]  # type: ignore[arg-type]
    return made, points


def _nodes_only(scores: Scores) -> Scores:
    return scores.select(
        [i for i, p in enumerate(scores.parts) if isinstance(p, Part) and p.kind in ("head", "xhead", "mlp")]
    )


def random_nodes(like: Circuit, parts: Sequence[Part], seed: int) -> Circuit:
    """A random circuit of parts with as many heads and MLPs of each stack."""
    rng = np.random.default_rng(seed)
    chosen: list[Part] = []
    for group in dict.fromkeys((p.kind, p.stack) for p in parts):  # a set has another order in every process
        pool = [p for p in parts if (p.kind, p.stack) == group]
        count = sum((p.kind, p.stack) == group for p in like.nodes)
        chosen += [pool[i] for i in rng.choice(len(pool), size=count, replace=False)]
    return Circuit(frozenset(chosen), None, None, {"random": "kind", "seed": seed})


def controls(like: Circuit, model: Model, draws: int, seed: int) -> list[Circuit]:
    """Random circuits of equal size: by kind for nodes; for edges ones in which every edge lies on a path."""
    if like.edges is None:
        parts = model.parts(("head", "xhead", "mlp"))
        return [random_nodes(like, parts, seed + i) for i in range(draws)]
    universe = universe_of(model)
    return [random_circuit(like, universe, seed + i, match="connected") for i in range(draws)]


def smallest(
    scores: Scores,
    model: Model,
    task: PairsSource | Pairs,
    *,
    target: float = 0.8,
    ablation: Ablation = "counterfactual",
    max_heads: float = 1.0,
    by: str = "magnitude",
    memory_gb: float = DEFAULT_MEMORY_GB,
    progress: Progress | None = None,
    store: Store | None = None,
) -> tuple[Circuit, pd.DataFrame]:
    """The smallest circuit on a grid of sizes whose faithfulness on these (finding) prompts reaches a target.

    The margin of a circuit picked this way is optimistic on the prompts it was picked on: prove it on others.

    Args:
        max_heads: largest share of the model's heads allowed.

    Returns:
        The circuit (the most faithful allowed one if none reaches the target), and the table of sizes tried.
    """
    pairs = task if isinstance(task, Pairs) else task.pairs(model)
    edge = scores.info.get("level") == "edge"
    universe = universe_of(model) if edge else None
    ranked = scores if edge else _nodes_only(scores)
    n = len(ranked)
    grid = sorted(
        {max(1, round(n * f)) for f in (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.17, 0.2, 0.25, 0.3, 0.4, 0.5)}
    )
    tried = [grow(ranked, size, by=by, universe=universe) for size in grid]  # type: ignore[arg-type]
    total = len(model.parts(("head", "xhead")))
    allowed = [(s, c) for s, c in zip(grid, tried, strict=True) if len(c.heads) <= max_heads * total and c.size]
    if not allowed:
        raise VesaliusError(f"no circuit has at most {max_heads:.0%} of the heads; allow more")
    values, ends = evaluate(
        model,
        pairs,
        [c for _, c in allowed],
        ablation=ablation,
        memory_gb=memory_gb,
        progress=progress,
        store=store,
        key="size",
    )
    gap = ends.full.mean() - ends.empty.mean()
    if not np.isfinite(gap) or gap == 0:
        raise VesaliusError(
            f"the whole model scores {ends.full.mean():.3g} on these prompts and scores {ends.empty.mean():.3g} with "
            "every part ablated: there is no effect to explain; choose other prompts or another model"
        )
    faith = (values.mean(1) - ends.empty.mean()) / gap
    table = pd.DataFrame(
        {"size": [s for s, _ in allowed], "heads": [len(c.heads) for _, c in allowed], "faithfulness": faith}
    )
    reached = np.flatnonzero(faith >= target)
    pick = int(reached[0]) if len(reached) else int(np.nanargmax(faith))
    circuit = allowed[pick][1]
    circuit.info.update(
        {"target": target, "target_reached": bool(len(reached)), "faithfulness_on_finding_prompts": float(faith[pick])}
    )
    return circuit, table


def prove(
    circuit: Circuit,
    model: Model,
    task: PairsSource | Pairs,
    *,
    ablations: Sequence[Ablation] = DEFAULT_ABLATIONS,
    curve: bool = True,
    seed: int = 0,
    memory_gb: float = DEFAULT_MEMORY_GB,
    stage: Stage | None = None,
    store: Store | None = None,
) -> Proof:
    """Measures a circuit on prompts that were not used to find it.

    Args:
        circuit: grown from scores (the curve needs them). task: held-out prompts: `task.held_out()`.
        ablations: what stands for the rest: counterfactual, mean, resample, zero.
        curve: also measure faithfulness against size and MIB's areas.
        stage: called with the name of each long step; returns its progress callback.
        store: keeps finished pieces, so that a killed proof goes on.

    Returns:
        A `Proof`.
    """
    pairs = pairs_of(task, model)
    seen = len(set(circuit.info.get("prompts", ())) & set(pairs.prompts))
    other = circuit.info.get("fingerprint", model.fingerprint) != model.fingerprint
    rankings = ("value", "magnitude") if curve and circuit.scores is not None else ()
    grown: dict[str, list[Circuit]] = {}
    points: list[tuple[float, int]] = []
    for by in rankings:
        assert circuit.scores is not None
        grown[by], points = circuits_of(circuit.scores, model, by)
    at_size = controls(circuit, model, CONTROLS, seed + 1000)
    on_curve = [
        controls(c, model, CURVE_CONTROLS, seed + 5000 + 100 * i) for i, c in enumerate(grown.get("magnitude", [])[:-1])
    ]
    knocked = _knockouts(circuit, model, seed) if circuit.edges is None else []
    every = [
        circuit,
        *at_size,
        *[c for by in rankings for c in grown[by]],
        *[c for cs in on_curve for c in cs],
        *[c for pair in knocked for c in pair[1:]],
    ]
    unique = list(dict.fromkeys(every))
    where = {c: i for i, c in enumerate(unique)}
    faith: dict[str, FaithfulnessCurve] = {}
    random: dict[str, Floats] = {}
    curves: dict[tuple[str, str], FaithfulnessCurve] = {}
    found: dict[tuple[str, str], Areas] = {}
    rows: list[dict[str, Any]] = []
    complete: list[dict[str, Any]] = []
    for ablation in ablations:
        progress = stage(f"proving: {ablation} ablation") if stage else None
        values, ends = evaluate(
            model,
            pairs,
            unique,
            ablation=ablation,
            seed=seed,
            memory_gb=memory_gb,
            progress=progress,
            store=store,
            key="prove",
        )

        def of(
            circuits: Sequence[Circuit],
            asked: Sequence[tuple[float, int]],
            values: Floats = values,
            ends: Ends = ends,
            name: str = ablation,
        ) -> FaithfulnessCurve:
            return faithfulness_curve(
                values[[where[c] for c in circuits]],
                ends.full,
                ends.empty,
                [s for _, s in asked],
                [f for f, _ in asked],
                name,
                seed=seed,
            )

        share = circuit.size / max(1, len(model.parts(("head", "xhead", "mlp"))))
        faith[ablation] = of([circuit], [(share, circuit.size)])
        random[ablation] = np.concatenate([of([c], [(share, circuit.size)]).values for c in at_size])
        for by in rankings:
            curves[ablation, by] = of(grown[by], points)
            found[ablation, by] = areas(curves[ablation, by])
        for (fraction, size), cs in zip(points, on_curve, strict=False):
            for draw, c in enumerate(cs):
                one = of([c], [(fraction, size)])
                rows.append(
                    {
                        "ablation": ablation,
                        "by": "random",
                        "size": size,
                        "fraction": fraction,
                        "faithfulness": float(one.values[0]),
                        "low": np.nan,
                        "high": np.nan,
                        "kind": "random",
                        "draw": draw,
                    }
                )
        for label, inside, outside in knocked:
            a, b = of([inside], [(0.0, 0)]), of([outside], [(0.0, 0)])
            complete.append(
                {
                    "ablation": ablation,
                    "removed": label,
                    "circuit_without": float(a.values[0]),
                    "model_without": float(b.values[0]),
                    "gap": float(abs(a.values[0] - b.values[0])),
                }
            )
    control = pd.DataFrame(
        rows, columns=["ablation", "by", "size", "fraction", "faithfulness", "low", "high", "kind", "draw"]
    )
    return Proof(
        circuit,
        pairs.n_examples,
        faith,
        random,
        curves,
        found,
        control,
        pd.DataFrame(complete),
        {"seed": seed, "seen_prompts": seen, "other_model": other},
    )


def _knockouts(circuit: Circuit, model: Model, seed: int, draws: int = 3) -> list[tuple[str, Circuit, Circuit]]:
    """Completeness: parts K taken out of the circuit and out of the whole model should do the same damage.

    K is the whole circuit (what is left of the model should do nothing of the job) and random halves of it.
    """
    everything = frozenset(model.parts(("head", "xhead", "mlp")))
    members = sorted((p for p in circuit.nodes if p in everything), key=lambda p: p.order)
    rng = np.random.default_rng(seed)
    removed = [("all of it", frozenset(members))]
    for i in range(draws):
        half: Sequence[int] = []
        if len(members) > 1:
            half = rng.choice(len(members), size=len(members) // 2, replace=False).tolist()
        removed.append((f"random half {i + 1}", frozenset(members[j] for j in half)))
    return [(label, Circuit(circuit.nodes - k), Circuit(everything - k)) for label, k in removed]
