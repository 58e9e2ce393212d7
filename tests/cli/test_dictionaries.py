"""`vesalius sae` and `vesalius codes` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Outcome, vesalius

from vesalius.features.dictionaries import SAE

QUICK = ("--width", "48", "--k", "4", "--passes", "2", "--batch", "64", "--lr", "0.01")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "prompts.txt"
    path.write_text("\n".join(" ".join(f"w{i}" for i in rng.integers(1, 97, 12)) for _ in range(60)))
    return path


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
    assert "A sparse autoencoder of L1.resid_post" in page and "loss won back" in page


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
        (("show", "nowhere/at-all"), "there is no SAE in nowhere/at-all"),
        (("use", "FOLDER", "--prompt", "w1 w2"), "nothing is changed"),
        (("use", "FOLDER", "--prompt", "w1 w2", "--feature", "3"), "a change needs both"),
        (("use", "FOLDER", "--prompt", "w1", "--feature", "3", "--set", "1", "--scale", "0"), "contradict each other"),
        (("use", "FOLDER", "--prompt", "w1 w2", "--feature", "99", "--set", "1"), "no feature 99; it has 0 to 47"),
    ],
)
def test_wrong_requests_are_one_line(
    trained: Outcome, random_llama: Path, text: Path, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    named = {"TEXT": str(text), "FOLDER": trained.json["run"]}
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


def test_codebooks_are_trained_shown_and_forced(random_llama: Path, text: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"{i}.txt").write_text(" ".join(text.read_text().split()[i * 40 : i * 40 + 200]))
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
    for code, why in (("L1.MLP", "names no code"), ("L0.MLP:3", "no codebook at L0.MLP"), ("L1.MLP:99", "no code 99")):
        assert why in vesalius("codebook", "steer", folder, "--prompt", "w3", "--code", code, "--out", tmp_path).error
