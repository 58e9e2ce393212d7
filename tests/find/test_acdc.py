"""ACDC on models whose circuit is known, and against the algorithm written out with everything recomputed each time."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from families import PRE_NORM, tiny
from pairs import random_pairs
from test_path_patching import Killed, Shelf, subject
from torch import Tensor

from vesalius.errors import OutOfMemory, UnknownName, VesaliusError
from vesalius.find import acdc as module
from vesalius.find.base import find
from vesalius.model import Model, Pairs
from vesalius.model.edges import EdgeRun, write_sites, writes
from vesalius.model.graph import universe_of
from vesalius.model.sweep import activations, record
from vesalius.parts import Edge, parse
from vesalius.prove.circuit import grow
from vesalius.scores import Scores

TASKS = ["induction", "ioi", "who-stayed", "successor", "successor-mlp"]


def kept(scores: Scores) -> frozenset[Edge]:
    return frozenset(e for e, v in zip(scores.parts, scores.values, strict=True) if v > 0)  # type: ignore[misc]


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_recovers_exactly_the_true_edges_of_planted_models(task: str, base: str, direction: str) -> None:
    truth, model, pairs = subject(task, base)
    scores = find("acdc", model, pairs, level="edge", objective="kl", threshold=1e-6, direction=direction)
    assert kept(scores) == truth.true_edges
    assert grow(scores, threshold=1e-12).edges == truth.true_edges
    assert scores.info["metric_circuit"] == pytest.approx(scores.info["metric_full"], abs=0.01)
    by_metric = find("acdc", model, pairs, level="edge", threshold=0.1, direction=direction)
    # The repeated name works against the answer: by the metric its value is cut first, and its key then does nothing.
    against = {parse(f"embed->{p}.{s}") for p, role in truth.roles.items() if role == "mover" for s in "kv"}
    expected = truth.true_edges - against if task == "ioi" else truth.true_edges
    assert kept(by_metric) == expected
    assert (scores.info["unit"], by_metric.info["unit"]) == ("nat", "logit")


@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_a_budget_recovers_them_too_if_the_screen_sees_them(base: str) -> None:
    truth, model, pairs = subject("ioi", base)
    scores = find("acdc", model, pairs, level="edge", objective="kl", threshold=1e-6, budget=20, screen="eap-ig")
    assert kept(scores) == truth.true_edges
    assert len(truth.true_edges) <= scores.info["tested"] <= 20
    assert scores.info["metric_after_screen"] == pytest.approx(scores.info["metric_full"], abs=0.01)


# -- random models: the algorithm written out ------------------------------------------------------------------------


class Slow:
    """A transformer written out head by head in which every receiver is given its own input; nothing is kept."""

    def __init__(self, model: Model, pairs: Pairs, noise: bool = True) -> None:
        self.model, self.pairs, self.graph = model, pairs, universe_of(model)
        self.ids, other = (pairs.clean, pairs.corrupted) if noise else (pairs.corrupted, pairs.clean)
        none = torch.zeros(self.graph.exists.shape, dtype=torch.bool)
        self.other: list[Tensor] = []
        self.other = self._writes(other, none)[0]

    def _rotate(self, x: Tensor) -> Tensor:
        if self.model.anatomy.family == "gpt2":
            return x
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def _writes(self, ids: Tensor, cut: Tensor) -> tuple[list[Tensor], Tensor]:
        a, hf = self.model.anatomy, self.model.hf
        x = hf.get_input_embeddings()(ids)
        if a.family == "gpt2":
            x = x + hf.transformer.wpe.weight[: ids.shape[1]]
        found, stream = [x], x
        column = 0

        def read() -> Tensor:
            nonlocal column
            swaps = [self.other[u] - found[u] for u in range(len(found)) if cut[u, column]]
            column += 1
            return stream + sum(swaps)

        for block in a.main.blocks:
            projected = []
            for side in "qkv":
                weight, bias = a.head_in(block, side)
                at = [block.norm_in.module(read()) @ weight[h] for h in range(a.n_heads)]
                projected.append([x if bias is None else x + bias[h] for h, x in enumerate(at)])
            future = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
            for h in range(a.n_heads):
                q, k, v = self._rotate(projected[0][h]), self._rotate(projected[1][h]), projected[2][h]
                scores = (q @ k.transpose(-1, -2) / math.sqrt(a.d_head)).masked_fill(future, -torch.inf)
                found.append(scores.softmax(-1) @ v @ a.head_out(block)[h])
            stream = stream + sum(found[-a.n_heads :]) + (0 if block.o.bias is None else block.o.bias)
            found.append(block.module.mlp(block.norm_mid.module(read())))
            stream = stream + found[-1]
        return found, read()

    def logits(self, cut: Tensor) -> Tensor:
        with torch.no_grad():
            final = self._writes(self.ids, cut)[1][torch.arange(self.pairs.n_rows)[:, None], self.pairs.reads]
            return self.model.hf.get_output_embeddings()(self.model.anatomy.main.final_norm.module(final))

    def metric(self, cut: Tensor) -> Tensor:
        return self.pairs.value(self.logits(cut)[..., self.pairs.metric.tokens(self.pairs)])


def slow_acdc(slow: Slow, threshold: float, objective: str, noise: bool) -> tuple[Tensor, dict[Edge, float]]:
    """Algorithm 1, one test at a time."""
    graph = slow.graph
    cut = torch.zeros(graph.exists.shape, dtype=torch.bool)
    full = slow.logits(cut).log_softmax(-1)

    def badness() -> float:
        if objective == "kl":
            return float((full.exp() * (full - slow.logits(cut).log_softmax(-1))).sum(-1).mean())
        return float(slow.metric(cut).mean()) * (-1 if noise else 1)

    now, changes = badness(), {}
    for r in reversed(range(graph.n_receivers)):
        node = graph.receivers[r].output
        outgoing = [
            (graph.sender_index(node), c) for c in range(graph.n_receivers) if graph.exists[graph.sender_index(node), c]
        ] if node.kind != "unembed" else []  # fmt: skip
        dead = bool(outgoing) and all(cut[u, c] for u, c in outgoing)
        for u in reversed(range(graph.n_senders)):
            if not graph.exists[u, r]:
                continue
            cut[u, r] = True
            if dead:
                continue
            after = badness()
            if after - now > threshold:
                cut[u, r] = False
                changes[Edge(graph.senders[u], graph.receivers[r])] = after - now
            else:
                now = after
    return cut, changes


@cache
def double(family: str) -> Model:
    return Model.wrap(tiny(family).hf.double(), name=family)


@pytest.mark.parametrize(
    ("family", "objective", "direction", "threshold"),
    [
        ("gpt2", "metric", "noise", 2e-3),
        ("llama", "metric", "denoise", 5e-3),
        ("gpt2", "kl", "denoise", 1e-4),
        ("llama", "kl", "noise", 1e-4),
        ("llama", "metric", "noise", 0.0),
    ],
)
@torch.no_grad()
def test_decides_as_the_plain_algorithm(family: str, objective: str, direction: str, threshold: float) -> None:
    model = double(family)
    pairs = random_pairs(model, rows=2, length=6, shared=2)
    slow = Slow(model, pairs, direction == "noise")
    none = torch.zeros(slow.graph.exists.shape, dtype=torch.bool)
    side = "clean" if direction == "noise" else "corrupted"
    assert torch.allclose(slow.logits(none)[:, 0], model.logits(getattr(pairs, side))[:, -1], atol=1e-6)
    cut, changes = slow_acdc(slow, threshold, objective, direction == "noise")
    scores = find("acdc", model, pairs, level="edge", objective=objective, direction=direction, threshold=threshold)
    assert 5 < len(changes) < slow.graph.n_edges - 50
    assert kept(scores) == set(changes)
    assert all(scores[edge] == pytest.approx(change, rel=1e-2, abs=1e-6) for edge, change in changes.items())
    assert scores.info["metric_circuit"] == pytest.approx(float(slow.metric(cut).mean()), abs=1e-5)
    # afresh, from the circuit as it is grown
    mask = grow(scores, threshold=1e-12).mask()
    assert float(slow.metric(~mask & torch.from_numpy(slow.graph.exists)).mean()) == pytest.approx(
        scores.info["metric_circuit"], abs=1e-5
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_edge_runs_equal_the_written_out_model(family: str) -> None:
    model = double(family)
    pairs = random_pairs(model, rows=2, length=6, shared=2)
    slow = Slow(model, pairs)
    run = edge_run(model, pairs, paired=True)
    for seed, share in enumerate([0.003, 0.1, 0.9]):
        cut = torch.rand(slow.graph.exists.shape, generator=torch.Generator().manual_seed(seed)) < share
        assert torch.allclose(run.values(cut), slow.metric(cut).float(), atol=1e-5)


def edge_run(model: Model, pairs: Pairs, paired: bool) -> EdgeRun:
    tape = record(model, pairs, "clean", [], paired=paired).tape
    return EdgeRun(
        model, pairs, "clean", writes(model, activations(model, pairs.corrupted, pairs, write_sites(model), tape))
    )


@pytest.mark.parametrize("family", PRE_NORM)
@torch.no_grad()
def test_edge_runs_are_the_same_from_any_recorded_run(family: str) -> None:
    """Restarted at any block, in a batch, over the last positions alone: as from the plain run, one at a time."""
    model = tiny(family)
    pairs = random_pairs(model, shared=4)
    whole, last = edge_run(model, pairs, False), edge_run(model, pairs, True)
    assert (whole.start, last.start) == (0, 4)
    graph = whole.graph
    random = torch.Generator().manual_seed(0)
    sets = torch.rand(4, *graph.exists.shape, generator=random) < torch.tensor([0.02, 0.2, 0.6, 0.95])[:, None, None]
    first = sets[2].clone()
    first[:, graph.block_columns(0)] = sets[1][:, graph.block_columns(0)]  # as set 1 in block 0, else set 2
    sets = torch.cat([sets, first[None]])
    expected = torch.stack([whole.values(one) for one in sets])
    assert torch.allclose(last.values(sets), expected, atol=1e-4)
    blocks = last.blocks_run
    last.record(sets[1])
    assert torch.allclose(last.values(sets), expected, atol=1e-4)
    before = last.blocks_run
    assert torch.allclose(last.values(first), expected[4], atol=1e-4)
    assert last.blocks_run - before == model.n_layers - 1  # block 0 is as recorded
    last.record(first)
    assert torch.allclose(last.values(sets), expected, atol=1e-4)
    before = last.blocks_run
    ends = first.clone()
    ends[:, -1] = sets[0][:, -1]
    assert torch.allclose(last.values(ends), whole.values(ends), atol=1e-4)
    assert last.blocks_run == before > blocks  # only edges into unembed differ: no block is run


# -- bounds, costs, refusals -----------------------------------------------------------------------------------------


def test_a_huge_threshold_cuts_all_and_tests_only_the_edges_into_unembed() -> None:
    for ablation, side in [("counterfactual", "corrupted"), ("zero", None), ("mean", None), ("resample", None)]:
        model = tiny("llama")
        pairs = random_pairs(model, rows=4)
        scores = find("acdc", model, pairs, level="edge", threshold=1e9, ablation=ablation)
        graph = universe_of(model)
        assert not kept(scores) and not scores.values.any()
        assert scores.info["tested"] == graph.n_senders == scores.verified.sum()
        assert scores.info["cut_untested_dead"] == graph.n_edges - graph.n_senders
        if side:
            final = model.logits(getattr(pairs, side))[:, -1:]
            metric = pairs.value(final[..., pairs.metric.tokens(pairs)]).mean()
            assert scores.info["metric_circuit"] == pytest.approx(float(metric), abs=1e-4)
        if ablation == "zero":  # nothing is left but the biases, of which llama has none
            assert scores.info["metric_circuit"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("budget", [20, 60, 10**6])
def test_a_budget_is_kept_and_accounted_for(budget: int) -> None:
    model = tiny("gpt2")
    pairs = random_pairs(model)
    graph = universe_of(model)
    screen = find("relp", model, pairs, level="edge", direction="noise")
    chosen = torch.from_numpy(graph.exists)
    if budget < graph.n_edges:  # the largest edges, less dead ends, for as long as there are not too many
        growing = [graph.prune(graph.mask(screen.top(n).parts)) for n in range(graph.n_edges)]
        chosen = next(mask for mask in reversed(growing) if mask.sum() <= budget)
    scores = find("acdc", model, pairs, level="edge", threshold=0.002, budget=budget)
    info = scores.info
    assert info["tested"] + info["cut_untested_dead"] == chosen.sum() <= budget
    assert info["never_tested_screened_out"] == graph.n_edges - chosen.sum()
    assert info["kept"] + info["cut_by_test"] == info["tested"] == scores.verified.sum() > 0
    assert {e for e, v in zip(scores.parts, scores.verified, strict=True) if v} <= graph.edge_set(chosen)
    run = edge_run(model, pairs, paired=False)
    after = run.values(torch.from_numpy(graph.exists) & ~chosen).mean()
    if budget < graph.n_edges:
        assert abs(info["metric_full"] - float(after)) > 1e-3
    assert info["metric_after_screen"] == pytest.approx(float(after), abs=1e-4)


def test_speculation_batches_and_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    pairs = random_pairs(model, rows=18, length=6)  # two batches of prompts
    whole = find("acdc", model, pairs, level="edge", threshold=0.002)
    assert whole.info["kept"] > 5
    assert whole.info["sets_run"] > whole.info["tested"]  # some speculation failed
    monkeypatch.setattr(module, "LAST_BATCH", 1)
    one = find("acdc", model, pairs, level="edge", threshold=0.002)
    assert one.info["sets_run"] == one.info["tested"] == whole.info["tested"]
    assert np.allclose(whole.per_example, one.per_example, atol=1e-6)
    monkeypatch.undo()
    tight = find("acdc", model, pairs, level="edge", threshold=0.002, memory_gb=1.5e-3)
    assert np.allclose(whole.per_example, tight.per_example, atol=1e-6)
    with pytest.raises(OutOfMemory, match="fewer or shorter prompts"):
        find("acdc", model, pairs, level="edge", memory_gb=1e-5)


def test_a_killed_run_goes_on() -> None:
    model = double("gpt2")
    pairs = random_pairs(model)
    whole = find("acdc", model, pairs, level="edge", threshold=0.002)
    shelf = Shelf(left=12)
    with pytest.raises(Killed):
        find("acdc", model, pairs, level="edge", threshold=0.002, store=shelf)
    before = dict(shelf.kept)
    shelf.left = 10**9
    seen: list[tuple[int, int]] = []
    again = find("acdc", model, pairs, level="edge", threshold=0.002, store=shelf, progress=lambda *at: seen.append(at))
    assert np.allclose(whole.per_example, again.per_example, atol=1e-7)
    assert again.info["tests_taken_from_store"] == sum(len(x) for x in before.values()) > 0
    assert again.info["passes"] < whole.info["passes"]
    assert seen == sorted(seen) and seen[-1] == (len(whole), len(whole))


def test_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    pairs = random_pairs(model)
    for options, message in [
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"budget": 0}, "at least 1"),
    ]:
        with pytest.raises(VesaliusError, match=message):
            find("acdc", model, pairs, level="edge", **options)
    with pytest.raises(UnknownName, match="did you mean 'kl'"):
        find("acdc", model, pairs, level="edge", objective="kll")
    with pytest.raises(UnknownName, match="did you mean 'mean'"):
        find("acdc", model, pairs, level="edge", ablation="means")
    with pytest.raises(VesaliusError, match="not nodes"):
        find("acdc", model, pairs)
    _, model_of_three_edges, prompts = subject("induction", "gpt2")
    with pytest.raises(VesaliusError, match="give a larger budget"):
        find("acdc", model_of_three_edges, prompts, level="edge", budget=2)
    monkeypatch.setattr(module, "LARGEST", 100)
    with pytest.raises(VesaliusError, match=r"262 passes; use --budget"):
        find("acdc", model, pairs, level="edge")
    assert find("acdc", model, pairs, level="edge", budget=50).info["tested"] <= 50
