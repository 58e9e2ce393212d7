"""Finding, knocking out and training parts, on a model whose mechanism was built in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import vesalius
from vesalius.build.planted import Planted, planted
from vesalius.errors import TaskError, VesaliusError
from vesalius.features.tuning import Answers, Plan, compare, key_parts, knock_out, others, split, text_loss
from vesalius.model import Model, Pairs


@pytest.fixture(scope="module")
def truth() -> Planted:
    return planted("name-mover")


@pytest.fixture(scope="module")
def model(truth: Planted, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return vesalius.open(str(truth.save(tmp_path_factory.mktemp("mover"), 64)))


@pytest.fixture(scope="module")
def pairs(model: Model) -> Pairs:
    return vesalius.task(Path(model.spec) / "ioi.jsonl").pairs(model)


def test_the_mover_is_found_and_nothing_is_answered_without_it(truth: Planted, model: Model, pairs: Pairs) -> None:
    prompts = split(pairs)
    found = key_parts(model, prompts.train, share=0.01, mlps=0)
    assert [truth.roles[p] for p in found.heads] == ["mover"]
    words = pairs.clean[:16]
    table = knock_out(model, found.heads, prompts.test, words, {"train": prompts.train}, draws=6)
    accuracy = table.groupby("without")["accuracy"].agg(list)
    assert accuracy["nothing"] == [1.0] and accuracy["found"][0] < 0.5
    idle = [a for a, h in zip(accuracy["random"], table["heads"][2:], strict=True) if parse(h) not in truth.roles]
    assert idle and min(idle) == 1.0  # heads that play no role
    assert table["train"].iloc[1] < 0.5


def parse(text: str) -> object:
    from vesalius.parts import parse_part

    return parse_part(text)


def test_questions_are_held_out_whole(pairs: Pairs) -> None:
    asked = {"who": torch.arange(pairs.n_rows) % 3 + int(pairs.mask.long().argmax(1).max())}
    named = split(replace(pairs, positions=asked))
    key = [tuple(int(p.clean[i, p.positions["who"][i]]) for i in [j]) for p in (named.train,) for j in range(p.n_rows)]
    held = {int(named.test.clean[j, named.test.positions["who"][j]]) for j in range(named.test.n_rows)}
    assert held and not held & {k[0] for k in key}
    plain = split(pairs)
    rows = [{tuple(r) for r in p.clean.tolist()} for p in (plain.train, plain.test)]
    assert not rows[0] & rows[1] and len(rows[1]) == pytest.approx(0.25 * plain.asked, abs=1)


def test_answers_are_prompts_with_their_answer_and_one_target(pairs: Pairs) -> None:
    source = Answers(pairs, 8, 0, 100, 0)
    batch = source.batch(3)
    assert batch.mask is not None and batch.mask.sum(1).tolist() == [1] * 8
    known = {(*pairs.clean[i][pairs.mask[i].bool()].tolist(), pairs.answers[i][0]) for i in range(pairs.n_examples)}
    for ids, segments, mask in zip(batch.ids, batch.segments, batch.mask, strict=True):
        real = ids[segments >= 0]
        assert tuple(real.tolist()) in known and mask[segments >= 0][-1] and not mask[segments < 0].any()
    assert np.array_equal(source.batch(3).ids, batch.ids) and not np.array_equal(source.batch(4).ids, batch.ids)


def test_only_the_found_parts_learn_and_the_model_is_put_back(model: Model, pairs: Pairs, tmp_path: Path) -> None:
    """Answers are exchanged, so that there is something to learn."""
    turned = split(replace(pairs, answers=pairs.wrong, wrong=pairs.answers))
    before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
    found = key_parts(model, split(pairs).train, share=0.01, mlps=1)
    parts = [*found.heads, *found.mlps]
    plan = Plan(steps=6, rows=8, lr=1e-4)
    tuned, log = compare(model, parts, turned, pairs.clean[:4], plan, save=tmp_path / "out")
    assert tuned["tuned"].tolist() == ["before", "found", "random", "full"]
    trained = tuned.set_index("tuned")["trained"]
    assert trained["full"] == model.n_parameters and 0 < trained["found"] < 0.3 * trained["full"]
    first, last = (log[(log["tuned"] == "full") & (log["step"] == s)]["loss"].item() for s in (0, 5))
    assert last < first
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in model.hf.named_parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    a = model.anatomy
    head = found.heads[0]
    changed = {n for n, p in before.items() if not torch.equal(again[n], p)}
    assert changed and all(f".{head.layer}." in n or any(f".{m.layer}." in n for m in found.mlps) for n in changed)
    twin = vesalius.open(str(tmp_path / "out"))
    now, was = twin.anatomy.head_out(twin.anatomy.block(head.layer or 0)), a.head_out(a.block(head.layer or 0))
    for h in range(a.n_heads):
        assert torch.equal(now[h], was[h]) == (h != head.index)
    assert text_loss(twin, pairs.clean[:4]) == pytest.approx(tuned["text_loss"][1], abs=1e-5)


def test_text_loss_is_transformers_own(model: Model, pairs: Pairs) -> None:
    ids = pairs.clean[:3]
    with torch.no_grad():
        want = float(model.hf(ids, labels=ids).loss)
    assert text_loss(model, ids) == pytest.approx(want, abs=1e-5)
    assert np.isnan(text_loss(model, None))


def test_what_cannot_be_is_refused(model: Model, pairs: Pairs) -> None:
    wrong = replace(pairs, answers=pairs.wrong, wrong=pairs.answers)
    with pytest.raises(VesaliusError, match="answers 0 of 64 prompts; parts are found on prompts that it"):
        key_parts(model, wrong)
    with pytest.raises(VesaliusError, match="give a share above 0"):
        key_parts(model, pairs, share=0)
    with pytest.raises(TaskError, match="3 different questions, too few"):
        split(pairs.take([0, 1, 2]))
    with pytest.raises(VesaliusError, match="give numbers above 0"):
        Plan(lr=0.0)
    parts = others(model, model.parts(("head",))[:2], np.random.default_rng(0))
    assert len(parts) == 2 and not set(parts) & set(model.parts(("head",))[:2])
