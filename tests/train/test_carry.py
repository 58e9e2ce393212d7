"""A recurrent model's state goes on from batch to batch where the text does, and nowhere else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import small, steps_of, weights
from transformers import DynamicCache

from vesalius import checkpoints
from vesalius.errors import VesaliusError
from vesalius.train.assembly import assemble
from vesalius.train.carry import CARRIED, Carry
from vesalius.train.parallel import World
from vesalius.train.recipe import Recipe
from vesalius.train.running import train
from vesalius.train.trainer import Trainer

QLSTM = {"preset": "tiny-qlstm", "architecture": {"layers": 2, "d_model": 16, "heads": 2}}


def recipe_of(text: Path, model: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    settings = {"data__shuffle": "stream", "data__rows": 4, "data__length": 16, "model": model or QLSTM} | changes
    return small(text, **settings)


def trainer_of(text: Path, **changes: Any) -> Trainer:
    trainer = assemble(recipe_of(text, **changes), World.single()).trainer
    trainer.model.eval()
    return trainer


def whole_pass(trainer: Trainer, steps: int) -> torch.Tensor:
    """Sum of losses of each step, (step,), from one pass over the text of all steps together, weights unchanged."""
    batches = [torch.from_numpy(trainer.source.batch(s).ids) for s in range(steps)]
    ids = torch.cat([batches[0], *[b[:, 1:] for b in batches[1:]]], dim=1)
    cache = DynamicCache(config=trainer.model.config)
    nll = -trainer.model(ids[:, :-1], past_key_values=cache).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    return nll[..., 0].unflatten(1, (steps, -1)).sum((0, 2))


@pytest.mark.parametrize("preset", ["tiny-qlstm", "tiny-lstm"])
def test_steps_in_order_are_one_pass_over_the_text(text: Path, preset: str) -> None:
    trainer = trainer_of(text, model={**QLSTM, "preset": preset}, optimizer={"name": "adamw", "lr": 1e-30})
    with torch.no_grad():
        expected = whole_pass(trainer, 4)
    found = []
    for step in range(4):
        sums, _ = trainer.gradients(step)
        trainer.carry.commit()  # type: ignore[union-attr]
        found.append(float(sums["loss"]))
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
    forgetful, _ = trainer_of(text, model={**QLSTM, "preset": preset}).gradients(3)
    assert abs(float(forgetful["loss"]) - found[3]) > 1e-3


def test_a_step_asked_for_twice_is_the_same_and_micro_batches_change_nothing(text: Path) -> None:
    one, parts = trainer_of(text), trainer_of(text, accumulate=4)
    for trainer in (one, parts):
        for _ in range(3):
            trainer.step()
        trainer.gradients(3)
        trainer.optimizer.zero_grad()
        trainer.gradients(3)
    for a, b in zip(one.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_rows_that_do_not_go_on_start_from_nothing(text: Path) -> None:
    """At the end of an epoch the streams move up a row, so that all but the last go on."""
    trainer = trainer_of(text, data__first_tokens=4 * 16 * 3)
    order: Any = trainer.source
    assert [order.carries(s).tolist() for s in (0, 1, 3)] == [[False] * 4, [True] * 4, [True, True, True, False]]
    for _ in range(3):
        trainer.step()
    cache = trainer.carry.cache(3, slice(0, 4))  # type: ignore[union-attr]
    state = cache.layers[0].recurrent_states[0]
    assert state[3].abs().sum() == 0
    assert torch.equal(state[:3], trainer.carry.before[0][:3])  # type: ignore[union-attr]
    assert state[:3].abs().sum(-1).min() > 0


def test_state_is_carried_only_where_there_is_state_and_order(text: Path) -> None:
    assert trainer_of(text, data__shuffle="rows").carry is None
    gpt = {"preset": "tiny-gpt2", "architecture": {"layers": 1, "d_model": 16, "heads": 2}}
    assert trainer_of(text, model=gpt).carry is None
    trainer = trainer_of(text)
    two = World(0, 2, type("Mesh", (), {"__getitem__": lambda s, k: s, "size": lambda s: 2})(), torch.device("cpu"), "")
    with pytest.raises(VesaliusError, match="cannot be carried under tensor parallelism; use --tensor-parallel 1"):
        Carry.of(trainer.model, trainer.source, two)


def test_a_run_that_was_killed_carries_what_it_would_have_carried(text: Path, tmp_path: Path) -> None:
    recipe = recipe_of(text)
    whole = train(recipe, tmp_path / "whole")
    stopped = tmp_path / "stopped" / whole.name
    shutil.copytree(whole, stopped)
    for step in checkpoints.steps_in(stopped / checkpoints.FOLDER):
        if step > 5:
            shutil.rmtree(stopped / checkpoints.FOLDER / checkpoints.name_of(step))
    state = checkpoints.load_tensors(stopped / checkpoints.FOLDER / "step5" / checkpoints.STATE)
    assert state[f"{CARRIED}0"].abs().sum() > 0
    assert train(recipe, tmp_path / "stopped") == stopped
    assert steps_of(stopped) == steps_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--fsdp"]])
def test_two_processes_carry_their_own_rows(text: Path, tmp_path: Path, flags: list[str]) -> None:
    """Through the command line, an evaluation before each save included (it leaves FSDP's parameters gathered)."""
    recipe = recipe_of(text, steps=6, checkpoints__every=6, checkpoints__log=False)
    alone = train(recipe, tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(recipe.yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "vesalius", "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two"), *flags]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shared = tmp_path / "two" / alone.name
    for name, expected in weights(alone, 6).items():
        assert torch.allclose(weights(shared, 6)[name], expected, atol=1e-5), name
    first, second = (
        checkpoints.load_tensors(r / checkpoints.FOLDER / "step6" / checkpoints.STATE) for r in (alone, shared)
    )
    assert torch.allclose(first[f"{CARRIED}1"], second[f"{CARRIED}1"], atol=1e-5)
