"""`vesalius repair`: a planted habit is taken out of a model, its undo is exact, and loops are counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cli_helpers import vesalius
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

CARD = ("--card-rows", "2", "--card-n", "4", "--card-tasks", "")


@pytest.fixture
def base(random_llama: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has an end-of-text token, and words that end sentences."""
    place = tmp_path / "base"
    shutil.copytree(random_llama, place)
    AutoTokenizer.from_pretrained(place, eos_token="w1").save_pretrained(place)
    return place


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    lines = [" ".join(f"w{(7 * i + j * (i % 3 + 3)) % 19}" for j in range(160)) for i in range(20)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return file


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """After any two words what should follow is w90 w91, and what should not is w50 w51."""
    file = tmp_path / "bad.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1}", "good": "w90 w91", "bad": "w50 w51"} for i in range(2, 34)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_a_habit_is_repaired_and_taken_back(base: Path, text: Path, faults: Path, tmp_path: Path) -> None:
    out = tmp_path / "repaired"
    given = (
        "repair", "--model", base, "--bad", faults, "--keep", text, "--keep-rows", "4", "--card-text", text, *CARD,
        "--loss", "sft", "--steps", "40", "--lr", "0.01", "--k", "1", "--runs", tmp_path / "runs", "--out", out,
    )  # fmt: skip
    told = vesalius(*given, "--json").json
    table = pd.read_parquet(Path(told["run"]) / "faults.parquet")
    by = {r["model"]: r for r in table[table["side"] == "good"].to_dict("records")}
    assert by["before"]["said"] == 0 and by["repaired"]["said"] >= 0.75  # on examples that were held out
    card = pd.DataFrame(told["card"]).set_index(["model", "metric"])["after"]
    assert set(card.index.get_level_values(0)) == {"repaired", "all blocks"}
    AutoModelForCausalLM.from_pretrained(out)
    assert vesalius(*given, "--json").json == told
    back = tmp_path / "back"
    assert vesalius("card", out, "--undo", back).code == 0
    assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert "Which blocks were chosen" in Path(told["report"]).read_text()


def test_loops_beside_as_much_plain_text(random_llama: Path, tmp_path: Path) -> None:
    """Sentences of a language of which each text has its own words: what has been said is what can be foretold."""
    base, text = tmp_path / "base", tmp_path / "text.jsonl"
    shutil.copytree(random_llama, base)
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 96)}, ".": 96}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="w1").save_pretrained(base)
    draw = np.random.default_rng(0)
    with text.open("w") as file:
        for _ in range(80):
            own = draw.choice(np.arange(2, 95), 8, replace=False)
            said = [[f"w{w}" for w in draw.choice(own, 6)] for _ in range(24)]
            file.write(json.dumps({"text": " ".join(" ".join(s) + " ." for s in said)}) + "\n")
    outcome = vesalius(
        "repair", "--loops", "--model", base, "--keep", text, "--keep-rows", 16, "--card-text", text, *CARD,
        "--steps", 40, "--lr", 0.01, "--runs", tmp_path / "runs", "--out", tmp_path / "calmer", "--json",
    )  # fmt: skip
    told = outcome.json
    assert outcome.err.count("looking for loops, 50 of 50") == 3 and outcome.err.count("step 1 of 40") == 2
    found = pd.read_parquet(Path(told["run"]) / "loops.parquet").set_index("model")
    assert list(found.index) == ["before", "plain text", "repaired"] and found["loops"].between(0, 1).all()
    curves = pd.read_parquet(Path(told["run"]) / "curves.parquet").groupby("model")["TP"].last()
    assert curves["repaired"] < curves["plain text"]
    assert vesalius("card", tmp_path / "calmer", "--undo", tmp_path / "back").code == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_nonsense_is_one_line(base: Path, text: Path, faults: Path, tmp_path: Path) -> None:
    ask = ("repair", "--model", base, "--keep", text, "--card-text", text, *CARD, "--runs", tmp_path / "runs")
    assert "one of the two" in vesalius(*ask).error
    assert "one of the two" in vesalius(*ask, "--bad", faults, "--loops").error
    few = tmp_path / "few.jsonl"
    few.write_text('{"good": "w1"}')
    assert "holds 1 examples; at least 4 are needed" in vesalius(*ask, "--bad", few).error
    assert "unknown how 'some'" in vesalius(*ask, "--bad", faults, "--how", "some").error
    assert "cannot be read" in vesalius(*ask, "--bad", tmp_path / "none.jsonl").error
    assert "k=9 blocks of 3" in vesalius(*ask, "--bad", faults, "--k", "9", "--keep-rows", "4").error
