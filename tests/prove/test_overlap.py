"""Overlap of circuits against chance, and against a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from vesalius.errors import PartError, VesaliusError
from vesalius.model.graph import Universe
from vesalius.parts import Edge, Part, parse
from vesalius.prove.circuit import Circuit, grow, random_circuit
from vesalius.prove.overlap import node_auroc, overlap, precision_recall
from vesalius.scores import Scores

U = Universe(8, 6)


def nodes(*names: str) -> Circuit:
    return Circuit(frozenset(parse(n) for n in names))  # type: ignore[misc]


def test_planted_overlap_is_the_known_fraction() -> None:
    shared = [f"L{i}.H{j}" for i in (2, 4) for j in range(3)]
    a = nodes(*shared, "L5.H0", "L5.H1", "L1.MLP")
    b = nodes(*shared, "L6.H0", "L1.MLP", "L2.MLP", "embed")
    found = overlap(a, b, U)
    assert (found.total.shared, found.total.size_a, found.total.size_b) == (7, 9, 9)
    assert found.jaccard == 7 / 11 and found.total.of_a == found.total.of_b == 7 / 9
    assert [str(p) for p in found.shared] == ["L1.MLP", *shared]
    assert list(map(str, found.only_a)) == ["L5.H0", "L5.H1"] and list(map(str, found.only_b)) == ["L2.MLP", "L6.H0"]
    heads = found.by_kind["head"]
    assert (heads.shared, heads.size_a, heads.size_b, heads.jaccard) == (6, 8, 7, 6 / 9)
    assert found.parts()["where"].tolist() == ["shared"] * 7 + ["a"] * 2 + ["b"] * 2
    same = overlap(a, a, U)
    assert same.jaccard == 1 and same.p < 1e-3
    apart = overlap(nodes("L0.H0", "L1.H1"), nodes("L0.H1", "L1.H2"), U)
    assert apart.jaccard == 0 and apart.p == 1


def test_planted_overlap_of_edges() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(U.n_edges)
    edges = [frozenset(U.edges[int(i)] for i in order[s]) for s in (slice(0, 60), slice(40, 100))]
    a, b = (Circuit(frozenset({e.sender for e in es}), es) for es in edges)
    found = overlap(a, b, U)
    assert found.level == "edge" and found.total.shared == 20 and found.jaccard == 20 / 100
    assert set(found.shared) == edges[0] & edges[1] and set(found.only_b) == edges[1] - edges[0]
    assert sum(s.shared for s in found.by_kind.values()) == 20
    by_side = {s: sum(e.receiver.side == s for e in edges[0]) for s in "qkv"}
    assert {s: found.by_kind[f"to {s}"].size_a for s in "qkv"} == by_side
    assert overlap(a, b, U, level="node").level == "node"
    with pytest.raises(VesaliusError, match="level='edge'"):
        overlap(a, nodes("L0.H0"), U, level="edge")


@pytest.mark.parametrize("match", ["kind", "layer"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_chance_is_hypergeometric_and_that_of_random_circuits(match: str, level: str) -> None:
    rng = np.random.default_rng(1)
    if level == "node":
        a, b = (grow(Scores(list(U.nodes), rng.normal(size=len(U.nodes))), 20, universe=U) for _ in range(2))
    else:
        a, b = (grow(Scores(U.edges, rng.normal(size=U.n_edges)), 300) for _ in range(2))
    found = overlap(a, b, U, seed=2, draws=20_000, match=match)  # type: ignore[arg-type]
    # closed form over the groups, from the definition
    mine, theirs = (a.edges, b.edges) if level == "edge" else (a.nodes, b.nodes)
    universe = list(U.edges) if level == "edge" else list(U.nodes)

    def group(x: Part | Edge) -> tuple[object, ...]:
        if isinstance(x, Edge):
            return (*group(x.sender), *group(x.receiver))
        return (x.kind, x.side, x.layer if match == "layer" else None)

    expected = variance = 0.0
    for g in {group(x) for x in universe}:
        n, ka, kb = (sum(group(x) == g for x in xs) for xs in (universe, mine or (), theirs or ()))
        expected += ka * kb / n
        variance += ka * kb * (n - ka) * (n - kb) / (n**2 * (n - 1)) if n > 1 else 0
    assert found.total.chance_shared == pytest.approx(expected)
    assert found.null.mean() == pytest.approx(expected, abs=5 * math.sqrt(variance / 20_000) + 1e-12)
    assert found.null.var() == pytest.approx(variance, rel=0.06)
    drawn = []
    for seed in range(400):
        c = random_circuit(b, U, seed, match)  # type: ignore[arg-type]
        drawn.append(len((mine or frozenset()) & ((c.edges if level == "edge" else c.nodes) or frozenset())))
    assert np.mean(drawn) == pytest.approx(expected, abs=5 * math.sqrt(variance / 400))


def test_p_is_uniform_under_the_null() -> None:
    # Ties make p conservative; splitting them at random must make it exactly uniform.
    rng = np.random.default_rng(0)
    table = Scores(list(U.nodes), rng.normal(size=len(U.nodes)))
    a = grow(table, 24, universe=U)
    plain, split = [], []
    for seed in range(300):
        found = overlap(a, random_circuit(a, U, seed, "layer"), U, seed=1000 + seed, draws=200)
        shared = found.total.shared
        above, ties = (found.null > shared).sum(), (found.null == shared).sum()
        plain.append(found.p)
        split.append((above + rng.random() * (1 + ties)) / 201)
        assert found.p == (1 + above + ties) / 201
    assert stats.kstest(split, "uniform").pvalue > 0.01
    assert stats.kstest(plain, "uniform", alternative="greater").pvalue > 0.01  # never too small
    assert np.mean(np.array(plain) <= 0.05) <= 0.09


def test_layer_matching_removes_what_layers_alone_explain() -> None:
    late = [f"L7.H{i}" for i in range(6)]  # two circuits that share a layer entirely, and nothing else
    a, b = nodes(*late, "L0.H0"), nodes(*late, "L0.H1")
    assert overlap(a, b, U, match="kind").p < 1e-3
    assert overlap(a, b, U, match="layer").p == 1.0
    mlps = nodes("L0.MLP", "L3.MLP")
    assert overlap(mlps, mlps, U, match="layer").p == 1.0  # one MLP a layer: nothing left to chance
    assert overlap(mlps, mlps, U, match="kind").p == pytest.approx(1 / 28, abs=0.01)


def test_empty_circuits_and_strange_parts() -> None:
    empty = overlap(nodes(), nodes("L0.H0"), U)
    assert empty.jaccard == 0 and math.isnan(empty.total.of_a) and empty.p == 1
    assert math.isnan(overlap(nodes(), nodes(), U).jaccard)
    with pytest.raises(PartError, match="L9.H0"):
        overlap(nodes("L9.H0"), nodes("L0.H0"), U)
    with pytest.raises(VesaliusError, match="at least 1"):
        overlap(nodes(), nodes(), U, draws=0)


def test_scores_are_correlated_over_all_parts() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=len(U.nodes))
    first = Scores(list(U.nodes), x)
    second = Scores(list(U.nodes)[::-1], (2 * x + 1)[::-1])
    found = overlap(grow(first, 5), grow(second, 5), U)
    assert found.pearson == pytest.approx(1) and found.spearman == pytest.approx(1)
    x[3] = np.nan  # a part without a score is left out of the correlation
    assert overlap(grow(first, 5), grow(second, 5), U).pearson == pytest.approx(1)
    edges = [Scores(U.edges, s * np.arange(U.n_edges, dtype=float)) for s in (1.0, -2.0)]
    pair = overlap(grow(edges[0], 50), grow(edges[1], 50), U)
    assert pair.pearson == pytest.approx(-1) and pair.spearman == pytest.approx(-1)
    none = overlap(grow(first, 5), nodes("L0.H0"), U)
    assert math.isnan(none.pearson) and "no scores" in none.notes[0]
    assert "Jaccard" in repr(found) and found.to_frame()["kind"].tolist()[0] == "all"


def test_auroc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = np.round(rng.normal(size=len(U.nodes)), 1)  # ties
        truth = rng.random(len(U.nodes)) < 0.2
        table = Scores(list(U.nodes), values)
        true = [p for p, t in zip(U.nodes, truth, strict=True) if t]
        assert node_auroc(table, true) == pytest.approx(roc_auc_score(truth, np.abs(values)))
        assert node_auroc(table, true, by="value") == pytest.approx(roc_auc_score(truth, values))
    edges = Scores(U.edges, rng.normal(size=U.n_edges))
    best = U.edges[int(np.argmax(np.abs(edges.values)))]
    assert node_auroc(edges, [best]) == 1.0
    assert math.isnan(node_auroc(table, []))
    with pytest.raises(PartError, match="L0.H99"):
        node_auroc(table, ["L0.H99"])


def test_precision_and_recall_against_the_planted_truth() -> None:
    truth = ["L0.H0", "L1.H0", "L2.H0", "L3.H0"]
    found = precision_recall(nodes("L0.H0", "L1.H0", "L5.H5", "embed"), truth)
    assert found.precision == pytest.approx(2 / 3) and found.recall == 0.5 and found.f1 == pytest.approx(4 / 7)
    assert list(map(str, found.missed)) == ["L2.H0", "L3.H0"] and list(map(str, found.extra)) == ["L5.H5"]
    perfect = precision_recall(nodes(*truth), truth)
    assert (perfect.precision, perfect.recall, perfect.f1) == (1, 1, 1)
    edge = "L0.H0->L1.H0.q"
    circuit = Circuit(frozenset({Part("head", 0, 0)}), frozenset({parse(edge)}))  # type: ignore[arg-type]
    assert precision_recall(circuit, [edge, "L0.H0->unembed"])[:2] == (1.0, 0.5)
    with pytest.raises(VesaliusError, match="parts only"):
        precision_recall(nodes("L0.H0"), [edge])
    assert math.isnan(precision_recall([], truth).precision)
