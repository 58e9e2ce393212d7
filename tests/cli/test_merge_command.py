"""`vesalius merge`: two models of one base become one, beside their average and each of them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from cli_helpers import vesalius
from families import some_ids, tiny_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

from vesalius.model.sources.quiet import quiet_transformers

QUICK = ("--card-rows", "2", "--card-n", "4", "--card-tasks", "")


@pytest.fixture
def three(random_llama: Path, tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """The base, two models near it, and text."""
    made = []
    for way in (1, 2):
        hf = tiny_hf("llama")
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(way)))
        hf.tie_weights()
        place = tmp_path / f"tuned{way}"
        with quiet_transformers():
            hf.save_pretrained(place)
            AutoTokenizer.from_pretrained(random_llama).save_pretrained(place)
        made.append(place)
    file = tmp_path / "text.jsonl"
    lines = [" ".join(f"w{(7 * i + 3 * j) % 19}" for j in range(160)) for i in range(8)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return random_llama, made[0], made[1], file


def test_a_merged_model_and_its_card(three: tuple[Path, Path, Path, Path], tmp_path: Path) -> None:
    base, a, b, text = three
    out = tmp_path / "both"
    given = (
        "merge",
        base,
        a,
        b,
        "--drop",
        "0.5",
        "--card-text",
        text,
        "--runs",
        tmp_path / "runs",
        "--out",
        out,
        *QUICK,
    )
    told = vesalius(*given, "--json").json
    card = pd.DataFrame(told["card"])
    assert list(dict.fromkeys(card["model"])) == ["merged", "average", "tuned1", "tuned2"]
    assert told["tensors"] > 0 and not told["kept"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(some_ids()).logits).all()
    assert [x["name"] for x in json.loads((out / "vesalius.json").read_text())["with"]] == ["tuned1", "tuned2"]
    assert vesalius(*given, "--json").json == told
    assert not list((Path(told["run"])).glob("*.part"))
    page = Path(told["report"]).read_text()
    assert "How far each model went from the base" in page
    back = tmp_path / "back"
    vesalius("card", out, "--undo", back)
    assert (back / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_nonsense_is_one_line(three: tuple[Path, Path, Path, Path], tmp_path: Path) -> None:
    base, a, b, text = three
    ask = ("merge", base, a, b, "--card-text", text, "--runs", tmp_path / "runs", *QUICK)
    assert "unknown way of merging 'dares'" in vesalius(*ask, "--method", "dares").error
    assert "drop 1 is no share" in vesalius(*ask, "--drop", "1").error
    assert "--weights 1,x are not numbers" in vesalius(*ask, "--weights", "1,x").error
    assert "3 weights for 2 models" in vesalius(*ask, "--weights", "1,1,1").error
    assert "there is no" in vesalius("merge", base, tmp_path / "nowhere", "--runs", tmp_path / "runs").error
