"""`vesalius sae` and `vesalius codes` as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Outcome, vesalius
from safetensors.torch import load_file, save_file

from vesalius.cli.codes import lead, notes
from vesalius.cli.sae import _own
from vesalius.features.dictionaries import SAE
from vesalius.parts import Part
from vesalius.scores import Scores

QUICK = ("--width", "48", "--k", "4", "--passes", "2", "--batch", "64", "--lr", "0.01")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "prompts.txt"
    path.write_text("\n".join(" ".join(f"w{i}" for i in rng.integers(1, 97, 12)) for _ in range(60)))
    return path


def corpus_of(text: Path, folder: Path) -> Path:
    """A folder with twelve documents of 200 words each."""
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(text.read_text().split()[i * 40 : i * 40 + 200]))
    return folder


@pytest.fixture(scope="module")
def trained(random_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    out = tmp_path_factory.mktemp("runs")
    return vesalius(
        "sae",
        "train",
        "--at",
        "L1.resid_post",
        "--model",
        random_llama,
        "--prompts",
        text,
        "--out",
        out,
        "--json",
        *QUICK,
    )


def test_training_leaves_an_sae_with_its_quality(trained: Outcome) -> None:
    told = trained.json
    assert told["features"] == 48 and told["place"] == "L1.resid_post"
    assert 0 < told["quality"]["explained"] <= 1 and told["quality"]["l0"] <= 4
    sae = SAE.load(told["run"])
    assert sae.d_in == 32 and sae.metadata["vesalius_fingerprint"] and sae.metadata["vesalius_scale"] > 0
    page = Path(told["report"]).read_text()
    assert "A sparse autoencoder of L1.resid_post" in page and "loss recovered" in page


def test_show_and_use_tell_of_features(trained: Outcome, random_llama: Path, text: Path, tmp_path: Path) -> None:
    folder, line = trained.json["run"], text.read_text().splitlines()
    texts = [part for one in line[:8] for part in ("--text", one)]
    shown = vesalius("sae", "show", folder, "--model", random_llama, *texts, "--out", tmp_path, "--json").json
    one = max(shown["features"], key=lambda f: f["largest"])
    values = [t["value"] for t in one["texts"]]
    assert values == sorted(values, reverse=True) and values[0] == pytest.approx(one["largest"])
    assert len(one["up"]) == 8
    common = ("--model", random_llama, "--prompt", line[0], "--tokens", "4", "--out", tmp_path, "--json")
    same = vesalius("sae", "use", folder, "--feature", one["number"], "--scale", "1", *common).json
    assert same["kl"] == pytest.approx(0, abs=1e-5) and same["texts"][0] == same["texts"][1]
    moved = vesalius("sae", "use", folder, "--feature", one["number"], "--set", "60", *common).json
    assert moved["kl"] > 0.1
    assert {"token", "before", "after"} <= set(moved["next"][0])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("train", "--at", "L1.H2"), "a dictionary reads all of it, such as L1.z"),
        (("train", "--at", "L8.resid_post"), "blocks L0 to L2"),
        (("train", "--at", "L1.resid_post", "--architecture", "gated"), "unknown architecture"),
        (("train", "--at", "L1.resid_post", "--prompts", "TEXT", "--width", "5000"), "too few to train 5,000 features"),
        (
            ("train", "--at", "L1.resid_post", "--prompts", "TEXT", "--width", "20", "--k", "4", "--memory", "1e-5"),
            "over --memory",
        ),
        (("train", "--at", "L1.resid_post", "--prompts", "EMPTY"), "holds no prompts"),
        (("show", "nowhere/at-all"), "there is no SAE in nowhere/at-all"),
        (("show", "FOLDER", "--text", "w1", "--corpus", "foldoc"), "--text and --corpus both say what is read"),
        (
            ("use", "FOLDER", "--prompt", "w1", "--feature", "3", "--set", "nan"),
            "--set nan is nothing a feature can be changed by",
        ),
        (
            ("use", "FOLDER", "--prompt", "w1", "--feature", "3", "--set", "1", "--tokens", "64"),
            "64 tokens after a prompt of 1 are more than llama reads (64)",
        ),
        (("use", "FOLDER", "--prompt", "w1 w2"), "nothing is changed"),
        (("use", "FOLDER", "--prompt", "w1 w2", "--feature", "3"), "a change needs both"),
        (("use", "FOLDER", "--prompt", "w1", "--feature", "3", "--set", "1", "--scale", "0"), "contradict each other"),
        (("use", "FOLDER", "--prompt", "w1 w2", "--feature", "99", "--set", "1"), "no feature 99; it has 0 to 47"),
    ],
)
def test_wrong_requests_are_one_line(
    trained: Outcome, random_llama: Path, text: Path, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    named = {"TEXT": str(text), "FOLDER": trained.json["run"], "EMPTY": str(tmp_path / "empty.txt")}
    given = [named.get(a, a) for a in arguments]
    assert why in vesalius("sae", *given, "--model", random_llama, "--out", tmp_path).error


def test_an_sae_of_another_model_is_refused_unless_forced(trained: Outcome, mover: Path, tmp_path: Path) -> None:
    folder = trained.json["run"]
    assert "another model" in vesalius("sae", "show", folder, "--model", mover, "--out", tmp_path).error


def test_codes_name_heads_and_show_their_prompts(mover: Path, tmp_path: Path) -> None:
    told = vesalius(
        "codes", "--model", mover, "--task", mover / "ioi.jsonl", "--n", "8", "--steps", "60", "--seeds", "2",
        "--out", tmp_path, "--json",
    ).json  # fmt: skip
    assert len(told["scores"]) == 16 and all(0 <= s["score"] <= 1 for s in told["scores"])
    page = Path(told["report"]).read_text()
    assert "The codes, prompt by prompt" in page and "mary" in page
    assert json.loads((Path(told["run"]) / "prompts.json").read_text())["positive"]
    few = vesalius("codes", "--model", mover, "--task", mover / "ioi.jsonl", "--n", "3", "--out", tmp_path)
    assert "3 prompts are too few" in few.error


def test_codes_that_no_head_has_are_told_without_nan() -> None:
    heads = [Part("head", 0, i) for i in range(3)]
    none, plain = (Scores(heads, np.full(3, value)) for value in (0.0, 1.0))
    assert "no head has a code of its own" in notes(none, [], "mine")[0]
    said = lead(none, plain, 8, float("nan"))
    assert "cannot be compared by rank, and puts L0.H0" in said and "nan" not in said
    assert "ranks heads alike by Spearman 0.50, and puts" in lead(plain, plain, 8, 0.5)


def test_codebooks_are_trained_shown_and_forced(random_llama: Path, text: Path, tmp_path: Path) -> None:
    corpus = corpus_of(text, tmp_path / "corpus")
    told = vesalius(
        "codebook", "train", "--at", "L1.MLP", "--model", random_llama, "--corpus", corpus, "--size", "12", "--k", "2",
        "--steps", "4", "--rows", "2", "--length", "16", "--out", tmp_path, "--json",
    ).json  # fmt: skip
    assert set(told["losses"]) == {"model", "codes put in", "with codes", "without, after"}
    folder, common = told["run"], ("--out", tmp_path, "--json")
    shown = vesalius("codebook", "show", folder, "--text", "w3 w4 w5", "--text", "w3 w9", "--regex", "w4", *common).json
    assert shown["used"] and "tells “w4” best" in shown["lead"]
    forced = vesalius(
        "codebook", "steer", folder, "--prompt", "w3 w4", "--code", "L1.MLP:3", "--tokens", "4", *common
    ).json
    assert len(forced["texts"]) == 2 and all(Path(r["report"]).exists() for r in (told, shown, forced))
    for code, why in (
        ("L1.MLP", "names no code"),
        ("L1.MLP:²", "names no code"),
        ("L0.MLP:3", "no codebook at L0.MLP"),
        ("L1.MLP:99", "no code 99"),
    ):
        assert why in vesalius("codebook", "steer", folder, "--prompt", "w3", "--code", code, "--out", tmp_path).error
    two = ("--code", "L1.MLP:3", "--code", "L1.MLP:4", "--out", tmp_path)
    assert (
        "two codes cannot be forced at once at L1.MLP" in vesalius("codebook", "steer", folder, "-p", "w3", *two).error
    )
    assert vesalius("runs", "--out", tmp_path, "--json").json[-1]["run"].startswith("codebook-train")


def test_an_sae_is_shown_on_the_corpus_by_default_and_with_all_tokens_at_most(
    trained: Outcome, random_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = corpus_of(text, tmp_path / "own")
    folder, common = trained.json["run"], ("--model", random_llama, "--feature", "1", "--out", tmp_path, "--json")
    assert vesalius("sae", "show", folder, "--corpus", own, *common).json["features"][0]["number"] == 1
    monkeypatch.setattr("vesalius.cli.sae._own", lambda sae: [str(own)])
    assert vesalius("sae", "show", folder, *common).json["features"][0]["number"] == 1
    many = vesalius("sae", "show", folder, "--text", "w3 w4 w5", "--shown", "500", *common).json
    assert len(many["features"][0]["up"]) == 97


def test_what_an_sae_of_prompts_was_trained_on_is_no_corpus(trained: Outcome) -> None:
    assert _own(SAE.load(trained.json["run"])) == []


def test_a_prompt_of_one_token_shows_what_is_on_there(trained: Outcome, random_llama: Path, tmp_path: Path) -> None:
    common = ("--model", random_llama, "--prompt", "w5", "--tokens", "2", "--out", tmp_path, "--json")
    told = vesalius("sae", "use", trained.json["run"], "--no-error", *common).json
    assert told["active"] and {r["on"] for r in told["active"]} == {"w5"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"k": "x"}, "'k' is 'x', which it cannot be"),
        ({"k": 5}, ""),
        ({"metadata": [1]}, "'metadata' is [1]"),
        ({"weights": float("nan")}, "W_dec holds NaN or infinity"),
    ],
)
def test_an_sae_that_was_edited_is_refused_or_read_anew(
    trained: Outcome, random_llama: Path, tmp_path: Path, change: dict[str, object], why: str
) -> None:
    copy = Path(shutil.copytree(trained.json["run"], tmp_path / "copy"))
    command = ("sae", "show", copy, "--model", random_llama, "--text", "w3 w4 w5", "--out", tmp_path / "runs", "--json")
    first = vesalius(*command).json["run"]
    if "weights" in change:
        tensors = load_file(copy / "sae_weights.safetensors")
        save_file(tensors | {"W_dec": tensors["W_dec"] * change["weights"]}, copy / "sae_weights.safetensors")
    else:
        note = json.loads((copy / "cfg.json").read_text())
        (copy / "cfg.json").write_text(json.dumps(note | change))
    if why:
        assert why in vesalius(*command).error
    else:
        assert vesalius(*command).json["run"] != first


def test_codebooks_on_one_model_are_other_runs_and_edited_ones_are_refused(
    random_llama: Path, text: Path, tmp_path: Path
) -> None:
    corpus = corpus_of(text, tmp_path / "corpus")
    common = ("--model", random_llama, "--corpus", corpus, "--size", "12", "--k", "2", "--steps", "0")
    common = ("codebook", "train", "--at", "L1.MLP", *common, "--rows", "2", "--out", tmp_path, "--json")
    folders = [vesalius(*common, "--length", "16", "--seed", s).json["run"] for s in (0, 1)]
    show = ("--text", "w3 w4 w5", "--out", tmp_path, "--json")
    assert len({vesalius("codebook", "show", folder, *show).json["run"] for folder in folders}) == 2
    assert "longer than llama reads (64)" in vesalius(*common, "--length", "65").error
    assert "lr inf" in vesalius(*common, "--length", "16", "--lr", "inf").error
    note = Path(folders[0]) / "codebooks.json"
    told = json.loads(note.read_text())
    for change, why in (({"size": "x"}, "'size' is 'x'"), ({"places": 3}, "'places' is 3")):
        note.write_text(json.dumps(told | change))
        assert why in vesalius("codebook", "show", folders[0], *show).error
    note.write_text(json.dumps({k: v for k, v in told.items() if k != "k"}))
    assert "has no 'k'" in vesalius("codebook", "show", folders[0], *show).error
