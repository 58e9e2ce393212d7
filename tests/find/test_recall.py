"""Factual recall: regressions with known weights, and a model in which every step was planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from sklearn.linear_model import Ridge

from vesalius.build.recall import PlantedRecall, planted_recall
from vesalius.errors import ModelError, TaskError, UnknownName, VesaliusError
from vesalius.find.base import find
from vesalius.find.recall import NEEDED, Trace, ask, facts_file, last_block, mix, swapped, take_apart, trace
from vesalius.find.recall.questions import tensors
from vesalius.model import Model
from vesalius.tasks.facts import relation_of, relations
from vesalius.tasks.metrics import LogitDiff

# -- the regression


def block(nonlinear: bool = False, n: int = 60, heads: int = 12, d: int = 48, seed: int = 0):
    """Writes of heads and rest with common parts (heads are collinear), and an MLP with known weights."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 1, d))
    inputs = rng.normal(size=(n, heads + 1, d)) + 0.7 * common + 3 * rng.normal(size=(1, heads + 1, d))
    alpha = rng.choice([-1.0, 0.0, 1.5], heads + 1)
    b = 4 * rng.normal(size=d)
    out = np.einsum("i,nid->nd", alpha, inputs) + b
    if nonlinear:
        w = rng.normal(size=(d, 4 * d)) / d**0.5
        hidden = np.abs(inputs.sum(1) @ w)
        out = hidden @ rng.normal(size=(4 * d, d))
    else:
        out += 0.05 * (out - b).std() * rng.normal(size=out.shape)
    return inputs, out, alpha, b


@pytest.mark.parametrize("seed", range(3))
def test_known_weights_and_intercept_are_found(seed: int) -> None:
    inputs, out, alpha, b = block(seed=seed)
    found = mix(inputs, out, [*[f"L0.H{i}" for i in range(12)], "rest"], "L0.MLP")
    assert np.abs(found.weights - alpha).max() < 0.05
    assert found.intercept @ b / np.linalg.norm(found.intercept) / np.linalg.norm(b) > 0.99
    assert found.r2 > 0.98 and found.null < 0.2 and not found.warning
    assert {name for name, _ in found.top(3)} <= {n for n, a in zip(found.inputs, alpha, strict=True) if a == 1.5}


def test_what_is_not_linear_is_told() -> None:
    inputs, out, *_ = block(nonlinear=True)
    found = mix(inputs, out, [*[f"L0.H{i}" for i in range(12)], "rest"], "L7.MLP")
    assert found.r2 < 0.5 and "L7.MLP" in found.warning and "not linear" in found.warning


def test_the_same_as_ridge_regression_of_scikit_learn() -> None:
    inputs, out, *_ = block(n=24, heads=5, d=10)
    found = mix(inputs, out, list("abcdef"))
    centred, wanted = inputs - inputs.mean(0), out - out.mean(0)
    size = np.sqrt(np.square(centred).sum((0, 2)))
    rows = (centred / size[None, :, None]).transpose(0, 2, 1).reshape(-1, 6)
    oracle = Ridge(alpha=found.ridge, fit_intercept=False).fit(rows, wanted.ravel())
    assert found.weights == pytest.approx(oracle.coef_ / size, rel=1e-6)
    assert found.r2_fitted == pytest.approx(oracle.score(rows, wanted.ravel()), abs=1e-3)


def test_too_few_prompts_are_refused_with_what_is_needed() -> None:
    inputs, out, *_ = block(n=NEEDED - 1)
    with pytest.raises(VesaliusError, match=f"{NEEDED - 1} prompts are too few .* {NEEDED} are needed"):
        mix(inputs, out, ["x"] * 13)


# -- a model whose recall is known


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def truth(request: pytest.FixtureRequest) -> PlantedRecall:
    return planted_recall(request.param)


@pytest.fixture(scope="module")
def model(truth: PlantedRecall) -> Model:
    return Model.wrap(truth.hf, truth.tokenizer, name="recall")


@pytest.fixture(scope="module")
def found(truth: PlantedRecall, model: Model) -> Trace:
    return trace(model, "the capital of land3 is", relation=truth.facts(), n=22, patched=6)


def test_every_step_is_found(truth: PlantedRecall, model: Model, found: Trace) -> None:
    it = found.machinery
    assert it.heads.heads == [truth.topic_head]
    row = [str(p) for p in it.heads.scores.parts].index(str(truth.topic_head))
    columns = it.heads.scores.columns
    assert columns["topic_rank"][row] == 1 and columns["other_rank"][row] > 1 and columns["attention"][row] > 0.9
    assert columns["to_mlps"][row] == pytest.approx(it.heads.scores.values[row], rel=0.05)  # all of it through MLPs
    assert it.heads.writers[0] == truth.answer_mlp == found.written_by
    assert found.fails == "none" and found.said == "city3" and bool(found.steps()["holds"].all())
    assert "recalled" in found.verdict
    assert any(str(truth.answer_mlp) in w for w in it.warnings)  # a table of facts is not linear in its heads


def test_the_intercept_of_the_relations_mlp_is_its_function(truth: PlantedRecall, found: Trace) -> None:
    table = found.machinery.vectors.set_index(["part", "scale"])
    mine = table.loc[(str(truth.task_mlp), 1.0)]
    assert mine["first"] >= 0.95 and mine["first_before"] < 0.2 and mine["moved"] > 3 * abs(mine["random"])
    others = table.drop(index=str(truth.task_mlp), level=0)
    assert others["moved"].abs().max() < 0.2 * mine["moved"]


def test_the_damper_is_found_and_taking_it_away_helps(truth: PlantedRecall, found: Trace) -> None:
    last = found.machinery.last
    assert last.suppressors == [truth.damper] and last.total.high < 0
    assert last.before.mean > last.after.mean
    assert last.mitigation is not None and last.mitigation.helps and last.mitigation.scale == 0.0
    assert last.mitigation.after.low > last.mitigation.before.high


def test_no_remedy_is_offered_where_nothing_is_held_back() -> None:
    made = planted_recall(damping=-0.2)  # the last block adds to the answer
    model = Model.wrap(made.hf, made.tokenizer)
    found = trace(model, "the capital of land3 is", relation=made.facts(), n=20, patched=4).machinery.last
    assert found.total.low > 0 and found.suppressors == [] and found.mitigation is None


@pytest.mark.parametrize(("which", "fails"), [("forgotten", "answer"), ("unseen", "topic")])
def test_a_fact_that_is_not_known_fails_at_its_step(truth: PlantedRecall, model: Model, which: str, fails: str) -> None:
    found = trace(model, f"the capital of {getattr(truth, which)} is", relation=truth.facts(), n=20, patched=4)
    assert found.fails == fails and found.rank > 1
    holds = dict(zip(found.steps()["step"], found.steps()["holds"], strict=True))
    assert holds["1 topic brought to the end"] == (fails == "answer") and not holds["2-3 answer written"]


def test_another_topics_answer_is_told(truth: PlantedRecall, model: Model) -> None:
    found = trace(model, "the capital of land4 is", relation=truth.facts(), answer="city9", n=20, patched=4)
    assert found.fails == "answer" and found.said == "city4" and "city9" in found.verdict


def test_swapping_the_topic_head_swaps_the_answer(truth: PlantedRecall, model: Model, found: Trace) -> None:
    pairs = replace(found.machinery.asked.pairs, metric=LogitDiff())
    idle = [p for p in model.parts(("head",)) if p not in (truth.topic_head, truth.relation_head)][:2]
    values = swapped(model, pairs, [[truth.topic_head], idle])
    assert (values[0] < 0).all() and (values[1] > 0).all()


def test_a_user_file_of_facts(truth: PlantedRecall, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "lands.csv"
    path.write_text("topic,answer\n" + "\n".join(f"{t},{a}" for t, a in truth.answers["language"].items()))
    asked = ask(model, take_apart(model, "the language of land5 is", relation=facts_file(path)), 22)
    assert asked.right == 22 == asked.pairs.n_examples and asked.own == 22
    last = last_block(model, asked.pairs, find("direct", model, asked.pairs, parts="head,mlp,embed"))
    assert last.suppressors == [truth.damper]


# -- questions


def test_the_relation_is_read_from_the_prompt() -> None:
    for name, relation in relations().items():
        for template in relation.templates:
            assert (asked := relation_of(template)) is not None and asked.name == name, template
        assert len(relation.answers) >= 35 and len(set(relation.templates)) == len(relation.templates)
    assert len(relations()["capital"].templates) == 15
    assert relation_of("Once upon a time") is None


@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ("the capital of land3 is", {}, "no topic of 'capital' stands in"),
        ("the capital of land3 is", {"topic": "land9"}, "the topic 'land9' does not stand in"),
        ("the capital of land3 is", {"topic": "land3"}, "'land3' has no capital in the list; give the right answer"),
        ("the capital of land3 is", {"topic": "land3", "answer": "city3 city4"}, "is 2 tokens"),
        ("We talked about land3", {}, "is none of capital, language, currency"),
        ("   ", {}, "an empty prompt"),
    ],
)
def test_bad_prompts_are_refused(model: Model, prompt: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(VesaliusError, match=told):
        take_apart(model, prompt, **options)


def test_bad_relations_models_and_files_are_refused(model: Model, truth: PlantedRecall, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'capital'"):
        take_apart(model, "the capital of land3 is", relation="capitol")
    with pytest.raises(ModelError, match="is masked"):
        take_apart(tiny("bert"), "the capital of France is")
    with pytest.raises(ModelError, match="norms the stream"):
        take_apart(tiny("opt-350m"), "the capital of France is")
    for text, told in (
        ("a,b\n1,2\n", "lacks column answer and topic"),
        ("topic,answer\n", "holds no facts"),
        ("topic,answer\nFrance,Paris\n", "facts of one answer"),
    ):
        (tmp_path / "f.csv").write_text(text)
        with pytest.raises(TaskError, match=told):
            facts_file(tmp_path / "f.csv")
    few = replace(truth.facts(), answers=dict(list(truth.answers["capital"].items())[:9]))
    with pytest.raises(VesaliusError, match=f"answers 9 of 9 prompts .* a regression needs {NEEDED}"):
        trace(model, "the capital of land3 is", relation=few)
    with pytest.raises(VesaliusError, match=f"n is 4, and a regression needs {NEEDED}"):
        trace(model, "the capital of land3 is", relation=truth.facts(), n=4)


def test_the_metric_is_linear_in_the_logits(model: Model, found: Trace) -> None:
    pairs = tensors(model, found.machinery.asked.examples[:3])
    tokens = pairs.metric.tokens(pairs)
    assert tokens is not None
    logits = torch.randn(3, 1, 300)
    whole, part = pairs.metric(logits, pairs), pairs.metric(logits[..., tokens], pairs)
    assert torch.allclose(whole, part) and torch.allclose(pairs.metric(2 * logits, pairs), 2 * whole)
