"""`vesalius icll` as a user meets it: models that have hardly learnt, and nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import vesalius

from vesalius.train.recipe import read_recipe
from vesalius.train.running import train

TINY = {
    "steps": 2, "checkpoints.every": 2, "data.rows": 4, "data.length": 40, "evaluate.batches": 1,
    "model.architecture.d_model": 32, "model.architecture.d_ff": 32, "model.architecture.init": "gpt2",  # logits near 0
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training runs of two steps."""
    folder = tmp_path_factory.mktemp("icll")
    lstm = {"model.architecture.mixers": "lstm", "name": "lstm"}
    return {
        "icll": train(read_recipe("icll", TINY), folder),
        "ngram": train(read_recipe("icll-ngram", TINY), folder),
        "lstm": train(read_recipe("icll", TINY | lstm), folder),
        "induction": train(read_recipe("induction", {"steps": 2, "data.rows": 4, "evaluate.batches": 1}), folder),
    }


def test_a_model_that_has_not_learnt_guesses_evenly(runs: dict[str, Path], tmp_path: Path) -> None:
    told = vesalius("icll", runs["icll"], "--n", "16", "--out", tmp_path, "--json").json
    by = {r["reader"]: r for r in told["readers"]}
    assert by["model"]["tvd"] == pytest.approx(by["uniform"]["tvd"], abs=0.1) and by["uniform"]["away"] < 0.15
    assert by["2-gram"]["tvd"] < by["1-gram"]["tvd"] < by["uniform"]["tvd"]
    assert [len(told["heads"]), told["nearest"]] == [8, "1-gram"]
    page = Path(told["report"]).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "Who is how far from the truth" in page


def test_hard_wired_heads_are_found_and_lstms_have_none(runs: dict[str, Path], tmp_path: Path) -> None:
    told = vesalius("icll", runs["ngram"], "--n", "8", "--out", tmp_path, "--json").json
    heads = {r["part"]: r for r in told["heads"]}
    assert sorted(heads) == ["L1.H0", "L1.H1", "L1.H2", "L1.H3"]  # the LSTMs' have no pattern
    assert heads["L1.H1"]["2-gram"] > 0.5 and heads["L1.H1"]["2-gram"] > heads["L1.H0"]["2-gram"]
    lstm = vesalius("icll", runs["lstm"], "--n", "8", "--out", tmp_path, "--json").json
    assert "heads" not in lstm and "no block of" in lstm["notes"][0]


def test_nonsense_is_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "not on icll; train one" in vesalius("icll", runs["induction"], "--out", tmp_path).error
    assert "no checkpoint of step 7; it has" in vesalius("icll", runs["icll"], "--step", "7").error
    assert "no run 'never'" in vesalius("icll", "never").error
    assert "--n" in vesalius("icll", runs["icll"], "--n", "1").error
