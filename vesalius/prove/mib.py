"""Circuits in the file form of the MIB benchmark's circuit track, so that results can be exchanged with it.

The form is that of EAP-IG's Graph (github.com/hannamw/EAP-IG, src/eap/graph.py), names in it being

    input   a3.h2   m3   logits          nodes                input->a0.h1<q>   a0.h1->m0   m3->logits     edges

JSON, the form written now:

    cfg     n_layers, n_heads, parallel_attn_mlp, d_model
    nodes   name -> {in_graph, score?, neurons?, neurons_scores?}
    edges   name -> {in_graph, score?}

and the older one: `nodes` name -> bool, neurons in a top-level `neurons`, cfg without d_model. A `.pt` file holds
cfg, src_nodes, dst_nodes, edges_scores (older: edges), edges_in_graph, nodes_in_graph, and optionally nodes_scores,
neurons_in_graph, neurons_scores, as matrices (n_senders, n_receivers) in the order of `Universe`. It is a pickle, and
is read only as far as `torch.load(weights_only=True)` allows. In neuron lists of JSON, a head's entry holds the rows of
all heads of its block. Scores are positive where a part helps the metric, as in Vesalius.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.errors import PartError, VesaliusError
from vesalius.model.graph import EdgeList, Level, Universe
from vesalius.parts import Part
from vesalius.prove.circuit import Circuit
from vesalius.scores import Scores

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class MibGraph:
    """What a MIB circuit file holds.

    Attributes:
        universe: the model's shape.
        edges_in_graph: (n_senders, n_receivers).
        nodes_in_graph: (n_senders,): input, heads, MLPs.
        edges_scores: (n_senders, n_receivers), NaN where an edge has none, or None for plain membership.
        nodes_scores: (n_senders,), NaN where a node has none, or None.
        neurons_in_graph: (n_senders, d_model), or None.
        neurons_scores: (n_senders, d_model), NaN where a neuron has none, or None.
        d_model: width of the residual stream; None in older files.
        cfg: whatever else the file's cfg holds.
        form: which of the two JSON forms it had.
        notes: what was set right on reading.
    """

    universe: Universe
    edges_in_graph: Bools
    nodes_in_graph: Bools
    edges_scores: Floats | None = None
    nodes_scores: Floats | None = None
    neurons_in_graph: Bools | None = None
    neurons_scores: Floats | None = None
    d_model: int | None = None
    cfg: dict[str, Any] = field(default_factory=dict)
    form: Literal["new", "old"] = "new"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.universe.attention_only:
            raise VesaliusError("MIB's file form has no models without MLPs; save the circuit with Circuit.save")
        matrix = (self.universe.n_senders, self.universe.n_receivers)
        row = (self.universe.n_senders,)
        wide = (self.universe.n_senders, self.d_model)
        for name, shape in (
            ("edges_in_graph", matrix),
            ("edges_scores", matrix),
            ("nodes_in_graph", row),
            ("nodes_scores", row),
            ("neurons_in_graph", wide),
            ("neurons_scores", wide),
        ):
            found = getattr(self, name)
            if found is not None and found.shape != shape:
                raise VesaliusError(f"{name} is {found.shape}; {self.universe} needs {shape}")

    def circuit(self, level: Level = "edge") -> Circuit:
        """The circuit: its edges and the parts they touch, or at node level the heads and MLPs marked as in it."""
        info = {"source": "MIB file", "universe": asdict(self.universe)}
        if level == "edge":
            edges = self.universe.edge_set(self.edges_in_graph)
            nodes = frozenset({e.sender for e in edges} | {e.receiver.output for e in edges})
            return Circuit(nodes, edges, None if self.edges_scores is None else self.scores("edge"), info)
        pairs = zip(self.universe.senders[1:], self.nodes_in_graph[1:], strict=True)
        nodes = frozenset(p for p, on in pairs if on)
        return Circuit(nodes, None, None if self.nodes_scores is None else self.scores("node"), info)

    def scores(self, level: Level = "edge") -> Scores:
        """The importance of every edge (or node); NaN where it has none.

        Raises:
            VesaliusError: if the file holds membership only.
        """
        info = {"method": "MIB file", "universe": asdict(self.universe)}
        found = self.edges_scores if level == "edge" else self.nodes_scores
        if found is None:
            raise VesaliusError(f"the file has no {level} scores, only which {level}s are in; use circuit()")
        if level == "edge":
            return Scores(self.universe.edges, self.universe.flat(found), info=info)
        return Scores(list(self.universe.senders), found, info=info)


def from_circuit(circuit: Circuit, universe: Universe | None = None, d_model: int | None = None) -> MibGraph:
    """A circuit as MIB keeps it: a circuit of nodes has all edges among its nodes, input and logits.

    Args:
        circuit: the circuit; its scores go along, those of edges or of nodes.
        universe: the model's shape, if the circuit does not know it.
        d_model: width of the residual stream; MIB's reader needs it in the file.
    """
    u = universe or circuit.universe
    if u is None:
        raise VesaliusError("the circuit does not know its model's shape; pass Universe(n_layers, n_heads)")
    mask = circuit.mask(u).numpy()
    nodes = np.zeros(u.n_senders, dtype=bool)
    senders = [p for p in circuit.nodes if p.kind != "unembed"]
    nodes[[u.sender_index(p) for p in senders]] = True
    if circuit.edges is None:
        nodes[0] = True  # input is always in a circuit of nodes
    edge_scores = node_scores = None
    if circuit.scores is not None:
        values = u.values(circuit.scores)
        edge_scores = None if np.isnan(values).all() else u.matrix(values, np.nan)
        node_scores = _node_values(u, circuit.scores)
    return MibGraph(u, mask, nodes, edge_scores, node_scores, d_model=d_model)


def from_scores(scores: Scores, universe: Universe, d_model: int | None = None) -> MibGraph:
    """Importance scores as MIB takes them: every edge (or node) with its score, none yet in the circuit."""
    values = universe.values(scores)
    nodes = _node_values(universe, scores)
    if np.isnan(values).all() and nodes is None:
        raise VesaliusError("the table scores no edge, head or MLP of this model")
    return MibGraph(
        universe,
        np.zeros((universe.n_senders, universe.n_receivers), dtype=bool),
        np.zeros(universe.n_senders, dtype=bool),
        None if np.isnan(values).all() else universe.matrix(values, np.nan),
        nodes,
        d_model=d_model,
    )


def _node_values(universe: Universe, scores: Scores) -> Floats | None:
    found = np.full(universe.n_senders, np.nan)
    if not isinstance(scores.parts, EdgeList):
        for part, value in zip(scores.parts, scores.values, strict=True):
            if isinstance(part, Part) and not part.side and part.kind in ("embed", "head", "mlp"):
                found[universe.sender_index(part)] = value
    return None if np.isnan(found).all() else found


# ------------------------------------------------------------------------------------------------ reading


def read(path: Path) -> MibGraph:
    """Reads a circuit or importance file of MIB, JSON or .pt.

    Raises:
        VesaliusError: if it is not one, names a node or edge the model does not have, or is a pickle of anything but
            plain tensors.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix == ".pt":
        return _from_pt(path)
    raise VesaliusError(f"{path.name} is neither .json nor .pt; MIB circuits are one of these")


def _from_json(path: Path) -> MibGraph:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VesaliusError(f"{path} is not a readable JSON file: {error}") from error
    _need(path, data, ("cfg", "nodes", "edges"))
    for key in ("nodes", "edges", "neurons"):
        if not isinstance(data.get(key, {}), dict):
            raise VesaliusError(f"{path.name} is not a MIB circuit: its {key} are not named")
    u, d_model, rest = _shape(path, data["cfg"])
    senders = {_name(p): i for i, p in enumerate(u.senders)}
    receivers = {_name(p): i for i, p in enumerate(u.receivers)}
    nodes = np.zeros(u.n_senders, dtype=bool)
    node_scores = np.full(u.n_senders, np.nan)
    neurons: dict[str, dict[str, Any]] = {"neurons": {}, "neurons_scores": {}}
    for name, entry in data["nodes"].items():
        if name == "logits":  # always in the graph
            continue
        if name not in senders:
            hint = "; neuron-by-neuron nodes of early files are not supported" if "." in name[1:] else ""
            raise VesaliusError(f"{path.name}: '{name}' is no node of {u}{hint}")
        if isinstance(entry, bool):
            nodes[senders[name]] = entry
            continue
        nodes[senders[name]] = _flag(path, name, entry)
        node_scores[senders[name]] = _number(path, name, entry)
        for key in neurons:
            if key in entry:
                neurons[key][name] = entry[key]
    neurons["neurons"] |= data.get("neurons", {})
    edges = np.zeros((u.n_senders, u.n_receivers), dtype=bool)
    edge_scores = np.full((u.n_senders, u.n_receivers), np.nan)
    for name, entry in data["edges"].items():
        tail, _, head = name.partition("->")
        s, r = senders.get(tail, -1), receivers.get(head, -1)
        if s < 0 or r < 0 or s >= u.limits[r]:
            raise VesaliusError(f"{path.name}: '{name}' is no edge of {u}; edges look like input->a0.h0<q>, m0->logits")
        edges[s, r] = _flag(path, name, entry)
        edge_scores[s, r] = _number(path, name, entry)
    old = any(isinstance(entry, bool) for entry in data["nodes"].values())
    return MibGraph(
        u,
        edges,
        nodes,
        None if np.isnan(edge_scores).all() else edge_scores,
        None if np.isnan(node_scores).all() else node_scores,
        _neurons(path, u, d_model, neurons["neurons"], False),
        _neurons(path, u, d_model, neurons["neurons_scores"], np.nan),
        d_model,
        rest,
        "old" if old else "new",
    )


def _from_pt(path: Path) -> MibGraph:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of an odd pickle before it refuses it
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise VesaliusError(
            f"{path.name} refused: it holds Python objects that could run code when opened; "
            "ask its author for the JSON form"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise VesaliusError(f"{path} is not a readable .pt file: {error}") from error
    _need(path, data, ("cfg", "src_nodes", "dst_nodes", "edges_in_graph", "nodes_in_graph"))
    u, d_model, rest = _shape(path, data["cfg"])
    for key, parts in (("src_nodes", u.senders), ("dst_nodes", u.receivers)):
        wanted = [_name(p) for p in parts]
        found = list(data[key])
        if found != wanted:
            wrong = next((f for f, w in zip(found, wanted, strict=False) if f != w), f"{len(found)} names")
            raise VesaliusError(f"{path.name}: {key} is not in MIB's order for {u} (at '{wrong}')")

    def tensor(*keys: str) -> Any:
        for key in keys:
            if data.get(key) is not None:
                if not isinstance(data[key], torch.Tensor):
                    raise VesaliusError(f"{path.name}: '{key}' is {type(data[key]).__name__}, not a tensor")
                return data[key].detach().cpu()
        return None

    def numbers(*keys: str) -> Floats | None:
        found = tensor(*keys)
        return None if found is None else found.double().numpy()

    def flags(key: str) -> Bools | None:
        found = tensor(key)
        return None if found is None else found.bool().numpy()

    edges, nodes = flags("edges_in_graph"), flags("nodes_in_graph")
    if edges is None or nodes is None or edges.shape != u.exists.shape:
        raise VesaliusError(f"{path.name}: edges_in_graph is not a matrix {u.exists.shape}, which {u} needs")
    stray = int((edges & ~u.exists).sum())
    scores = numbers("edges_scores", "edges")
    if scores is not None and scores.shape == u.exists.shape:
        scores = np.where(u.exists, scores, np.nan)
    return MibGraph(
        u,
        edges & u.exists,
        nodes,
        scores,
        numbers("nodes_scores"),
        flags("neurons_in_graph"),
        numbers("neurons_scores"),
        d_model,
        rest,
        notes=(f"{stray} marked pairs are no edges of the model and were left out",) if stray else (),
    )


def _need(path: Path, data: Any, keys: Iterable[str]) -> None:
    if not isinstance(data, dict):
        raise VesaliusError(f"{path.name} is not a MIB circuit: it holds a {type(data).__name__}, not named fields")
    missing = [k for k in keys if k not in data]
    if missing:
        raise VesaliusError(f"{path.name} is not a MIB circuit: no {', '.join(missing)} (found {', '.join(data)})")


def _shape(path: Path, cfg: Any) -> tuple[Universe, int | None, dict[str, Any]]:
    _need(path, cfg, ("n_layers", "n_heads"))
    try:
        width = cfg.get("d_model")
        u = Universe(int(cfg["n_layers"]), int(cfg["n_heads"]), bool(cfg.get("parallel_attn_mlp", False)))
        known = ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")
        return u, None if width is None else int(width), {k: v for k, v in cfg.items() if k not in known}
    except (TypeError, ValueError) as error:
        raise VesaliusError(f"{path.name}: cfg does not describe a model: {error}") from error


def _flag(path: Path, name: str, entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), (bool, int)):
        raise VesaliusError(f"{path.name}: '{name}' has no true or false in_graph, but {str(entry)[:60]}")
    return bool(entry["in_graph"])


def _number(path: Path, name: str, entry: dict[str, Any]) -> float:
    score = entry.get("score")
    if score is None:
        return float("nan")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise VesaliusError(f"{path.name}: the score of '{name}' is {str(score)[:40]!r}, not a number")
    return float(score)


def _neurons(path: Path, u: Universe, d_model: int | None, rows: dict[str, Any], fill: Any) -> Any:
    if not rows:
        return None
    if d_model is None:
        raise VesaliusError(f"{path.name} lists neurons but its cfg has no d_model")
    out = np.full((u.n_senders, d_model), fill, dtype=bool if fill is False else float)
    index = {_name(p): (i, p) for i, p in enumerate(u.senders)}
    for name, row in rows.items():
        if name not in index:
            raise VesaliusError(f"{path.name}: neurons of '{name}', which is no node of {u}")
        i, part = index[name]
        try:
            found = np.array(row, dtype=float)
        except (TypeError, ValueError) as error:
            raise VesaliusError(f"{path.name}: neurons of '{name}' are not numbers") from error
        if found.shape == (u.n_heads, d_model) and part.kind == "head":
            found = found[part.index or 0]
        if found.shape != (d_model,):
            raise VesaliusError(f"{path.name}: '{name}' lists {found.shape} neurons, d_model is {d_model}")
        out[i] = found
    return out


# ------------------------------------------------------------------------------------------------ writing


def write(graph: MibGraph | Circuit, path: Path, d_model: int | None = None) -> Path:
    """Writes a circuit or importance file, JSON or .pt by the path's ending; an older JSON file keeps its form.

    Edges without any score are written without the key, as MIB takes ready-made circuits. MIB's reader wants `d_model`
    in the file: give it here if the graph has none.

    Raises:
        VesaliusError: if the path cannot be written, or d_model is not known.
    """
    if isinstance(graph, Circuit):
        graph = from_circuit(graph, d_model=d_model)
    path = Path(path)
    width = d_model or graph.d_model
    if width is None and (graph.form == "new" or path.suffix == ".pt"):
        raise VesaliusError("MIB's file form needs the width of the residual stream; pass d_model=model.d_model")
    if path.suffix not in (".json", ".pt"):
        raise VesaliusError(f"{path.name} is neither .json nor .pt; name the file one of these")
    cfg: dict[str, Any] = {
        "n_layers": graph.universe.n_layers,
        "n_heads": graph.universe.n_heads,
        "parallel_attn_mlp": graph.universe.parallel,
        **({} if width is None else {"d_model": width}),
        **graph.cfg,
    }
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            part.write_text(json.dumps(_to_json(graph, cfg)), "utf-8")
        else:
            torch.save(_to_pt(graph, cfg), part)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise VesaliusError(f"cannot write {path}: {error}; choose another folder") from error
    return path


def _to_json(graph: MibGraph, cfg: dict[str, Any]) -> dict[str, Any]:
    u = graph.universe
    nodes: dict[str, Any] = {}
    neurons: dict[str, Any] = {}
    for i, part in enumerate(u.senders):
        entry: dict[str, Any] = {"in_graph": bool(graph.nodes_in_graph[i])}
        if graph.nodes_scores is not None and not np.isnan(graph.nodes_scores[i]):
            entry["score"] = float(graph.nodes_scores[i])
        rows = slice(i, i + 1)
        if part.kind == "head":
            rows = slice(i - (part.index or 0), i - (part.index or 0) + u.n_heads)
        if graph.neurons_in_graph is not None:
            found = graph.neurons_in_graph[rows].tolist()
            neurons[_name(part)] = graph.neurons_in_graph[i].tolist()
            entry["neurons"] = found if part.kind == "head" else found[0]
        if graph.neurons_scores is not None:
            found = graph.neurons_scores[rows].tolist()
            entry["neurons_scores"] = found if part.kind == "head" else found[0]
        nodes[_name(part)] = entry if graph.form == "new" else entry["in_graph"]
    nodes["logits"] = {"in_graph": True} if graph.form == "new" else bool(graph.edges_in_graph[:, -1].any())
    edges: dict[str, Any] = {}
    names = [_name(p) for p in u.senders]
    for r, receiver in enumerate(u.receivers):
        head = _name(receiver)
        for s in range(int(u.limits[r])):
            entry = {"in_graph": bool(graph.edges_in_graph[s, r])}
            if graph.edges_scores is not None:
                score = float(graph.edges_scores[s, r])
                if not np.isnan(score):
                    entry["score"] = score
                elif graph.form == "old":
                    entry["score"] = None
            edges[f"{names[s]}->{head}"] = entry
    data = {"cfg": cfg, "nodes": nodes, "edges": edges}
    return data | ({"neurons": neurons} if graph.form == "old" and neurons else {})


def _to_pt(graph: MibGraph, cfg: dict[str, Any]) -> dict[str, Any]:
    u = graph.universe
    scores = graph.edges_scores
    data: dict[str, Any] = {
        "cfg": cfg,
        "src_nodes": [_name(p) for p in u.senders],
        "dst_nodes": [_name(p) for p in u.receivers],
        "edges_in_graph": torch.from_numpy(graph.edges_in_graph),
        "nodes_in_graph": torch.from_numpy(graph.nodes_in_graph),
    }
    if scores is not None:  # MIB keeps 0 where there is no edge
        data["edges_scores"] = torch.from_numpy(np.where(u.exists, scores, 0.0)).float()
    if graph.nodes_scores is not None:
        data["nodes_scores"] = torch.from_numpy(graph.nodes_scores).float()
    if graph.neurons_in_graph is not None:
        data["neurons_in_graph"] = torch.from_numpy(graph.neurons_in_graph)
    if graph.neurons_scores is not None:
        data["neurons_scores"] = torch.from_numpy(graph.neurons_scores).float()
    return data


def _name(part: Part) -> str:
    """MIB's name of a part.

    Example:
        >>> _name(Part("head", 3, 2, "q"))
        'a3.h2<q>'
    """
    if part.kind == "embed":
        return "input"
    if part.kind == "unembed":
        return "logits"
    if part.kind == "mlp":
        return f"m{part.layer}"
    if part.kind != "head":
        raise PartError(f"{part} has no name in MIB's files, which know heads, MLPs, input and logits")
    return f"a{part.layer}.h{part.index}" + (f"<{part.side}>" if part.side else "")
