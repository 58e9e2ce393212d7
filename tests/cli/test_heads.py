"""`vesalius heads` on a model whose heads are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import Outcome, vesalius

from vesalius.build.planted import Planted
from vesalius.runs import Run

DETECTORS = "previous-token,duplicate-token,induction,mover,negative-mover,inhibition"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def whole(mover: Path, folder: Path) -> Outcome:
    common = ("heads", "--model", mover, "--task", mover / "ioi.jsonl", "--out", folder)
    return vesalius(*common, "--detectors", DETECTORS, "--json")


def test_each_planted_head_has_its_role(whole: Outcome, truth: Planted) -> None:
    found = whole.json
    assert whole.code == 0
    for part, role in truth.roles.items():
        assert found["leading"][str(part)] == role
        assert found["found"][role] == [str(part)]
    assert set(found["leading"]) - {str(p) for p in truth.true_parts} <= {
        str(p)
        for p in truth.for_task("who-stayed").true_parts  # the other task's previous-token head looks back too
    }
    assert found["found"]["negative-mover"] == [] and found["skipped"] == {}
    assert len(found["scores"]) == 6 * found["heads"]
    row = next(r for r in found["scores"] if r["part"] in found["found"]["mover"] and r["detector"] == "mover")
    assert row["score"] > row["null_high"] > row["null"] and row["q"] < 0.05


def test_the_page_shows_the_strongest_head_of_each_role(whole: Outcome, truth: Planted) -> None:
    found = whole.json
    page = Path(found["report"]).read_text()
    drawn = [one["head"] for one in Run.open(found["run"]).json("portraits")]
    assert set(drawn) >= {str(p) for p in truth.true_parts}
    for head in drawn:
        assert f"{head}, closely" in page
    for name in DETECTORS.split(","):
        assert name in page


def test_the_same_command_finds_its_run_again(whole: Outcome, mover: Path, folder: Path) -> None:
    again = vesalius(
        *("heads", "--model", mover, "--task", mover / "ioi.jsonl", "--out", folder, "--detectors", DETECTORS)
    )
    assert again.code == 0 and whole.json["run"] in again.out and whole.json["lead"] in again.out
    assert "opening" not in again.err or "mover (" not in again.err  # nothing was measured again
    assert Run.open(whole.json["run"]).status["attempts"] == 1


def test_a_run_that_was_stopped_measures_only_what_is_missing(mover: Path, tmp_path: Path) -> None:
    common = ("heads", "--model", mover, "--task", "none", "--out", tmp_path, "--detectors", "previous-token,induction")
    first = vesalius(*common, "--json").json
    run = Run.open(first["run"])
    kept = (run.folder / "scores-previous-token.parquet").stat().st_mtime_ns
    (run.folder / "scores-induction.parquet").unlink()
    again = vesalius(*common, "--json").json
    assert again["scores"] == first["scores"]
    assert (run.folder / "scores-previous-token.parquet").stat().st_mtime_ns == kept


def test_one_head_has_a_page_of_its_own_and_the_run_is_not_made_again(mover: Path, tmp_path: Path) -> None:
    asked = ("heads", "--model", mover, "--out", tmp_path, "--detectors", "induction,previous-token", "--task", "none")
    whole = vesalius(*asked, "--json").json
    stored = (Path(whole["run"]) / "scores-induction.parquet").stat().st_mtime_ns
    found = vesalius(*asked, "--head", "3.1", "--head", "L0.H2", "--json").json
    assert found["run"] == whole["run"] and list(found["closely"]) == ["L3.H1", "L0.H2"]
    assert (Path(whole["run"]) / "scores-induction.parquet").stat().st_mtime_ns == stored
    for head, closely in found["closely"].items():
        rows = {r["detector"]: r for r in found["scores"] if r["part"] == head}
        for row in closely["scores"]:
            above = [r for r in found["scores"] if r["detector"] == row["detector"] and r["score"] > row["score"]]
            assert row["score"] == rows[row["detector"]]["score"]
            assert row["place"] == (len(above) + 1 if row["score"] > 0 else None)
        for example in closely["portrait"]["examples"]:
            assert len(example["tokens"]) == len(example["attention"]) == example["query"] + 1
            assert sum(example["attention"]) == pytest.approx(1.0, abs=0.01)
        page = Path(closely["page"]).read_text()
        assert f"{head} of" in page and "previous-token" in page
        assert Path(closely["page"]).name in Path(found["report"]).read_text()
    told = vesalius(*asked, "--head", "L3.H1")
    assert told.code == 0 and "head-L3.H1.html" in told.out and "looks at" in told.out
    vesalius(*asked, "--fresh")
    assert not Path(closely["page"]).exists()


def test_a_listing_has_every_detector_with_its_parameters() -> None:
    rows = {r["detector"]: r for r in vesalius("detectors", "--json").json}
    assert {"induction", "successor", "retrieval", "mover", "arithmetic"} <= set(rows)
    assert "needles=" in rows["retrieval"]["parameters"] and "form=contextual" in rows["successor"]["parameters"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--detectors", "inductoin"), "did you mean 'induction'"),
        (("--detectors", "mover", "--task", "none"), "mover: found in a task"),
        (("--head", "L9.H0"), "L9.H0 does not exist"),
        (("--head", "L1.MLP"), "L1.MLP is no head"),
        (("--head", "L1.H0.q"), "L1.H0.q is no head"),
        (("--head", "first"), "'first' is not a part"),
        (("--detectors", "induction", "--detector-set", "induction.row=3"), "unknown parameter of induction 'row'"),
        (("--detectors", "induction", "--detector-set", "copying.top=3"), "unknown detector asked for 'copying'"),
        (("--detectors", "induction", "--detector-set", "rows=3"), "not of the form DETECTOR.KEY=VALUE"),
        (
            ("--detectors", "induction", "--detector-set", "induction.rows=0"),
            "induction.rows is 0; give a number above 0",
        ),
        (("--detectors", "copying", "--detector-set", "copying.top=-1"), "copying.top is -1.0; give a number above 0"),
        (("--detectors", "induction", "--detector-set", "induction.length=17"), "reads 32; give 16 or less"),
        (("--detectors", "retrieval", "--task", "none"), "reads 32 tokens and a prompt of 256"),
        (("--detectors", "successor", "--task", "none"), "successor heads cannot be asked for here"),
    ],
)
def test_bad_input_is_one_line(mover: Path, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    common = ("heads", "--model", mover, "--out", tmp_path)
    task = () if "--task" in arguments else ("--task", mover / "ioi.jsonl")
    assert told in vesalius(*common, *task, *arguments).error
