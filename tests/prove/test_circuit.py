"""The graph of MIB, growing circuits from scores, and random circuits."""

from __future__ import annotations

import itertools
import json

import networkx as nx
import numpy as np
import pytest

from vesalius.errors import PartError, VesaliusError
from vesalius.model.graph import EdgeList, Universe
from vesalius.parts import Edge, Part, parse
from vesalius.prove.circuit import Circuit, choose, grow, random_circuit
from vesalius.scores import Scores

SHAPES = [
    Universe(3, 2),
    Universe(3, 2, parallel=True),
    Universe(3, 2, attention_only=True),
    Universe(1, 1),
    Universe(2, 3, parallel=True, attention_only=True),
]


def listed(u: Universe) -> set[str]:
    """All edges by walking through the model, the long way."""
    edges, stream = set(), ["embed"]
    for layer in range(u.n_layers):
        heads = [f"L{layer}.H{h}" for h in range(u.n_heads)]
        edges |= {f"{s}->{h}.{side}" for s in stream for h in heads for side in "qkv"}
        if not u.attention_only:
            before = stream if u.parallel else stream + heads
            edges |= {f"{s}->L{layer}.MLP" for s in before}
        stream = stream + heads + ([] if u.attention_only else [f"L{layer}.MLP"])
    return edges | {f"{s}->unembed" for s in stream}


# Published in EDGE_COUNTS of the leaderboard's evaluation code.
@pytest.mark.parametrize(
    ("layers", "heads", "count"),
    [(12, 12, 32491), (24, 14, 179749), (26, 8, 74218), (32, 32, 1592881), (6, 4, 1108)],
    ids=["gpt2", "qwen2.5-0.5b", "gemma2-2b", "llama3.1-8b", "interpbench"],
)
def test_number_of_edges_is_the_published_one(layers: int, heads: int, count: int) -> None:
    u = Universe(layers, heads)
    assert u.n_edges == count == len(u.edges) == int(u.exists.sum())
    assert u.edge_index(u.edges[count - 1]) == count - 1


@pytest.mark.parametrize("u", SHAPES, ids=str)
def test_edges_are_those_of_the_forward_pass_and_numbers_go_both_ways(u: Universe) -> None:
    edges = list(u.edges)
    assert {str(e) for e in edges} == listed(u) and len(edges) == u.n_edges
    assert edges == [u.edges[i] for i in range(u.n_edges)] == u.edges[:]
    assert u.edge_indices(edges).tolist() == list(range(u.n_edges))
    assert u.edges[-1] == edges[-1] and edges[0] in u.edges
    for s, r in itertools.product(u.senders, u.receivers):
        assert (
            (Edge(s, r) in u.edges)
            == (f"{s}->{r}" in listed(u))
            == bool(u.exists[u.sender_index(s), u.receiver_index(r)])
        )
    for e in edges:
        owner = u.owner[u.receiver_index(e.receiver)]
        assert (owner == u.n_senders) if e.receiver.kind == "unembed" else (u.senders[owner] == e.receiver.output)


@pytest.mark.parametrize("u", SHAPES, ids=str)
def test_masks_and_sets_are_the_same_thing(u: Universe) -> None:
    rng = np.random.default_rng(0)
    chosen = frozenset(e for e in u.edges if rng.random() < 0.4)
    mask = u.mask(chosen)
    assert mask.shape == (u.n_senders, u.n_receivers) and int(mask.sum()) == len(chosen)
    assert u.edge_set(mask) == chosen
    values = rng.normal(size=u.n_edges)
    spread = u.matrix(values, np.nan)
    assert np.array_equal(u.flat(spread), values) and np.array_equal(~np.isnan(spread), u.exists)
    for i in range(u.n_edges):
        e = u.edges[i]
        assert spread[u.sender_index(e.sender), u.receiver_index(e.receiver)] == values[i]


def test_unknown_parts_and_edges_are_refused() -> None:
    u = Universe(2, 2)
    for text in ("L0.MLP->L0.H0.q", "L1.H0->L1.MLP.q", "L0.H0->L5.MLP", "L0.H7->unembed", "L0.H0->L1.H0"):
        with pytest.raises(PartError):
            u.edge_index(parse(text))  # type: ignore[arg-type]
    with pytest.raises(PartError, match="not computed before"):
        Universe(2, 2, parallel=True).edge_index(parse("L1.H0->L1.MLP"))  # type: ignore[arg-type]
    with pytest.raises(VesaliusError, match="no edge"):
        u.edge_set(~u.mask([]))
    with pytest.raises(VesaliusError, match="at least 1"):
        Universe(0, 4)


def live(edges: set[Edge]) -> set[Edge]:
    """Edges on a path from embed to unembed, by networkx on the graph of nodes."""
    g = nx.DiGraph([(str(e.sender), str(e.receiver.output)) for e in edges])
    g.add_nodes_from(["embed", "unembed"])
    ahead, behind = nx.descendants(g, "embed") | {"embed"}, nx.ancestors(g, "unembed") | {"unembed"}
    return {e for e in edges if str(e.sender) in ahead and str(e.receiver.output) in behind}


@pytest.mark.parametrize("u", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.05, 0.15, 0.5])
def test_pruning_keeps_exactly_the_edges_between_embed_and_unembed(u: Universe, density: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        edges = {e for e in u.edges if rng.random() < density}
        assert u.edge_set(u.prune(u.mask(edges))) == live(edges)


def scored(u: Universe, seed: int = 0) -> Scores:
    values = np.random.default_rng(seed).normal(size=u.n_edges)
    return Scores(u.edges, values, info={"method": "eap", "task": "t"})


def slow_greedy(u: Universe, scores: Scores, n: int, by: str) -> set[Edge]:
    value = {e: abs(v) if by == "magnitude" else v for e, v in zip(u.edges, scores.values, strict=True)}
    inside, chosen = {Part("unembed")}, set()
    for _ in range(n):
        best = max((e for e in value if e not in chosen and e.receiver.output in inside), key=lambda e: value[e])
        chosen.add(best)
        inside.add(best.sender)
    return chosen


@pytest.mark.parametrize("u", SHAPES[:3], ids=str)
@pytest.mark.parametrize("by", ["magnitude", "value"])
def test_greedy_is_the_plain_search_from_the_logits(u: Universe, by: str) -> None:
    for n in (1, 5, 17, u.n_edges):
        expected = slow_greedy(u, scored(u), n, by)
        found = grow(scored(u), n, by=by, method="greedy")  # type: ignore[arg-type]
        assert found.edges == live(expected) and found.info["taken"] == n
        assert found.info["dead_ends"] == n - found.size


@pytest.mark.parametrize("by", ["magnitude", "value"])
def test_top_takes_the_largest_and_prunes(by: str) -> None:
    u = Universe(3, 2)
    table = scored(u, 3)
    for n in (0, 4, 30, u.n_edges):
        key = np.abs(table.values) if by == "magnitude" else table.values
        largest = {u.edges[int(i)] for i in np.argsort(-key)[:n]}
        found = grow(table, n, by=by)  # type: ignore[arg-type]
        assert found.edges == live(largest)
        assert found.nodes == {e.sender for e in live(largest)} | {e.receiver.output for e in live(largest)}
    assert grow(table, u.n_edges).edges == frozenset(u.edges)
    plain = Scores(list(u.edges)[::-1], table.values[::-1])
    assert grow(plain, 30, universe=u) == grow(table, 30)


def test_threshold_and_fraction_agree_with_size() -> None:
    u = Universe(3, 2)
    table = scored(u, 4)
    cut = np.sort(np.abs(table.values))[::-1][24]
    for method in ("top", "greedy"):
        assert grow(table, threshold=float(cut) - 1e-9).info["taken"] == 25
        by_fraction = grow(table, fraction=0.3, method=method)  # type: ignore[arg-type]
        assert by_fraction == grow(table, int(0.3 * u.n_edges), method=method)  # type: ignore[arg-type]
    taken = choose(u, table.values, threshold=float(cut), method="greedy")
    assert (np.abs(table.values)[taken] >= cut).all()


def test_missing_scores_are_never_taken() -> None:
    u = Universe(2, 2)
    values = np.where(np.arange(u.n_edges) % 3 == 0, np.nan, 1.0)
    for method in ("top", "greedy"):
        n = int((~np.isnan(values)).sum())
        assert not choose(u, values, size=n, method=method)[np.isnan(values)].any()  # type: ignore[arg-type]
    with pytest.raises(VesaliusError, match="cannot take"):
        grow(Scores(u.edges, values), u.n_edges)


def nodes_table() -> Scores:
    names = ["embed", "L0.H0", "L0.H1", "L0.MLP", "L1.H0", "L1.H1", "L1.MLP", "L0.H0.q"]
    return Scores([parse(n) for n in names], np.array([9, 0.1, -3, 2, 1, np.nan, -0.5, 8]), info={"method": "relp"})


def test_nodes_grow_by_magnitude_or_value() -> None:
    table = nodes_table()
    assert set(map(str, grow(table, 3).nodes)) == {"L0.H1", "L0.MLP", "L1.H0"}
    assert set(map(str, grow(table, 3, by="value").nodes)) == {"L0.MLP", "L1.H0", "L0.H0"}
    circuit = grow(table, threshold=0.5)
    assert circuit.level == "node" and circuit.size == 4 and circuit.edges is None
    assert [str(p) for p in circuit.heads] == ["L0.H1", "L1.H0"]
    assert [str(p) for p in circuit.mlps] == ["L0.MLP", "L1.MLP"]
    assert circuit.fractions() == {"heads": 0.5, "mlps": 1.0}
    assert circuit.info["unscored"] == 1 and circuit.info["not_candidates"] == 2
    assert "L0.H1" in circuit and "L0.H0" not in circuit
    frame = circuit.to_frame()
    assert frame["part"].tolist() == ["L0.H1", "L0.MLP", "L1.H0", "L1.MLP"]
    assert frame["score"].tolist() == [-3, 2, 1, -0.5]


def test_a_circuit_of_nodes_keeps_all_edges_among_them() -> None:
    u = Universe(2, 2)
    circuit = Circuit(frozenset({Part("head", 0, 1), Part("mlp", 1)}), info={"universe": {"n_layers": 2, "n_heads": 2}})
    kept = {"embed", "L0.H1", "L1.MLP", "unembed"}
    assert u.edge_set(circuit.mask()) == {e for e in u.edges if {str(e.sender), str(e.receiver.output)} <= kept}


@pytest.mark.parametrize("kwargs", [{}, {"size": 3, "fraction": 0.1}, {"fraction": 1.5}, {"size": 99}, {"size": -1}])
def test_bad_requests_are_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(VesaliusError):
        grow(nodes_table(), **kwargs)  # type: ignore[arg-type]


def test_ambiguous_tables_are_refused() -> None:
    u = Universe(2, 2)
    with pytest.raises(VesaliusError, match="universe"):
        grow(Scores([parse("L0.H0->unembed")], np.ones(1)), 1)
    with pytest.raises(VesaliusError, match="level="):
        grow(Scores([parse("L0.H0->unembed"), parse("L0.H0")], np.ones(2)), 1, universe=u)
    with pytest.raises(VesaliusError, match="greedy"):
        grow(nodes_table(), 2, method="greedy")
    with pytest.raises(VesaliusError, match="per position"):
        grow(Scores([parse("L0.H0")], np.ones(1), positions=["END"]), 1)


@pytest.mark.parametrize("edges", [False, True])
def test_save_and_load_give_the_same_circuit_and_the_same_file(edges: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    table = scored(Universe(3, 2)) if edges else nodes_table()
    circuit = grow(table, 7 if edges else 4)
    circuit.save(tmp_path / "a.json")
    back = Circuit.load(tmp_path / "a.json")
    assert back == circuit and back.info == circuit.info and back.scores is not None
    assert list(back.scores.parts) == list(table.parts)
    assert np.array_equal(back.scores.values, table.values, equal_nan=True)
    assert isinstance(back.scores.parts, EdgeList) == edges
    nodes = frozenset(reversed(sorted(circuit.nodes, key=str)))
    reordered = Circuit(nodes, circuit.edges, circuit.scores, circuit.info)
    reordered.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert back.to_frame().equals(circuit.to_frame())
    assert circuit._repr_html_().count("<tr") == 1 + min(20, circuit.size) and "heads" in repr(circuit)


def test_unreadable_circuits_are_one_clear_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for content in ("{", "[]", json.dumps({"format": "other"}), json.dumps({"cfg": {}, "nodes": {}})):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(VesaliusError, match="no readable circuit"):
            Circuit.load(tmp_path / "c.json")
    with pytest.raises(VesaliusError, match="no readable circuit"):
        Circuit.load(tmp_path / "absent.json")


def composition(circuit: Circuit, by_layer: bool) -> list[tuple[object, ...]]:
    def kind(p: Part) -> tuple[object, ...]:
        return (p.kind, p.side, p.layer if by_layer else None)

    if circuit.edges is not None:
        return sorted((str(kind(e.sender)), str(kind(e.receiver))) for e in circuit.edges)
    return sorted((str(kind(p)),) for p in circuit.nodes)


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("match", ["kind", "layer"])
def test_random_circuits_have_the_same_make_up(level: str, match: str) -> None:
    u = Universe(6, 5)
    rng = np.random.default_rng(0)
    if level == "edge":
        like = grow(scored(u), 150)
    else:
        table = Scores(list(u.nodes), rng.normal(size=len(u.nodes)))
        like = grow(table, 12, universe=u)
    drawn = [random_circuit(like, u, seed, match) for seed in range(20)]  # type: ignore[arg-type]
    assert all(composition(c, match == "layer") == composition(like, match == "layer") for c in drawn)
    assert all(c.size == like.size and c.level == level for c in drawn)
    assert drawn[0] == random_circuit(like, u, 0, match)  # type: ignore[arg-type]
    assert len({frozenset(c.edges or c.nodes) for c in drawn}) > 15


def test_random_heads_are_drawn_evenly() -> None:
    u = Universe(2, 5)
    like = Circuit(frozenset({Part("head", 0, 0), Part("head", 0, 1), Part("head", 1, 4)}))
    counts = np.zeros(len(u.senders))
    for seed in range(2000):
        for p in random_circuit(like, u, seed, "layer").nodes:
            counts[u.sender_index(p)] += 1
    expected = np.array([0] + [800] * 5 + [0] + [400] * 5 + [0])
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(np.maximum(expected, 0.01)))


def test_connected_random_circuits_have_no_dead_ends() -> None:
    u = Universe(6, 5)
    like = grow(scored(u), 60, method="greedy")
    for seed in range(10):
        drawn = random_circuit(like, u, seed, "connected")
        assert drawn.size == like.size and live(set(drawn.edges or ())) == drawn.edges
    with pytest.raises(VesaliusError, match="edges"):
        random_circuit(Circuit(frozenset({Part("head", 0, 0)})), u, 0, "connected")
