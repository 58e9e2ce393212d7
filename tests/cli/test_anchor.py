"""`vesalius anchor` on a model that knows the answer and says A."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from cli_helpers import Outcome, vesalius

from vesalius.build.anchored import PlantedAnchor, planted_anchor
from vesalius.model.sources.quiet import quiet_transformers


@pytest.fixture(scope="module")
def known() -> PlantedAnchor:
    return planted_anchor()


@pytest.fixture(scope="module")
def folder(known: PlantedAnchor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, with `fine.jsonl` (questions) and `text.jsonl`."""
    folder = tmp_path_factory.mktemp("models") / "anchor"
    with quiet_transformers():
        known.hf.save_pretrained(folder)
        known.tokenizer.save_pretrained(folder)
    (folder / "fine.jsonl").write_text("\n".join(json.dumps(r) for r in known.rows(40)))
    rng = random.Random(0)
    words = [w for w in known.tokenizer.get_vocab() if w.startswith(("fine", "poor"))]
    texts = [" ".join(["Which", *rng.choices(words, k=24)]) for _ in range(20)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return folder


def command(folder: Path, *more: object) -> Outcome:
    common = (
        "--model",
        folder,
        "--questions",
        folder / "fine.jsonl",
        "--corpus",
        folder / "text.jsonl",
        "--length",
        16,
    )
    return vesalius("anchor", *common, "--dev", 16, "--n", 24, "--neurons", 1, "--out", folder.parent / "runs", *more)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Outcome:
    return command(folder, "--json", "--save", folder.parent / "even")


def test_the_anchor_is_found_and_lifted(whole: Outcome, known: PlantedAnchor) -> None:
    found = whole.json
    assert whole.code == 0 and found["bias"]["chosen"][0] == 1.0 and found["bias"]["variation"] == 0.75
    assert next(iter(found["writers"])) == str(known.mlp) and found["residue"] < 1e-4
    rows = {r["condition"]: r for r in found["repairs"]}
    assert rows["value vectors"]["accuracy"] == 1.0 and rows["value vectors"]["text"] < 0.01
    assert rows["random neurons 1"]["variation"] == 0.75 and rows["prior calibration"]["accuracy"] == 1.0
    assert found["upper"] == 1.0
    page = Path(found["report"]).read_text()
    assert all(title in page for title in ("What is chosen", "Who writes A", "Repairs, on other questions"))


def test_the_same_command_finds_its_model_again(whole: Outcome, folder: Path) -> None:
    assert command(folder, "--json", "--save", folder.parent / "even").json == whole.json


def test_the_saved_model_answers_evenly(whole: Outcome, folder: Path) -> None:
    again = command(
        Path(whole.json["checkpoint"]), "--questions", folder / "fine.jsonl", "--corpus", folder / "text.jsonl"
    )
    assert again.code == 0 and "is right in 100%" in again.out
    refused = command(folder, "--save", folder)
    assert "is there already" in refused.error


def test_the_same_command_finds_its_run_again(whole: Outcome, folder: Path) -> None:
    again = command(folder)
    assert again.code == 0 and whole.json["lead"] in again.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--neurons", 11), "11 neurons cannot be edited"),
        (("--dev", 40), "has 40 questions, and --dev 40 leaves none"),
        (("--dev", 3), "3 development questions are too few"),
        (("--length", 30), "and 16 are needed"),
        (("--length", 60), "texts of 60 tokens are longer than anchor reads (32)"),
    ],
)
def test_bad_input_is_one_line(folder: Path, arguments: tuple[object, ...], told: str) -> None:
    assert told in command(folder, *arguments).error


def test_bad_questions_are_one_line(folder: Path, tmp_path: Path) -> None:
    common = ("--model", folder, "--out", tmp_path)
    assert "did you mean 'kinds'" in vesalius("anchor", *common, "--source", "kind").error
    assert "7 choices" in vesalius("anchor", *common, "--choices", 7).error
    assert "'all' has" in vesalius("anchor", *common, "--n", 9999).error
    assert "cannot be read" in vesalius("anchor", *common, "--questions", tmp_path / "none.jsonl").error


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"options": "abcd"}, 'line 1 is no {"question", "options", "answer"}'),
        ({"options": ["fine1", None, "poor1", "poor2"]}, 'line 1 is no {"question", "options", "answer"}'),
        ({"options": ["fine1", "fine1", "poor1", "poor2"]}, "line 1 offers an option twice"),
        ({"question": "\ud800"}, 'line 1 is no {"question", "options", "answer"}'),
        ({"question": "Which " * 900}, "reads at most"),
    ],
)
def test_questions_that_cannot_be_asked(folder: Path, tmp_path: Path, change: dict[str, object], told: str) -> None:
    rows = [json.loads(line) | change for line in (folder / "fine.jsonl").read_text().splitlines()]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert told in command(folder, "--questions", tmp_path / "mine.jsonl").error
