"""Every command on a model whose mechanism is known: what it finds is what was planted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import SMALL, Outcome, assert_same, only_run, vesalius

from vesalius import __version__
from vesalius.build.planted import Planted
from vesalius.model.check import IDENTITIES
from vesalius.runs import Run

# The path from the repeated name to the answer, without the 6 % that the repeated name has directly.
CHAIN = {"embed->L0.H0.q", "L0.H0->L2.H1.v", "L2.H1->L3.H0.q", "L3.H0->unembed"}


def parts(run: Run) -> set[str]:
    return {row["part"] for row in run.json("circuit")["parts"]}


def edges(run: Run) -> set[str]:
    return {f"{row['sender']}->{row['receiver']}" for row in run.json("circuit")["edges"]}


def test_a_circuit_is_the_planted_one_and_is_proved(first: Outcome, truth: Planted) -> None:
    found = first.json
    assert first.code == 0
    assert found["accuracy"] == 1.0 and found["n_find"] == 8 and found["n_prove"] == 8
    assert parts(Run.open(found["run"])) == {str(p) for p in truth.true_parts}
    assert found["faithfulness"]["mean"] == pytest.approx(1.0, abs=1e-3)
    assert found["random"]["mean"] < 0.1
    page = Path(found["report"]).read_text()
    assert page.startswith("<!doctype html>") and "L2.H1" in page


def test_at_one_position_only_what_acts_there_is_found(mover: Path, tmp_path: Path) -> None:
    """At END act the inhibition head and the mover; the duplicate-token head acts at the second mention."""
    common = ("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", tmp_path, *SMALL, "--target", 0.2)
    found = vesalius(*common, "--position", "END", "--json").json
    scores = Run.open(found["run"]).scores("scores")
    strong = {str(p) for p, v in zip(scores.parts, scores.values, strict=True) if abs(v) > 1e-3 * scores.values.max()}
    assert strong == {"L2.H1", "L3.H0"}


def test_rows_that_are_passed_over_are_told(mover: Path, tmp_path: Path) -> None:
    lines = (mover / "ioi.jsonl").read_text().splitlines()[:16]
    odd = {"clean": "tom sang", "corrupted": "tom and mary sang", "answer": " tom", "wrong": " mary"}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join([*lines, json.dumps(odd)]))
    skip = ("--task-set", "on_misaligned=skip", "--compare", "none")
    found = vesalius("circuit", "--model", mover, "--task", prompts, "--out", tmp_path / "runs", *skip, "--json").json
    assert [n for n in found["notes"] if "rows passed over: 1;" in n and "line 17" in n]


def test_the_same_command_finds_its_run_again(first: Outcome, mover: Path, runs: Path) -> None:
    run = Run.open(first.json["run"])
    before = {p.name: p.stat().st_mtime_ns for p in run.folder.glob("*.parquet")}
    again = vesalius("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", runs, *SMALL)
    assert again.code == 0 and str(run.folder) in again.out and "faithfulness 1.00" in again.out
    assert "accuracy" not in again.err  # nothing was measured again
    assert {p.name: p.stat().st_mtime_ns for p in run.folder.glob("*.parquet")} == before
    assert Run.open(run.folder).status["attempts"] == 1


def test_a_seed_draws_other_prompts_and_the_same_seed_the_same(
    first: Outcome, mover: Path, tmp_path: Path, truth: Planted
) -> None:
    common = ("circuit", "--model", mover, "--task", mover / "ioi.jsonl", *SMALL)
    same = vesalius(*common, "--out", tmp_path / "same", "--json").json
    other = vesalius(*common, "--out", tmp_path / "other", "--seed", 1, "--json").json
    assert_same(Run.open(first.json["run"]), Run.open(same["run"]))
    assert other["task_fingerprint"] != same["task_fingerprint"]
    assert Run.open(other["run"]).json("examples") != Run.open(same["run"]).json("examples")
    assert parts(Run.open(other["run"])) == {str(p) for p in truth.true_parts}


def test_edges_by_acdc_are_planted_edges(mover: Path, tmp_path: Path, truth: Planted) -> None:
    found = vesalius(
        *("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--method", "acdc", "--n", 4, "--prove-n", 4),
        *("--out", tmp_path, "--json", "--ablations", "counterfactual"),
    ).json
    assert found["level"] == "edge"
    assert {str(e) for e in truth.true_edges} >= edges(Run.open(found["run"])) >= CHAIN
    assert found["faithfulness"]["mean"] == pytest.approx(1.0, abs=0.1)


def test_edges_by_integrated_gradients_hold_the_planted_path(mover: Path, tmp_path: Path) -> None:
    outcome = vesalius(
        *("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--method", "eap-ig", "--level", "edge"),
        *("--n", 4, "--prove-n", 4, "--out", tmp_path, "--ablations", "counterfactual"),
    )
    run = only_run(tmp_path)
    assert outcome.code == 0 and f"{run.json('summary')['size']['edges']} of 479 edges" in outcome.out
    assert edges(run) >= CHAIN
    assert run.json("summary")["faithfulness"]["mean"] == pytest.approx(1.0, abs=0.1)


def test_two_tasks_share_the_planted_heads(mover: Path, tmp_path: Path, truth: Planted) -> None:
    tasks = f"{mover / 'ioi.jsonl'},{mover / 'who-stayed.jsonl'}"
    common = ("reuse", "--model", mover, "--tasks", tasks, "--n", 8, "--prove-n", 8, "--out", tmp_path)
    found = vesalius(*common, "--json").json
    run = Run.open(found["run"])
    shared = run.table("parts").query("where == 'shared'")["part"].tolist()
    assert set(shared) >= {str(p) for p in truth.true_parts & truth.for_task("who-stayed").true_parts}
    assert [item["accuracy"] for item in found["items"]] == [1.0, 1.0]
    assert all(item["faithfulness"]["mean"] == pytest.approx(1.0, abs=1e-3) for item in found["items"])
    inhibition = next(str(p) for p, role in truth.roles.items() if role == "inhibition")
    assert found["transplant"]["heads"] == [inhibition]
    assert {row["kind"] for row in found["overlap"]} >= {"all", "head"}

    again = vesalius(*common)
    assert again.code == 0 and Run.open(run.folder).status["attempts"] == 1
    assert "ioi" in again.out and f"transplant of {inhibition} from ioi to who-stayed" in again.out
    # one row for each metric, not one for each of the random draws
    assert sum("random" in line or "accuracy" in line for line in again.out.splitlines()) <= 6
    assert str(run.folder / "report.html") in again.out


def test_one_task_in_two_models(mover: Path, tmp_path: Path) -> None:
    found = vesalius(
        *("reuse", "--models", f"{mover},{mover}", "--tasks", mover / "ioi.jsonl", "--n", 8, "--prove-n", 8),
        *("--out", tmp_path, "--json"),
    ).json
    assert found["overlap"][0]["jaccard"] == 1.0
    assert any("no transplant" in note for note in found["notes"])


def test_a_run_agrees_with_itself(first: Outcome, runs: Path, tmp_path: Path) -> None:
    run = first.json["run"]
    found = vesalius("compare", run, run, "--out", tmp_path, "--json").json
    assert {row["kind"] for row in found["matrix"]} == {"head", "mlp"}
    for row in found["matrix"]:
        assert row["pearson"] == pytest.approx(1.0) and row["spearman"] == pytest.approx(1.0)
        assert row["overlap"] == 1.0 and row["k"] < row["n"]
    assert Path(found["report"]).exists() and Path(found["run"]).parent == tmp_path


def test_methods_are_compared_by_name(first: Outcome, mover: Path, runs: Path, tmp_path: Path) -> None:
    other = vesalius(
        *("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--method", "relp", "--out", tmp_path),
        *("--json", *SMALL),
    ).json
    outcome = vesalius("compare", first.json["run"], other["run"], "--out", tmp_path)
    assert outcome.code == 0
    made = only_run(tmp_path, "compare")
    assert [r["name"] for r in made.json("summary")["runs"]] == ["activation-patching", "relp"]
    heads = made.table("matrix").query("kind == 'head' and a != b")
    # a different estimate of the same three heads: they stand out in both
    assert len(heads) == 2 and (heads["pearson"] > 0.8).all() and (heads["pearson"] < 1).all()
    assert str(made.folder) in outcome.out


def test_runs_lists_what_is_there_and_report_draws_it(first: Outcome, runs: Path) -> None:
    run = Run.open(first.json["run"])
    rows = vesalius("runs", "--out", runs, "--json").json
    mine = next(row for row in rows if row["folder"] == str(run.folder))
    assert mine["state"] == "done" and mine["heads"] == 3 and mine["accuracy"] == 1.0
    assert run.hash[:10] in vesalius("runs", "--out", runs).out
    (run.folder / "report.html").unlink()
    drawn = vesalius("report", run.hash[:8], "--out", runs, "--json").json
    assert drawn == {"run": str(run.folder), "report": str(run.folder / "report.html")}
    assert (run.folder / "report.html").exists()
    assert vesalius("report", run.folder).out.strip() == str(run.folder / "report.html")


def test_no_runs_yet(tmp_path: Path) -> None:
    assert vesalius("runs", "--out", tmp_path, "--json").json == []
    assert "no runs" in vesalius("runs", "--out", tmp_path).out


def test_check_says_what_is_usable(random_llama: Path, tmp_path: Path) -> None:
    outcome = vesalius("check", random_llama, "--out", tmp_path, "--json", "--seed", 3)
    found = outcome.json  # numbers that were not measured are null, not NaN
    assert outcome.code == 0 and found["ok"] is True
    assert found["usable"]["head"] == {"usable": True, "reason": ""}
    assert not found["usable"]["xhead"]["usable"]
    skipped = [c for c in found["checks"] if c["status"] == "not applicable"]
    assert skipped and all(c["worst"] is None for c in skipped)
    run = only_run(tmp_path)
    assert run.request["seed"] == 3 and run.state == "done" and len(run.table("checks")) == len(found["checks"])
    assert "no report" in vesalius("report", "--out", tmp_path).error


def test_check_ends_with_1_where_an_identity_fails(
    random_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(bench: Any, worst: Any) -> None:
        raise ArithmeticError("planted failure")

    one = dataclasses.replace(IDENTITIES[0], run=wrong)
    monkeypatch.setattr("vesalius.model.check.IDENTITIES", (one, *IDENTITIES[1:2]))
    outcome = vesalius("check", random_llama, "--out", tmp_path)
    assert outcome.code == 1 and "planted failure" in outcome.out and "NOT usable" in outcome.out
    assert only_run(tmp_path).state == "done"  # a model that fails is a finding, not a failure of the run


def test_lists() -> None:
    assert {row["name"] for row in vesalius("models", "--json").json} >= {"smollm2-135m", "gpt2"}
    tasks = {row["task"]: row for row in vesalius("tasks", "--json").json}
    assert tasks["ioi"]["parameters"].startswith("order=") and tasks["ioi"]["paper"] == "arXiv 2211.00593"
    methods = {row["method"]: row for row in vesalius("methods", "--json").json}
    assert methods["acdc"]["levels"] == "edge" and "steps=" in methods["eap-ig"]["parameters"]
    for command, word in (("models", "smollm2-135m"), ("tasks", "colored-objects"), ("methods", "path-patching")):
        outcome = vesalius(command)
        assert outcome.code == 0 and word in outcome.out


def test_version_and_help() -> None:
    assert vesalius("--version").out.strip() == __version__
    for command in ("circuit", "reuse", "compare", "check", "models", "tasks", "methods", "runs", "report"):
        outcome = vesalius(command, "--help")
        assert outcome.code == 0 and f"vesalius {command}" in outcome.out
        assert all(option in outcome.out for option in ("--json", "--out", "--seed"))
    outcome = vesalius()
    assert "circuit" in outcome.out + outcome.err and "error" not in outcome.err


def test_help_loads_no_pytorch() -> None:
    """It is what a newcomer waits for first."""
    code = (
        "import sys\nfrom vesalius.cli.app import command_line\ncommand_line()\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
