"""`vesalius prune` and `vesalius card`: a smaller model, what it cost, and the way back."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from cli_helpers import vesalius
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = ("--rows", "2", "--card-rows", "2", "--card-n", "4", "--card-tasks", "", "--no-time")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of more than 128 tokens in any vocabulary of words."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [" ".join(f"w{(7 * i + j * (i % 3 + 3)) % 19}" for j in range(160)) for i in range(60)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return file


def pruned(model: Path, text: Path, out: Path, *more: object) -> tuple[object, ...]:
    given = ("prune", "--model", model, "--corpus", text, "--card-text", text, "--runs", out / "runs", *QUICK)
    return (*given, *more)


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_smaller_model_that_opens_without_vesalius_and_its_card(
    random_llama: Path, text: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "small"
    shutil.copytree(random_llama, base)
    given = pruned(base, text, tmp_path, "--ratio", "0.25", "--out", out)
    first = vesalius(*given, "--json")
    told = first.json
    assert "\n   ..." not in first.err  # every line of progress says what is done
    assert (
        told["checkpoint"] == str(out)
        and told["change"] == "prune"
        and told["of_body"] == pytest.approx(0.25, abs=0.02)
    )
    hf = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in hf.parameters()) == told["after"] == told["before"] - told["removed"]
    card = pd.DataFrame(told["card"]).set_index(["model", "metric"])
    assert set(card.index.get_level_values(0)) == {"pruned", "random"}
    assert card.loc[("pruned", "parameters"), "after"] == told["after"]
    again = vesalius(*given, "--json").json
    assert again == told  # the run and the folder are found again
    lone = vesalius(*given[:-2], "--no-control", "--json").json
    assert {r["model"] for r in lone["card"]} == {"pruned"} and "random" not in lone["lead"]
    alone = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", alone, str(out)], check=True, capture_output=True)
    page = Path(told["report"]).read_text()
    assert "What it cost" in page
    assert re.search(rf'<td class="num"[^>]*>\s*{told["after"]:,}\s*</td>', page)  # a number among numbers

    shown = vesalius("card", out)
    assert "prune, made of" in shown.out and "perplexity" in shown.out and "ratio=0.25" in shown.out
    for printed in (shown, vesalius(*given)):
        assert f"{told['after']:,}" in printed.out and "nats a token" in printed.out
    back = tmp_path / "back"
    assert vesalius("card", out, "--undo", back, "--json").json["restored"] == str(back)
    assert sha256(back) == sha256(base)
    measured = vesalius("card", out, "--again", "--card-text", text, *QUICK[2:], "--json").json["card"]
    assert {r["metric"]: r["after"] for r in measured}["perplexity"] == pytest.approx(
        card.loc[("pruned", "perplexity"), "after"], rel=1e-4
    )

    with (base / "model.safetensors").open("r+b") as file:  # another model now stands where it was made of
        file.seek(-4, 2)
        file.write(b"\x00\x00\x80?")
    assert "put the old files back" in vesalius("card", out, "--undo", tmp_path / "no").error
    assert not (tmp_path / "no").exists()


def test_any_finding_drives_it(mover: Path, text: Path, tmp_path: Path) -> None:
    """A head that a finding says does the task stays, and one that does nothing goes."""
    asked = ("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", tmp_path, "--json")
    found = vesalius(*asked, "--n", "8", "--prove-n", "8", "--compare", "none").json["run"]
    words = tmp_path / "words.jsonl"
    source = (mover / "ioi.jsonl").read_text().splitlines()
    line = " ".join(json.loads(x)["clean"] for x in source[:40])
    words.write_text("\n".join(json.dumps({"text": line}) for _ in range(6)))
    told = vesalius(*pruned(mover, words, tmp_path, "--by", found, "--ratio", "0.3"), "--json")
    assert told.code == 0, told.err
    kept = told.json
    assert any("scores no neurons" in n for n in kept["notes"])


def test_a_text_that_changed_under_its_name_is_another_run(random_llama: Path, text: Path, tmp_path: Path) -> None:
    mine = tmp_path / "text.jsonl"
    shutil.copy(text, mine)
    first = vesalius(*pruned(random_llama, mine, tmp_path), "--json").json["run"]
    mine.write_text("\n".join(reversed(text.read_text().splitlines())))
    assert vesalius(*pruned(random_llama, mine, tmp_path), "--json").json["run"] != first


def test_a_model_that_was_taken_away_is_made_again(random_llama: Path, text: Path, tmp_path: Path) -> None:
    first = vesalius(*pruned(random_llama, text, tmp_path), "--json").json
    made = sha256(Path(first["checkpoint"]))
    shutil.rmtree(first["checkpoint"])
    again = vesalius(*pruned(random_llama, text, tmp_path), "--json").json
    assert again["run"] == first["run"] and sha256(Path(again["checkpoint"])) == made


def test_recovery_is_a_run_of_the_trainer(random_llama: Path, text: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_llama, base)
    AutoTokenizer.from_pretrained(base, eos_token="w1").save_pretrained(base)  # the trainer puts it between documents
    outcome = vesalius(
        *pruned(base, text, tmp_path, "--ratio", "0.25", "--recover", text, "--tokens", "1600", "--lr", "0.01"),
        "--json",
    )
    told = outcome.json
    assert "recovering: step" in outcome.err
    card = pd.DataFrame(told["card"]).set_index(["model", "metric"])["after"]
    assert card["recovered", "perplexity"] < card["pruned", "perplexity"]
    assert card["recovered", "parameters"] == card["pruned", "parameters"]  # adapters are merged
    names = [n for n, _ in AutoModelForCausalLM.from_pretrained(told["checkpoint"]).named_parameters()]
    assert not any("lora" in n for n in names)
    lines = [json.loads(x)["text"] for x in text.read_text().splitlines()]
    learnt = [json.loads(x)["text"] for x in (Path(told["run"]) / "recovery.jsonl").read_text().splitlines()]
    assert learnt == [*lines[:2], *lines[4:]]  # two were ranked on, the next two are what the card reads


def test_nonsense_is_one_line_and_leaves_nothing(random_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refusal(*more: object) -> str:
        error = vesalius(*pruned(random_llama, text, tmp_path, "--out", out, *more)).error
        assert not out.exists() or not any(out.iterdir())
        return error

    assert "unknown ranking 'ampp'; did you mean 'amp'" in refusal("--by", "ampp")
    assert "ratio 2 is no share" in refusal("--ratio", "2")
    assert "--heads some is none of" in refusal("--heads", "some")
    assert "unknown corpus 'fodoc'" in refusal("--corpus", "fodoc")
    assert "less than one batch" in refusal("--recover", text, "--tokens", "5")
    out.mkdir()
    (out / "mine").write_text("kept")
    assert "is there already" in vesalius(*pruned(random_llama, text, tmp_path, "--out", out)).error
    assert (out / "mine").read_text() == "kept"
    assert "has no vesalius.json" in vesalius("card", random_llama).error
