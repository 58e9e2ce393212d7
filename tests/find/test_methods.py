"""What every registered method keeps to: the right rows, honest numbers, the same ones again, nothing left behind."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from pairs import random_pairs
from plain import forward, padded_pairs, put

from vesalius.errors import ModelError, UnknownName, VesaliusError
from vesalius.find.base import METHODS, Context, find, parameters, table
from vesalius.model import Model, Pairs
from vesalius.model.graph import universe_of
from vesalius.parts import Part
from vesalius.scores import Scores
from vesalius.tasks.metrics import make_metric

LEVELS = [(m.name, level) for m in METHODS for level in m.info["levels"]]
NODES = [name for name, level in LEVELS if level == "node"]
# ACDC decides about all prompts together; random weights need a threshold of their size.
OPTIONS = {"acdc": {"threshold": 1e-3}, "sae-codes": {"steps": 20, "seeds": 2, "features": 8}}
# Methods that learn from, or decide about, all prompts together: a prompt's score does depend on its company.
TOGETHER = {"acdc", *(m.name for m in METHODS if m.info.get("together"))}
HEADS = ("path-patching", "sae-codes", "activation-difference")

every_level = pytest.mark.parametrize(("method", "level"), LEVELS)


@cache
def opened(family: str) -> Model:
    return tiny(family)


def run(method: str, level: str, model: Model, pairs: Pairs, **options: object) -> Scores:
    return find(method, model, pairs, level=level, **OPTIONS.get(method, {}), **options)


def families(level: str) -> list[str]:
    return ["llama", "gpt2", "gemma2"] if level == "edge" else ["llama", "gpt2", "gemma2", "bert", "t5"]


CASES = [(m, level, f) for m, level in LEVELS for f in families(level)]


def expected_rows(method: str, level: str, model: Model) -> list[object]:
    if level == "edge":
        return list(universe_of(model).edges)
    if method in HEADS:
        return model.parts(("head",))
    if method == "direct":
        stack = model.anatomy.main.prefix
        return [p for p in model.parts(("head", "mlp", "embed")) if p.stack == stack]
    return model.parts()


@pytest.mark.parametrize(("method", "level", "family"), CASES)
def test_the_contract(method: str, level: str, family: str, tmp_path: Path) -> None:
    model = opened(family)
    pairs = random_pairs(model, rows=5, shared=2)
    before = {n: p.clone() for n, p in model.hf.state_dict().items()}
    given = {n: v.clone() for n, v in vars(pairs).items() if isinstance(v, torch.Tensor)}
    logits = model.hf(**model.inputs(pairs.clean, None, pairs.decoder)).logits
    state = torch.get_rng_state()
    scores = run(method, level, model, pairs, seed=3)

    assert list(scores.parts) == expected_rows(method, level, model)
    assert np.isfinite(scores.values).all() and np.ptp(scores.values) > 0
    if method != "acdc":  # whose values are the changes that its own pruning saw
        assert scores.per_example.shape == (len(scores), 5)
        assert np.isfinite(scores.per_example).all()
    if scores.per_example is not None:
        assert np.allclose(scores.per_example.mean(1), scores.values, rtol=1e-9, atol=1e-12)

    info = scores.info
    assert (info["method"], info["level"], info["n"], info["seed"]) == (method, level, 5, 3)
    assert (info["model"], info["fingerprint"], info["metric"]) == (family, model.fingerprint, "logit-diff")
    assert set(info["options"]) == set(parameters(method))

    again = run(method, level, model, pairs, seed=3)
    assert np.array_equal(scores.values, again.values)

    # Nothing is left behind: weights, hooks, gradients, the caller's tensors, the global generator.
    assert all(torch.equal(p, before[n]) for n, p in model.hf.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.hf.modules())
    assert all(p.grad is None and not p.requires_grad for p in model.hf.parameters())
    assert all(torch.equal(getattr(pairs, n), v) for n, v in given.items())
    assert torch.equal(model.hf(**model.inputs(pairs.clean, None, pairs.decoder)).logits, logits)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()

    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert list(loaded.parts) == list(scores.parts) and np.array_equal(loaded.values, scores.values)
    frame = scores.to_frame()
    assert {"part", "score", "low", "high"} <= set(frame.columns) and len(frame) == len(scores)


@pytest.mark.parametrize(("method", "level"), [(m, level) for m, level in LEVELS if m not in TOGETHER])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompts_score_does_not_depend_on_its_company(method: str, level: str, family: str) -> None:
    """More prompts than are recorded at once, of several lengths; then some of them, in another order."""
    model = opened(family)
    lengths = [6, 8, 7] * 6
    pairs = padded_pairs(model, lengths, "left", 2)
    whole = run(method, level, model, pairs)
    some = [17, 4, 0, 9]
    few = run(method, level, model, pairs.take(some))
    size = np.abs(whole.per_example).max()
    assert np.allclose(few.per_example, whole.per_example[:, some], atol=2e-4 * size + 2e-5)


@pytest.mark.parametrize("method", ["activation-patching", "attribution-patching", "eap-ig", "relp", "path-patching"])
def test_answers_of_several_tokens_have_one_score_a_prompt(method: str) -> None:
    """Each prompt takes a row for every continuation; the score is of the prompt."""
    model = opened("llama")
    pairs = several_tokens(model)
    scores = find(method, model, pairs)
    assert scores.per_example.shape[1] == 2
    assert scores.unit == "nat"
    alone = np.stack([find(method, model, pairs.take([i])).per_example[:, 0] for i in range(2)], axis=1)
    assert np.allclose(scores.per_example, alone, atol=1e-4)


def several_tokens(model: Model) -> Pairs:
    """Two prompts with three teacher-forced continuations each: two right, one wrong, of one or two tokens."""
    base = padded_pairs(model, [8] * 6, "left", 0, seed=5)
    clean, corrupted = base.clean.clone(), base.corrupted.clone()
    targets = torch.tensor([[11, 12], [13, 14], [15, 0], [16, 17], [18, 0], [19, 20]])
    read_mask = torch.tensor([[True, True], [True, True], [True, False]] + [[True, True], [True, False], [True, True]])
    for row in range(6):
        first = row // 3 * 3  # the rows of a prompt share all but the continuation
        clean[row, :7], corrupted[row, :7] = clean[first, :7], corrupted[first, :7]
        clean[row, 7] = corrupted[row, 7] = targets[row, 0]
    return replace(
        base,
        clean=clean,
        corrupted=corrupted,
        reads=torch.tensor([[6, 7]] * 6),
        read_mask=read_mask,
        row_example=torch.tensor([0, 0, 0, 1, 1, 1]),
        row_right=torch.tensor([True, True, False] * 2),
        targets=targets,
        answers=[[11], [16]],
        wrong=[[15], [19]],
        metric=make_metric("logit-diff", sequence=True),
        positions={},
    )


def test_patching_with_answers_of_several_tokens_is_one_hook_a_continuation() -> None:
    model = opened("llama")
    pairs = several_tokens(model)
    scores = find("activation-patching", model, pairs, direction="noise")

    def probability(row: int, logits: torch.Tensor) -> torch.Tensor:
        steps = logits[0, [6, 7]].log_softmax(-1)[[0, 1], pairs.targets[row]]
        return steps[pairs.read_mask[row]].sum()

    def metric(by_row: list[torch.Tensor], first: int) -> float:
        right = torch.logsumexp(torch.stack(by_row[first : first + 2]), 0)
        return float(right - by_row[first + 2])

    with torch.no_grad():
        plain = [probability(r, model.hf(pairs.clean[r : r + 1]).logits) for r in range(6)]
        for part, got in zip(scores.parts, scores.per_example, strict=True):
            changed = []
            for r in range(6):
                _, seen = forward(model, {part: lambda x: x}, input_ids=pairs.corrupted[r : r + 1])
                logits, _ = forward(model, {part: put(seen[part])}, input_ids=pairs.clean[r : r + 1])
                changed.append(probability(r, logits))
            expected = [metric(plain, first) - metric(changed, first) for first in (0, 3)]
            assert np.allclose(got, expected, atol=2e-4), part


@every_level
def test_half_precision_runs_and_agrees_roughly(method: str, level: str) -> None:
    hf = tiny("llama").hf
    model = Model.wrap(hf.to(torch.bfloat16), name="llama")
    pairs = random_pairs(model, rows=5)
    scores = run(method, level, model, pairs)
    assert model.dtype == torch.bfloat16
    if method in TOGETHER:
        assert np.isfinite(scores.values).all()
        return
    assert scores.correlation(run(method, level, opened("llama"), pairs)) > 0.95


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_a_level_that_a_method_cannot_score_is_refused_with_those_that_can(method: str) -> None:
    levels = METHODS.entry(method).info["levels"]
    model = opened("gpt2")
    pairs = random_pairs(model)
    for level in {"node", "edge"} - set(levels):
        able = [m.name for m in METHODS if level in m.info["levels"]]
        with pytest.raises(VesaliusError, match=f"{method} scores {levels[0]}s, not {level}s; for {level}s use") as got:
            find(method, model, pairs, level=level)
        assert able and all(name in str(got.value) for name in able)
    with pytest.raises(UnknownName, match="unknown level 'edges'; did you mean 'edge'"):
        find(method, model, pairs, level="edges")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("rlep", "relp"), ("activation_patching", "activation-patching"), ("eapig", "eap-ig"), ("ACDC", "acdc")],
)
def test_an_unknown_method_is_answered_with_near_names(typed: str, meant: str) -> None:
    model = opened("gpt2")
    with pytest.raises(UnknownName, match=f"unknown method '{typed}'") as got:
        find(typed, model, random_pairs(model))
    assert meant in str(got.value) and "known: " in str(got.value)


@every_level
def test_a_parameter_that_does_not_exist_is_refused(method: str, level: str) -> None:
    model = opened("gpt2")
    name = next(iter(parameters(method)))
    with pytest.raises(UnknownName, match=f"unknown parameter of {method} '{name}x'; did you mean.*'{name}'"):
        find(method, model, random_pairs(model), level=level, **{f"{name}x": 1})


@every_level
def test_without_prompts_or_without_a_difference_nothing_is_scored(method: str, level: str) -> None:
    model = opened("gpt2")
    pairs = random_pairs(model)
    with pytest.raises(VesaliusError, match="no prompts to score on"):
        find(method, model, pairs.take([]), level=level)
    with pytest.raises(VesaliusError, match="clean and corrupted prompts are the same"):
        find(method, model, replace(pairs, corrupted=pairs.clean), level=level)


@pytest.mark.parametrize("method", [m for m, level in LEVELS if level == "edge"])
@pytest.mark.parametrize(("family", "why"), [("bert", "normalises the residual stream"), ("t5", "has two stacks")])
def test_edges_are_refused_where_there_is_no_one_stream(method: str, family: str, why: str) -> None:
    model = opened(family)
    with pytest.raises(ModelError, match=f"{why}.*use --level node"):
        find(method, model, random_pairs(model), level="edge")


def test_every_method_says_what_it_does_and_where_it_is_from() -> None:
    for entry in METHODS:
        assert entry.summary and entry.paper, entry.name
        function = METHODS.get(entry.name)
        for name, parameter in parameters(entry.name).items():
            assert parameter.default is not inspect.Parameter.empty, (entry.name, name)  # runs without options
            assert parameter.annotation is not inspect.Parameter.empty, (entry.name, name)
        assert list(inspect.signature(function).parameters)[:3] == ["model", "pairs", "context"]


def test_a_plug_in_comes_through_the_same_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))

    def depth(model: Model, pairs: Pairs, context: Context, *, power: float = 1.0) -> Scores:
        parts: list[Part] = model.parts()
        rows = np.array([[float((p.layer + 1) ** power)] * pairs.n_examples for p in parts])
        return table(parts, rows)

    METHODS.register("depth", "later blocks first", levels=("node",))(depth)
    model = opened("llama")
    pairs = random_pairs(model)
    scores = find("depth", model, pairs, power=2)
    assert scores["L2.MLP"] == 9
    assert scores.info["options"] == {"power": 2} and scores.info["method"] == "depth"
    with pytest.raises(UnknownName, match="did you mean 'power'"):
        find("depth", model, pairs, pwer=2)
    with pytest.raises(VesaliusError, match="depth scores nodes, not edges"):
        find("depth", model, pairs, level="edge")
