"""What all commands that change a model refuse: one line, exit code 2, nothing at the place asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import Outcome, vesalius
from families import tiny_hf
from transformers import AutoTokenizer

from vesalius.model.sources.quiet import quiet_transformers

CARD = ("--card-rows", "2", "--card-n", "4", "--card-tasks", "")
Changing = Callable[..., Outcome]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of more than 128 tokens in the random Llama's vocabulary of words."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [" ".join(f"w{(7 * i + j * (i % 3 + 3)) % 19 + 3}" for j in range(160)) for i in range(60)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return file


@pytest.fixture(scope="module")
def base(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has an end-of-text token."""
    place = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(random_llama, place)
    AutoTokenizer.from_pretrained(place, eos_token="w1").save_pretrained(place)
    return place


@pytest.fixture
def changing(base: Path, text: Path, tmp_path: Path) -> Changing:
    """Any of the commands, as small as it goes."""
    faults, skill, book = tmp_path / "faults.jsonl", tmp_path / "skill.jsonl", tmp_path / "book.txt"
    rows = [{"prompt": f"w{i} w{i + 1}", "good": "w90 w91", "bad": "w50 w51"} for i in range(2, 14)]
    faults.write_text("\n".join(map(json.dumps, rows)))
    items = [{"task": "ab"[i % 2], "prompt": f"w{i}", "choices": [" w5", " w6"], "answer": i // 2 % 2}
             for i in range(24)]  # fmt: skip
    skill.write_text("\n".join(map(json.dumps, items)))
    book.write_text(" ".join(f"w{5 * j % 31 + 3}" for j in range(900)))
    few = ("--steps", 1, "--rows", 2)
    kept = ("--keep", text, "--keep-rows", 4)
    given = {
        "prune": ("prune", "--corpus", text, "--rows", 2, "--ratio", 0.3, "--no-time", "--no-control"),
        "sparsify": ("sparsify", "--on", text, "--texts", 8, *few, "--no-control"),
        "quantize": ("quantize", "--corpus", text, "--rows", 2, "--no-time"),
        "distil": ("distil", "--corpus", text, "--row-length", 16, "--no-time", *few),
        "repair": ("repair", "--bad", faults, *kept, *few, "--k", 1),
        "forget": ("forget", "--what", book, "--reinforce-steps", 1, "--no-control", *kept, *few),
        "skill": ("forget", "--skill", skill, "--rounds", 1, *few),
    }

    def run(command: str, *more: object) -> Outcome:
        model = (
            ("--teacher" if command == "distil" else "--model", base) if not {"--model", "--teacher"} & {*more} else ()
        )
        asked = (*given[command], *model, "--card-text", text, *CARD, "--runs", tmp_path / "runs", *more)
        return vesalius(*asked)

    return run


@pytest.mark.parametrize("command", ["repair", "forget", "skill", "sparsify"])
def test_a_training_that_diverges_in_its_last_step_leaves_no_model(
    changing: Changing, command: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "lower the learning rate" in changing(command, "--lr", "1e39", "--out", out).error
    assert not out.exists() and not list((tmp_path / "runs").glob("*/model"))


def test_a_model_that_foretells_no_numbers_is_not_kept(changing: Changing, tmp_path: Path) -> None:
    out = tmp_path / "out"  # weights of 1e30 are numbers, what they foretell is none
    assert "gives plain text no probability that is a number" in changing("repair", "--lr", "1e30", "--out", out).error
    assert not out.exists()


def test_places_where_nothing_can_be_written(
    changing: Changing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "empty")
    for out, words in (
        (tmp_path / "file" / "out", f"{tmp_path / 'file'} is no folder"),
        (tmp_path / "nowhere", "is a link"),
        (tmp_path / "nowhere" / "out", f"{tmp_path / 'nowhere'} is no folder"),
        (tmp_path / "linked", "is a link"),
    ):
        assert words in changing("prune", "--out", out).error
    monkeypatch.chdir(tmp_path / "empty")
    for out in ("", "."):
        assert "the folder you are in" in changing("prune", "--out", out).error
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the superuser may write anywhere
        assert f"{tmp_path} may not be written" in changing("prune", "--out", tmp_path / "mine" / "out").error
    assert not list((tmp_path / "runs").glob("*/scores.parquet"))  # refused before anything was computed
    assert not any((tmp_path / "empty").iterdir()) and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        ("sparsify", "--rank=99999999999999999999", "1024"),
        ("sparsify", "--rows=99999999999999999999", "1024"),
        ("distil", "--rows=9999999", "1024"),
        ("repair", "--steps=99999999999999999999", "1000000"),
        ("forget", "--rows=9999999", "1024"),
        ("distil", "--student=", "no student is named"),
        ("distil", "--student=\u00b2-layers", "unknown recipe"),
    ],
)
def test_numbers_and_names_that_mean_nothing(changing: Changing, command: str, option: str, words: str) -> None:
    assert words in changing(command, option).error


def test_a_class_that_holds_neither_fewer_heads_nor_fewer_neurons(
    changing: Changing, base: Path, tmp_path: Path
) -> None:
    place = tmp_path / "bloom"
    with quiet_transformers():
        tiny_hf("bloom").save_pretrained(place)
        AutoTokenizer.from_pretrained(base).save_pretrained(place)
    assert "neither can be taken out" in changing("prune", "--model", place).error


def test_a_merge_with_more_tokens_or_with_a_skill_taken_away(base: Path, text: Path, tmp_path: Path) -> None:
    """A fine-tuned model with more tokens cannot be on the card, and weights that sum to 0 have no average beside."""
    wide, tuned = tmp_path / "wide", tmp_path / "tuned"
    with quiet_transformers():
        hf = tiny_hf("llama")
        with torch.no_grad():
            hf.model.norm.weight.add_(0.1)
        hf.save_pretrained(tuned)
        hf.resize_token_embeddings(100)
        hf.save_pretrained(wide)
        for place in (wide, tuned):
            AutoTokenizer.from_pretrained(base).save_pretrained(place)
    asked = ("merge", base, wide, "--card-text", text, *CARD, "--runs", tmp_path / "runs", "--json")
    told = vesalius(*asked).json
    assert {r["model"] for r in told["card"]} == {"merged", "average"}
    assert "wide is not on the card: it has 100 tokens and base 97" in told["notes"]
    assert any("tensors stay the base's" in n for n in told["notes"])
    away = vesalius(*asked[:3], tuned, *asked[3:], "--method", "task", "--weights", "1,-1").json
    assert {r["model"] for r in away["card"]} == {"merged", "tuned"}


def test_a_rounded_model_is_changed_no_further(changing: Changing, text: Path, tmp_path: Path) -> None:
    rounded = tmp_path / "rounded"
    assert changing("quantize", "--out", rounded).code == 0
    for command in ("prune", "sparsify", "quantize", "repair", "forget", "distil"):
        name = "--teacher" if command == "distil" else "--model"
        assert "rounded is in whole numbers" in changing(command, name, rounded).error
    assert vesalius("card", rounded, "--again", "--card-text", text, *CARD, "--no-time").code == 0


def test_a_finding_on_another_model_is_refused_before_anything_is_done(
    changing: Changing, mover: Path, tmp_path: Path
) -> None:
    asked = ("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", tmp_path / "found", "--json")
    found = vesalius(*asked, "--n", "8", "--prove-n", "8", "--compare", "none").json["run"]
    assert "a finding about mover, and base is another one" in changing("prune", "--by", found).error
    assert not (tmp_path / "runs").exists()


def test_the_way_back_is_found_from_another_folder(
    base: Path, changing: Changing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert changing("prune", "--model", "./mine", "--out", tmp_path / "out").code == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert vesalius("card", tmp_path / "out", "--undo", tmp_path / "back").code == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    config = tmp_path / "mine" / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    assert "put the old one back" in vesalius("card", tmp_path / "out", "--undo", tmp_path / "no").error
    assert not (tmp_path / "no").exists()


def test_an_edit_that_was_tampered_with_is_not_taken_back(changing: Changing, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert changing("repair", "--out", out).code == 0
    note, no = out / "edit" / "edit.json", tmp_path / "no"
    whole = json.loads(note.read_text())
    half = whole | {"changes": whole["changes"][:-1]}
    (out / "manifest.json").unlink()
    for story, words in (
        (half, "does not lead to the weights it was made on"),
        (whole | {"changes": [{"name": "nothing"}]}, "edit.json was changed by hand"),
        ({k: v for k, v in whole.items() if k != "result"}, "edit.json was changed by hand"),
    ):
        note.write_text(json.dumps(story))
        assert words in vesalius("card", out, "--undo", no).error
        assert not no.exists()
    note.write_text(json.dumps(whole))
    assert vesalius("card", out, "--undo", tmp_path / "back").code == 0


def test_a_changed_model_that_was_edited_by_hand(changing: Changing, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert changing("repair", "--out", out).code == 0
    config, story = out / "config.json", out / "vesalius.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    assert "config.json was changed after it was saved" in vesalius("card", out, "--undo", tmp_path / "no").error
    told = json.loads(story.read_text())
    for wrong in ({"of": "base"}, {"card": "none"}, {"card": [1]}, {"request": [1]}):
        story.write_text(json.dumps(told | wrong))
        assert "vesalius.json was changed by hand" in vesalius("card", out).error
    story.write_text(json.dumps(told | {"of": None}))
    assert "restored" not in vesalius("card", out).out


def test_examples_of_too_many_tokens_or_none(changing: Changing, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": "w3", "good": "w4", "bad": "w5 " * (1000 if i == 1 else 1)} for i in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    words = "an example of 1001 tokens ('w3 ...') is longer than base reads (64)"
    assert words in changing("repair", "--bad", file).error
    file.write_text("\n".join(json.dumps({"prompt": "w4 " * 1000, "good": "w5"}) for _ in range(12)))
    for command, option in (("sparsify", "--on"), ("forget", "--probes")):
        assert "longer than base reads (64)" in changing(command, option, file).error
    file.write_text("\n".join(json.dumps({"prompt": " ", "good": " ", "bad": " "}) for _ in range(12)))
    for command, option in (("repair", "--bad"), ("sparsify", "--on"), ("forget", "--probes")):
        assert "leaves no token to foretell" in changing(command, option, file).error


def test_a_prompt_that_is_no_text(base: Path, tmp_path: Path) -> None:
    for prompt in ("caf\udce9", "\ud800"):  # what a terminal that is not UTF-8 hands on, and half a character
        error = vesalius("write", prompt, "--model", base, "--out", tmp_path / "runs").error
        assert "is not UTF-8 text, or holds half a character" in error


def test_a_guide_that_diverges_in_its_last_step_is_not_delivered(base: Path, tmp_path: Path) -> None:
    file, guide = tmp_path / "texts.csv", tmp_path / "guide"
    file.write_text("text,label\n" + "".join(f"w{i % 40 + 5} w9 w8,{('w5', 'w6')[i % 2]}\n" for i in range(40)))
    asked = ("steer", "--train", file, "--guide", guide, "--model", base, "--rows", 2, "--out", tmp_path / "runs")
    assert "NaN or infinite" in vesalius(*asked, "--steps", 1, "--lr", "1e39").error
    assert not guide.exists()
    assert vesalius(*asked, "--steps", 2).code == 0 and guide.is_dir()
