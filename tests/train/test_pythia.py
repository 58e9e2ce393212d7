"""Pythia's promises, exactly: what went into the model is what the record says, and a kill leaves no trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import STEPS, small, steps_of, weights

from vesalius import checkpoints
from vesalius.corpus.order import Order
from vesalius.runs import Run
from vesalius.train.assembly import data_of
from vesalius.train.running import recipe_of, train

PATIENCE_S = 240  # on a busy machine

# Trains by a recipe, and writes what each process's model read, (step, row, position), to OUT.RANK.npy.
READER = """
import os, sys
import numpy as np, torch
from vesalius.train.assembly import assemble
from vesalius.train.parallel import World
from vesalius.train.recipe import read_recipe
torch.set_num_threads(1)
recipe, out = read_recipe(sys.argv[1]), sys.argv[2]
with World.start(device="cpu") as world:
    trainer, read, steps = assemble(recipe, world).trainer, [], []
    trainer.model.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"].numpy()), with_kwargs=True)
    for _ in trainer.steps(recipe.steps):
        steps.append(np.concatenate(read))
        read.clear()
    np.save(f"{out}.{world.rank}.npy", np.stack(steps))
"""

# The command, killed by the kernel just before it makes step 7.
KILLED = """
import os, signal
from vesalius.train.trainer import Trainer
step = Trainer.step
def dying(self):
    if self.done == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer.step = dying
from vesalius.cli import main
main()
"""


def call(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    given = [sys.executable, *map(str, words)]
    return subprocess.run(given, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize("accumulate, processes", [(4, 1), (2, 2)])
def test_what_the_model_read_is_what_the_record_says(
    text: Path, tmp_path: Path, accumulate: int, processes: int
) -> None:
    recipe = small(text, accumulate=accumulate)
    (tmp_path / "recipe.yaml").write_text(recipe.yaml())
    (tmp_path / "reader.py").write_text(READER)
    out = tmp_path / "read"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2] if processes == 2 else []
    done = call(*launcher, tmp_path / "reader.py", tmp_path / "recipe.yaml", out)
    assert not done.returncode, done.stderr
    read = np.concatenate([np.load(f"{out}.{rank}.npy") for rank in range(processes)], axis=1)  # (step, row, position)
    run = Run.open(train(small(text), tmp_path))  # a record of another run, which shares the work otherwise
    store = data_of(recipe_of(run)).store
    assert store is not None
    order = Order.from_description(run.json("data"), store)
    assert read.shape == (STEPS, 8, 24)
    for step in (0, 1, 7, STEPS - 1):
        assert np.array_equal(read[step], order.batch(step).ids[:, :-1])
    assert not np.array_equal(read[0], read[1])
    assert not np.array_equal(read[0], data_of(small(text, seed=8)).source.batch(0).ids[:, :-1])


def test_a_killed_run_ends_with_the_bytes_of_one_left_alone(text: Path, tmp_path: Path) -> None:
    recipe, path = small(text, dropout=0.1), tmp_path / "recipe.yaml"
    path.write_text(recipe.yaml())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(recipe, tmp_path / "whole")
        done = call("-c", KILLED, "train", path, "--threads", 1, "--out", tmp_path / "killed")
        assert done.returncode == -signal.SIGKILL, done.stderr
        (killed,) = (tmp_path / "killed").iterdir()
        assert checkpoints.steps_in(killed / checkpoints.FOLDER) == [0, 1, 2, 4, 5]
        assert train(recipe, tmp_path / "killed") == killed
    finally:
        torch.set_num_threads(threads)
    assert steps_of(killed) == steps_of(whole)
    states = [checkpoints.load_tensors(r / "steps" / "step12" / checkpoints.STATE) for r in (whole, killed)]
    assert states[0] and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(torch.equal(t, weights(killed, 12)[n]) for n, t in weights(whole, 12).items())
    logs = [Run.open(r).table("log") for r in (whole, killed)]
    assert list(logs[1]["step"]) == list(range(STEPS))
    assert logs[0]["loss"].equals(logs[1]["loss"])
