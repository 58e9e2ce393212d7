"""Proofs on models whose circuit is known, and their arithmetic against plain runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from families import tiny
from numpy.typing import NDArray
from pairs import random_pairs
from plain import Shelf, padded_pairs, patched, prompts, put, record
from reuse_helpers import Subject, subject

import vesalius
from vesalius.errors import VesaliusError
from vesalius.model import Model, Pairs
from vesalius.model.graph import universe_of
from vesalius.parts import Part
from vesalius.prove import grow, prove, smallest
from vesalius.prove.areas import MIB_FRACTIONS
from vesalius.prove.circuit import Circuit
from vesalius.prove.proof import _knockouts, controls
from vesalius.scores import Scores

NAMES = ["induction", "name-mover", "successor", "successor-mlp"]
every_model = pytest.mark.parametrize("name", NAMES)
both_bases = pytest.mark.parametrize("base", ["gpt2", "llama"])


@pytest.fixture(scope="module")
def planted_subject(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    @cache
    def made(name: str, base: str) -> tuple[Subject, str]:
        found = subject(name, tmp_path_factory.mktemp(f"{name}-{base}"), base=base, n=8)
        return found, next(iter(found.tasks))

    return made


@cache
def opened(family: str) -> Model:
    return tiny(family)


# -- planted truth -----------------------------------------------------------------------------------------------------


@every_model
@both_bases
def test_the_true_circuit_is_found_and_proved(planted_subject, name: str, base: str) -> None:  # type: ignore[no-untyped-def]
    (model, tasks, roles), task = planted_subject(name, base)
    truth = frozenset(roles[task])
    finding = tasks[task]
    scores = vesalius.find("activation-patching", model, finding, direction="noise")
    circuit, tried = smallest(scores, model, finding, target=0.9)
    assert circuit.nodes == truth  # no true part can be missed, and none is added
    assert circuit.info["target_reached"] and (tried["faithfulness"][tried["size"] < len(truth)] < 0.9).all()
    proof = circuit.prove(model, finding.held_out(), ablations=("counterfactual", "mean"))
    assert proof.n == 8
    f = proof.faithfulness["counterfactual"]
    assert f.values[0] == pytest.approx(1, abs=0.01)
    assert f.low[0] == pytest.approx(1, abs=0.02) and f.high[0] == pytest.approx(1, abs=0.02)
    # The rest of the model alone does nothing of the job, nor does a random circuit that lacks a true part.
    whole = proof.completeness.query("ablation == 'counterfactual' and removed == 'all of it'")
    assert abs(float(whole["model_without"].iloc[0])) < 0.05
    for drawn, value in zip(controls(circuit, model, 10, 1000), proof.random["counterfactual"], strict=True):
        assert (value > 0.9) == (truth <= drawn.nodes)


@every_model
@both_bases
def test_true_parts_keep_their_sign_and_place_whichever_prompts_are_drawn(
    planted_subject, name: str, base: str
) -> None:  # type: ignore[no-untyped-def]
    (model, tasks, roles), task = planted_subject(name, base)
    scores = vesalius.find("activation-patching", model, tasks[task], direction="noise")
    inside = np.array([p in roles[task] for p in scores.parts])
    assert (scores.sign_stability()[inside] == 1).all()
    assert (scores.place_stability(int(inside.sum()))[inside] == 1).all()
    assert scores.place_stability(int(inside.sum()))[~inside].max() == 0
    low, high = scores.interval()
    assert (low[inside] > 0).all() and (np.abs(high - low)[~inside] < 1e-3).all()


@every_model
@both_bases
def test_the_true_edges_are_the_model(planted_subject, name: str, base: str) -> None:  # type: ignore[no-untyped-def]
    (model, tasks, _), task = planted_subject(name, base)
    truth = vesalius.build.planted(name, base).true_edges
    scores = vesalius.find("eap-ig", model, tasks[task], level="edge")
    circuit = grow(scores, len(truth), universe=universe_of(model))
    assert circuit.edges == truth
    proof = prove(circuit, model, tasks[task].held_out(), ablations=("counterfactual",), curve=False)
    assert proof.faithfulness["counterfactual"].values[0] == pytest.approx(1, abs=0.01)
    drawn = controls(circuit, model, 10, 1000)
    assert all(c.size == circuit.size for c in drawn)
    assert max(proof.random["counterfactual"]) < 0.5


def test_held_out_prompts_are_others(planted_subject) -> None:  # type: ignore[no-untyped-def]
    for name in NAMES:
        (model, tasks, _), task = planted_subject(name, "gpt2")
        finding = tasks[task]
        held_out = finding.held_out()
        mine = {e.clean for e in finding.examples(model.tokenizer)}
        theirs = {e.clean for e in held_out.examples(model.tokenizer)}
        assert len(mine) == len(theirs) == 8 and mine.isdisjoint(theirs)
        a, b = finding.pairs(model), held_out.pairs(model)
        assert not {tuple(row) for row in a.clean.tolist()} & {tuple(row) for row in b.clean.tolist()}


# -- arithmetic against plain runs -------------------------------------------------------------------------------------


def plain(model: Model, pairs: Pairs, kept: frozenset[Part]) -> NDArray[np.float64]:
    """The metric of each prompt when all parts but these do what they do on the corrupted prompt."""
    parts, found = model.parts(("head", "xhead", "mlp")), []
    for prompt in prompts(pairs):
        _, seen = record(model, prompt, "corrupted", parts)
        found.append(patched(model, prompt, "clean", {p: put(seen[p]) for p in parts if p not in kept}))
    return np.array(found)


def ratio(model: Model, pairs: Pairs, kept: frozenset[Part]) -> float:
    ends = {s: np.mean([record(model, p, s, [])[0] for p in prompts(pairs)]) for s in ("clean", "corrupted")}
    value = plain(model, pairs, kept).mean() if kept else ends["corrupted"]
    return float((value - ends["corrupted"]) / (ends["clean"] - ends["corrupted"]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_faithfulness_controls_and_completeness_equal_plain_runs(family: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, [7, 9, 8], "right" if model.kind == "masked" else "left", 1, seed=4)
    everything = frozenset(model.parts(("head", "xhead", "mlp")))
    circuit = Circuit(frozenset(sorted(everything, key=lambda p: p.order)[1::2]))
    proof = prove(circuit, model, pairs, ablations=("counterfactual",), curve=False, seed=5)
    got = proof.faithfulness["counterfactual"]
    assert got.values[0] == pytest.approx(ratio(model, pairs, circuit.nodes), abs=2e-3)
    drawn = controls(circuit, model, 10, 1005)
    for control, value in zip(drawn[:3], proof.random["counterfactual"], strict=False):
        assert value == pytest.approx(ratio(model, pairs, control.nodes), abs=2e-3)
    removed = _knockouts(circuit, model, 5)
    assert len(proof.completeness) == len(removed) == 4
    for (label, inside, outside), row in zip(removed, proof.completeness.itertuples(), strict=True):
        k = circuit.nodes - inside.nodes
        assert outside.nodes == everything - k  # the same parts are taken out of both
        assert len(k) == (circuit.size if label == "all of it" else circuit.size // 2)
        a, b = ratio(model, pairs, inside.nodes), ratio(model, pairs, outside.nodes)
        assert row.removed == label
        assert row.circuit_without == pytest.approx(a, abs=2e-3)
        assert row.model_without == pytest.approx(b, abs=2e-3)
        assert row.gap == pytest.approx(abs(a - b), abs=4e-3)


def scored(model: Model, seed: int = 0) -> Scores:
    parts = model.parts()
    return Scores(parts, np.random.default_rng(seed).normal(size=len(parts)))


def test_the_ends_of_the_scale_are_one_and_nought() -> None:
    model = opened("llama")
    pairs = random_pairs(model, rows=6)
    for kept, expected in ((frozenset(model.parts()), 1.0), (frozenset(), 0.0)):
        proof = prove(Circuit(kept), model, pairs, ablations=("counterfactual", "mean", "zero"), curve=False)
        for ablation, curve in proof.faithfulness.items():
            assert curve.values[0] == pytest.approx(expected, abs=1e-5), ablation


def test_the_curve_ends_in_the_whole_model_and_its_points_are_the_largest_scores() -> None:
    model = opened("llama")
    pairs = random_pairs(model, rows=6, seed=3)
    scores = scored(model)
    circuit = grow(scores, 5)
    proof = prove(circuit, model, pairs, ablations=("counterfactual",))
    n = len(scores)
    expected = [(f, int(f * n)) for f in MIB_FRACTIONS if int(f * n)]
    ranks = {"value": np.argsort(-scores.values), "magnitude": np.argsort(-np.abs(scores.values))}
    for by, order in ranks.items():
        curve = proof.curves["counterfactual", by]
        assert list(zip(curve.fractions, curve.sizes, strict=True)) == expected
        assert curve.values[-1] == pytest.approx(1, abs=1e-5)
        for size, value in zip(curve.sizes, curve.values, strict=True):
            kept = frozenset(scores.parts[i] for i in order[:size])
            assert value == pytest.approx(ratio(model, pairs, kept), abs=2e-3), (by, size)
    drawn = proof.control.groupby("size").size()
    assert list(drawn.index) == [s for _, s in expected[:-1]] and (drawn == 3).all()


@pytest.mark.parametrize("size", [1, 4, 9, 14])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_random_circuits_have_as_many_heads_and_mlps_of_each_stack(family: str, size: int) -> None:
    model = opened(family)
    parts = model.parts(("head", "xhead", "mlp"))
    like = Circuit(frozenset(parts[i] for i in np.random.default_rng(size).choice(len(parts), size, replace=False)))
    drawn = controls(like, model, 20, seed=0)
    wanted = Counter((p.kind, p.stack) for p in like.nodes)
    assert all(Counter((p.kind, p.stack) for p in c.nodes) == wanted for c in drawn)
    assert all(c.nodes <= set(parts) for c in drawn)
    assert len({c.nodes for c in drawn}) > (1 if size == 1 else 5)
    again, others = controls(like, model, 20, seed=0), controls(like, model, 20, seed=100)
    assert drawn == again and drawn != others


def turned(model: Model, pairs: Pairs) -> Pairs:
    """Each pair with that prompt as the clean one that gives the higher logit difference."""
    better = [record(model, p, "clean", [])[0] > record(model, p, "corrupted", [])[0] for p in prompts(pairs)]
    keep = torch.tensor(better)[:, None]
    clean, corrupted = (torch.where(keep, *x) for x in ((pairs.clean, pairs.corrupted), (pairs.corrupted, pairs.clean)))
    return replace(pairs, clean=clean, corrupted=corrupted)


def test_intervals_hold_the_mean_and_shrink_as_the_root_of_the_prompts() -> None:
    model = opened("llama")
    circuit = grow(scored(model), 9)
    pairs = turned(model, random_pairs(model, rows=160))
    widths: dict[int, list[float]] = {}
    for n in (10, 40, 160):
        for first in range(0, 160, n):
            some = pairs.take(range(first, first + n))
            curve = prove(circuit, model, some, ablations=("counterfactual",), curve=False).faithfulness[
                "counterfactual"
            ]
            assert curve.low[0] < curve.values[0] < curve.high[0]
            widths.setdefault(n, []).append(float(curve.high[0] - curve.low[0]))
    typical = [float(np.median(w)) for w in widths.values()]
    for wide, narrow in pairwise(typical):
        assert 1.3 < wide / narrow < 3.1  # four times the prompts: about half the width


def test_the_same_seed_is_the_same_proof() -> None:
    model = opened("gpt2")
    pairs = random_pairs(model, rows=6)
    circuit = grow(scored(model), 6)
    a, b, c = (prove(circuit, model, pairs, seed=s, ablations=("resample",)) for s in (0, 0, 1))
    assert a.curve_frame().equals(b.curve_frame()) and a.completeness.equals(b.completeness)
    assert np.array_equal(a.random["resample"], b.random["resample"])
    assert not np.array_equal(a.random["resample"], c.random["resample"])


def test_a_killed_proof_goes_on_with_the_same_numbers() -> None:
    model = opened("llama")
    pairs = random_pairs(model, rows=20)
    circuit = grow(scored(model), 6)
    whole = prove(circuit, model, pairs)
    shelf = Shelf(3)
    with pytest.raises(KeyboardInterrupt):
        prove(circuit, model, pairs, store=shelf)
    kept = list(shelf.kept)
    shelf.pieces = 10**9
    again = prove(circuit, model, pairs, store=shelf)
    assert list(shelf.kept)[:3] == kept
    assert whole.curve_frame().equals(again.curve_frame())
    assert whole.summary().equals(again.summary())


# -- the smallest circuit ----------------------------------------------------------------------------------------------


def test_the_smallest_circuit_keeps_to_its_share_of_heads_and_owns_up_when_it_falls_short() -> None:
    model = opened("llama")
    pairs = random_pairs(model, rows=6, seed=3)
    scores = vesalius.find("activation-patching", model, pairs, direction="noise")
    few, tried = smallest(scores, model, pairs, target=0.95, max_heads=0.25)
    assert len(few.heads) <= 3 and (tried["heads"] <= 3).all()
    for row in tried.itertuples():
        kept = frozenset(scores.top(row.size).parts)
        assert row.faithfulness == pytest.approx(ratio(model, pairs, kept), abs=2e-3)
    short, tried = smallest(scores, model, pairs, target=1e9)
    assert short.info["target_reached"] is False
    assert short.info["faithfulness_on_finding_prompts"] == pytest.approx(tried["faithfulness"].max())
    with pytest.raises(VesaliusError, match="no circuit has at most 0% of the heads"):
        smallest(scores.kind("head"), model, pairs, max_heads=0.0)
