"""A sitting of a training run: the trainer's steps, a checkpoint every minute, and going on from the last one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from vesalius import checkpoints
from vesalius.checkpoints import load_tensors, save_tensors
from vesalius.features.dictionaries.reading import Tell
from vesalius.runs import Run
from vesalius.train.trainer import Trainer

SAVE_SECONDS = 60.0
TELL_SECONDS = 10.0


def train(
    run: Run, trainer: Trainer, steps: int, tell: Tell, after: Callable[[int], None] | None = None
) -> pd.DataFrame:
    """Makes all steps, from wherever an earlier sitting stopped; returns the log, one row a step.

    Args:
        run: keeps `log.parquet` and, until `forget`, checkpoints.
        after: called with the number of updates made after each, before anything is saved.
    """
    place = run.folder / checkpoints.FOLDER
    log: list[dict[str, Any]] = []
    step, _ = checkpoints.latest(place)
    if step is not None:
        trainer.load(place / checkpoints.name_of(step))
        old = run.table("log")
        log = old[old["step"] < step].to_dict("records")  # type: ignore[assignment]
        tell(f"going on from step {step}", None)
    first, began, saved, told = trainer.done, time.monotonic(), time.monotonic(), 0.0

    def keep() -> None:
        run.save_table("log", pd.DataFrame(log))  # first, so that it never lacks a step that was made
        for old_step in checkpoints.steps_in(place):
            if old_step != trainer.done:
                shutil.rmtree(place / checkpoints.name_of(old_step), ignore_errors=True)
        trainer.save(place / checkpoints.name_of(trainer.done), {})

    with run.stage("training", steps) as stage:
        for made in trainer.steps(steps):
            row = {k: v for k, v in asdict(made).items() if k != "logs"}
            log.append({**row, **made.logs})
            if after is not None:
                after(trainer.done)
            now, done = time.monotonic(), trainer.done
            if now - told > TELL_SECONDS or done == steps:
                told = now
                left = (steps - done) * (now - began) / max(done - first, 1)
                tell(f"training, step {done:,}/{steps:,}, loss {made.loss:.4g}, {left:.0f} s left", done / steps)
            if now - saved > SAVE_SECONDS:
                keep()
                saved = time.monotonic()
            stage.update(done)
    run.save_table("log", pd.DataFrame(log))
    return pd.DataFrame(log)


def forget(run: Run) -> None:
    """Removes the checkpoints of a finished run."""
    shutil.rmtree(run.folder / checkpoints.FOLDER, ignore_errors=True)


class Kept:
    """How the trainer keeps a module that is no transformers model: its tensors in one file."""

    TENSORS = "module.safetensors"
    config: Any = None

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor]) -> None:
        """The tensors alone."""
        save_tensors(Path(folder) / self.TENSORS, dict(state_dict))

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: Any) -> Any:
        """What `save_pretrained` wrote."""
        return _Saved(load_tensors(Path(folder) / cls.TENSORS))


class _Saved:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors
