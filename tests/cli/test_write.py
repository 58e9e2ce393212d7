"""`vesalius write` and `vesalius steer` as a user calls them, on tiny models."""

from __future__ import annotations

import json
import shutil

import pytest
from cli_helpers import vesalius
from transformers import AutoTokenizer

from vesalius.change.gedi import Guide


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    file = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    rows = [
        {"text": f"w{i % 9 + 10 * (i % 2)} w{i % 7 + 10 * (i % 2)} w5", "label": ("w40", "w41")[i % 2]}
        for i in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def test_the_rules_are_listed():
    found = vesalius("write", "--rules", "--json")
    assert found.code == 0 and {"no letter e", "8 syllables"} <= {r["rule"] for r in found.json}


def test_a_run_has_texts_masks_and_reasons_and_is_found_again(random_llama, tmp_path):
    command = ["write", "w7 w8", "--model", random_llama, "--rule", "no letter 3", "--mode", "token", "--n", 2]
    command += ["--tokens", 12, "--temperature", 1, "--out", tmp_path, "--json"]
    found = vesalius(*command)
    assert found.code == 0, found.err
    texts = [t["text"] for t in found.json["texts"]]
    assert len(texts) == 2 and not any("3" in t for t in texts)
    assert vesalius(*command).json["texts"] == found.json["texts"]
    page = (tmp_path / found.json["run"].split("/")[-1] / "report.html").read_text()
    assert "What was barred, and why" in page and "How much was allowed" in page


def test_a_direction_steers_and_strength_nought_changes_nothing(random_llama, tmp_path):
    concept = tmp_path / "numbers.csv"
    concept.write_text("text,label\n" + "".join(f"w{i} w{i + 1},{1 if i < 9 else -1}\n" for i in range(1, 18)))
    command = ["steer", "w7 w8", "--model", random_llama, "--direction", concept, "--tokens", 8, "--out", tmp_path]
    same = vesalius(*command, "--strength", 0, "--json")
    assert same.code == 0, same.err
    assert same.json["texts"][0]["text"] == same.json["texts"][0]["unsteered"]
    much = vesalius(*command, "--strength", 40, "--json").json["texts"][0]
    assert much["text"] != much["unsteered"]


def test_the_terminal_and_the_report_show_a_steered_text_beside_the_unsteered_one(random_llama, tmp_path):
    concept = tmp_path / "numbers.csv"
    concept.write_text("text,label\n" + "".join(f"w{i} w{i + 1},{1 if i < 9 else -1}\n" for i in range(1, 18)))
    command = ["steer", "w7 w8", "--model", random_llama, "--direction", concept, "--strength", 40, "--tokens", 6]
    text = vesalius(*command, "--out", tmp_path, "--json").json["texts"][0]
    shown = vesalius(*command, "--out", tmp_path).out
    assert f"unsteered: w7 w8\u2502{text['unsteered']}" in shown and f"\nsteered: w7 w8\u2502{text['text']}" in shown
    page = next(tmp_path.glob("steer-*/report.html")).read_text()
    assert page.index(">steered<") < page.index(">unsteered<") < page.index(">perplexity unsteered<")
    assert ">went back<" not in page


def test_a_guide_is_trained_and_steers(random_llama, labelled, tmp_path):
    base = shutil.copytree(random_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "w96"
    tokenizer.save_pretrained(base)
    made = vesalius(
        "steer", "--train", labelled, "--guide", tmp_path / "guide", "--model", base, "--steps", 12, "--rows", 2,
        "--lr", 0.01, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert made.code == 0 and "training the guide: step 12/12" in made.err, made.err
    assert made.json["classes"] == ["w40", "w41"] and 0 <= made.json["class_accuracy"] <= 1
    assert Guide.load(str(tmp_path / "guide")).scale == made.json["scale"]
    assert AutoTokenizer.from_pretrained(tmp_path / "guide").get_vocab()
    found = vesalius(
        "steer", "w7 w8", "--model", base, "--toward", "gedi:w41", "--guide", tmp_path / "guide", "--tokens", 6,
        "--out", tmp_path, "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    passes = next(f for f in found.json["facts"] if f[0] == "guide passes")
    assert float(passes[1]) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["write", "a", "--rule", "8 sylables"], "did you mean something like '8 syllables'"),
        (["write"], "give a PROMPT"),
        (["write", "a", "--mode", "letter"], "neither word nor token"),
        (["write", "a", "--transforms", "lowr"], "lower"),
        (["write", "a", "--top-p", "0"], "above 0 up to 1"),
        (["steer", "a"], "give one way to steer"),
        (["steer", "a", "--toward", "gedi:sea"], "give --guide DIR"),
        (["steer", "a", "--toward", "sea", "--guide", "x"], "not of the form gedi:TOPIC"),
        (["steer", "a", "--train", "x.csv"], "leave out prompts"),
        (["steer", "--train", "x.csv"], "give --guide DIR"),
    ],
)
def test_what_cannot_be_is_one_line_and_code_2(arguments, message):
    found = vesalius(*arguments)
    assert found.code == 2 and message in found.err and found.err.count("\n") == 1
