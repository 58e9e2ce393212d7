"""`vesalius sparsify`: exact zeros in a plain checkpoint, what it learnt, and the control beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from cli_helpers import vesalius
from transformers import AutoModelForCausalLM

from vesalius.change.sparse import trained_numbers, zeros_of
from vesalius.runs import Run

QUICK = ("--card-rows", "2", "--card-n", "4", "--card-tasks", "", "--rows", "8", "--rank", "2", "--lr", "0.01")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of more than 128 tokens that count in steps."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [" ".join(f"w{1 + (7 * i + j * (i % 3 + 3)) % 19}" for j in range(160)) for i in range(60)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return file


def test_a_sparse_model_of_text(random_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    given = ("sparsify", "--model", random_llama, "--sparsity", "0.75", "--on", text, "--card-text", text, *QUICK,
             "--texts", "16", "--steps", "20", "--runs", tmp_path / "runs", "--out", out, "--json")  # fmt: skip
    told = vesalius(*given).json
    assert told["checkpoint"] == str(out) and told["change"] == "sparsify"
    run = Run.open(Path(told["run"]))
    maps, held = run.table("maps"), run.table("held_out").set_index("model")["perplexity"]
    hf = AutoModelForCausalLM.from_pretrained(out)
    modules = dict(hf.named_modules())
    assert len(maps) == 7 * 3
    for _, row in maps.iterrows():
        weight = modules[row["name"]].weight
        assert int((weight == 0).sum()) == row["zeros"] == zeros_of(0.75, weight.numel())
        assert row["trained"] == trained_numbers(*weight.shape, 2)
    assert told["zeros"] == maps["zeros"].sum() and told["trained"] == maps["trained"].sum()
    assert held["pst"] < held["before"]  # a random model has much to learn
    card = pd.DataFrame(told["card"]).set_index(["model", "metric"])["after"]
    assert set(card.index.get_level_values(0)) == {"pst", "magnitude"}
    assert card["pst", "not zero"] == sum(int(torch.count_nonzero(p)) for p in hf.parameters())
    assert card["pst", "bytes"] == card["magnitude", "bytes"] == 4 * sum(p.numel() for p in hf.parameters())
    story = json.loads((out / "vesalius.json").read_text())
    assert story["change"] == "sparsify" and story["request"]["plan"]["sparsity"] == 0.75
    assert "files and times stay what they were" in Path(told["report"]).read_text()
    assert vesalius(*given).json == told  # found again


def test_prompts_and_answers_are_learnt(random_llama: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "ask.jsonl"
    pairs = [{"prompt": f"w{i} w{j}", "good": f" w{50 + i}"} for i in range(1, 5) for j in range(60, 70)]
    file.write_text("\n".join(map(json.dumps, pairs)))
    told = vesalius(
        "sparsify", "--model", random_llama, "--how", "movement", "--on", file, "--card-text", text, *QUICK, "--steps",
        "40", "--no-control", "--runs", tmp_path, "--json",
    ).json  # fmt: skip
    held = Run.open(Path(told["run"])).table("held_out").set_index("model")
    assert held.index.tolist() == ["before", "movement"] and held["held_out"].tolist() == [10, 10]
    assert held.loc["movement", "log_p"] > held.loc["before", "log_p"] + 0.5


def test_nonsense_is_one_line_and_leaves_nothing(random_llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refusal(*more: object) -> str:
        given = ("sparsify", "--model", random_llama, "--on", text, "--card-text", text, *QUICK, "--runs", tmp_path)
        error = vesalius(*given, "--out", out, *more).error
        assert not out.exists()
        return error

    assert "sparsity 1 is no share" in refusal("--sparsity", "1")
    assert "did you mean 'movement'" in refusal("--how", "movment")
    assert "unknown corpus 'fodoc'" in refusal("--on", "fodoc")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "a", "bad": "b"}\n')
    assert "1 of 1 examples have no good" in refusal("--on", bare)
    bare.write_text('{"prompt": "a", "good": "b"}\n')
    assert "holds 1 examples; at least 4" in refusal("--on", bare)
