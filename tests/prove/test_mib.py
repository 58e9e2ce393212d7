"""MIB's file form: both JSON generations and .pt, there and back, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vesalius.errors import VesaliusError
from vesalius.model.graph import Universe
from vesalius.parts import Part
from vesalius.prove.circuit import Circuit, grow, random_circuit
from vesalius.prove.mib import from_circuit, from_scores, read, write
from vesalius.scores import Scores

U = Universe(2, 2)
CFG = {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 3}
NODES = ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]


def edge_names() -> list[str]:
    """MIB's names of all edges of a model of two layers and two heads, by walking through it."""
    names, stream = [], ["input"]
    for layer in range(2):
        heads = [f"a{layer}.h{h}" for h in range(2)]
        names += [f"{s}->{h}<{x}>" for s in stream for h in heads for x in "qkv"]
        stream += heads
        names += [f"{s}->m{layer}" for s in stream]
        stream.append(f"m{layer}")
    return names + [f"{s}->logits" for s in stream]


def new_form(scores: bool = True, neurons: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    nodes: dict[str, Any] = {n: {"in_graph": bool(i % 2 == 0)} for i, n in enumerate(NODES)}
    if scores:
        for n in NODES[1:]:
            nodes[n]["score"] = float(np.float32(rng.normal()))
    if neurons:
        rows = {n: (rng.random(3) < 0.5).tolist() for n in NODES}
        for n in NODES:
            block = [rows[f"{n[:2]}.h{h}"] for h in range(2)] if n[0] == "a" else rows[n]
            nodes[n]["neurons"] = block
    nodes["logits"] = {"in_graph": True}
    edges = {n: {"in_graph": bool(rng.random() < 0.3)} for n in edge_names()}
    if scores:
        for entry in edges.values():
            entry["score"] = float(np.float32(rng.normal()))  # type: ignore[assignment]
    return {"cfg": dict(CFG), "nodes": nodes, "edges": edges}


def old_form() -> dict[str, Any]:
    data = new_form()
    del data["cfg"]["d_model"]
    data["nodes"] = {n: entry["in_graph"] for n, entry in data["nodes"].items()}
    data["edges"]["input->m0"]["score"] = None
    data["edges"]["input->logits"]["in_graph"] = True
    return data


def as_pt(data: dict[str, Any], score_key: str = "edges_scores") -> dict[str, Any]:
    """The same graph as EAP-IG lays it out in tensors, indexed by its own rule."""
    src = NODES
    dst = [n for layer in range(2) for n in [*(f"a{layer}.h{h}<{x}>" for x in "qkv" for h in range(2)), f"m{layer}"]]
    dst.append("logits")
    scores, inside = torch.zeros(len(src), len(dst)), torch.zeros(len(src), len(dst), dtype=torch.bool)
    for name, entry in data["edges"].items():
        s, r = name.split("->")
        inside[src.index(s), dst.index(r)] = entry["in_graph"]
        scores[src.index(s), dst.index(r)] = entry["score"]
    return {
        "cfg": data["cfg"],
        "src_nodes": src,
        "dst_nodes": dst,
        score_key: scores,
        "edges_in_graph": inside,
        "nodes_in_graph": torch.tensor([data["nodes"][n]["in_graph"] for n in src]),
    }


def put(path: Path, data: Any) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(data))
    else:
        torch.save(data, path)
    return path


@pytest.mark.parametrize(
    "data",
    [new_form(), new_form(scores=False), new_form(neurons=True), old_form()],
    ids=["scores", "membership", "neurons", "old"],
)
def test_json_goes_there_and_back_exactly(data: dict[str, Any], tmp_path: Path) -> None:
    graph = read(put(tmp_path / "a.json", data))
    write(graph, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == data


def test_the_circuit_is_what_the_names_say(tmp_path: Path) -> None:
    data = new_form()
    graph = read(put(tmp_path / "a.json", data))
    circuit = graph.circuit()
    assert circuit.size == sum(entry["in_graph"] for entry in data["edges"].values())
    for name, entry in data["edges"].items():
        edge = next(e for e in U.edges if mib_name(e.sender) + "->" + mib_name(e.receiver) == name)
        assert (edge in circuit) == entry["in_graph"] and graph.scores()[edge] == entry["score"]
    nodes = graph.circuit("node")
    assert {mib_name(p) for p in nodes.nodes} == {n for n in NODES[1:] if data["nodes"][n]["in_graph"]}
    assert graph.scores("node")["L1.H0"] == data["nodes"]["a1.h0"]["score"]


def mib_name(p: Part) -> str:
    side = f"<{p.side}>" if p.side else ""
    return {"embed": "input", "unembed": "logits", "mlp": f"m{p.layer}"}.get(p.kind, f"a{p.layer}.h{p.index}{side}")


@pytest.mark.parametrize("key", ["edges_scores", "edges"])
def test_pt_holds_the_same_graph_as_json(key: str, tmp_path: Path) -> None:
    data = new_form()
    from_json, from_pt = read(put(tmp_path / "a.json", data)), read(put(tmp_path / "a.pt", as_pt(data, key)))
    assert np.array_equal(from_json.edges_in_graph, from_pt.edges_in_graph)
    assert np.array_equal(from_json.edges_scores, from_pt.edges_scores, equal_nan=True)  # type: ignore[arg-type]
    assert np.array_equal(from_json.nodes_in_graph, from_pt.nodes_in_graph)
    written = torch.load(write(from_pt, tmp_path / "b.pt"), weights_only=True)
    expected = as_pt(data)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(written[name], value) if isinstance(value, torch.Tensor) else written[name] == value


def test_pairs_that_are_no_edges_are_left_out_and_counted(tmp_path: Path) -> None:
    data = as_pt(new_form())
    data["edges_in_graph"][6, 0] = True  # m1 -> a0.h0<q>, which node-level files can hold
    graph = read(put(tmp_path / "a.pt", data))
    assert "1 marked" in graph.notes[0] and not graph.edges_in_graph[6, 0]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("ending", [".json", ".pt"])
def test_circuits_of_ours_come_back_the_same(parallel: bool, ending: str, tmp_path: Path) -> None:
    u = Universe(3, 4, parallel=parallel)
    values = np.random.default_rng(0).normal(size=u.n_edges).astype(np.float32).astype(float)
    table = Scores(u.edges, values)
    circuit = grow(table, 40, method="greedy")
    graph = read(write(circuit, tmp_path / f"c{ending}", d_model=16))
    assert graph.circuit() == circuit and graph.universe == u and graph.d_model == 16
    assert np.array_equal(graph.scores().values, values)
    assert grow(graph.scores(), 40, method="greedy") == circuit
    binary = read(write(random_circuit(circuit, u, 0), tmp_path / f"r{ending}", d_model=16))
    assert binary.edges_scores is None and binary.circuit() == random_circuit(circuit, u, 0)
    with pytest.raises(VesaliusError, match="no edge scores"):
        binary.scores()
    importances = read(write(from_scores(table, u, d_model=16), tmp_path / f"s{ending}"))
    assert np.array_equal(importances.scores().values, values) and not importances.edges_in_graph.any()


def test_a_circuit_of_nodes_carries_the_edges_among_them(tmp_path: Path) -> None:
    table = Scores(list(U.nodes), np.arange(6.0))
    circuit = grow(table, 2, universe=U)
    graph = read(write(circuit, tmp_path / "n.json", d_model=3))
    assert graph.circuit("node") == circuit and np.array_equal(graph.edges_in_graph, circuit.mask().numpy())
    assert graph.scores("node")["L1.MLP"] == 5.0 and np.isnan(graph.scores("node")["embed"])
    assert graph.nodes_in_graph[0]


def broken(change: Any) -> dict[str, Any]:
    data = new_form()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["nodes"].update({"a7.h0": {"in_graph": True}}), "'a7.h0' is no node"),
        (lambda d: d["nodes"].update({"m0.5": {"in_graph": True}}), "neuron-by-neuron"),
        (lambda d: d["edges"].update({"m1->a0.h0<q>": {"in_graph": True, "score": 0.0}}), "is no edge"),
        (lambda d: d["edges"].update({"input->a0.h0": {"in_graph": True, "score": 0.0}}), "is no edge"),
        (lambda d: d["edges"].update({"nonsense": {"in_graph": True, "score": 0.0}}), "'nonsense' is no edge"),
        (lambda d: d["edges"].update({"input->m0": {"score": 0.0}}), "no true or false in_graph"),
        (lambda d: d["edges"].update({"input->m0": {"in_graph": True, "score": "high"}}), "not a number"),
        (lambda d: d.pop("nodes"), "no nodes"),
        (lambda d: d.update(cfg={"n_layers": 2}), "no n_heads"),
        (lambda d: d["cfg"].update(n_layers="many"), "cfg does not describe"),
        (lambda d: d["nodes"]["m0"].update(neurons=[True]), r"d_model is 3"),
    ],
)
def test_wrong_names_and_values_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(VesaliusError, match=says):
        read(put(tmp_path / "a.json", broken(change)))


class Danger:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickled_objects_are_never_opened(tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    put(tmp_path / "a.pt", as_pt(new_form()) | {"extra": Danger(sign)})
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"cfg": Danger(sign)}))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(VesaliusError, match="refused|not a readable"):
            read(tmp_path / name)
    assert not sign.exists()


def test_files_that_are_no_circuits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04 not a zip")
    put(tmp_path / "whole.pt", as_pt(new_form()))
    (tmp_path / "d.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:900])
    put(tmp_path / "e.pt", {"cfg": CFG})
    put(tmp_path / "f.pt", as_pt(new_form()) | {"src_nodes": NODES[::-1]})
    put(tmp_path / "g.pt", as_pt(new_form()) | {"edges_in_graph": torch.zeros(2, 2, dtype=torch.bool)})
    put(tmp_path / "h.pt", torch.zeros(3))
    (tmp_path / "i.txt").write_text("")
    for path in [*sorted(tmp_path.glob("[a-i].*")), tmp_path / "absent.json", tmp_path / "absent.pt"]:
        with pytest.raises(VesaliusError):
            read(path)


def test_writing_needs_the_width_and_a_known_ending(tmp_path: Path) -> None:
    circuit = Circuit(frozenset({Part("head", 0, 0)}))
    with pytest.raises(VesaliusError, match="d_model"):
        write(from_circuit(circuit, U), tmp_path / "a.json")
    with pytest.raises(VesaliusError, match="neither"):
        write(from_circuit(circuit, U, 3), tmp_path / "a.txt")
    with pytest.raises(VesaliusError, match="shape"):
        from_circuit(circuit)
    with pytest.raises(VesaliusError, match="without MLPs"):
        from_circuit(circuit, Universe(2, 2, attention_only=True))
