"""The metric under circuits against hooks that replace every other part, prompt by prompt; both ends of the scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from families import tiny
from numpy.typing import NDArray
from pairs import random_pairs
from plain import Shelf, padded_pairs, patched, prompts, put, record
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.model import Model, Pairs
from vesalius.model.graph import universe_of
from vesalius.parts import Part
from vesalius.prove.circuit import Circuit
from vesalius.prove.faithfulness import evaluate

CLOSE = 3e-4  # logits; many parts change at once
LENGTHS = [7, 9, 7, 9, 7, 9, 7, 9]
FAMILIES = ["llama", "gpt2", "gpt-neox", "gemma2", "bert", "t5"]


@cache
def opened(family: str) -> Model:
    return tiny(family)


def all_parts(model: Model) -> list[Part]:
    return model.parts(("head", "xhead", "mlp"))


def some_circuits(model: Model, n: int = 4, seed: int = 0) -> list[Circuit]:
    """Of very different sizes."""
    rng = np.random.default_rng(seed)
    parts = all_parts(model)
    sizes = np.linspace(1, len(parts) - 1, n).astype(int)
    return [Circuit(frozenset(parts[i] for i in rng.choice(len(parts), s, replace=False))) for s in sizes]


def counterfactual(model: Model, pairs: Pairs, circuits: Sequence[Circuit]) -> NDArray[np.float64]:
    """Everything outside as in the corrupted run, (circuit, example)."""
    parts, columns = all_parts(model), []
    for prompt in prompts(pairs):
        _, seen = record(model, prompt, "corrupted", parts)
        columns.append(
            [patched(model, prompt, "clean", {p: put(seen[p]) for p in parts if p not in c.nodes}) for c in circuits]
        )
    return np.array(columns).T


def runs(model: Model, pairs: Pairs, side: str) -> NDArray[np.float64]:
    return np.array([record(model, p, side, [])[0] for p in prompts(pairs)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_rest_does_what_it_does_on_the_paired_prompt(family: str, padding: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, [7, 9, 6], padding, 2)
    circuits = some_circuits(model)
    got, ends = evaluate(model, pairs, circuits)
    assert np.abs(got - counterfactual(model, pairs, circuits)).max() < CLOSE
    assert np.abs(ends.full - runs(model, pairs, "clean")).max() < CLOSE
    assert np.abs(ends.empty - runs(model, pairs, "corrupted")).max() < CLOSE  # with the embedding nothing is left
    assert np.ptp(got, axis=0).min() > 10 * CLOSE  # the circuits differ


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "resample", "zero"])
def test_everything_kept_is_the_model_and_nothing_kept_is_the_empty_circuit(family: str, ablation: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, LENGTHS, "right" if model.kind == "masked" else "left")
    everything, nothing = Circuit(frozenset(all_parts(model))), Circuit(frozenset())
    got, ends = evaluate(model, pairs, [everything, nothing], ablation=ablation)  # type: ignore[arg-type]
    assert np.abs(got[0] - ends.full).max() < 1e-4
    assert np.abs(ends.full - runs(model, pairs, "clean")).max() < 1e-4
    assert np.array_equal(got[1], ends.empty)
    assert abs(ends.full.mean() - ends.empty.mean()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_the_rest_is_zero_or_the_mean_of_its_length(family: str, ablation: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, LENGTHS, "right" if model.kind == "masked" else "left")
    circuits, parts, rows = some_circuits(model), all_parts(model), prompts(pairs)
    seen = [record(model, p, "corrupted", parts)[1] for p in rows]

    def value(part: Part, length: int) -> Tensor:
        if ablation == "zero":
            return torch.zeros(())
        return torch.cat([s[part] for s, n in zip(seen, LENGTHS, strict=True) if n == length]).mean(0, keepdim=True)

    expected = [
        [
            patched(model, prompt, "clean", {p: put(value(p, length)) for p in parts if p not in c.nodes})
            for prompt, length in zip(rows, LENGTHS, strict=True)
        ]
        for c in circuits
    ]
    got, _ = evaluate(model, pairs, circuits, ablation=ablation)  # type: ignore[arg-type]
    assert np.abs(got - expected).max() < CLOSE


def test_the_rest_is_resampled_from_one_other_prompt_of_the_same_length() -> None:
    model = opened("llama")
    pairs = padded_pairs(model, LENGTHS, "left")
    circuits, parts, rows = some_circuits(model), all_parts(model), prompts(pairs)
    got, _ = evaluate(model, pairs, circuits, ablation="resample", seed=2)
    seen = [record(model, p, "corrupted", parts)[1] for p in rows]
    for column, prompt in enumerate(rows):
        fitting = set()
        for donor, s in enumerate(seen):
            if LENGTHS[donor] == LENGTHS[column]:
                plain = [
                    patched(model, prompt, "clean", {p: put(s[p]) for p in parts if p not in c.nodes}) for c in circuits
                ]
                if np.abs(got[:, column] - plain).max() < CLOSE:
                    fitting.add(donor)
        assert len(fitting) == 1 and column not in fitting
    other, _ = evaluate(model, pairs, circuits, ablation="resample", seed=3)
    assert np.abs(got - other).max() > 10 * CLOSE


# -- edges -----------------------------------------------------------------------------------------------------------


def with_edges(model: Model, kept: frozenset[Part]) -> Circuit:
    """All edges out of these parts and out of the embedding."""
    edges = frozenset(e for e in universe_of(model).edges if e.sender in kept or e.sender.kind == "embed")
    nodes = frozenset({e.sender for e in edges} | {e.receiver.output for e in edges})
    return Circuit(nodes, edges)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_all_edges_are_the_model_and_none_the_ablated_one(family: str, ablation: str) -> None:
    model = opened(family)
    pairs = random_pairs(model, rows=4)
    everything = Circuit(frozenset(), frozenset(universe_of(model).edges))
    got, ends = evaluate(model, pairs, [everything, Circuit(frozenset(), frozenset())], ablation=ablation)  # type: ignore[arg-type]
    assert np.abs(got[0] - runs(model, pairs, "clean")).max() < CLOSE
    assert np.abs(ends.full - got[0]).max() < CLOSE
    assert np.array_equal(got[1], ends.empty)
    if ablation == "counterfactual":
        assert np.abs(ends.empty - runs(model, pairs, "corrupted")).max() < CLOSE


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "bloom"])
@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
def test_cutting_all_edges_of_a_part_is_ablating_it(family: str, ablation: str) -> None:
    """So a circuit of nodes and the one of all edges that leave its nodes do the same, by the plain hooks too."""
    model = opened(family)
    pairs = random_pairs(model, rows=5, shared=2)
    nodes = some_circuits(model, seed=1)
    edges = [with_edges(model, c.nodes) for c in nodes]
    by_node, ends = evaluate(model, pairs, nodes, ablation=ablation)  # type: ignore[arg-type]
    by_edge, same = evaluate(model, pairs, edges, ablation=ablation)  # type: ignore[arg-type]
    assert np.abs(by_node - by_edge).max() < CLOSE
    assert np.abs(ends.full - same.full).max() < CLOSE and np.abs(ends.empty - same.empty).max() < CLOSE
    if ablation == "counterfactual":
        assert np.abs(by_edge - counterfactual(model, pairs, nodes)).max() < CLOSE


# -- budget, interruptions, refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["node", "edge"])
def test_memory_and_company_change_nothing(level: str) -> None:
    """A tiny budget; one circuit at a time; more prompts than are run at once."""
    model = opened("llama")
    pairs = padded_pairs(model, [7, 9, 6] * 6, "left", 2)
    circuits = some_circuits(model)
    if level == "edge":
        circuits = [with_edges(model, c.nodes) for c in circuits]
    whole, ends = evaluate(model, pairs, circuits)
    small, _ = evaluate(model, pairs, circuits, memory_gb=1e-9)
    alone = np.concatenate([evaluate(model, pairs, [c])[0] for c in circuits])
    few, some = evaluate(model, pairs.take([17, 2, 8]), circuits)
    assert np.abs(whole - small).max() < 1e-4
    assert np.abs(whole - alone).max() < 1e-4
    assert np.abs(whole[:, [17, 2, 8]] - few).max() < 1e-4
    assert np.abs(ends.empty[[17, 2, 8]] - some.empty).max() < 1e-4


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("ablation", ["counterfactual", "resample"])
def test_a_killed_evaluation_goes_on_with_the_same_numbers(level: str, ablation: str) -> None:
    model = opened("gpt2")
    pairs = random_pairs(model, rows=40)  # three batches
    circuits = some_circuits(model)
    if level == "edge":
        circuits = [with_edges(model, c.nodes) for c in circuits]
    whole, ends = evaluate(model, pairs, circuits, ablation=ablation)  # type: ignore[arg-type]
    shelf = Shelf(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, pairs, circuits, ablation=ablation, store=shelf)  # type: ignore[arg-type]
    assert len(shelf.kept) == 2
    shelf.pieces = 10**9
    again, same = evaluate(model, pairs, circuits, ablation=ablation, store=shelf)  # type: ignore[arg-type]
    assert np.array_equal(whole, again) and np.array_equal(ends.empty, same.empty)
    assert len(shelf.kept) == 3


def test_refusals() -> None:
    model = opened("llama")
    pairs = padded_pairs(model, [7, 5, 7], "left")
    node, edge = some_circuits(model)[0], with_edges(model, frozenset())
    with pytest.raises(VesaliusError, match="no circuits"):
        evaluate(model, pairs, [])
    with pytest.raises(VesaliusError, match="nodes and of edges cannot be evaluated in one call"):
        evaluate(model, pairs, [node, edge])
    with pytest.raises(VesaliusError, match="no other prompt has 5 tokens.*more prompts"):
        evaluate(model, pairs, [node], ablation="resample")
    with pytest.raises(VesaliusError, match="edges between its parts are not defined"):
        evaluate(opened("bert"), random_pairs(opened("bert")), [edge])
