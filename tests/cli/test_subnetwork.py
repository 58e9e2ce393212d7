"""`vesalius subnetwork` and a removal of norms, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import vesalius

from vesalius.runs import Run

TASK = "{chain: 16, symbols: 8, span: 4}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on the Markov task."""
    folder = tmp_path_factory.mktemp("runs")
    shape = "{layers: 1, d_model: 32, heads: 2, kv_heads: 2, d_ff: 64}"
    changes = [f"model.architecture={shape}", f"data.settings={TASK}", "data.length=24", "data.rows=4", "steps=3"]
    done = vesalius("train", "markov", *(x for c in changes for x in ("--set", c)), "--out", folder, "--json")
    return Path(done.json["run"])


def test_a_subnetwork_is_found_reported_and_found_again(trained: Path, tmp_path: Path) -> None:
    command = ("subnetwork", "--model", f"{trained}@last", "--steps", 4, "--rows", 4, "--check", 1, "--controls", 1)
    found = vesalius(*command, "--out", tmp_path, "--json").json
    assert found["weights"] == 4 * 32 * 32 + 3 * 32 * 64 and found["corpus"] == "markov-spans"
    assert {v["variant"] for v in found["variants"]} >= {"model", "subnetwork", "no matrices", "random", "without it"}
    folder = Path(found["run"])
    report = (folder / "report.html").read_text("utf-8")
    assert "A subnetwork of" in report and "Where the weights are" in report and "Where states turn" in report
    before = (folder / "mask.safetensors").stat().st_mtime_ns
    assert vesalius(*command, "--out", tmp_path, "--json").json["run"] == str(folder)
    assert (folder / "mask.safetensors").stat().st_mtime_ns == before
    assert Run.open(folder).done


def test_refusals_name_the_remedy(trained: Path, random_llama: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path)
    assert "name the text the masks are learnt on (--corpus" in vesalius("subnetwork", "-m", random_llama, *out).error
    short = tmp_path / "short.jsonl"
    lines = [{"id": str(j), "text": " ".join(f"w{i + j}" for i in range(60))} for j in range(8)]
    short.write_text("\n".join(map(json.dumps, lines)))
    options = ("--corpus", short, "--length", 4, "--check", 1, "--held-out", 0.5)
    refusal = vesalius("subnetwork", "-m", random_llama, *options, *out).error
    assert "too few for a bigram table" in refusal and "are needed" in refusal
    assert "did you mean 'bigram'" in vesalius("subnetwork", "-m", f"{trained}@last", "--target", "bigrams", *out).error
    norms = ("--set", "norms={start: 1}", "--set", "steps=5", *out)
    source = (
        "--set",
        f"model.source={trained}@last",
        "--set",
        "data.corpus=null",
        "--set",
        "data.synthetic=markov-spans",
    )
    refusal = vesalius(
        "train", "norm-free", *source, "--set", f"data.settings={TASK}", "--set", "data.length=24", *norms
    ).error
    assert "and there are 5 steps; give" in refusal
    assert "did you mean 'gap_mlp'" in vesalius("train", "norm-free", "--set", "norms.gap_mpl=1", *out).error
    beta = vesalius("subnetwork", "-m", f"{trained}@last", "--last-beta", "inf", *out).error
    assert "last_beta inf: give an lr above 0" in beta
