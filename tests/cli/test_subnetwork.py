"""`vesalius subnetwork` and a removal of norms, as a user meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_helpers import vesalius
from safetensors.torch import load_file

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
    weights = folder / "model" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-100])
    assert vesalius(*command, "--out", tmp_path, "--json").json["run"] == str(folder)
    assert weights.read_bytes() == kept  # what was damaged is written again
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
    ask = ("train", "norm-free", *source, "--set", f"data.settings={TASK}", "--set", "data.length=24")
    assert "and there are 5 steps; give" in vesalius(*ask, *norms).error
    gaps = ", ".join(f"gap_{k}: 0" for k in ("mlp", "qk", "v", "separators", "first"))
    free = vesalius(*ask, "--set", f"norms={{start: 1, {gaps}}}", "--set", "steps=5", *out)
    told = re.search(r"(\d+) norms are constants; opened anew, .* logits differ by at most (\S+)", free.out)
    assert told and int(told[1]) == 3 and float(told[2]) < 1e-3  # two of the block, and the last
    assert "did you mean 'gap_mlp'" in vesalius("train", "norm-free", "--set", "norms.gap_mpl=1", *out).error
    beta = vesalius("subnetwork", "-m", f"{trained}@last", "--last-beta", "inf", *out).error
    assert "last_beta inf: give an lr above 0" in beta


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masks_are_learnt_on_a_model_of_narrow_numbers(trained: Path, tmp_path: Path, dtype: str) -> None:
    few = ("--steps", 2, "--rows", 4, "--check", 1, "--controls", 1, "--out", tmp_path, "--json")
    found = vesalius("subnetwork", "--model", f"{trained}@last", "--dtype", dtype, *few).json
    assert vesalius("lens", "logit", "x", "--model", found["checkpoint"]).code in (0, 2)
    saved = load_file(Path(found["checkpoint"]) / "model.safetensors")
    assert {str(t.dtype) for t in saved.values()} == {f"torch.{dtype}"}
    left = sum(int((t != 0).sum()) for name, t in saved.items() if "proj" in name)
    assert 0 < left <= found["kept"]


def test_a_step_that_reads_more_than_there_is_and_a_model_made_afresh(random_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    lines = [{"id": str(j), "text": " ".join(f"w{1 + (7 * i + j) % 90}" for i in range(200))} for j in range(12)]
    text.write_text("\n".join(map(json.dumps, lines)))
    command = ("subnetwork", "-m", random_llama, "--corpus", text, "--length", 8, "--check", 1, "--held-out", 0.3)
    command = (*command, "--steps", 2, "--controls", 1, "--out", tmp_path / "runs", "--json")
    refusal = vesalius(*command, "--rows", 100_000_000).error
    assert "has 2,400 tokens, and one step of 100,000,000 rows of 8 reads 800,000,000" in refusal
    weights = Path(vesalius(*command, "--rows", 4).json["checkpoint"]) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"not these")
    assert vesalius(*command, "--rows", 4, "--fresh").code == 0
    assert weights.read_bytes() == whole
