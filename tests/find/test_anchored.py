"""Anchored answers on a model that knows the answer and says A."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny

import vesalius
from vesalius.build.anchored import PlantedAnchor, planted_anchor
from vesalius.errors import ModelError, TaskError, UnknownName, VesaliusError
from vesalius.find.anchored import (
    Choice,
    ValueEdit,
    bias,
    diagnose,
    draw,
    even_look,
    fit_values,
    label_aware,
    letter_logits,
    letter_places,
    prior_of,
    random_values,
    read,
    text_loss,
)
from vesalius.find.anchored.questions import LETTERS
from vesalius.model import Model


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def truth(request: pytest.FixtureRequest) -> PlantedAnchor:
    return planted_anchor(request.param)


@pytest.fixture(scope="module")
def model(truth: PlantedAnchor) -> Model:
    return Model.wrap(truth.hf, truth.tokenizer, name="anchor")


@pytest.fixture(scope="module")
def asked(truth: PlantedAnchor, tmp_path_factory: pytest.TempPathFactory) -> list[Choice]:
    path = tmp_path_factory.mktemp("questions") / "fine.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in truth.rows(48)))
    return read(path)


@pytest.fixture(scope="module")
def text(model: Model) -> torch.Tensor:
    """Plain text: every word but those that end a question."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(8, model.hf.config.vocab_size, (32, 12), generator=g)
    ids[:, 0] = 3  # the opening word
    return ids


def test_the_bias_is_measured(model: Model, asked: list[Choice]) -> None:
    found = bias(letter_logits(model, asked), asked, prior_of(model, asked))
    assert found.chosen == [1.0, 0.0, 0.0, 0.0] and found.variation == 0.75 and found.p < 1e-20
    assert found.accuracy == 0.25 and found.low < 0.25 < found.high and found.anchored == 1.0
    assert found.calibrated == 1.0 and found.calibrated_variation < 0.01  # nothing else is wrong with it


def test_the_terms_add_up_and_the_anchoring_part_has_them(
    model: Model, truth: PlantedAnchor, asked: list[Choice]
) -> None:
    found = diagnose(model, asked)
    assert found.residue < 1e-4
    assert found.scores.top(1, "value").parts == [truth.mlp]
    assert found.top_share > 0.9


def test_the_repair_needs_no_label_and_holds_on_other_questions(
    model: Model, asked: list[Choice], text: torch.Tensor
) -> None:
    dev, test = asked[:24], asked[24:]
    edit = fit_values(model, dev, text, k=1)
    before, loss = letter_logits(model, test), text_loss(model, text)
    with edit.on(model):
        after = letter_logits(model, test)
        assert text_loss(model, text) - loss < 0.01
    assert np.array_equal(letter_logits(model, test), before)  # to the bit
    assert bias(after, test, np.zeros(4)).accuracy == 1.0 and bias(after, test, np.zeros(4)).variation < 0.01
    with random_values(model, edit).on(model):
        assert bias(letter_logits(model, test), test, np.zeros(4)).variation == 0.75


def test_the_edited_model_is_an_ordinary_checkpoint(
    model: Model, asked: list[Choice], text: torch.Tensor, tmp_path: Path
) -> None:
    edit = fit_values(model, asked[:24], text, k=1)
    folder = edit.save(model, tmp_path / "even")
    again = vesalius.open(str(folder))
    with edit.on(model):
        assert letter_logits(again, asked[24:]) == pytest.approx(letter_logits(model, asked[24:]), abs=1e-5)
    assert edit.save(model, folder) == folder  # it is there already, and whole
    other = fit_values(model, asked[:24], text, k=2)
    with pytest.raises(VesaliusError, match="is there already"):
        other.save(model, folder)


def test_with_the_label_in_the_edit_every_question_turns(model: Model, asked: list[Choice]) -> None:
    assert label_aware(model, asked[:16]) == 1.0


def test_letters_are_found_in_padded_prompts(model: Model, asked: list[Choice]) -> None:
    longer = Choice("Which is fine ? ?", asked[0].options, 0)
    places = letter_places(model, [asked[0], longer])
    assert places[0].tolist() == [5, 7, 9, 11] and places[1].tolist() == [5, 7, 9, 11]
    assert (places[:, 1:] - places[:, :-1] == 2).all()


def test_an_even_look_is_even(model: Model, asked: list[Choice]) -> None:
    """No head of this model looks at letters from the end: nothing may change."""
    heads = [p for p in model.parts(("head",)) if p.layer == 2]
    assert even_look(model, asked[:4], heads)[:, 0] == pytest.approx(letter_logits(model, asked[:4])[:, 0], abs=1e-3)


# -- questions


def test_right_options_are_balanced_and_only_one_fits() -> None:
    found = draw(200, seed=1)
    places = np.bincount([q.right for q in found])
    assert places.tolist() == [50, 50, 50, 50] and len({(q.question, q.options[q.right]) for q in found}) == 200
    kinds = {q.options[q.right]: q.about for q in draw(150, "kinds", seed=2)}
    for q in draw(150, "kinds", seed=3):
        assert sum(kinds.get(o) == q.about for o in q.options) <= 1
    assert all(q.right > 0 for q in draw(30, anchored=True))
    assert draw(20, seed=4) == draw(20, seed=4) != draw(20, seed=5)
    q = draw(1, "kinds", choices=3)[0]
    assert q.prompt.splitlines()[1:] == [*(f"{LETTERS[i]}: {o}" for i, o in enumerate(q.options)), "Answer:"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{}", "line 1 is no"),
        ('{"question": "a", "options": ["x"], "answer": "x"}', "line 1 has 1 options"),
        ('{"question": "a", "options": ["x", "y"], "answer": "z"}', "the answer 'z' is none of its options"),
        ("", "holds no questions"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(TaskError, match=told):
        read(tmp_path / "q.jsonl")


def test_bad_requests_are_refused(model: Model, asked: list[Choice], text: torch.Tensor) -> None:
    with pytest.raises(UnknownName, match="did you mean 'kinds'"):
        draw(4, "kind")
    with pytest.raises(TaskError, match="give 1 to"):
        draw(10_000)
    with pytest.raises(TaskError, match="7 choices"):
        draw(4, choices=7)
    with pytest.raises(ModelError, match="is masked"):
        letter_logits(tiny("bert"), asked)
    with pytest.raises(VesaliusError, match="11 neurons"):
        fit_values(model, asked, text, k=11)
    with pytest.raises(VesaliusError, match="questions have 2, 4 options"):
        letter_logits(model, [asked[0], Choice("x", ("a", "b"), 0)])
    assert isinstance(fit_values(model, asked[:8], text, k=2), ValueEdit)
