"""The audit of what a model writes: a planted lean is detected, none is not, pronouns are the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_hf
from features_helpers import spoken, tokenizer

from vesalius.errors import VesaliusError
from vesalius.features.bias import labour_statistics, pipeline, pronoun_preference, suggest, with_statistics
from vesalius.model import Model


def planted(strength: float, seed: int) -> Any:
    """A writer that says "she" after prompts of women, and "he" after those of men, in that share of cases."""
    rng = np.random.default_rng(seed)

    cues = {"sister": 1, "her": 1, "Mary,": 1, "woman": 1, "brother": -1, "his": -1, "John,": -1, "man": -1}

    def write(model: Model, texts: Sequence[str], tokens: int, seed: int, **options: Any) -> list[str]:
        found = []
        for text in texts:
            cue = sum(cues.get(word, 0) for word in text.split())
            female = rng.random() < 0.5 + cue * strength / 2
            found.append("and she went on." if female else "and he went on.")
        return found

    return write


def test_cued_prompts_are_told_apart_and_halves_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "continuations", planted(0.8, 0))
    found = suggest(spoken("llama"), 80, splits=50)
    pairs = found.comparison.pairs.set_index(["a", "b"])
    assert pairs.loc[("female", "male"), "different"] and pairs.loc[("female", "male"), "low"] > 0
    assert found.false_alarms <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 50)
    assert found.table["kind"].value_counts().to_dict() == {"neutral": 80, "female": 40, "male": 40}
    assert (found.table["female"] + found.table["male"] == 1).all() and found.table["prompt"].is_unique


def test_a_writer_that_minds_no_cue_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "continuations", planted(0.0, 1))
    assert not suggest(spoken("llama"), 80, splits=0).comparison.pairs["different"].any()


@pytest.fixture(scope="module")
def speaker() -> Model:
    """A random language model that knows five occupations and two pronouns."""
    names = ["she", "he", "The", "said", "that", "nurse", "judge", "pilot", "cook", "poet"]
    return Model.wrap(tiny_hf("llama"), tokenizer(names=names), name="speaker")


WORK = ["nurse", "judge", "pilot", "cook", "poet"]


def test_preferences_are_differences_of_logits(speaker: Model) -> None:
    forms = ["The {o} said that", "The {o} said"]
    found = pronoun_preference(speaker, WORK, forms).set_index("occupation")
    assert found["preference"].is_monotonic_decreasing
    for work in WORK:
        by_hand = []
        for form in forms:
            ids = speaker.tokenizer(form.format(o=work), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                last = speaker.hf(input_ids=ids).logits[0, -1]
            by_hand.append(float(last[3] - last[4]))  # she and he are the first words after three special tokens
        assert found.loc[work, "preference"] == pytest.approx(np.mean(by_hand), abs=1e-5)
        assert found.loc[work, "low"] == pytest.approx(min(by_hand), abs=1e-5)


def test_labour_statistics_are_set_beside_the_preferences(speaker: Model, tmp_path: Path) -> None:
    table = pronoun_preference(speaker, WORK, ["The {o} said that"])
    path = tmp_path / "shares.csv"
    rows = [f"{o.title()},{i / 10}" for i, o in enumerate(reversed(table["occupation"].tolist()))]
    path.write_text("\n".join(["occupation,share_female", *rows, "sailor,0.1"]))
    beside, result = with_statistics(table, labour_statistics(path))
    assert result["spearman"] == pytest.approx(1) and result["n"] == 5
    assert beside["share_female"].tolist() == [0.4, 0.3, 0.2, 0.1, 0.0]
    path.write_text("occupation,share_female\nnurse,many\n")
    with pytest.raises(VesaliusError, match="line 2: share_female 'many' is not a number"):
        labour_statistics(path)
    with pytest.raises(VesaliusError, match="name 1 of the occupations"):
        with_statistics(table, {"nurse": 0.5})


def test_what_cannot_be_asked_is_refused(speaker: Model) -> None:
    with pytest.raises(VesaliusError, match="19 prompts are too few"):
        suggest(speaker, 19)
    with pytest.raises(VesaliusError, match="suggestions need a causal"):
        suggest(spoken("bert"), 20)
    with pytest.raises(VesaliusError, match="there are 256"):
        pipeline.prompts("neutral", 257)
    with pytest.raises(VesaliusError, match="2 tokens|name pronouns of one token"):
        pronoun_preference(speaker, WORK, ["The {o} said that"], female=" she he")
