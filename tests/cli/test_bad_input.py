"""What a user can get wrong: one clear line on standard error, exit code 2, no traceback, and nothing lost."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SMALL, Outcome, only_run, vesalius
from safetensors.torch import load_file, save_file
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from vesalius.runs import Run

GOOD = {
    "clean": "since sarah and tom went to the station , sarah gave a coin to",
    "corrupted": "since sarah and tom went to the station , tom gave a coin to",
    "answer": " tom",
    "wrong": " sarah",
}
OTHER = {
    "clean": "after john and sarah went to the market , sarah gave a ring to",
    "corrupted": "after john and sarah went to the market , john gave a ring to",
    "answer": " john",
    "wrong": " sarah",
}


@pytest.fixture
def circuit(mover: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """`vesalius circuit` on the planted model; refusals leave no run that claims to be done."""

    def run(*arguments: object, task: object = None) -> Outcome:
        chosen = mover / "ioi.jsonl" if task is None else task
        return vesalius("circuit", "--model", mover, "--task", chosen, "--out", tmp_path / "runs", *arguments)

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of prompts, a row an object or a line as it stands."""

    def write(*lines: Any, name: str = "mine.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


# ---- the command line itself


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("circut", ["'circut'", "'circuit'", "vesalius --help"]),
        ("circuit --tsk ioi", ["--tsk", "--task", "vesalius circuit --help"]),
        ("circuit --seed text", ["--seed", "'text'", "integer"]),
        ("circuit --seed=text", ["--seed", "'text'", "integer"]),
        ("circuit --n", ["--n", "argument"]),
        ("circuit ioi", ["ioi", "vesalius circuit --help"]),
        ("circuit --threads 0", ["--threads 0", "1 or more"]),
        ("circuit --memory 0", ["--memory 0", "above 0"]),
        ("circuit --memory nan", ["--memory nan", "above 0"]),
        ("circuit --ablations meen", ["ablation 'meen'", "'mean'"]),
        ("circuit --level nodes", ["level 'nodes'", "'node'"]),
        ("circuit --task-set both", ["'both'", "KEY=VALUE"]),
        ("circuit --task-set ordr=abba", ["'ordr'", "'order'"]),
        ("circuit --method eap-ig --method-set step=3", ["'step'", "'steps'"]),
        ("circuit --method eap-ig --method-set steps=four", ["steps='four'"]),
        ("circuit --method relp --budget 4", ["relp", "--budget", "activation-patching"]),
        ("circuit --method eap --steps 4", ["eap", "--steps", "eap-ig"]),
        ("reuse --tasks ioi", ["two tasks, or two models"]),
        ("reuse --tasks ,", ["--tasks"]),
        ("reuse --models gpt2,smollm2-135m", ["2 tasks in 2 models"]),
        ("reuse --method acdc", ["acdc", "edges"]),
        ("reuse --method rellp", ["method 'rellp'", "'relp'"]),
        ("reuse --prove-n 0", ["--prove-n 0", "1 or more"]),
        ("reuse --memory -1", ["--memory -1"]),
        ("compare", ["runs", "vesalius compare --help"]),
        ("compare last", ["two or more"]),
        ("codes --features 100000000", ["--features", "10000", "'100000000'"]),
        ("codes --seeds 100000000", ["--seeds", "1000", "'100000000'"]),
        ("codes --steps 100000000", ["--steps", "100000", "'100000000'"]),
        ("direction moral --permutations 100000000", ["--permutations", "100000", "'100000000'"]),
        ("frequency --orders 100000000", ["--orders", "1000", "'100000000'"]),
        ("frequency --permutations 100000000", ["--permutations", "100000", "'100000000'"]),
        ("subnetwork --controls 100000000", ["--controls", "100", "'100000000'"]),
        ("tune --rows 100000000", ["--rows", "1024", "'100000000'"]),
        ("tune --draws 10000000", ["--draws", "1000", "'10000000'"]),
        ("models --verify smolm2-135m", ["'smolm2-135m'", "'smollm2-135m'"]),
    ],
)
def test_wrong_use_is_one_line(arguments: str, words: list[str]) -> None:
    error = vesalius(*arguments.split()).error
    assert all(word in error for word in words), error


# ---- unknown names


@pytest.mark.parametrize("command", ["circuit --model", "check"])
def test_unknown_model(command: str) -> None:
    error = vesalius(*command.split(), "smolm2-135m").error
    assert "unknown model 'smolm2-135m'; did you mean 'smollm2-135m'" in error


def test_unknown_task_and_method(circuit: Callable[..., Outcome]) -> None:
    assert "unknown task 'iio'; did you mean 'ioi'" in circuit(task="iio").error
    assert "unknown method 'reelp'; did you mean 'relp'" in circuit("--method", "reelp").error
    assert "unknown method 'eepig'; did you mean 'eap-ig'" in circuit("--compare", "eepig").error


def test_unknown_part(circuit: Callable[..., Outcome]) -> None:
    assert "unknown kind of part 'heds'; did you mean 'head'" in circuit("--method-set", "parts=heds", *SMALL).error
    assert "unknown position 'S3'" in circuit("--position", "S3", *SMALL).error


def test_what_is_no_circuit(circuit: Callable[..., Outcome]) -> None:
    receivers = ("--method", "path-patching", *SMALL, "--method-set", "receivers=L2.H1.v")
    assert "what reaches L2.H1.v is no circuit" in circuit(*receivers).error
    for several in ("each", "END,IO"):
        assert f"give one named position, not '{several}'" in circuit("--position", several, *SMALL).error


# ---- models that are none


def test_a_file_or_folder_that_is_no_model(circuit: Callable[..., Outcome], tmp_path: Path, mover: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("hello")
    (tmp_path / "notes.gguf").write_text("hello")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(40))
    for model, words in (
        (tmp_path / "notes", ["not a model", "config.json", "readme.txt"]),
        (tmp_path / "notes.gguf", ["not a GGUF file", "hell"]),
        (tmp_path / "cut.gguf", ["cut.gguf"]),
        (tmp_path / "nowhere", ["no folder", "nowhere"]),
        (mover / "ioi.jsonl", ["is a file", "config.json"]),
        ("", ["no model was named"]),
        ("a/b/c/d", ["neither a folder", "org/name"]),
    ):
        error = vesalius("circuit", "--model", model, "--out", tmp_path / "runs").error
        assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


def test_weights_that_are_cut_short(mover: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mover, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = vesalius("check", copy, "--out", tmp_path / "runs").error
    assert f"{copy / 'model.safetensors'} is cut short" in error


@pytest.mark.parametrize("command", ["heads", "channels", "check", "lens logit w1", "observe w1"])
def test_weights_that_are_no_numbers(random_llama: Path, tmp_path: Path, command: str) -> None:
    copy = Path(shutil.copytree(random_llama, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    asked = (*command.split(), *(() if command == "check" else ("--model",)), copy, "--out", tmp_path / "runs")
    for bad, dtype in ((math.nan, ()), (math.inf, ()), (1e6, ("--dtype", "float16"))):
        weights[name][2, 3] = bad
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        error = vesalius(*asked, *dtype).error
        assert "NaN or infinite" in error and name in error and "1 of its weights" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--dtype", "float99", ["float99", "float32", "bfloat16"]),
        ("--dtype", "nn", ["'nn'", "float32"]),
        ("--device", "gpu", ["'gpu'", "cpu"]),
        ("--device", "cuda", ["no GPU", "--device cpu"]),
        ("--device-map", "nonsense", ["nonsense", "auto"]),
    ],
)
def test_dtype_and_device(
    circuit: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, option: str, value: str, words: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = circuit(option, value).error
    assert all(word in error for word in words), error


# ---- prompts


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["empty", "clean, corrupted, answer, wrong"]),
        ([GOOD], ["one row"]),
        ([GOOD, '{"clean": '], ["line 2", "not JSON"]),
        ([GOOD, "[1]"], ["line 2", "list"]),
        ([GOOD, {k: v for k, v in GOOD.items() if k != "wrong"}], ["line 2", "'wrong'"]),
        ([GOOD, GOOD | {"wrongs": "x"}], ["line 2", "'wrongs'", "'wrong'"]),
        ([GOOD, GOOD | {"answer": 3}], ["line 2", "'answer'", "3"]),
        ([GOOD, OTHER, GOOD | {"clean": "as tom sang", "corrupted": "as tom and mary sang"}], ["line 3", "3", "5"]),
        ([GOOD, OTHER, OTHER | {"corrupted": OTHER["clean"]}], ["line 3", "the same"]),
    ],
)
def test_files_of_prompts(
    circuit: Callable[..., Outcome], rows: Callable[..., Path], lines: list[Any], words: list[str]
) -> None:
    error = circuit(task=rows(*lines)).error
    assert "mine.jsonl" in error and all(word in error for word in words), error


def test_files_that_are_not_there_or_not_text(
    circuit: Callable[..., Outcome], rows: Callable[..., Path], mover: Path, tmp_path: Path
) -> None:
    assert "did you mean 'ioi.jsonl'" in circuit(task=mover / "iio.jsonl").error
    assert "does not exist" in circuit(task=tmp_path / "nowhere" / "a.jsonl").error
    assert ".jsonl or .csv" in circuit(task=mover).error
    (tmp_path / "latin.jsonl").write_bytes('{"clean": "caf\xe9"}\n'.encode("latin-1"))
    assert "not UTF-8" in circuit(task=tmp_path / "latin.jsonl").error


def test_an_answer_of_several_tokens(circuit: Callable[..., Outcome], rows: Callable[..., Path]) -> None:
    task = rows(GOOD | {"answer": " tom and mary"}, OTHER | {"answer": " john and mary"})
    error = circuit("--method", "direct", "--anyway", task=task).error
    assert "mine.jsonl line" in error and "3 tokens" in error and "one" in error


def test_a_task_the_model_cannot_do(circuit: Callable[..., Outcome], rows: Callable[..., Path], tmp_path: Path) -> None:
    flipped = [r | {"answer": r["wrong"], "wrong": r["answer"]} for r in (GOOD, OTHER)]
    error = circuit(task=rows(*flipped)).error
    assert "accuracy 0.00" in error and "--anyway" in error
    assert only_run(tmp_path / "runs").state == "failed"


def test_one_prompt_to_find_with_and_one_to_prove(circuit: Callable[..., Outcome], rows: Callable[..., Path]) -> None:
    # Too few for intervals, which are then left out; not a crash once all is measured.
    outcome = circuit("--compare", "none", "--json", task=rows(GOOD, OTHER))
    assert outcome.code == 0 and outcome.json["n_prove"] == 1
    assert circuit("--compare", "none", task=rows(GOOD, OTHER)).code == 0


# ---- numbers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--n 0", ["n ", "at least 1", "0"]),
        ("--n -3", ["n ", "at least 1", "-3"]),
        ("--n 1000", ["64 rows", "1000"]),
        ("--n 64", ["64 of 64", "0 left"]),
        ("--prove-n 0", ["at least 1", "0"]),
        ("--prove-n 1000", ["32 of 64", "32 left"]),
        ("--target 0", ["--target", "greater than 0"]),
        ("--target 2", ["--target", "2"]),
        ("--target nan", ["--target", "nan"]),
        ("--max-heads 0", ["--max", "greater than 0"]),
        ("--max-heads 3", ["--max", "3"]),
        ("--n 8 --max-heads 0.001", ["heads", "allow more"]),
        ("--n 8 --method eap-ig --steps 0", ["0", "at least 1"]),
        ("--n 8 --budget 0", ["budget", "0", "at least 2"]),
        ("--n 8 --direction sideways", ["direction 'sideways'", "denoise", "noise"]),
        ("--n 8 --level edge --method direct", ["direct", "edge", "eap-ig"]),
        ("--task-set metric=accurate", ["metric 'accurate'", "logit-diff"]),
        ("--task-set scoring=some", ["scoring 'some'", "sequence"]),
    ],
)
def test_numbers_out_of_range(circuit: Callable[..., Outcome], arguments: str, words: list[str]) -> None:
    error = circuit(*arguments.split()).error
    assert all(word in error for word in words), error


def test_drawn_tasks_take_no_fewer_than_one_prompt(circuit: Callable[..., Outcome]) -> None:
    assert "n must be a whole number of at least 1, not 0" in circuit("--n", 0, task="ioi").error
    assert "order must be one of 'both', 'abba', 'baba'" in circuit("--task-set", "order=cab", task="ioi").error


# ---- folders and runs


def test_folders_that_cannot_be_written(mover: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    common = ("--model", mover, "--task", mover / "ioi.jsonl", *SMALL)
    assert "is a file, not a folder" in vesalius("circuit", *common, "--out", tmp_path / "file").error
    for out in (tmp_path / "file" / "inside", Path("/proc/nowhere")):
        error = vesalius("circuit", *common, "--out", out).error
        assert str(out) in error and "--out" in error
    for command in ("check", "runs", "report"):
        arguments = (mover,) if command == "check" else ()
        assert vesalius(command, *arguments, "--out", tmp_path / "file").error
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_loses_nothing(
    circuit: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync = [], os.fsync

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device; free some space" in circuit(*SMALL).error
    run = only_run(tmp_path / "runs")
    kept = {p: p.stat().st_mtime_ns for p in (run.folder / "checkpoints").rglob("*.npz")}
    assert kept and run.state in ("failed", "interrupted")
    assert circuit(*SMALL).code == 0 and only_run(tmp_path / "runs").done
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_runs_that_are_not_there(tmp_path: Path, first: Outcome, runs: Path) -> None:
    assert "no run 'nosuch'" in vesalius("report", "nosuch", "--out", runs).error
    assert "no runs in" in vesalius("report", "--out", tmp_path).error
    name = Path(first.json["run"]).name
    near = name.replace("mover", "moover")
    assert name in vesalius("report", near, "--out", runs).error
    assert "no run 'nosuch'" in vesalius("compare", name, "nosuch", "--out", runs).error


def test_comparing_what_cannot_be_compared(first: Outcome, runs: Path, mover: Path, tmp_path: Path) -> None:
    run = first.json["run"]
    assert vesalius("compare", run, run, "--out", tmp_path).code == 0
    error = vesalius("compare", run, only_run(tmp_path, "compare").folder).error
    assert "vesalius compare" in error and "circuit" in error
    edges = ("--level", "edge", "--method", "eap", "--n", 4, "--prove-n", 4, "--ablations", "counterfactual")
    common = ("--model", mover, "--task", mover / "ioi.jsonl")
    assert vesalius("circuit", *common, *edges, "--out", tmp_path).code == 0
    error = vesalius("compare", run, only_run(tmp_path, "circuit").folder, "--out", tmp_path).error
    assert "edge scores" in error and "one level" in error


def test_a_damaged_run_is_refused_and_made_again(first: Outcome, mover: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(first.json["run"], tmp_path / Path(first.json["run"]).name))
    table = folder / "scores.parquet"
    table.write_bytes(table.read_bytes()[:-200] + bytes(200))
    for command in (("report", folder), ("compare", folder, folder)):
        error = vesalius(*command).error
        assert "scores.parquet" in error and "run the same command again" in error
    row = vesalius("runs", "--out", tmp_path, "--json").json[0]
    assert row["run"] == folder.name
    again = vesalius("circuit", "--model", mover, "--task", mover / "ioi.jsonl", "--out", tmp_path, *SMALL)
    assert again.code == 0 and Run.open(folder).done
    assert vesalius("report", folder).code == 0


# ---- memory


def test_running_out_of_memory_says_what_to_lower(
    circuit: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = GPT2MLP.forward, []

    def greedy(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 60:
            torch.empty(1 << 60, dtype=torch.uint8)  # the allocator's own error, of more than any machine has
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GPT2MLP, "forward", greedy)
        error = circuit(*SMALL).error
    assert error.startswith("out of memory")
    assert all(word in error for word in ("--n", "--memory", "--dtype"))
    run = only_run(tmp_path / "runs")
    assert run.state == "failed" and "out of memory" in run.status["error"]
    assert circuit(*SMALL).code == 0 and only_run(tmp_path / "runs").done


def test_out_of_memory_where_nothing_expects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")):

        def fail(error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("vesalius.model.sources.listing", fail)
        assert "out of memory" in vesalius("models").error


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr("vesalius.model.sources.listing", fail)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        vesalius("models")


@pytest.mark.parametrize("given", [("--ratio=0.1", "--ratio", "x"), ("--ratio", "0.1", "--ratio=x"), ("--ratio=x",)])
def test_of_an_option_that_is_repeated_the_last_value_is_told(given: tuple[str, ...]) -> None:
    failed = vesalius("prune", *given)
    assert failed.code == 2 and "not 'x' (see" in failed.error
