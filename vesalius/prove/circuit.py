"""Circuits: a set of parts, or of edges between them, and how one is grown from scores."""

from __future__ import annotations

import heapq
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from vesalius.errors import PartError, VesaliusError
from vesalius.model.graph import Bools, EdgeList, Floats, Ints, Level, Universe, as_numpy
from vesalius.parts import Address, Edge, Part, parse, parse_part
from vesalius.records import dump
from vesalius.scores import Scores

TRIES = 100  # draws of a random circuit that comes out too small


@dataclass(frozen=True)
class Circuit:
    """Parts, or edges, that are claimed to do a job. Equal when their nodes and edges are.

    Attributes:
        nodes: the heads and MLPs in it; at edge level also embed and unembed where an edge touches them. At node level
            embed and unembed are always kept and not listed.
        edges: the edges in it, or None for a circuit of nodes.
        scores: what it was grown from, or None.
        info: how it was grown, and the shape of the model (`universe`).
    """

    nodes: frozenset[Part]
    edges: frozenset[Edge] | None = None
    scores: Scores | None = field(default=None, compare=False)
    info: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def level(self) -> Level:
        """Whether it is made of parts or of edges."""
        return "node" if self.edges is None else "edge"

    @property
    def heads(self) -> list[Part]:
        """Heads in model order."""
        return sorted((p for p in self.nodes if p.kind in ("head", "xhead")), key=lambda p: p.order)

    @property
    def mlps(self) -> list[Part]:
        """MLPs in model order."""
        return sorted((p for p in self.nodes if p.kind == "mlp"), key=lambda p: p.order)

    @property
    def size(self) -> int:
        """Number of edges, or at node level of parts (embed and unembed not counted)."""
        if self.edges is not None:
            return len(self.edges)
        return sum(p.kind not in ("embed", "unembed") for p in self.nodes)

    @property
    def universe(self) -> Universe | None:
        """The shape of the model it was grown in, if recorded."""
        found = self.info.get("universe")
        return Universe(**found) if found else None

    def fractions(self, universe: Universe | None = None) -> dict[str, float]:
        """Shares of the model's heads, MLPs and edges in the circuit; NaN where the model has none or is not known."""
        u = universe or self.universe
        scored = self.info.get("scored", {})
        totals = {"heads": scored.get("heads", 0), "mlps": scored.get("mlps", 0), "edges": 0}
        if u is not None:
            totals = {
                "heads": u.n_layers * u.n_heads,
                "mlps": 0 if u.attention_only else u.n_layers,
                "edges": u.n_edges,
            }
        counts = {"heads": len(self.heads), "mlps": len(self.mlps)}
        if self.edges is not None:
            counts["edges"] = len(self.edges)
        return {k: n / totals[k] if totals[k] else float("nan") for k, n in counts.items()}

    def mask(self, universe: Universe | None = None) -> Tensor:
        """The edges it keeps, (n_senders, n_receivers); at node level all edges among its nodes, embed and unembed."""
        u = universe or self.universe
        if u is None:
            raise VesaliusError("the circuit does not know its model's shape; pass Universe(n_layers, n_heads)")
        return u.induced(self.nodes) if self.edges is None else u.mask(self.edges)

    def __contains__(self, part: object) -> bool:
        found = parse(part) if isinstance(part, str) else part
        return found in self.nodes if isinstance(found, Part) else self.edges is not None and found in self.edges

    def _ordered(self) -> list[Address]:
        if self.edges is not None:
            return list(self._ordered_edges())
        return list(self._ordered_nodes())

    def _ordered_nodes(self) -> list[Part]:
        return sorted(self.nodes, key=lambda p: (p.order, p.side or ""))

    def _ordered_edges(self) -> list[Edge]:
        return sorted(self.edges or (), key=lambda e: (e.receiver.order, e.receiver.side or "", e.sender.order))

    def to_frame(self) -> pd.DataFrame:
        """A row for each part (or edge) in the circuit: part, kind, layer, index, score, in model order."""
        rows = self._ordered()
        known: dict[Address, float] = {}
        if self.scores is not None and isinstance(self.scores.parts, EdgeList):
            index = self.scores.parts.universe.edge_index
            known = {e: float(self.scores.values[index(e)]) for e in rows if isinstance(e, Edge)}
        elif self.scores is not None:
            known = dict(zip(self.scores.parts, np.asarray(self.scores.values, dtype=float).tolist(), strict=True))
        ends = [p.receiver if isinstance(p, Edge) else p for p in rows]
        frame = pd.DataFrame(
            {
                "part": [str(p) for p in rows],
                "kind": ["edge" if isinstance(p, Edge) else p.kind for p in rows],
                "layer": pd.array([p.layer for p in ends], dtype="Int64"),
                "index": pd.array([p.index for p in ends], dtype="Int64"),
                "score": [known.get(p, float("nan")) for p in rows],
            }
        )
        if self.edges is not None:
            frame.insert(1, "sender", [str(p.sender) for p in rows if isinstance(p, Edge)])
            frame.insert(2, "receiver", [str(p.receiver) for p in rows if isinstance(p, Edge)])
        return frame

    def save(self, path: Path) -> None:
        """Writes one JSON file, parts in model order, so that equal circuits give equal files."""
        edges = None if self.edges is None else [str(e) for e in self._ordered_edges()]
        nodes = [str(p) for p in self._ordered_nodes()]
        data = {
            "format": "vesalius circuit 1",
            "level": self.level,
            "nodes": nodes,
            "edges": edges,
            "scores": None if self.scores is None else _scores_to_json(self.scores),
            "info": self.info,
        }
        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(dump(data))
            part.replace(path)
        except OSError as error:
            raise VesaliusError(f"cannot write the circuit to {path}: {error}; choose another folder") from error

    @classmethod
    def load(cls, path: Path) -> Circuit:
        """Reads what `save` wrote."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            if data["format"] != "vesalius circuit 1":
                raise KeyError(f"format {data['format']!r}")
            nodes = frozenset(parse_part(p) for p in data["nodes"])
            edges = None if data["edges"] is None else frozenset(_edge(e) for e in data["edges"])
            scores = None if data["scores"] is None else _scores_from_json(data["scores"])
            return cls(nodes, edges, scores, data["info"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            hint = "; MIB's files are read with vesalius.prove.mib.read"
            raise VesaliusError(f"no readable circuit in {path}: {error!r}{hint}") from error

    def prove(self, model: Any, task: Any, **options: Any) -> Any:
        """Measures the circuit on prompts not used to find it; see `vesalius.prove`."""
        from vesalius.prove.proof import prove

        return prove(self, model, task, **options)

    def _summary(self) -> str:
        shares = self.fractions()
        bits = [f"{len(self.heads)} heads", f"{len(self.mlps)} MLPs"]
        if self.edges is not None:
            bits.append(f"{len(self.edges)} edges")
        names = ["heads", "mlps", "edges"]
        bits = [bit if np.isnan(shares[n]) else f"{bit} ({shares[n]:.1%})" for bit, n in zip(bits, names, strict=False)]
        origin = f"; {self.info['method']} on {self.info.get('task', '?')}" if "method" in self.info else ""
        return ", ".join(bits) + origin

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self._ordered()[:12])) + (", ..." if self.size > 12 else "")
        return f"Circuit({self._summary()}: {shown})"

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        top = frame.reindex(frame["score"].abs().sort_values(ascending=False, kind="stable").index).head(20)
        table = top.to_html(index=False, float_format=lambda v: f"{v:.4g}")
        return f"<p><b>Circuit</b>: {html.escape(self._summary())}; the {len(top)} largest</p>{table}"


def grow(
    scores: Scores,
    size: int | None = None,
    *,
    fraction: float | None = None,
    threshold: float | None = None,
    by: Literal["magnitude", "value"] = "magnitude",
    method: Literal["top", "greedy"] = "top",
    level: Level | None = None,
    universe: Universe | None = None,
) -> Circuit:
    """The circuit of the largest scores.

    Node level takes the largest heads and MLPs. Edge level takes the largest edges (`top`), or works backwards from the
    logits, each time adding the largest edge whose receiver's node is already in (`greedy`); then dead ends are
    dropped, so that the circuit can be smaller than asked for, as in MIB. MIB ranks by signed score for CPR and by
    absolute score for CMD. Equal scores keep model order; parts without a score (NaN) are never taken.

    Args:
        scores: one row a part or edge, summed over positions.
        size: how many to take before dead ends are dropped.
        fraction: instead of size, a share of the scored parts or edges; int(fraction * n) as MIB rounds.
        threshold: instead of size, the least score (or magnitude) to take.
        by: rank by |score| or by signed score.
        method: `top` or `greedy` (edges only).
        level: needed when the table scores both parts and edges.
        universe: the model's shape; needed for edges.

    Returns:
        The circuit; `info` has what was asked for, taken and dropped, and how many parts had no score.
    """
    if sum(x is not None for x in (size, fraction, threshold)) != 1:
        raise VesaliusError("grow needs exactly one of size, fraction, threshold")
    if scores.positions is not None:
        raise VesaliusError("these scores are per position; a circuit is grown from scores summed over positions")
    lazy = isinstance(scores.parts, EdgeList)
    n_edges = len(scores) if lazy else sum(isinstance(p, Edge) for p in scores.parts)
    if level is None:
        if 0 < n_edges < len(scores):
            counts = f"{len(scores) - n_edges} parts and {n_edges} edges"
            raise VesaliusError(f"the table scores {counts}; choose with level='node' or level='edge'")
        level = "edge" if n_edges else "node"
    if universe is None and isinstance(scores.parts, EdgeList):
        universe = scores.parts.universe
    kept = ("method", "task", "model", "fingerprint", "prompts", "seed", "unit")
    info: dict[str, Any] = {k: scores.info[k] for k in kept if k in scores.info}
    info |= {"by": by, "grown": method, "size": size, "fraction": fraction, "threshold": threshold}
    if universe is not None:
        info["universe"] = asdict(universe)
    if level == "edge":
        if universe is None:
            raise VesaliusError("edges need the model's shape; pass universe=Universe(n_layers, n_heads)")
        values = universe.values(scores)
        chosen = universe.matrix(choose(universe, values, size, fraction, threshold, by, method), False)
        pruned = as_numpy(universe.prune(chosen))
        edges = universe.edge_set(pruned)
        info |= {
            "taken": int(chosen.sum()),
            "dead_ends": int(chosen.sum() - pruned.sum()),
            "unscored": int(np.isnan(values).sum()),
        }
        nodes = frozenset({e.sender for e in edges} | {e.receiver.output for e in edges})
        return Circuit(nodes, edges, scores, info)
    if method == "greedy":
        raise VesaliusError("greedy growth follows edges; these are scores of parts: use method='top' or score edges")
    rows, parts = [], []
    for i, part in enumerate(scores.parts):
        if isinstance(part, Part) and part.kind in ("head", "xhead", "mlp") and not part.side:
            rows.append(i)
            parts.append(part)
    values = np.asarray(scores.values, dtype=float)[rows]
    picked = _largest(values, size, fraction, threshold, by)
    heads = sum(p.kind != "mlp" for p in parts)
    info |= {
        "taken": int(picked.sum()),
        "unscored": int(np.isnan(values).sum()),
        "not_candidates": len(scores) - len(rows),
        "scored": {"heads": heads, "mlps": len(parts) - heads},
    }
    return Circuit(frozenset(p for p, on in zip(parts, picked, strict=True) if on), None, scores, info)


def choose(
    universe: Universe,
    values: Floats,
    size: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    by: Literal["magnitude", "value"] = "magnitude",
    method: Literal["top", "greedy"] = "top",
) -> Bools:
    """As `grow` at edge level, on arrays: which edges are taken, (n_edges,), before dead ends are dropped.

    Args:
        universe: the model's shape.
        values: score by edge number, (n_edges,); NaN is never taken.
        size: how many, or
        fraction: which share of the scored edges, or
        threshold: which least score.
        by: rank by |score| or by signed score.
        method: `top` or `greedy`.
    """
    if method == "top":
        return _largest(values, size, fraction, threshold, by)
    n = _count(values, size, fraction)
    ordered = np.abs(values) if by == "magnitude" else np.asarray(values, dtype=float)
    if threshold is not None:
        ordered = np.where(ordered >= threshold, ordered, np.nan)
    return _greedy(universe, ordered, n)


def _count(values: Floats, size: int | None, fraction: float | None) -> int:
    n = int((~np.isnan(values)).sum())
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise VesaliusError(f"fraction {fraction} is not between 0 and 1")
        return int(fraction * n)
    if size is not None and not 0 <= size <= n:
        raise VesaliusError(f"cannot take {size} of {n} scored parts; choose a size from 0 to {n}")
    return n if size is None else size


def _largest(values: Floats, size: int | None, fraction: float | None, threshold: float | None, by: str) -> Bools:
    ordered = np.abs(values) if by == "magnitude" else np.asarray(values, dtype=float)
    if threshold is not None:
        found: Bools = ordered >= threshold
        return found
    picked = np.zeros(len(values), dtype=bool)
    picked[np.argsort(-ordered, kind="stable")[: _count(values, size, fraction)]] = True  # NaN sorts last
    return picked


def _greedy(universe: Universe, ordered: Floats, n: int) -> Bools:
    """Best-first search from unembed: a heap holds the best edge left of each node already in the circuit."""
    taken = np.zeros(universe.n_edges, dtype=bool)
    offsets = universe._offsets
    columns: dict[int, list[int]] = {}
    for column, node in enumerate(universe.owner.tolist()):
        columns.setdefault(node, []).append(column)
    queues: dict[int, Iterator[tuple[float, int]]] = {}
    heap: list[tuple[float, int, int]] = []  # (-score, edge number, receiving node)

    def enter(node: int) -> None:
        numbers = np.concatenate([np.arange(offsets[c], offsets[c + 1]) for c in columns[node]])
        numbers = numbers[~np.isnan(ordered[numbers])]
        numbers = numbers[np.argsort(-ordered[numbers], kind="stable")]
        queues[node] = iter(zip((-ordered[numbers]).tolist(), numbers.tolist(), strict=True))
        advance(node)

    def advance(node: int) -> None:
        following = next(queues[node], None)
        if following is not None:
            heapq.heappush(heap, (*following, node))

    enter(universe.n_senders)
    while heap and n > 0:
        _, number, node = heapq.heappop(heap)
        taken[number] = True
        n -= 1
        advance(node)
        sender = number - int(offsets[np.searchsorted(offsets, number, side="right") - 1])
        if sender > 0 and sender not in queues:
            enter(sender)
    return taken


def random_circuit(
    like: Circuit, universe: Universe, seed: int, match: Literal["kind", "layer", "connected"] = "layer"
) -> Circuit:
    """A random circuit with as many heads and MLPs (or edges) as another: the control for its faithfulness.

    `kind` keeps the number of heads and of MLPs (edges: by kind of sender, kind and side of receiver). `layer` keeps
    them layer by layer too; since a layer has one MLP, the MLPs are then the same ones. For edges both leave dead ends,
    which pass nothing on; `connected` instead draws edges with random paths from embed and to unembed until the size
    is reached, whatever their kind, so that every edge counts (edges only).
    """
    rng = np.random.default_rng(seed)
    info = {"random": match, "seed": seed, "universe": asdict(universe)}
    if match == "connected":
        if like.edges is None:
            raise VesaliusError("match='connected' is for circuits of edges; use 'layer' or 'kind' for parts")
        edges = universe.edge_set(_connected(universe, len(like.edges), rng))
    else:
        strata = universe.strata(like.level, match)
        members = _members(like, universe)
        drawn: list[Ints] = []
        for group, count in zip(*np.unique(strata[members], return_counts=True), strict=True):
            drawn.append(rng.choice(np.flatnonzero(strata == group), size=count, replace=False))
        picked = np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)
        if like.edges is None:
            return Circuit(frozenset(universe.senders[i] for i in picked), None, None, info)
        edges = frozenset(universe.edges[int(i)] for i in picked)
    return Circuit(frozenset({e.sender for e in edges} | {e.receiver.output for e in edges}), edges, None, info)


def _members(circuit: Circuit, universe: Universe) -> Ints:
    """Numbers of a circuit's edges, or rows of its heads and MLPs."""
    if circuit.edges is not None:
        return universe.edge_indices(circuit.edges)
    nodes = [p for p in circuit.nodes if p.kind not in ("embed", "unembed")]
    return np.array([universe.sender_index(p) for p in nodes], dtype=np.int64)


def _connected(universe: Universe, size: int, rng: np.random.Generator) -> Bools:
    """A very small draw can end in a dead end, with one edge left and no path that short: then it is drawn again."""
    for _ in range(TRIES):
        mask = _connected_once(universe, size, rng)
        if mask.sum() == size:
            break
    return mask


def _connected_once(universe: Universe, size: int, rng: np.random.Generator) -> Bools:
    mask = np.zeros((universe.n_senders, universe.n_receivers), dtype=bool)
    inside = np.zeros(universe.n_senders + 1, dtype=bool)  # nodes with a path from embed and to unembed
    inside[[0, -1]] = True
    left = size
    for number in rng.permutation(universe.n_edges):
        if left == 0:
            break
        receiver = int(np.searchsorted(universe._offsets, number, side="right")) - 1
        sender = int(number - universe._offsets[receiver])
        path = [(sender, receiver)]
        while not inside[sender]:  # back to the circuit
            column = int(rng.choice(np.flatnonzero(universe.owner == sender)))
            sender = int(rng.integers(universe.limits[column]))
            path.append((sender, column))
        node = int(universe.owner[receiver])
        while not inside[node]:  # on to the circuit
            column = int(rng.choice(np.flatnonzero(universe.limits > node)))
            path.append((node, column))
            node = int(universe.owner[column])
        fresh = [p for p in path if not mask[p]]
        if 0 < len(fresh) <= left:
            for s, r in fresh:
                mask[s, r] = True
                inside[[s, universe.owner[r]]] = True
            left -= len(fresh)
    return mask


def _edge(text: str) -> Edge:
    found = parse(text)
    if not isinstance(found, Edge):
        raise PartError(f"'{text}' is not an edge; edges look like L5.H1->L9.H6.q")
    return found


def _scores_to_json(scores: Scores) -> dict[str, Any]:
    lazy = scores.parts.universe if isinstance(scores.parts, EdgeList) else None
    return {
        "parts": {"edges_of": asdict(lazy)} if lazy else [str(p) for p in scores.parts],
        "values": np.asarray(scores.values, dtype=float).tolist(),
        "per_example": None if scores.per_example is None else np.asarray(scores.per_example, dtype=float).tolist(),
        "verified": None if scores.verified is None else scores.verified.tolist(),
        "info": scores.info,
    }


def _scores_from_json(data: dict[str, Any]) -> Scores:
    names = data["parts"]
    parts: Sequence[Address] = (
        Universe(**names["edges_of"]).edges if isinstance(names, dict) else [parse(p) for p in names]
    )
    return Scores(
        parts,
        np.array(data["values"], dtype=float),
        None if data["per_example"] is None else np.array(data["per_example"], dtype=float),
        None,
        None if data["verified"] is None else np.array(data["verified"], dtype=bool),
        data["info"],
    )
