"""`vesalius direction`, `probe` and `bias` as a user meets them: where the answer is known, and given nonsense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Outcome, assert_same, only_run, vesalius
from features_helpers import Plant
from safetensors.numpy import load_file, save_file

from vesalius.features import Axis
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.runs import Run

QUICK = ("--permutations", "20")


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder in which w0 to w29 lie high and w30 to w59 low on one axis, and such a file."""
    folder = tmp_path_factory.mktemp("plant")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((70, 32)) * 0.4
    x[:30, 3] += 2
    x[30:60, 3] -= 2
    made = Plant({f"w{i}": v for i, v in enumerate(x)})
    with quiet_transformers():
        made.hf.save_pretrained(folder / "model")
        made.words.save_pretrained(folder / "model")
    rows = [{"text": f"w{i}", "label": "high" if i < 30 else "low"} for i in range(1, 60)]
    rows += [{"text": f"w{i}", "rating": float(v)} for i, v in zip(range(60, 70), x[60:, 3], strict=True)]
    (folder / "heights.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def found(plant: Path) -> Outcome:
    return vesalius(
        "direction", plant / "heights.jsonl", "--model", plant / "model", "--score", "w3 w4", "--score", "w40",
        "--save", plant / "axis", "--out", plant / "runs", "--json", *QUICK,
    )  # fmt: skip


def test_a_planted_direction_is_found_scored_and_saved(found: Outcome, plant: Path) -> None:
    told = found.json
    assert told["poles"] == ["high", "low"] and told["quality"]["sign_accuracy"] == 1
    assert told["quality"]["p"] == pytest.approx(1 / 21)
    assert [row["phrase"] for row in told["scored"]] == ["w3 w4", "w40"]
    assert told["scored"][0]["score"] > 0.5 and told["scored"][1]["score"] < -0.5
    by_method = {row["method"]: row for row in told["axes"]}
    assert by_method["mean-difference"]["sign_accuracy"] == 1 and by_method["random"]["sign_accuracy"] < 0.9
    axis = Axis.load(plant / "axis")
    assert abs(axis.vector[3]) > 0.95
    page = Path(told["report"]).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "w3 w4" in page


def test_the_same_request_finds_its_run_and_another_seed_makes_another(found: Outcome, plant: Path) -> None:
    again = vesalius(
        "direction", plant / "heights.jsonl", "--model", plant / "model", "--score", "w3 w4", "--score", "w40",
        "--out", plant / "runs", "--json", *QUICK,
    )  # fmt: skip
    assert again.json["run"] == found.json["run"]
    fresh = vesalius(
        "direction", plant / "heights.jsonl", "--model", plant / "model", "--score", "w3 w4", "--score", "w40",
        "--out", plant / "other", "--json", *QUICK,
    )  # fmt: skip
    assert_same(Run.open(Path(found.json["run"])), Run.open(Path(fresh.json["run"])))


def test_the_terminal_shows_what_json_holds(plant: Path, found: Outcome) -> None:
    shown = vesalius(
        "direction", plant / "heights.jsonl", "--model", plant / "model", "--score", "w3 w4", "--score", "w40",
        "--out", plant / "runs", *QUICK,
    )  # fmt: skip
    assert found.json["lead"] in shown.out and "mean-difference" in shown.out and shown.code == 0


def test_a_language_model_is_steered_by_it(plant: Path, random_llama: Path) -> None:
    common = ("--steer", "w1 w2", "--tokens", "6", "--out", plant / "runs", "--json", *QUICK)
    guarded = vesalius(
        "direction", plant / "heights.jsonl", "--model", plant / "model", "--with", random_llama, "--top-k", "40",
        *common,
    ).json  # fmt: skip
    assert guarded["steering"]["by"] == "guard" and 6 <= guarded["steering"]["candidates"] <= 240
    assert guarded["steered"][0]["score_steered"] >= guarded["steered"][0]["score_unsteered"]
    arguments = ("direction", plant / "heights.jsonl", "--model", random_llama, "--layer", "1", "--push", "8", *common)
    silent, told = vesalius(*arguments).json, vesalius(*arguments, "--show-texts").json
    assert told["steering"]["by"] == "push" and told["run"] == silent["run"]
    row = told["steered"][0]
    assert row["steered"] != row["unsteered"]
    # What a model wrote is shown only where it was asked for, and never in the report, which is passed on.
    assert "steered" not in silent["steered"][0] and row["steered"] not in Path(told["report"]).read_text()


def test_a_saved_axis_scores_again_and_belongs_to_its_model(
    found: Outcome, plant: Path, random_llama: Path, tmp_path: Path
) -> None:
    common = ("--score", "w3 w4", "--out", tmp_path, "--json")
    again = vesalius("direction", plant / "axis.json", "--model", plant / "model", *common).json
    assert again["scored"][0]["score"] == pytest.approx(found.json["scored"][0]["score"], abs=1e-6)
    assert again["quality"]["sign_accuracy"] == found.json["quality"]["sign_accuracy"]
    assert Path(again["report"]).exists()
    other = vesalius("direction", plant / "axis.json", "--model", random_llama, *common).error
    assert "another space" in other and "fingerprint" in other
    asked = vesalius("direction", plant / "axis.json", "--model", plant / "model", "--method", "lda", *common).error
    assert "found already; leave out --method" in asked
    shutil.copy(plant / "axis.json", tmp_path / "half.json")
    assert "no readable axis" in vesalius("direction", tmp_path / "half.json", *common).error
    (tmp_path / "file").write_text("")
    nowhere = vesalius(
        "direction", plant / "axis.json", "--model", plant / "model", *common, "--save", tmp_path / "file" / "axis"
    ).error
    assert "cannot be saved" in nowhere


@pytest.mark.parametrize(
    ("lines", "command", "told"),
    [
        ([f"w{i % 20},{i % 2}" for i in range(60)], "direction", "'w1' stands there twice"),
        ([f"a, {i},1" for i in range(9)], "direction", "mine.csv line 2: 3 cells under 2 columns"),
        (["x" * 200_000], "probe", "mine.csv line 2: not CSV (field larger"),
        ([f"w{i},{int(i < 30)}" for i in range(60)] + ["w1,"], "direction", "mine.csv line 62: neither a label"),
        (["a,1", "b,0"], "direction", "has 1 1 phrases; an axis needs 8 or more"),
        ([f"a{i},{int(i < 8)}" for i in range(60)], "direction", "the smaller side needs 13, a quarter of the larger"),
        (
            [f"w{i},{int(i < 4)}" for i in range(20)],
            "probe",
            "4 examples of '1'; a probe needs 10 or more of each label (there are 16 of '0', 4 of '1')",
        ),
        ([f"w{i},{int(i < 10)}" for i in range(60)], "probe", "add 3 of the latter, or balance (--balance) to draw 10"),
        ([f"w{i},1" for i in range(60)], "probe", "all 60 examples have the label '1'; two are needed"),
        ([f"w{i}," for i in range(20)], "probe", "mine.csv line 2: no 'label'"),
    ],
)
def test_too_few_and_lopsided_examples_are_refused_with_what_is_needed(
    lines: list[str], command: str, told: str, plant: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *lines]))
    given = ("--labels", tmp_path / "mine.csv") if command == "probe" else (tmp_path / "mine.csv",)
    refused = vesalius(command, *given, "--model", plant / "model", "--out", tmp_path)
    assert told in refused.error and refused.code == 2


def test_probes_read_a_planted_label(plant: Path) -> None:
    told = vesalius(
        "probe", "--labels", plant / "labels.csv", "--model", plant / "model", "--out", plant / "runs", "--json"
    )
    assert "no file" in told.error
    lines = [f"w{i},{'up' if i < 30 else 'down'}" for i in range(60)]
    (plant / "labels.csv").write_text("\n".join(["text,label", *lines]))
    told = vesalius(
        "probe",
        "--labels",
        plant / "labels.csv",
        "--model",
        plant / "model",
        "--mdl",
        "--out",
        plant / "runs",
        "--json",
    ).json
    assert told["probes"][0]["part"] == "L0.resid_post" and told["probes"][0]["accuracy"] > 0.95
    assert told["probes"][0]["control"] < 0.75 and told["probes"][0]["compression"] > 1.5
    assert len(Run.open(Path(told["run"])).scores("scores")) == 1
    assert Path(told["report"]).exists()


def test_heads_are_probed_apart(random_llama: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [f"w{rng.integers(20, 90)} w{3 if i % 2 else 4},{i % 2}" for i in range(60)]
    (tmp_path / "ends.csv").write_text("\n".join(["text,label", *rows]))
    told = vesalius(
        "probe", "--labels", tmp_path / "ends.csv", "--model", random_llama, "--site", "head", "--layers", "0,-1",
        "--out", tmp_path, "--json",
    ).json  # fmt: skip
    assert [row["part"] for row in told["probes"]] == [f"L{n}.H{h}" for n in (0, 2) for h in range(4)]
    assert "By head" in Path(told["report"]).read_text()


@pytest.fixture(scope="module")
def audited(plant: Path) -> Outcome:
    """Two corpora, one in which women and men stand with different words, and word sets planted in the encoder."""
    (plant / "apart.jsonl").write_text(
        "\n".join(
            json.dumps({"text": f"{who} likes the {what}"}) for who, what in [("she", "rose"), ("he", "car")] * 60
        )
    )
    (plant / "alike.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{who} likes the {w}"}) for w in ("rose", "car") for who in ("she", "he") * 30)
    )
    sets = {"up": range(10), "down": range(30, 40), "good": range(10, 20), "bad": range(40, 50)}
    lines = [f"  {n}: [{', '.join(f'w{i}' for i in r)}]" for n, r in sets.items()]
    (plant / "words.yaml").write_text(
        "\n".join(["sets:", *lines, "tests:", "  height: {what: up and down, x: up, y: down, a: good, b: bad}"])
    )
    return vesalius(
        "bias", "--model", plant / "model", "--words", plant / "words.yaml", "--corpus", plant / "apart.jsonl",
        "--corpus", f"same={plant / 'alike.jsonl'}", "--percentile", "0", "--out", plant / "runs", "--json",
    )  # fmt: skip


def test_planted_associations_and_corpora_are_told_apart(audited: Outcome) -> None:
    told = audited.json
    words = next(row for row in told["weat"] if row["form"] == "words")
    assert words["test"] == "height" and words["d"] > 1.9 and words["p_holm"] < 0.001
    by_corpus = {row["corpus"]: row for row in told["corpora"]}
    assert by_corpus["apart"]["score"] > 1 > 0.2 > by_corpus["same"]["score"]
    assert by_corpus["apart"]["p"] < 0.05 < by_corpus["same"]["p"]
    assert told["documents_pairs"][0]["difference"] == 0  # as many women as men in both: the words differ, not the lean
    assert any("400" in note for note in told["notes"])
    page = Path(told["report"]).read_text()
    assert "Words of apart" in page and "Texts side by side" in page


def test_a_language_models_suggestions_are_audited(random_llama: Path, tmp_path: Path) -> None:
    told = vesalius("bias", "--model", random_llama, "--suggestions", "20", "--weat", "none", "--out", tmp_path)
    assert "group 'neutral' has 0 values" in told.error  # a model that knows no gendered word suggests none
    only = only_run(tmp_path)
    assert only.state == "failed"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("direction morale", ["concept 'morale'", "'moral'"]),
        ("direction nowhere.csv", ["no file nowhere.csv"]),
        ("direction moral --method pac", ["'pac'", "'pca'"]),
        ("direction moral --layer 3 --reading mean@3", ["--layer", "--reading"]),
        ("direction moral --reading mean", ["mean@12"]),
        ("direction moral --model PLANT --layer 7", ["no block 7"]),
        ("direction moral --model PLANT --push 2", ["--push", "--steer"]),
        ("direction moral --model PLANT --steer hello", ["writes no text", "--with"]),
        ("probe --labels moral --site resid", ["site 'resid'", "'resid_pre'"]),
        ("probe --labels morals", ["concept 'morals'", "'moral'"]),
        ("probe --labels moral --layers a,b", ["--layers a,b"]),
        ("probe --labels moral --pool first", ["'first'"]),
        ("probe --labels moral --model PLANT --folds 1", ["--folds"]),
        ("bias --weat 11", ["association test '11'"]),
        ("bias --weat none", ["nothing to audit"]),
        ("bias --corpus nowhere.txt", ["nowhere.txt"]),
        ("bias --suggestions 4", ["20 or more"]),
        ("bias --statistics shares.csv", ["--pronouns"]),
        ("bias --pronouns --statistics nowhere.csv", ["no file nowhere.csv"]),
        ("bias --window ²", ["--window ²", "infinite"]),
        ("bias --corpus=", ["no corpus was named"]),
        ("bias --window wide", ["--window wide", "infinite"]),
        ("bias --percentile 100", ["--percentile 100"]),
        ("bias --words nowhere.yaml", ["no file nowhere.yaml"]),
        ("bias --model PLANT --pronouns --weat none", ["causal"]),
        ("bias --model PLANT --reading mean@9 --no-profile", ["no block 9"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: str, told: list[str], plant: Path, tmp_path: Path
) -> None:
    given = [str(plant / "model") if w == "PLANT" else w for w in arguments.split()]
    refused = vesalius(*given, "--out", tmp_path).error
    assert all(t in refused for t in told), refused
    assert not any(Run.open(p.parent).done for p in tmp_path.glob("*/request.json"))


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no text" in vesalius("bias", "--corpus", tmp_path / "empty.txt", "--out", tmp_path).error
    (tmp_path / "silent.txt").write_text("A table stands in the room.")
    assert "no female words" in vesalius("bias", "--corpus", tmp_path / "silent.txt", "--out", tmp_path).error


def test_steering_needs_a_number_and_a_prompt(plant: Path, random_llama: Path, tmp_path: Path) -> None:
    common = ("direction", plant / "heights.jsonl", "--model", random_llama, "--layer", "1", "--out", tmp_path, *QUICK)
    assert "push is nan; give a finite number" in vesalius(*common, "--steer", "w1", "--push", "nan").error
    assert "threshold is nan" in vesalius(*common, "--steer", "w1", "--threshold", "nan").error
    assert "an empty prompt has nothing to go on from" in vesalius(*common, "--steer", "", "--push", "2").error


def test_pronouns_that_the_model_does_not_know(random_llama: Path, tmp_path: Path) -> None:
    told = vesalius("bias", "--model", random_llama, "--pronouns", "--weat", "none", "--out", tmp_path).error
    assert "llama does not know ' she' and ' he'" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"offset": None}, "'offset' is None"),
        ({"scale": "x"}, "'scale' is 'x'"),
        ({"quality": {}}, "no 'n'"),
        ({"quality": [1]}, "'quality' is [1]"),
        ({"vector": 3}, "this axis is of width 3"),
        ({"vector": float("nan")}, "vector holds NaN or infinity"),
    ],
)
def test_an_axis_that_was_edited(
    found: Outcome, plant: Path, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copy(plant / f"axis{suffix}", tmp_path / f"axis{suffix}")
    if "vector" in change:
        arrays = load_file(tmp_path / "axis.safetensors")
        made = {k: v[:3] if change["vector"] == 3 else v * change["vector"] for k, v in arrays.items()}
        save_file(made, tmp_path / "axis.safetensors")
    else:
        note = json.loads((tmp_path / "axis.json").read_text())
        (tmp_path / "axis.json").write_text(json.dumps(note | change))
    common = ("--model", plant / "model", "--score", "w3", "--out", tmp_path / "runs")
    assert told in vesalius("direction", tmp_path / "axis.json", *common).error


def test_two_ratings_or_shares_of_one_text(plant: Path, tmp_path: Path) -> None:
    rows = (plant / "heights.jsonl").read_text() + '\n{"text": "w60", "rating": 99}'
    (tmp_path / "mine.jsonl").write_text(rows)
    told = vesalius("direction", tmp_path / "mine.jsonl", "--model", plant / "model", "--out", tmp_path).error
    assert "mine.jsonl line 70: 'w60' has another rating further up" in told
    (tmp_path / "shares.csv").write_text("occupation,share_female\nnurse,0.9\nNurse,0.1\n")
    told = vesalius("bias", "--pronouns", "--statistics", tmp_path / "shares.csv", "--out", tmp_path).error
    assert "shares.csv line 3: 'nurse' has another share further up" in told
