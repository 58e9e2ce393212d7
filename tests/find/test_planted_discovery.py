"""Every method against models whose circuit is set by hand: precision and recall of parts, edges and receivers."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from test_path_patching import subject

from vesalius.find.base import find
from vesalius.model.graph import universe_of
from vesalius.parts import Address, Edge, Part
from vesalius.prove.circuit import grow
from vesalius.scores import Scores

TASKS = ["induction", "ioi", "who-stayed", "successor", "successor-mlp"]
NATURAL = 1e-3  # of the largest effect: true edges carry at least 3 % of it, all others less than 0.03 %

every_task = pytest.mark.parametrize("task", TASKS)
both_bases = pytest.mark.parametrize("base", ["gpt2", "llama"])
both_directions = pytest.mark.parametrize("direction", ["denoise", "noise"])


def found(scores: Scores) -> frozenset[Address]:
    """Rows whose effect is larger than the natural threshold."""
    size = np.abs(scores.values)
    return frozenset(p for p, v in zip(scores.parts, size, strict=True) if v > NATURAL * size.max())


def margin(scores: Scores, truth: frozenset[Part] | frozenset[Edge]) -> float:
    """How many times the weakest true row outweighs the strongest other."""
    inside = np.array([p in truth for p in scores.parts])
    assert inside.sum() == len(truth)  # every true part or edge has a score
    size = np.abs(scores.values)
    return float(size[inside].min() / size[~inside].max())


@both_bases
@every_task
@both_directions
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_patching_finds_precisely_the_true_parts(task: str, base: str, direction: str, seed: int) -> None:
    truth, model, pairs = subject(task, base, seed)
    scores = find("activation-patching", model, pairs, direction=direction)
    assert found(scores) == truth.true_parts  # precision and recall are both 1
    assert all(scores[part] > 0 for part in truth.true_parts)  # each of them helps, whichever way it is patched
    assert grow(scores, len(truth.true_parts)).nodes == truth.true_parts
    # Clean and corrupted prompts have opposite answers: one part alone never does more than the whole difference.
    whole = find("direct", model, pairs, contrast=True).info["sum"]
    assert scores.values.max() < 1.05 * whole


@both_bases
@every_task
def test_exact_patching_finds_precisely_the_true_edges(task: str, base: str) -> None:
    truth, model, pairs = subject(task, base)
    scores = find("activation-patching", model, pairs, level="edge", direction="noise")
    assert found(scores) == truth.true_edges
    # The one edge that works against the answer is the repeated name's own value at the mover.
    against = {e for e in truth.true_edges if scores[e] < 0}
    assert {str(e.sender) for e in against} <= {"embed"}
    assert {(truth.roles[e.receiver.output], e.receiver.side) for e in against} == (
        {("mover", "v")} if task == "ioi" else set()
    )


ATTRIBUTION = [
    ("eap-ig", {}),
    ("relp", {"direction": "denoise"}),
    ("relp", {"direction": "noise"}),
]


@both_bases
@every_task
@pytest.mark.parametrize(("method", "options"), ATTRIBUTION, ids=[f"{m}{list(o.values())}" for m, o in ATTRIBUTION])
def test_attribution_ranks_every_true_part_and_edge_first(
    task: str, base: str, method: str, options: dict[str, str]
) -> None:
    truth, model, pairs = subject(task, base, seed=2)
    assert margin(find(method, model, pairs, **options), truth.true_parts) > 1e3
    edges = find(method, model, pairs, level="edge", **options)
    assert margin(edges, truth.true_edges) > 50
    assert grow(edges, len(truth.true_edges)).edges == truth.true_edges  # and so nothing is pruned as a dead end


@both_bases
@pytest.mark.parametrize("task", ["induction", "successor", "successor-mlp"])
def test_integrated_gradients_are_the_size_of_the_exact_effect_where_one_path_carries_it(task: str, base: str) -> None:
    """Plain gradients see the slope at one end alone; the average along the line sees the whole step."""
    truth, model, pairs = subject(task, base)
    exact = find("activation-patching", model, pairs)
    integrated = find("eap-ig", model, pairs)
    for part in truth.true_parts:
        assert integrated[part] == pytest.approx(exact[part], rel=0.05), part


@cache
def received(task: str, base: str, receiver: str) -> Scores:
    _, model, pairs = subject(task, base)
    return find("path-patching", model, pairs, receivers=receiver, senders="head,mlp", freeze_mlps=True)


@both_bases
@every_task
def test_path_patching_finds_the_true_receivers_of_every_part(task: str, base: str) -> None:
    truth, model, pairs = subject(task, base)
    largest = np.abs(received(task, base, "unembed").values).max()
    edges = set()
    for receiver in universe_of(model).receivers:
        scores = received(task, base, str(receiver))
        edges |= {Edge(p, receiver) for p, v in zip(scores.parts, scores.values, strict=True) if v > NATURAL * largest}
    assert edges == {e for e in truth.true_edges if e.sender.kind != "embed"}


@both_bases
def test_two_neurons_matter_for_each_prompt_of_the_successor_mlp(base: str) -> None:
    """One neuron an item: that of the clean prompt's last item and that of the corrupted one's."""
    truth, model, pairs = subject("successor-mlp", base)
    scores = find("activation-patching", model, pairs, parts="neuron", direction="noise")
    mlp = next(p for p in truth.true_parts if p.kind == "mlp")
    effects = np.abs(scores.per_example) > NATURAL * np.abs(scores.values).max()
    assert (effects.sum(0) == 2).all()
    assert {p.layer for p, on in zip(scores.parts, effects.any(1), strict=True) if on} == {mlp.layer}
    # Neurons write into a space of their own, read linearly but for the final norm: together they are the MLP.
    both = scores.per_example.sum(0)
    whole = find("activation-patching", model, pairs, parts="mlp", direction="noise")
    assert np.allclose(both, whole.per_example[[p == mlp for p in whole.parts]][0], rtol=0.25)


@both_bases
@pytest.mark.parametrize("method", ["activation-patching", "eap-ig", "relp"])
@pytest.mark.parametrize("task", ["induction", "ioi"])
def test_at_single_positions_the_answer_is_written_at_the_last_token(task: str, base: str, method: str) -> None:
    """A mover or induction head matters at the end of the prompt and nowhere else; earlier heads where they write."""
    truth, model, pairs = subject(task, base)
    scores = find(method, model, pairs, position="each")
    end = {role: str(pairs.length - 1) for role in ("mover", "inhibition", "induction")}
    size = np.abs(scores.values)
    for part, role in truth.roles.items():
        rows = [i for i, p in enumerate(scores.parts) if p == part]
        matters = {scores.positions[i] for i in rows if size[i] > 1e-2 * size.max()}
        if role in end:
            assert matters == {end[role]}, role
        else:
            assert matters and end["mover"] not in matters, role
