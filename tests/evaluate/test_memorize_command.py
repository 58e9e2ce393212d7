"""The command on a run that was made to memorize one text: counts, control, forecast, report, going on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from vesalius.cli import memorize
from vesalius.errors import RunError, VesaliusError
from vesalius.train.assembly import data_of
from vesalius.train.recipe import read_recipe
from vesalius.train.running import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("memorize")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VESALIUS_CACHE", str(folder / "cache"))
        rng = random.Random(0)
        texts = [(f"plain-{i}", "".join(rng.choices("abcdefghijklmnop", k=48))) for i in range(60)]
        secret = "".join(rng.choices("abcdefghijklmnop", k=48))
        texts += [(f"canary-0000/{i}", secret) for i in range(100)]
        rng.shuffle(texts)
        (folder / "corpus.jsonl").write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in texts))
        recipe = {
            "name": "secret",
            "model": {"preset": "tiny-pythia"},
            "data": {
                "corpus": str(folder / "corpus.jsonl"),
                "tokenizer": {"kind": "bytes"},
                "length": 49,  # 48 letters and a separator: a row is a document
                "rows": 8,
                "held_out": 0.1,
            },
            "optimizer": {"name": "adamw", "lr": 5e-3},
            "steps": 60,
            "checkpoints": {"log": False, "every": 20},
            "evaluate": {"every": 60, "batches": 1},
        }
        made = read_recipe(recipe)
        yield train(made, folder / "runs"), made, folder


def call(arguments: list[str]) -> dict[str, Any]:
    app = typer.Typer()
    app.callback()(lambda: None)
    memorize.register(app)
    done = CliRunner().invoke(app, ["memorize", *arguments, "--json"], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def asked(trained: Any) -> list[str]:
    run, _, folder = trained
    return [str(run), "--k", "16", "--rows", "40", "--document", "canaries", "--out", str(folder / "runs")]


def test_the_secret_is_found_and_strangers_are_not(trained: Any):
    found, recipe = call(asked(trained)), trained[1]
    shares = {r["group"]: r for r in found["memorized"]}
    assert shares["canary"]["n"] == 1 and shares["canary"]["share"] == 1.0
    assert shares["held-out"]["memorized"] == 0 and shares["held-out"]["n"] >= 3
    assert shares["row"]["memorized"] == 1  # the row that is the secret
    folder = Path(found["run_folder"])
    canary = pd.read_parquet(folder / "scores.parquet").query("group == 'canary'").set_index("step")
    viewer = data_of(recipe).viewer()
    text = pd.read_parquet(folder / "sequences.parquet").query("group == 'canary'")["continuation"].iloc[0]
    for step in (0, 20, 40, 60):
        assert canary.loc[step, "exposures"] == viewer.exposures(text, step)
    assert not canary.loc[0, "extractible"]
    page = (folder / "report.html").read_text()
    assert "What secret memorized" in page and text in page
    last = [f for f in found["forecasts"] if f["predictor"] == "step 40" and f["among"] == "all"][0]
    assert last["memorized"] == 2 and last["flops"] == pytest.approx(found["flops"] * 40 / 60)


def test_an_interrupted_run_goes_on_after_the_last_checkpoint(trained: Any, monkeypatch: pytest.MonkeyPatch):
    import vesalius.evaluate

    call_ = vesalius.evaluate.at_checkpoint
    steps: list[int] = []

    def stopping(model: Any, step: int, *rest: Any, **more: Any) -> Any:
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return call_(model, step, *rest, **more)

    monkeypatch.setattr(vesalius.evaluate, "at_checkpoint", stopping)
    arguments = [*asked(trained), "--seed", "1"]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        call(arguments)
    found = call(arguments)
    assert steps == [0, 20, 40, 40, 60]
    assert {r["step"] for r in found["by_step"]} == {0, 20, 40, 60}
    call(arguments)
    assert len(steps) == 5  # found again


def test_another_checkpoint_is_a_predictor(trained: Any):
    run, _, _ = trained
    found = call([*asked(trained), "--steps", "60", "--against", f"{run}@step40"])
    whole = call(asked(trained))
    other = next(f for f in found["forecasts"] if f["among"] == "all")
    same = next(f for f in whole["forecasts"] if f["predictor"] == "step 40" and f["among"] == "all")
    assert other["predictor"] == "secret step 40"
    assert {k: other[k] for k in ("foretold", "recall", "flops")} == {
        k: same[k] for k in ("foretold", "recall", "flops")
    }


def test_refusals(trained: Any):
    for more, told in (
        (["--steps", "20,21"], "no checkpoint of step 21; it has 0, 20, 40, 60"),
        (["--steps", "some"], "give all, last, or numbers"),
        (["--k", "40"], "lower --k"),
        (["--document", "canry-0"], "unknown document"),
        (["--against", "nowhere"], "nowhere"),
    ):
        with pytest.raises(VesaliusError, match=told):
            call([*asked(trained), *more])
    with pytest.raises(RunError):
        call(["nowhere"])
    with pytest.raises(VesaliusError, match="asks about nothing"):
        call([str(trained[0]), "--rows", "0"])
