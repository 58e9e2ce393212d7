"""`vesalius train`, `data`, `race` and `dynamics` as a user meets them: killed, short of disk, given nonsense."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from cli_helpers import Outcome, beside, only_run, vesalius

from vesalius import checkpoints
from vesalius.runs import Run

PATIENCE_S = 180
# The real command; with a number first, each step takes that long, so that a signal meets it at work.
SLOW = """
import sys, time
from vesalius.train.trainer import Trainer
nap, step = float(sys.argv.pop(1)), Trainer.step
def slow(self):
    time.sleep(nap)
    return step(self)
Trainer.step = slow
from vesalius.cli import main
main()
"""
# After its second checkpoint the process may write no file larger than 20 kB: what a full disk does.
FULL = """
import resource, sys
from vesalius import checkpoints
write, count = checkpoints.write, 0
def limited(*args, **kwargs):
    global count
    count += 1
    if count == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        return write(*args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.write = limited
from vesalius.cli import main
main()
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VESALIUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents of chained words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    lines = [{"id": f"doc{i}", "text": " ".join(rng.choices(words, k=80))} for i in range(40)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


@pytest.fixture(scope="module")
def recipe(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    content = {
        "name": "small",
        "model": {"preset": "tiny-pythia", "architecture": {"layers": 1, "d_model": 32, "heads": 2}},
        "data": {"corpus": str(text), "tokenizer": {"kind": "bpe", "vocab_size": 300}, "length": 16, "rows": 4},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "dropout": 0.1,
        "steps": 40,
        "checkpoints": {"every": 10, "log": False},
        "evaluate": {"every": 20, "batches": 1},
    }
    content["data"]["held_out"] = 0.2  # type: ignore[index]
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, in a process of its own (as many threads as the disturbed ones)."""
    out = tmp_path_factory.mktemp("whole")
    finish(beside(SLOW, 0, "train", recipe, "--out", out))
    return only_run(out).folder


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    return Outcome(process.returncode, out, err)


def files(run: Path) -> dict[int, dict[str, str]]:
    """sha256 of every file of every checkpoint, each checked against its manifest."""
    place = run / checkpoints.FOLDER
    found = {}
    for step in checkpoints.steps_in(place):
        folder = place / checkpoints.name_of(step)
        assert not checkpoints.troubles(folder)
        found[step] = {n: e["sha256"] for n, e in checkpoints.manifest(folder).items()}
    return found


def wait_for(step: int, out: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not list(out.glob(f"*/steps/step{step}/manifest.json")):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"step {step} was not there in time: {process.communicate()}")
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_ends_with_the_bytes_of_one_left_alone(
    recipe: Path, whole: Path, tmp_path: Path, how: signal.Signals
) -> None:
    process = beside(SLOW, 0.05, "train", recipe, "--out", tmp_path)
    wait_for(20, tmp_path, process)
    time.sleep(random.Random(how).uniform(0, 0.3))
    process.send_signal(how)
    out, err = process.communicate(timeout=PATIENCE_S)
    run = only_run(tmp_path)
    assert run.state == "interrupted"
    kept = list(files(run.folder))
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert kept == [0, 10, 20]
    else:
        assert Outcome(process.returncode, out, err).error.startswith("interrupted")
        assert kept[:3] == [0, 10, 20] and len(kept) <= 5  # and, between two of the schedule, where it was stopped
    again = finish(beside(SLOW, 0, "train", "--resume", run.folder))
    assert "going on from step" in again.err
    assert files(run.folder) == files(whole)  # the one kept in between is gone
    assert list(Run.open(run.folder).table("log")["step"]) == list(range(40))
    assert Run.open(run.folder).done


def test_a_full_disk_leaves_the_checkpoints_before(recipe: Path, whole: Path, tmp_path: Path) -> None:
    process = beside(FULL, "train", recipe, "--out", tmp_path)
    out, err = process.communicate(timeout=PATIENCE_S)
    refusal = Outcome(process.returncode, out, err).error
    assert "cannot save" in refusal and "step20" in refusal and "checkpoints saved before are untouched" in refusal
    run = only_run(tmp_path)
    assert list(files(run.folder)) == [0, 10]
    assert not list(run.folder.rglob("*.part"))
    finish(beside(SLOW, 0, "train", recipe, "--out", tmp_path))
    assert files(run.folder) == files(whole)


@pytest.mark.parametrize("damage", ["short", "changed", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_made_again(whole: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / whole.name
    shutil.copytree(whole, run)
    path = run / "steps" / "step40" / ("manifest.json" if damage == "manifest" else "model.safetensors")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        changed = {"short": data[:-1], "changed": data[:-1] + bytes([data[-1] ^ 1]), "manifest": data[:40]}
        path.write_bytes(changed[damage])
    refusal = vesalius("circuit", "--model", f"{run}@step40", "--task", "induction", "--out", tmp_path).error
    assert path.name in refusal and ("0, 10, 20, 30" in refusal or damage == "manifest")
    if damage != "changed":  # once is enough
        return
    again = finish(beside(SLOW, 0, "train", "--resume", run))
    assert "made again" in again.err and "going on from step 30" in again.err
    assert files(run) == files(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown recipe 'nothing'"),
        ([], "name a recipe file, or --preset NAME"),
        (["--preset", "inducton"], "did you mean 'induction'"),
        (["--resume", "nothing"], "no run 'nothing'"),
        (["RECIPE", "--set", "optimizer.lr"], "--set optimizer.lr: not of the form KEY=VALUE"),
        (["RECIPE", "--set", "optimizer.learning_rate=1"], "unknown setting of optimizer adamw 'learning_rate'"),
        (["RECIPE", "--set", "optimizer=adann"], "unknown optimizer 'adann'; did you mean 'adan'"),
        (["RECIPE", "--set", "objective=causal"], "unknown objective 'causal'; did you mean 'causal-lm'"),
        (["RECIPE", "--set", "schedule=cosin"], "unknown schedule 'cosin'; did you mean 'cosine'"),
        (["RECIPE", "--set", "model.preset=tiny-pithia"], "did you mean 'tiny-pythia'"),
        (["RECIPE", "--set", "model.architecture.heads=3"], "heads=3 does not divide d_model=32"),
        (["RECIPE", "--set", "data.corpus=nowhere.txt"], "nowhere.txt"),
        (["RECIPE", "--set", "data.corpus=bible-kjw"], "did you mean 'bible-kjv'"),
        (["RECIPE", "--set", "data.corpus=EMPTY"], "empty"),
        (["RECIPE", "--set", "data.corpus=BINARY"], "not text"),
        (["RECIPE", "--set", "data.held_out=0.000001"], "holds out nothing"),
        (["RECIPE", "--set", "data.first_tokens=9999999"], "ask for at most that"),
        (["RECIPE", "--set", "accumulate=3"], "4 rows a batch cannot be shared"),
        (["RECIPE", "--set", "precision=float8"], "precision"),
        (["RECIPE", "--tensor-parallel", "2"], "torchrun --nproc-per-node 2"),
        (["--branch", "small@step10", "--preset", "induction"], "--branch takes the recipe of the run"),
        (["--branch", "small"], "name a step, as in small@step512"),
        (["RECIPE", "--resume", "small"], "--resume goes on with a run as it is"),
    ],
)
def test_what_cannot_be_is_one_clear_line(arguments: list[str], message: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"text \xff\xfe\x00 more")
    names = {"RECIPE": str(recipe), "EMPTY": str(tmp_path / "empty.txt"), "BINARY": str(tmp_path / "binary.txt")}
    given = [a.replace("EMPTY", names["EMPTY"]).replace("BINARY", names["BINARY"]) for a in arguments]
    given = [names["RECIPE"] if a == "RECIPE" else a for a in given]
    assert message in vesalius("train", *given, "--out", tmp_path / "runs").error


def test_a_branch_by_one_command(whole: Path, tmp_path: Path) -> None:
    found = vesalius(
        "train", "--branch", f"{whole}@step20", "--set", "optimizer.lr=0.001", "--out", tmp_path, "--json"
    ).json
    assert found["checkpoints"] == [20, 30, 40]
    data = Run.open(Path(found["run"])).json("data")
    assert data["lineage"] == {"parent": str(whole), "step": 20}
    name = "model.safetensors"
    assert files(Path(found["run"]))[20][name] == files(whole)[20][name]
    assert files(Path(found["run"]))[40][name] != files(whole)[40][name]


def test_the_text_of_a_step_and_the_steps_of_a_text(whole: Path, text: Path) -> None:
    shown = vesalius("data", whole, "--step", 7, "--json", "--verify").json
    assert len(shown["rows"]) == 4 and len(shown["sha256"]) == 64
    documents = [json.loads(line) for line in text.read_text().splitlines()]
    name = shown["rows"][0]["documents"].split(" [")[0]
    words = next(d["text"] for d in documents if d["id"] == name)
    piece = shown["rows"][0]["text"].split("<|endoftext|>")[0].strip()
    assert piece in words
    inner = " ".join(piece.split()[1:3])
    seen = vesalius("data", whole, "--find", inner, "--json").json["seen"]
    assert any(row["id"] == name and row["step"] <= 7 <= row["last_step"] for row in seen)
    assert vesalius("data", whole, "--document", name, "--until", 0, "--json").json["times"] == 0
    assert "did you mean 'doc1'" in vesalius("data", whole, "--document", "dok1").error
    assert "steps 0 to 39" in vesalius("data", whole, "--step", 40).error
    assert "one of --step, --find and --document" in vesalius("data", whole).error


def test_a_race_reports_every_run_and_judges_as_training_does(recipe: Path, tmp_path: Path) -> None:
    command = ("race", recipe, "--optimizers", "adamw,sgdm", "--grid", "0.5,1", "--seeds", "3,4", "--set", "steps=15")
    found = vesalius(*command, "--out", tmp_path, "--json").json
    laps = {(r["arm"], r["factor"], r["seed"]): r for r in found["laps"]}
    assert len(laps) == 6 and {r["steps"] for r in laps.values()} == {15}
    for arm in ("adamw", "sgdm"):
        best = min((laps[arm, f, 3]["held_out"], f) for f in (0.5, 1))[1]
        chosen = [laps[arm, best, seed]["held_out"] for seed in (3, 4)]
        row = next(r for r in found["standings"] if r["arm"] == arm)
        assert row["loss"] == pytest.approx(sum(chosen) / 2) and (row["low"], row["high"]) == (min(chosen), max(chosen))
    assert [r["loss"] for r in found["standings"]] == sorted(r["loss"] for r in found["standings"])
    alone = vesalius("train", recipe, "--set", "steps=15", "--set", "seed=3", "--out", tmp_path, "--json").json
    assert laps["adamw", 1, 3]["held_out"] == pytest.approx(alone["held_out"], abs=1e-5)
    assert "two or more different" in vesalius("race", recipe, "--optimizers", "adamw").error
    assert "unknown optimizer 'adm'" in vesalius("race", recipe, "--optimizers", "adm,adan").error
    far = vesalius("race", recipe, "--optimizers", "adamw,adan", "--compute-class", "5 parsecs")
    assert "'5 parsecs' is no compute class" in far.error


def test_dynamics_agree_with_circuit(whole: Path, tmp_path: Path) -> None:
    arguments = ("--task", "induction", "--task-set", "length=6", "--n", 8, "--out", tmp_path)
    found = vesalius("dynamics", whole, *arguments, "--steps", "0,40", "--json").json
    assert [row["step"] for row in found["numbers"]] == [0, 40]
    scores = Run.open(Path(found["run_folder"])).table("scores_by_step")
    circuit = ("circuit", "--model", f"{whole}@step40", "--anyway", "--compare", "none", "--max-heads", 1, "--json")
    other = vesalius(*circuit, *arguments).json
    mine = scores[scores["step"] == 40].set_index("part")["score"]
    theirs = Run.open(Path(other["run"])).scores().to_frame().set_index("part")["score"]
    assert sorted(mine.index) == sorted(theirs.index)
    assert mine.to_dict() == pytest.approx(theirs.to_dict(), abs=2e-4)  # batches of other sizes
    assert "no checkpoint of step 7" in vesalius("dynamics", whole, "--steps", "7").error
    assert "not a training run" in vesalius("dynamics", other["run"]).error


def test_a_second_signal_keeps_nothing_of_a_step_half_made(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Both signals fall between the update and its being counted: a checkpoint of that moment would be a wrong one."""
    script = """
import os, signal
from vesalius.train import trainer
make = trainer.Trainer.__init__
def wrapped(self, *args, **kwargs):
    make(self, *args, **kwargs)
    update = self.optimizer.step
    def step(*a, **k):
        found = update(*a, **k)
        if self.done == 14:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return found
    self.optimizer.step = step
trainer.Trainer.__init__ = wrapped
from vesalius.cli import main
main()
"""
    process = beside(script, "train", recipe, "--out", tmp_path)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert Outcome(process.returncode, out, err).error.startswith("interrupted")
    run = only_run(tmp_path).folder
    assert list(files(run)) == [0, 10]
    finish(beside(SLOW, 0, "train", recipe, "--out", tmp_path))
    assert files(run) == files(whole)


def test_a_changed_corpus_answers_for_no_run(recipe: Path, text: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    shutil.copy(text, mine)
    command = ("train", recipe, "--set", f"data.corpus={mine}", "--set", "steps=4", "--out", tmp_path)
    run = vesalius(*command, "--json").json["run"]
    mine.write_text(mine.read_text().replace("a", "b"))
    for again in (
        command,
        ("data", run, "--step", 0),
        ("dynamics", run, "--task", "none"),
        ("memorize", run, "--k", 4),
    ):
        assert "no longer what it was trained on" in vesalius(*again).error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer={name: adamw, lr: nan}", "optimizer.lr"),
        ("optimizer.lr=-1", "give a number of 0 or more"),
        ("optimizer.lr=true", "give a number"),
        ("optimizer.betas=5", "optimizer.betas is 5"),
        ("optimizer.model=3", "optimizer.model"),
        ("objective={name: causal-lm, needs: 1}", "objective.needs"),
        ("schedule={name: wsd, decay: x}", "schedule cannot be"),
        ("schedule.warmup=2", "warmup"),
        ("data.tokenizer={kind: bpe, vocab_size: x}", "data.tokenizer cannot be"),
        ("data.tokenizer={kind: bpe, documents: 3}", "data.tokenizer.documents"),
        ("data.corpus=''", "corpus is empty"),
        ("parameters={lora: {r: 2, use_dora: true}}", "use_dora is not offered"),
        ("parameters={lora: {r: 2, modules_to_save: [embed_in]}}", "modules_to_save is not offered"),
        ("parameters={lora: {r: 2}, only: [L0]}", "leave out roles, only and freeze"),
        ("parameters={only: []}", "parameters.only"),
        ("checkpoints={at: [-1]}", "checkpoints.at has step -1"),
        ("branch={run: x, step: 50}", "ends before the branch begins"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_key(
    recipe: Path, tmp_path: Path, change: str, message: str
) -> None:
    assert message in vesalius("train", recipe, "--set", change, "--out", tmp_path).error


def test_numbers_and_doubles_in_a_recipe_file(recipe: Path, tmp_path: Path) -> None:
    from vesalius.train.recipe import read_recipe

    path = tmp_path / "r.yaml"
    path.write_text(
        f"preset: tiny-pythia\noptimizer: {{name: adamw, lr: 1e-3, eps: 1E-8}}\ndata: {{corpus: {recipe}}}\n"
    )
    assert read_recipe(path).optimizer.settings["lr"] == 0.001 and read_recipe(path).optimizer.settings["eps"] == 1e-8
    path.write_text("preset: tiny-pythia\nsteps: 3\nsteps: 4\n")
    assert "'steps' stands twice, the second time in line 3" in vesalius("train", path).error


def test_a_renamed_run_is_not_begun_again(whole: Path, tmp_path: Path) -> None:
    moved = tmp_path / "another-name"
    shutil.copytree(whole, moved)
    assert f"call it {whole.name} again" in vesalius("train", "--resume", moved).error
