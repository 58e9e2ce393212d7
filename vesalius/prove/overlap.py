"""How much two circuits of one model share, against chance (Merullo et al. 2310.08744).

The null: the second circuit is drawn anew with as many parts of every group (kind, or kind and layer) as it has. In a
group of N parts of which the first circuit holds a and the second b, the number shared is hypergeometric(N, a, b), so
chance and p value are drawn from that, group by group; drawing both circuits anew gives the same distribution. A model
has one MLP a layer: matched by layer, MLPs are shared by necessity and count neither for nor against reuse.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from vesalius.errors import PartError, VesaliusError
from vesalius.model.graph import EdgeList, Level, Universe
from vesalius.parts import Address, Edge, parse
from vesalius.prove.circuit import Circuit
from vesalius.scores import Scores

Match = Literal["kind", "layer"]


class Share(NamedTuple):
    """Overlap of one kind of part, or of all, with its chance level."""

    shared: int
    size_a: int
    size_b: int
    jaccard: float  # shared / in either
    of_a: float  # shared / in the first
    of_b: float  # shared / in the second
    chance_shared: float  # mean of the null, in closed form
    chance_jaccard: float  # mean over the draws
    chance_high: float  # 97.5 % of the null, in parts shared
    p: float  # (1 + draws with as many or more shared) / (1 + draws)


@dataclass(frozen=True)
class Overlap:
    """What two circuits share.

    Attributes:
        level: whether parts or edges are compared.
        match: what the random circuits keep.
        shared, only_a, only_b: parts or edges, in model order.
        total: over everything.
        by_kind: the same for heads and for MLPs (node level), or for edges by kind of receiver.
        null: number shared in each draw, (draw,).
        pearson, spearman: correlation of the two circuits' scores over all scored parts, in the circuits or not; NaN
            where a circuit carries no scores.
        notes: what is missing, and why.
    """

    level: Level
    match: Match
    shared: list[Address]
    only_a: list[Address]
    only_b: list[Address]
    total: Share
    by_kind: dict[str, Share]
    null: NDArray[np.int64]
    pearson: float
    spearman: float
    notes: tuple[str, ...] = ()

    @property
    def jaccard(self) -> float:
        """Shared over in either."""
        return self.total.jaccard

    @property
    def p(self) -> float:
        """Share of random circuits with at least as much in common, with the + 1 correction."""
        return self.total.p

    def to_frame(self) -> pd.DataFrame:
        """A row for all and for each kind: kind, shared, sizes, jaccard, of_a, of_b, chance and p."""
        return pd.DataFrame([{"kind": k, **s._asdict()} for k, s in {"all": self.total, **self.by_kind}.items()])

    def parts(self) -> pd.DataFrame:
        """A row for each part or edge in either circuit: part, where (shared, a, b)."""
        rows = [(str(p), w) for w, ps in (("shared", self.shared), ("a", self.only_a), ("b", self.only_b)) for p in ps]
        return pd.DataFrame(rows, columns=["part", "where"])

    def __repr__(self) -> str:
        t = self.total
        return (
            f"Overlap({t.shared} {self.level}s shared of {t.size_a} and {t.size_b}: Jaccard {t.jaccard:.3f} "
            f"(chance {t.chance_jaccard:.3f}), {t.of_a:.0%} of the first, {t.of_b:.0%} of the second, p = {t.p:.2g}, "
            f"random circuits matched by {self.match})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>" + self.to_frame().to_html(index=False, float_format=lambda v: f"{v:.4g}")


def overlap(
    circuit_a: Circuit,
    circuit_b: Circuit,
    universe: Universe,
    seed: int = 0,
    draws: int = 10_000,
    match: Match = "layer",
    level: Level | None = None,
) -> Overlap:
    """Compares two circuits of one model.

    Args:
        circuit_a: the first.
        circuit_b: the second.
        universe: the shape of their model.
        seed: of the random circuits.
        draws: number of random circuits.
        match: whether they keep numbers by kind, or by kind and layer.
        level: `edge` by default where both circuits have edges, else `node` (heads and MLPs).

    Raises:
        PartError: if a circuit holds a part the model does not have.
    """
    if draws < 1:
        raise VesaliusError(f"{draws} random circuits give no chance level; draw at least 1")
    if level is None:
        level = "edge" if circuit_a.edges is not None and circuit_b.edges is not None else "node"
    a, b = (_rows(c, universe, level) for c in (circuit_a, circuit_b))
    strata = universe.strata(level, match)
    kinds_a, kinds_b = (_kinds(universe, level, rows) for rows in (a, b))
    rng = np.random.default_rng(seed)
    totals = dict(zip(*(v.tolist() for v in np.unique(strata, return_counts=True)), strict=True))
    drawn: dict[str, NDArray[np.int64]] = {}
    expected: dict[str, float] = {}
    groups_a, first, counts_a = np.unique(strata[a], return_index=True, return_counts=True)
    counts_b = dict(zip(*(v.tolist() for v in np.unique(strata[b], return_counts=True)), strict=True))
    for group, row, held in zip(groups_a.tolist(), first.tolist(), counts_a.tolist(), strict=True):
        n, k, kind = totals[group], counts_b.get(group, 0), str(kinds_a[row])
        found = rng.hypergeometric(held, n - held, k, size=draws)
        drawn[kind] = drawn.get(kind, np.zeros(draws, dtype=np.int64)) + found
        expected[kind] = expected.get(kind, 0.0) + held * k / n
    nothing = np.zeros(draws, dtype=np.int64)
    null: NDArray[np.int64] = np.sum([nothing, *drawn.values()], axis=0)
    by_kind = {}
    for kind in sorted({*kinds_a.tolist(), *kinds_b.tolist()}):
        mine, theirs = set(a[kinds_a == kind].tolist()), set(b[kinds_b == kind].tolist())
        by_kind[kind] = _share(mine, theirs, drawn.get(kind, nothing), expected.get(kind, 0.0))
    in_a, in_b = set(a.tolist()), set(b.tolist())
    pearson, spearman, notes = _correlations(circuit_a.scores, circuit_b.scores)
    named = universe.edges if level == "edge" else universe.senders

    def parts(rows: set[int]) -> list[Address]:
        return [named[i] for i in sorted(rows)]

    return Overlap(
        level,
        match,
        parts(in_a & in_b),
        parts(in_a - in_b),
        parts(in_b - in_a),
        _share(in_a, in_b, null, sum(expected.values())),
        by_kind,
        null,
        pearson,
        spearman,
        notes,
    )


def _rows(circuit: Circuit, universe: Universe, level: Level) -> NDArray[np.int64]:
    if level == "edge":
        if circuit.edges is None:
            raise VesaliusError("level='edge' needs two circuits of edges; one of these has parts only")
        return universe.edge_indices(circuit.edges)
    nodes = [p for p in circuit.nodes if p.kind not in ("embed", "unembed")]
    return np.array([universe.sender_index(p) for p in nodes], dtype=np.int64)


def _kinds(universe: Universe, level: Level, rows: NDArray[np.int64]) -> NDArray[np.str_]:
    """Kind of each part, or of each edge's receiver, (row,)."""
    if level == "node":
        return np.array([universe.senders[i].kind for i in rows.tolist()], dtype=np.str_)
    names = np.array([f"to {p.side or p.kind}" for p in universe.receivers], dtype=np.str_)
    return names[universe.receiver_of(rows)]


def _share(a: set[int], b: set[int], null: NDArray[np.int64], expected: float) -> Share:
    shared, either = len(a & b), len(a | b)
    unions = len(a) + len(b) - null
    return Share(
        shared=shared,
        size_a=len(a),
        size_b=len(b),
        jaccard=shared / either if either else float("nan"),
        of_a=shared / len(a) if a else float("nan"),
        of_b=shared / len(b) if b else float("nan"),
        chance_shared=expected,
        chance_jaccard=float((null / unions).mean()) if either else float("nan"),
        chance_high=float(np.quantile(null, 0.975)),
        p=float((1 + (null >= shared).sum()) / (1 + len(null))),
    )


def _correlations(a: Scores | None, b: Scores | None) -> tuple[float, float, tuple[str, ...]]:
    if a is None or b is None:
        return float("nan"), float("nan"), ("no score correlation: a circuit carries no scores",)
    if isinstance(a.parts, EdgeList) and isinstance(b.parts, EdgeList) and a.parts.universe == b.parts.universe:
        x, y = np.asarray(a.values, dtype=float), np.asarray(b.values, dtype=float)
        known = ~np.isnan(x) & ~np.isnan(y)
        if known.sum() < 3 or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
            return float("nan"), float("nan"), ("no score correlation: too few or constant scores",)
        pearson, spearman = stats.pearsonr(x[known], y[known]), stats.spearmanr(x[known], y[known])
        return float(pearson.statistic), float(spearman.statistic), ()
    a, b = (s.select(np.flatnonzero(~np.isnan(np.asarray(s.values, dtype=float))).tolist()) for s in (a, b))
    try:
        return a.correlation(b), a.correlation(b, "spearman"), ()
    except VesaliusError as error:
        return float("nan"), float("nan"), (f"no score correlation: {error}",)


class Recovery(NamedTuple):
    """A circuit against the true one."""

    precision: float  # true parts found / found; NaN if none was found
    recall: float  # true parts found / true; NaN if nothing is true
    f1: float
    found: list[Address]
    missed: list[Address]
    extra: list[Address]


def precision_recall(circuit: Circuit | Iterable[str | Address], truth: Iterable[str | Address]) -> Recovery:
    """Precision and recall of a circuit (or any parts or edges) against the true parts or edges.

    A circuit is read at the level of the truth: its edges if the truth lists edges, else its heads and MLPs.

    Example:
        >>> precision_recall(["L0.H1", "L1.H0"], ["L1.H0", "L1.H3"])[:2]
        (0.5, 0.5)
    """
    true = {parse(p) for p in truth}
    if isinstance(circuit, Circuit):
        if any(isinstance(p, Edge) for p in true):
            if circuit.edges is None:
                raise VesaliusError("the truth lists edges, the circuit has parts only; grow it from scores of edges")
            found: set[Address] = set(circuit.edges)
        else:
            found = {p for p in circuit.nodes if p.kind not in ("embed", "unembed")}
    else:
        found = {parse(p) for p in circuit}
    hits = found & true
    precision = len(hits) / len(found) if found else float("nan")
    recall = len(hits) / len(true) if true else float("nan")
    f1 = 2 * len(hits) / (len(found) + len(true)) if found or true else float("nan")
    return Recovery(precision, recall, f1, _ordered(hits), _ordered(true - found), _ordered(found - true))


def node_auroc(
    scores: Scores, truth: Iterable[str | Address], by: Literal["magnitude", "value"] = "magnitude"
) -> float:
    """Area under the ROC curve of scores as a test for being in the true circuit; ties count half. Edges as well.

    Args:
        scores: one row a part or edge; rows without a score (NaN) rank below all others.
        truth: the true parts or edges; all must be among the rows.
        by: rank by |score| or by signed score.

    Returns:
        Chance that a true part outranks another; NaN if all rows, or none, are true.

    Raises:
        PartError: if a true part is not scored.

    Example:
        >>> table = Scores([parse("L0.H0"), parse("L0.H1"), parse("L1.H0")], np.array([0.1, -3.0, 0.2]))
        >>> node_auroc(table, ["L0.H1"]), node_auroc(table, ["L0.H1"], by="value")
        (1.0, 0.0)
    """
    if scores.positions is not None:
        raise VesaliusError("these scores are per position; sum them over positions to rank parts")
    true = {parse(p) for p in truth}
    unknown = true - set(scores.parts)
    if unknown:
        raise PartError(f"true parts without a score: {', '.join(map(str, _ordered(unknown)[:5]))}; score them too")
    values = np.asarray(scores.values, dtype=float)
    key = np.abs(values) if by == "magnitude" else values
    ranks = stats.rankdata(np.where(np.isnan(key), -np.inf, key))
    positive = np.array([p in true for p in scores.parts], dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return float("nan")
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def _ordered(parts: Iterable[Address]) -> list[Address]:
    def key(p: Address) -> tuple[Any, ...]:
        return (1, *p.order, p.receiver.side or "") if isinstance(p, Edge) else (0, p.order, p.side or "")

    return sorted(parts, key=key)
