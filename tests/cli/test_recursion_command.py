"""`vesalius recursion` as a user meets it: a model that has hardly learnt, and given nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import vesalius

from vesalius.runs import Run
from vesalius.train.recipe import read_recipe
from vesalius.train.running import train

TINY = {
    "steps": 3, "checkpoints.every": 3, "data.rows": 8, "evaluate.batches": 1, "model.architecture.d_model": 16,
    "model.architecture.heads": 2, "model.architecture.layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Training runs of three steps."""
    folder = tmp_path_factory.mktemp("recursion")
    return {
        "successor": train(read_recipe("successor", TINY), folder),
        "seq2seq": train(read_recipe("successor-seq2seq", TINY | {"model.architecture.d_head": 8}), folder),
        "traversal": train(read_recipe("traversal", TINY), folder),
        "induction": train(read_recipe("induction", TINY | {"data.length": 16}), folder),
    }


@pytest.mark.parametrize("name", ["successor", "seq2seq"])
def test_a_model_that_has_not_learnt_is_told_so(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    told = vesalius("recursion", runs[name], "--n", "4", "--inputs", "32", "--out", tmp_path, "--json").json
    kinds = {r["where"]: r for r in told["kinds"]}
    assert kinds["trained"]["right"] < 0.5
    assert any("has not learnt its own training range" in n for n in told["notes"])
    assert told["mechanism"]["moved"] < 0.5 and len(told["heads"]) == 2
    grid = Run.open(Path(told["run"])).table("grid")
    assert grid["n"].sum() == sum(r["n"] for r in told["kinds"])
    page = Path(told["report"]).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "Exact match in per cent" in page


def test_trees_are_asked_without_forcing_heads(runs: dict[str, Path], tmp_path: Path) -> None:
    told = vesalius("recursion", runs["traversal"], "--n", "2", "--out", tmp_path, "--json").json
    assert "mechanism" not in told and told["task"] == "tree_traversal" and told["score"][0]["failures"] > 0
    assert any("a tree's recursion has no one end" in n for n in told["notes"])


def test_nonsense_is_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["successor"]
    assert "no checkpoint of step 7; it has" in vesalius("recursion", run, "--step", "7").error
    assert "names no steps" in vesalius("recursion", run, "--step", "newest").error
    assert "no run 'never'" in vesalius("recursion", "never").error
    said = vesalius("recursion", runs["induction"], "--out", tmp_path).error
    assert "which is no recursive function; train one on binary_successor or tree_traversal" in said


def test_a_run_without_checkpoints_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    recipe = read_recipe("successor", TINY | {"name": "empty"})
    with Run.start({"command": "train", "model": "empty", "recipe": recipe.model_dump(mode="json")}, tmp_path) as empty:
        pass
    assert "has no checkpoints yet" in vesalius("recursion", empty.folder).error
