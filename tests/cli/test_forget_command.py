"""`vesalius forget`: a text is unlearnt, the card says what else went, and probes what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from cli_helpers import vesalius
from transformers import AutoModelForCausalLM

CARD = ("--card-rows", "2", "--card-n", "4", "--card-tasks", "")


def test_a_text_is_forgotten_beside_its_control(random_llama: Path, tmp_path: Path) -> None:
    book, plain, out = tmp_path / "book.txt", tmp_path / "plain.jsonl", tmp_path / "without"
    book.write_text(" ".join(f"w{40 + (7 * i) % 23}" for i in range(400)))
    lines = [" ".join(f"w{(7 * i + 3 * j) % 19}" for j in range(160)) for i in range(8)]
    plain.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    probes = tmp_path / "probes.jsonl"
    probes.write_text(json.dumps({"prompt": "w40 w47", "good": "w54"}))
    given = (
        "forget", "--model", random_llama, "--what", book, "--probes", probes, "--card-text", plain, *CARD,
        "--steps", "4", "--rows", "2", "--reinforce-steps", "4", "--keep", plain, "--keep-rows", "3",
        "--runs", tmp_path / "runs", "--out", out,
    )  # fmt: skip
    told = vesalius(*given, "--json").json
    assert told["change"] == "forget" and 0 < told["changed"] <= 1
    assert any("no name was found" in n for n in told["notes"])
    card = pd.DataFrame(told["card"])
    assert list(dict.fromkeys(card["model"])) == ["forgot", "ascent"]
    found = pd.read_parquet(Path(told["run"]) / "probes.parquet")
    assert found["model"].tolist() == ["before", "ascent", "forgot"]
    AutoModelForCausalLM.from_pretrained(out)
    assert vesalius(*given, "--json").json == told
    assert "What the model was taught" in Path(told["report"]).read_text()


def test_a_skill_is_forgotten_and_audited(random_llama: Path, tmp_path: Path) -> None:
    plain, skill = tmp_path / "plain.jsonl", tmp_path / "skill.jsonl"
    lines = [" ".join(f"w{(7 * i + 3 * j) % 19}" for j in range(160)) for i in range(8)]
    plain.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    rows = [
        {"task": t, "prompt": f"w{k} w{i}", "choices": [" w5", " w6"], "answer": i % 2}
        for k, t in ((3, "even"), (4, "other"))
        for i in range(20, 44)
    ]
    skill.write_text("\n".join(map(json.dumps, rows)))
    given = (
        "forget",
        "--model",
        random_llama,
        "--skill",
        skill,
        "--card-text",
        plain,
        *CARD,
        "--steps",
        "3",
        "--rows",
        "4",
    )
    told = vesalius(*given, "--runs", tmp_path / "runs", "--out", tmp_path / "out", "--json").json
    found = pd.read_parquet(Path(told["run"]) / "matrix.parquet")
    assert [tuple(r) for r in found[["forgot", "asked", "items"]].to_numpy()] == [
        ("even", "even", "trained"), ("even", "even", "held out"), ("even", "other", "held out"),
        ("other", "even", "held out"), ("other", "other", "trained"), ("other", "other", "held out"),
    ]  # fmt: skip
    assert "Is it gone, or only not said?" in Path(told["report"]).read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_nonsense_is_one_line(random_llama: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("w1 w2 w3")
    ask = ("forget", "--model", random_llama, "--card-text", book, *CARD, "--runs", tmp_path / "runs", "--keep", "none")
    assert "one of the two" in vesalius(*ask).error
    assert "one of the two" in vesalius(*ask, "--what", book, "--skill", book).error
    assert "line 1: not JSON" in vesalius(*ask, "--skill", book).error
    assert "cannot be read" in vesalius(*ask, "--what", tmp_path / "none.txt").error
    assert "unknown way of forgetting 'bothe'" in vesalius(*ask, "--what", book, "--how", "bothe").error
    assert "unknown kind of label 'sofd'" in vesalius(*ask, "--what", book, "--labels", "sofd").error
    assert "cannot be read" in vesalius(*ask, "--what", book, "--anchors", tmp_path / "none.json").error
    assert "alpha -1 is no weight" in vesalius(*ask, "--what", book, "--alpha", "-1").error
    assert "shorter than 32 tokens" in vesalius(*ask, "--what", book, "--no-control").error
