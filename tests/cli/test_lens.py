"""`vesalius lens`: every command leaves its numbers and a page, a killed training goes on, wrong use is one line."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import ROOT, Outcome, beside, only_run, vesalius

import vesalius as bench
from vesalius.checkpoints import steps_in
from vesalius.lens import TunedLens, trajectory
from vesalius.runs import Run

sys.path.append(str(ROOT / "tests" / "lens"))
from lens_helpers import write_text

FAST = ("--tokens", 2400, "--length", 24, "--rows", 4, "--states", 40, "--check-states", 100, "--held-out", 0.2)
PATIENCE_S = 120


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VESALIUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(random_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    out = tmp_path_factory.mktemp("runs")
    return vesalius("lens", "train", "--model", random_llama, "--corpus", text, *FAST, "--out", out, "--json")


def test_train_leaves_a_lens_and_tells_how_good_it_is(trained: Outcome, random_llama: Path) -> None:
    found = trained.json
    assert trained.code == 0
    rows = {(r["lens"], r["layer"]): r for r in found["quality"]}
    assert len(rows) == 8 and rows["tuned", 2]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(rows["tuned", n]["kl"] < rows["logit", n]["kl"] for n in (-1, 0, 1))
    model = bench.open(str(random_llama))
    assert TunedLens.load(found["run"], model).matrix(0).abs().max() > 0
    assert "nats" in found["lead"] and Path(found["report"]).read_text().startswith("<!doctype html>")


def test_logit_and_tuned_print_what_python_gives(trained: Outcome, random_llama: Path, tmp_path: Path) -> None:
    model = bench.open(str(random_llama))
    lens = trained.json["run"]
    common = ("w7 w8 w9", "--model", random_llama, "--token", "w11", "--position", 1, "--out", tmp_path, "--json")
    plain = vesalius("lens", "logit", *common).json
    tuned = vesalius("lens", "tuned", *common, "--lens", lens).json
    for found, mine in ((plain, "logit"), (tuned, TunedLens.load(lens, model))):
        want = trajectory(model, "w7 w8 w9", lens=mine, tokens=["w11"])
        assert [r["kl"] for r in found["layers"]] == pytest.approx(want.kl[:, 1].tolist(), abs=1e-6)
        assert [r["p w11"] for r in found["layers"]] == pytest.approx(want.chosen_probs[:, 1, 0].tolist(), abs=1e-6)
        assert found["depth"] == want.depth[1] and found["position"] == 1
        assert found["likeliest"][-1]["top"][0][0] == want.top(2, 1)[0][0]
        page = Path(found["report"]).read_text()
        assert "w8" in page and ("Beside the logit lens" in page) == (mine != "logit")
    table = Run.open(tuned["run"]).table("plain")
    assert np.allclose(table["kl"], trajectory(model, "w7 w8 w9").kl.ravel(), atol=1e-5)


def test_direct_terms_sum(random_llama: Path, tmp_path: Path) -> None:
    common = ("lens", "direct", "w7 w8 w9", "--model", random_llama, "--out", tmp_path, "--json")
    found = vesalius(*common, "--token", "w11", "--against", "w12", "--neurons", "L1.MLP").json
    model = bench.open(str(random_llama))
    logits = model.logits(torch.tensor([[7, 8, 9]]))[0, -1]
    run = Run.open(found["run"])
    terms = run.table("terms")
    assert terms["value"].sum() == pytest.approx(float(logits[11] - logits[12]), abs=1e-4)
    assert (terms["kind"] == "neuron").sum() == 48 and len(found["terms"]) == 15
    assert run.scores("scores").values.sum() == pytest.approx(terms["value"].sum(), abs=1e-6)
    assert "w11" in Path(found["report"]).read_text()
    assert vesalius("report", found["run"]).code == 0


def test_basis(trained: Outcome, random_llama: Path, text: Path, tmp_path: Path) -> None:
    common = ("lens", "basis", "--model", random_llama, "--corpus", text, "--out", tmp_path, "--json", "--rows", 6)
    found = vesalius(*common, "--lens", trained.json["run"], "--layer", "L0", "--k", 3, "--length", 12).json
    kinds = [r["kind"] for r in found["directions"]]
    assert kinds == ["basis"] * 3 + ["random"] * 3 and found["layer"] == "L0"
    best = [r["lens"] for r in found["directions"] if r["kind"] == "basis"]
    assert min(best) > max(r["lens"] for r in found["directions"] if r["kind"] == "random")
    kept = Run.open(found["run"]).array("basis")
    assert np.allclose(kept["directions"] @ kept["directions"].T, np.eye(3), atol=1e-5)
    assert kept["influence"] == pytest.approx(best, rel=1e-4)


def test_anomaly(random_llama: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for name, words in (("normal", range(5, 7)), ("odd", range(60, 97))):
        lines = [" ".join(f"w{rng.choice(words)}" for _ in range(7)) for _ in range(60)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    common = ("lens", "anomaly", "--model", random_llama, "--lens", "logit", "--out", tmp_path / "runs", "--json")
    found = vesalius(*common, "--normal", tmp_path / "normal.txt", "--test", tmp_path / "odd.txt").json
    assert found["auroc"]["trajectory"]["auroc"] > 0.9 and set(found["auroc"]) == {
        "trajectory",
        "entropy",
        "perplexity",
    }
    assert len(found["prompts"]) == 30 + 60 and found["prompts"][0]["kind"] == "test"


# The real command, which keeps a checkpoint after every step and sleeps a little, so that a signal meets it at work.
SLOW = """
import time
import vesalius.lens.training as t
t.SAVE_SECONDS = 0.0
keep = t._Sitting._save
def slow(self, *given):
    keep(self, *given)
    time.sleep(0.2)
t._Sitting._save = slow
from vesalius.cli import main
main()
"""


def test_a_killed_training_goes_on_to_the_same_bytes(
    trained: Outcome, random_llama: Path, text: Path, tmp_path: Path
) -> None:
    command = ("lens", "train", "--model", random_llama, "--corpus", text, *FAST, "--out", tmp_path)
    process = beside(SLOW, *command)
    wait_for(2, tmp_path, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL
    process.communicate()
    run = only_run(tmp_path)
    assert run.state == "interrupted" and not run.has("lens.safetensors")
    assert (
        "let that run finish"
        in vesalius(
            "lens", "tuned", "w7", "--model", random_llama, "--lens", run.folder, "--out", tmp_path / "read"
        ).error
    )
    assert vesalius(*command).code == 0
    whole = Path(trained.json["run"])
    assert (run.folder / "lens.safetensors").read_bytes() == (whole / "lens.safetensors").read_bytes()
    assert run.folder.name == whole.name and not (run.folder / "steps").exists()


def wait_for(step: int, out: Path, process: subprocess.Popen[str]) -> None:
    """Returns once a checkpoint of that step or a later one is there."""
    end = time.monotonic() + PATIENCE_S
    while not any(max(steps_in(place), default=-1) >= step for place in out.glob("*/steps")):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"step {step} was not there in time: {process.communicate()}")
        time.sleep(0.02)


def test_wrong_use_is_one_line(trained: Outcome, random_llama: Path, mover: Path, text: Path, tmp_path: Path) -> None:
    lens = trained.json["run"]
    out = ("--out", tmp_path)
    on = ("--model", random_llama, *out)
    for command, says in (
        (("logit", "", *on), "the prompt is empty"),
        (("logit", "w7", *on, "--position", 1), "no position 1"),
        (("logit", "w7", *on, "--token", "w7 w8"), "is 2 tokens"),
        (("tuned", "w7", *on, "--lens", tmp_path), "no trained lens"),
        (("tuned", "w7", *on, "--lens", "nothing-there"), "no run 'nothing-there'"),
        (("tuned", "mary", "--model", mover, *out, "--lens", lens), "a lens fits one shape alone"),
        (("direct", "w7", *on, "--token", "w7", "--against", "w7"), "against itself"),
        (("direct", "w7", *on, "--neurons", "L7.MLP"), "L7.MLP does not exist"),
        (("train", *on, "--corpus", "no-such-corpus", "--length", 24), "unknown corpus"),
        (("train", *on, "--corpus", text, "--tokens", 90000, "--length", 24), "are needed to train on"),
        (("train", *on, "--corpus", text, "--start", "middle"), "'middle'"),
        (("train", *on, "--corpus", text, "--weight-decay", "nan"), "weight_decay nan: give numbers above 0"),
        (
            ("train", *on, "--tokens", 1200, "--tokens", 0),
            "--tokens': Input should be greater than or equal to 1, not '0'",
        ),
        (("train", *on, "--corpus", text, "--optimizer", "adamm"), "did you mean 'adamw'"),
        (("basis", *on, "--corpus", text, "--lens", "logit", "--layer", "L2"), "layer 2 has no causal basis"),
        (("basis", *on, "--corpus", text, "--lens", "logit", "--layer", "top"), "names no layer"),
        (("basis", *on, "--corpus", text, "--lens", "logit", "--rows", "10000000"), "and --rows is 10000000"),
        (("basis", *on, "--corpus", text, "--lens", "logit", "--ablation", "meen"), "did you mean 'mean'"),
        (("anomaly", *on, "--normal", tmp_path / "none.txt", "--test", text), "none.txt"),
        (("anomaly", *on, "--normal", text, "--test", text, "--detector", "lo"), "anomaly detector 'lo'"),
    ):
        assert says in vesalius("lens", *command).error, command


def test_a_lens_of_a_tuned_copy_needs_to_be_asked_for(trained: Outcome, random_llama: Path, tmp_path: Path) -> None:
    model = bench.open(str(random_llama))
    with torch.no_grad():
        model.hf.model.layers[0].mlp.up_proj.weight.add_(0.01)
    copy = tmp_path / "copy"
    model.hf.save_pretrained(copy)
    model.tokenizer.save_pretrained(copy)
    command = ("lens", "tuned", "w7 w8", "--model", copy, "--lens", trained.json["run"], "--out", tmp_path)
    refusal = vesalius(*command).error
    assert "was trained on llama" in refusal and "the same norm and unembedding" in refusal and "--transfer" in refusal
    assert vesalius(*command, "--transfer").code == 0


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("n_layers", None, "has no 'n_layers'"),
        ("d_model", "x", "'d_model' is 'x'"),
        ("bias_only", 1, "'bias_only' is 1"),
        ("bias_only", True, "lens.safetensors does not fit lens.json"),
        ("fingerprint", None, "has no 'fingerprint'"),
    ],
)
def test_a_lens_that_was_edited(
    trained: Outcome, random_llama: Path, tmp_path: Path, key: str, value: object, told: str
) -> None:
    copy = Path(shutil.copytree(trained.json["run"], tmp_path / "lens"))
    note = json.loads((copy / "lens.json").read_text())
    note = {k: v for k, v in note.items() if k != key} | ({} if value is None else {key: value})
    (copy / "lens.json").write_text(json.dumps(note))
    common = ("--model", random_llama, "--out", tmp_path / "runs")
    assert told in vesalius("lens", "tuned", "w7", "--lens", copy, *common).error
