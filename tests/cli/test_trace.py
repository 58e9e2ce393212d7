"""`vesalius trace` on a model whose recall is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import Outcome, vesalius

from vesalius.build.recall import PlantedRecall, planted_recall
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.runs import Run


@pytest.fixture(scope="module")
def known() -> PlantedRecall:
    return planted_recall()


@pytest.fixture(scope="module")
def folder(known: PlantedRecall, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, with `capitals.csv`."""
    folder = tmp_path_factory.mktemp("models") / "recall"
    with quiet_transformers():
        known.hf.save_pretrained(folder)
        known.tokenizer.save_pretrained(folder)
    rows = [f"{topic},{answer}" for topic, answer in known.answers["capital"].items()]
    (folder / "capitals.csv").write_text("\n".join(["topic,answer", *rows]))
    return folder


def command(folder: Path, *more: object) -> Outcome:
    common = ("--model", folder, "--facts", folder / "capitals.csv", "--n", 20, "--patched", 4)
    return vesalius("trace", *more, *common, "--out", folder.parent / "runs")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Outcome:
    return command(folder, "the capital of land3 is", "--json")


def test_the_steps_are_told(whole: Outcome, known: PlantedRecall, folder: Path) -> None:
    found = whole.json
    assert whole.code == 0 and found["fails"] == "none" and found["said"] == "city3" and found["rank"] == 1
    assert found["task_heads"] == [str(known.topic_head)] and found["written_by"] == str(known.answer_mlp)
    assert found["last"]["suppressors"] == [str(known.damper)] and found["last"]["mitigation"]["helps"]
    assert any("not linear" in note for note in found["notes"])
    again = command(folder, "the capital of land3 is")
    assert again.code == 0 and "“city3” is recalled" in again.out and "1 topic brought to the end" in again.out
    assert "raises p(right) on other prompts" in again.out
    assert Run.open(found["run"]).status["attempts"] == 1  # nothing was measured again


def test_the_page_has_every_step(whole: Outcome, known: PlantedRecall) -> None:
    page = Path(whole.json["report"]).read_text()
    for title in (
        "The steps",
        "Who writes the answer",
        "Step 1: heads that bring",
        "Step 2: what MLPs make",
        "Step 4: the last",
    ):
        assert title in page
    assert "Step 3: intercepts as function vectors" in page and str(known.damper) in page


def test_a_wrong_fact_is_told_where_it_fails(folder: Path, known: PlantedRecall) -> None:
    found = command(folder, f"the capital of {known.forgotten} is")
    assert found.code == 0 and "fails at step 3" in found.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("We walked home",), "no topic of 'capitals' stands in"),
        (("the capital of land3 is", "--answer", "city3 city4"), "is 2 tokens"),
        (("the capital of land3 is", "--relation", "capital"), "give one of them"),
        (("the capital of land3 is", "--topic", "land9"), "does not stand in"),
        (("the capital of land3 is", "--seed", "1", "--n", "7"), "n is 7, and a regression needs 20 prompts"),
    ],
)
def test_bad_input_is_one_line(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    common = ("--model", folder, "--facts", folder / "capitals.csv", "--patched", 4, "--out", folder.parent / "runs")
    assert told in vesalius("trace", *common, *arguments).error


def test_few_facts_and_other_models_are_refused(folder: Path, known: PlantedRecall, tmp_path: Path) -> None:
    (tmp_path / "few.csv").write_text("topic,answer\nland1,city1\nland2,city2\nland3,city3\n")
    common = ("--model", folder, "--out", tmp_path)
    few = vesalius("trace", "the capital of land3 is", *common, "--facts", tmp_path / "few.csv")
    assert "answers 3 of 3 prompts" in few.error and "needs 20" in few.error
    assert (
        "lacks column" in vesalius("trace", "the capital of land3 is", *common, "--facts", folder / "config.json").error
    )


def test_facts_are_read_whole_or_refused(folder: Path, tmp_path: Path) -> None:
    good = (folder / "capitals.csv").read_text()
    common = ("trace", "the capital of land3 is", "--model", folder, "--n", 20, "--patched", 4, "--out", tmp_path)
    for name, text, told in (
        ("more.csv", good + "\nland3,city3,city4\n", "cells under 2 columns"),
        ("less.csv", good + "\nland30,\n", "no answer; give both"),
        ("twice.csv", good + "\nland3,city4\n", "'land3' has another answer further up"),
        ("long.csv", good + "\n" + "x" * 200_000, "not CSV (field larger"),
    ):
        (tmp_path / name).write_text(text)
        assert told in vesalius(*common, "--facts", tmp_path / name).error
    (tmp_path / "capitals.csv").write_text("\ufeff" + good)
    assert vesalius(*common, "--facts", tmp_path / "capitals.csv").code == 0
