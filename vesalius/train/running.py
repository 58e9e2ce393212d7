"""A recipe as a run: started, watched, killed, gone on with, finished.

    RUN/request.json      the whole recipe
    RUN/recipe.yaml       the same for people
    RUN/steps/step512/    checkpoints (see `vesalius.checkpoints`)
    RUN/data.json         what decides the batches: store, order, tokenizer, with fingerprints
    RUN/log.parquet       every step: loss, learning rate, gradient norm, tokens, seconds
    RUN/evaluation.parquet  held-out loss by step
    RUN/summary.json      the end: losses, bits per byte, the compute ledger

A run goes on from its last whole checkpoint. Between scheduled checkpoints one more is kept every ten minutes, and one
when the run is interrupted; it goes when the next scheduled one is there.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from vesalius import checkpoints
from vesalius.errors import RunError
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.records import plain, versions
from vesalius.run_index import find_run
from vesalius.runs import Run, folder_of
from vesalius.train.assembly import Data, assemble, data_of
from vesalius.train.ledger import Ledger, flops_per_step, six_n_t
from vesalius.train.objectives.samples import model_inputs
from vesalius.train.optimizers import state_bytes
from vesalius.train.parallel import World, unwrap
from vesalius.train.recipe import Recipe
from vesalius.train.schedules import checkpoint_steps
from vesalius.train.trainer import StepLog, deterministic, is_exact

RESCUE_SECONDS = 600.0
SHOW_SECONDS = 20.0  # between two drawings of the live curve
PROBES = 3  # gradients timed each way to tell what determinism costs


class Watcher(Protocol):
    """Who is told how a run goes."""

    def message(self, text: str) -> None:
        """Something that takes a while begins, or something to know."""
        ...

    def step(self, log: StepLog, total: int, ledger: Ledger, held_out: float | None) -> None:
        """A step was made."""
        ...

    def saved(self, run: Run, step: int) -> None:
        """New numbers lie in the run's folder."""
        ...


class Silent:
    """Tells nobody."""

    def message(self, text: str) -> None:
        return

    def step(self, log: StepLog, total: int, ledger: Ledger, held_out: float | None) -> None:
        return

    def saved(self, run: Run, step: int) -> None:
        return


def request_of(recipe: Recipe) -> dict[str, Any]:
    """What names the run: the recipe, whole."""
    return {"command": "train", "model": recipe.name, "recipe": recipe.model_dump(mode="json")}


def recipe_of(run: Run) -> Recipe:
    """The recipe of a training run."""
    if run.request.get("command") != "train":
        raise RunError(f"{run.folder} is a run of `vesalius {run.request.get('command')}`, not a training run")
    return Recipe.model_validate(run.request["recipe"])


def train(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    fresh: bool = False,
    command_line: str = "",
    watcher: Watcher | None = None,
    world: World | None = None,
    strategy: str = "ddp",
    sequence_parallel: bool = False,
) -> Path:
    """Trains by a recipe, going on where an earlier sitting stopped; returns the run's folder.

    Args:
        recipe: see `read_recipe`.
        out: the folder that holds runs.
        fresh: forget what an earlier sitting left.
        command_line: shown in the report.
        watcher: told of steps and checkpoints.
        world: the processes that share the work (`World.start()` under torchrun).
        strategy: how data ranks share it: ddp or fsdp.
        sequence_parallel: with tensor parallelism, also shard what lies between the split matrices.

    Raises:
        VesaliusError: naming what in the recipe, the data, the disk or the checkpoint is at fault.
    """
    world, watcher = world or World.single(), watcher or Silent()
    request = request_of(recipe)
    if not world.is_main:
        sitting = _Sitting(None, folder_of(request, out), recipe, world, watcher, strategy, sequence_parallel)
        if world.agree(False):  # waits for the main process, which has the run's folder then and decides
            sitting.go()
        return sitting.folder
    with Run.start(request, out, fresh, command_line) as run:
        if fresh:
            shutil.rmtree(run.folder / checkpoints.FOLDER, ignore_errors=True)
        sitting = _Sitting(run, run.folder, recipe, world, watcher, strategy, sequence_parallel)
        if world.agree(not (run.done and sitting.finished)):
            sitting.go()
        elif run.has("data.json"):
            _same_data(run.json("data"), data_of(recipe, watcher.message).description, run.folder)
    return run.folder


def data_of_run(run: Run, tell: Callable[[str], None] = lambda text: None) -> Data:
    """The data a run was trained on.

    Raises:
        RunError: if the corpus or tokenizer is no longer what it was.
    """
    made = data_of(recipe_of(run), tell)
    if run.has("data.json"):
        _same_data(run.json("data"), made.description, run.folder)
    return made


def _same_data(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    if any(then.get(k) != v for k, v in plain(now).items()):
        raise RunError(
            f"the data of {folder} is no longer what it was trained on (its fingerprint differs); bring back the "
            "corpus and tokenizer, or start again with --fresh"
        )


class _Sitting:
    """One process's part in one sitting of a run; `run` is there on the main process alone."""

    def __init__(
        self,
        run: Run | None,
        folder: Path,
        recipe: Recipe,
        world: World,
        watcher: Watcher,
        strategy: str,
        sequence_parallel: bool,
    ) -> None:
        self.run, self.folder, self.recipe, self.world, self.watcher = run, folder, recipe, world, watcher
        self.strategy, self.sequence_parallel = strategy, sequence_parallel
        self.steps = folder / checkpoints.FOLDER
        plan = recipe.checkpoints
        self.schedule = {s for s in checkpoint_steps(recipe.steps, plan.every, plan.log)} | {recipe.steps}
        self.schedule |= {s for s in plan.at if s <= recipe.steps}
        if recipe.branch is not None:
            self.schedule = {s for s in self.schedule if s >= recipe.branch.step}
        self.ledger = Ledger()
        self.log: list[dict[str, Any]] = []
        self.evaluation: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.shown = time.monotonic()
        self.last_save = time.monotonic()
        self.rescue: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the last checkpoint is there, whole."""
        place = self.steps / checkpoints.name_of(self.recipe.steps)
        return (place / checkpoints.MANIFEST).exists() and not checkpoints.troubles(place)

    def go(self) -> None:
        """Trains to the end."""
        recipe = self.recipe
        made = assemble(recipe, self.world, self.watcher.message, self.strategy, self.sequence_parallel)
        self.made = made
        self.trainer = made.trainer
        exact = is_exact(recipe.deterministic, made.trainer.device)
        self._go_on()
        with deterministic(exact), Stop(self.watcher.message) as self.stop:
            self._begin(exact)
            try:
                self._loop()
            except RunError:  # before the update was made: the weights are those of the step
                self._keep_rescue()
                raise
        self._end(exact)

    def _go_on(self) -> None:
        """Takes up the last whole checkpoint of this run, or the one it branches from."""
        step, passed = checkpoints.latest(self.steps)
        for reason in passed:
            self._note(f"{reason}; that checkpoint is made again")
        if step is not None:
            note = self.trainer.load(self.steps / checkpoints.name_of(step))
            self._same(note)
            self._remember(step)
            self.rescue = None if step in self.schedule else step
            self.watcher.message(f"going on from step {step}")
        elif self.recipe.branch is not None:
            branch = self.recipe.branch
            parent = find_run(branch.run)
            self.made.branch(self.trainer, parent.folder / checkpoints.FOLDER / checkpoints.name_of(branch.step))

    def _same(self, note: dict[str, Any]) -> None:
        now = plain(self._told())
        _same_data(note.get("data", {}), now["data"], self.folder)
        old, new = note.get("versions", {}), now["versions"]
        if changed := [f"{k} {old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]]:
            self._note(f"went on with {', '.join(changed)}: equal to rounding, not to the bit")

    def _told(self) -> dict[str, Any]:
        """What a checkpoint says of where it comes from."""
        used = {k: v for k, v in versions().items() if k in ("vesalius", "torch", "transformers", "threads")}
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": self.made.description,
            "versions": used,
            "lineage": self.made.lineage,
            "chance": "dropout and objectives draw from generators seeded with (seed, step, data rank, micro-batch)",
        }

    def _remember(self, step: int) -> None:
        """The log up to a step, as an earlier sitting wrote it."""
        if self.run is None:
            return
        for name, rows in (("log", self.log), ("evaluation", self.evaluation)):
            if self.run.has(name):
                table = self.run.table(name)
                rows.extend(table[table["step"] < step + (name == "evaluation")].to_dict("records"))  # type: ignore[arg-type]
        for row in self.log:
            self.ledger.tokens += int(row["tokens"])
            self.ledger.seconds += float(row["seconds"])
            self.ledger.steps += 1

    def _begin(self, exact: bool) -> None:
        trainer = self.trainer
        sample = trainer.sample(trainer.done)
        plain_model = unwrap(trainer.model)
        self.flops = None
        if self.world.size == 1:
            self.flops = flops_per_step(plain_model, sample, **trainer.always)
        self.ledger.flops = self.ledger.steps * (self.flops or 0)
        self.cost = None
        left = self.recipe.steps - trainer.done
        if exact and self.world.size == 1 and left >= 100 * PROBES:
            self.cost = self._cost_of_exactness()
            self.watcher.message(f"deterministic: a gradient takes {self.cost:.2f} times as long as otherwise")
        if self.run is not None:
            self.run.save_file("recipe.yaml", self.recipe.yaml().encode())
            self.run.save_json("data", {**self.made.description, "lineage": self.made.lineage})
        if trainer.done in self.schedule:
            self._save()
            if not self.evaluation:
                self._evaluate()

    def _cost_of_exactness(self) -> float:
        """Time of a gradient with deterministic algorithms over the time without, the least of a few each."""
        trainer = self.trainer
        trainer.model.train()
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(PROBES):
            for on in times:
                torch.use_deterministic_algorithms(on)
                began = time.perf_counter()
                trainer.gradients(trainer.done)
                times[on].append(time.perf_counter() - began)
                trainer.optimizer.zero_grad(set_to_none=True)
        torch.use_deterministic_algorithms(True)
        return min(times[True]) / min(times[False])

    def _loop(self) -> None:
        recipe, held_out = self.recipe, None
        for log in self.trainer.steps(recipe.steps):
            self.ledger.add(log.tokens, self.flops or 0, log.seconds)
            row = {k: v for k, v in asdict(log).items() if k != "logs"}
            self.log.append({**row, **log.logs})
            done = self.trainer.done
            if done % recipe.evaluate.every == 0 or done == recipe.steps:
                held_out = self._evaluate()
            self.watcher.step(log, recipe.steps, self.ledger, held_out)
            if done in self.schedule:
                self._save()
            elif self.world.agree(time.monotonic() - self.last_save > RESCUE_SECONDS):
                self._keep_rescue()
            elif time.monotonic() - self.shown > SHOW_SECONDS:
                self._show()
            if done < recipe.steps and self.world.agree(self.stop.asked):
                self._keep_rescue()
                raise KeyboardInterrupt

    def _evaluate(self) -> float | None:
        held_out = self.made.held_out
        if held_out is None:
            return None
        found = self.trainer.evaluate(held_out, self.recipe.evaluate.batches)
        row = {"step": self.trainer.done, **found}
        if self.made.bytes_per_token:
            row["bits_per_byte"] = found["loss"] / math.log(2) / self.made.bytes_per_token
        self.evaluation.append(row)
        return found["loss"]

    # -- keeping

    def _save(self) -> None:
        """A scheduled checkpoint; the one kept in between goes."""
        self._write()
        if self.rescue is not None and self.run is not None:
            shutil.rmtree(self.steps / checkpoints.name_of(self.rescue), ignore_errors=True)
        self.rescue = None
        if self.recipe.checkpoints.keep_state == "last" and self.run is not None:
            for step in checkpoints.steps_in(self.steps):
                if step < self.trainer.done:
                    checkpoints.drop_state(self.steps / checkpoints.name_of(step))

    def _keep_rescue(self) -> None:
        """A checkpoint between scheduled ones."""
        if self.trainer.done in self.schedule:
            return
        before = self.rescue
        with contextlib.suppress(RunError):  # what stopped the run is the error to show
            self._write()
            self.rescue = self.trainer.done
            if before is not None and before != self.rescue and self.run is not None:
                shutil.rmtree(self.steps / checkpoints.name_of(before), ignore_errors=True)

    def _write(self) -> None:
        self._tables()  # first, so that the log never lacks a step the checkpoint has made
        place = self.steps / checkpoints.name_of(self.trainer.done)
        self.trainer.save(place, self._told(), self.made.tokenizer)
        self.last_save = time.monotonic()
        self._show(tables=False)

    def _tables(self) -> None:
        if self.run is None:
            return
        if self.log:
            self.run.save_table("log", pd.DataFrame(self.log))
        if self.evaluation:
            self.run.save_table("evaluation", pd.DataFrame(self.evaluation))
        if self.made.removal is not None:
            self.run.save_table("norms", self.made.removal.table())

    def _show(self, tables: bool = True) -> None:
        if self.run is None:
            return
        if tables:
            self._tables()
        self.shown = time.monotonic()
        self.watcher.saved(self.run, self.trainer.done)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.watcher.message(text)

    def _end(self, exact: bool) -> None:
        if self.run is None:
            return
        self._tables()
        model: Any = unwrap(self.trainer.model)
        norms = None if self.made.removal is None else self._folded(model)
        last = self.evaluation[-1] if self.evaluation else {}
        tail = [r["loss"] for r in self.log[-20:]]
        self.run.save_json(
            "summary",
            {
                "name": self.recipe.name,
                "model_type": model.config.model_type,
                "parameters": sum(p.numel() for p in model.parameters()),
                "trained": sum(p.numel() for g in self.trainer.optimizer.param_groups for p in g["params"])
                - self.made.held,
                "steps": self.recipe.steps,
                "loss": sum(tail) / len(tail) if tail else None,
                "held_out": last.get("loss"),
                "bits_per_byte": last.get("bits_per_byte"),
                "ledger": self.ledger.to_json(),
                "flops_6nt": six_n_t(model, self.ledger.tokens),
                "optimizer_bytes": state_bytes(self.trainer.optimizer),
                "optimizer": self.recipe.optimizer.name,
                "objective": self.recipe.objective.name,
                "deterministic": exact,
                "cost_of_determinism": self.cost,
                "world": {"processes": self.world.size, "data": self.world.data, "tensor": self.world.tensor},
                "checkpoints": checkpoints.steps_in(self.steps),
                "notes": self.notes,
                **({} if norms is None else {"norms": norms}),
            },
        )
        self._show(tables=False)

    @torch.no_grad()
    def _folded(self, model: Any) -> dict[str, Any]:
        """What became of the norms, and how far the checkpoint, opened anew, is from the model in memory."""
        removal, place = self.made.removal, self.steps / checkpoints.name_of(self.trainer.done)
        assert removal is not None
        told = {"removed": len(removal.norms), "ordinary_checkpoint": removal.folds}
        if not removal.folds:
            return told
        sample = self.trainer.sample(0)[slice(0, 2)].to(self.trainer.device)
        model.eval()
        removal.read(sample)
        ours = model(**model_inputs(sample, model), **self.trainer.always).logits
        with quiet_transformers():
            again = type(model).from_pretrained(place, dtype=ours.dtype).to(ours.device).eval()
        theirs = again(**model_inputs(sample, again), **self.trainer.always).logits
        return told | {"largest_difference": float((ours - theirs).abs().max())}


class Stop:
    """Ctrl-C or SIGTERM inside the block asks for an end after the step, so that a checkpoint of it can be kept.

    The second one ends the block at once, and no checkpoint is written of a step that may be half made.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.asked, self._tell, self._before = False, tell, dict[int, Any]()

    def _signal(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._tell("stopping after this step; once more stops at once")

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._signal) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
