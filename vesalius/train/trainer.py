"""The trainer: one loop for every architecture, objective and optimizer.

One step, for the batch of step s (a pure function of s), its sample, and the count N of its targets over all processes:

    loss = (1 / N) sum over micro-batches and processes of the summed loss

so neither gradient accumulation nor the number of processes changes the gradient. Dropout and everything else that is
drawn in a step is drawn from generators seeded with (seed, step, process, micro-batch); a run that goes on from a
checkpoint draws what it would have drawn, and there is no state of generators to keep.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vesalius import checkpoints
from vesalius.corpus.batches import Source
from vesalius.errors import RunError, VesaliusError
from vesalius.model.memory import memory_errors
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.records import dump, read_json
from vesalius.train.carry import CARRIED, Carry
from vesalius.train.objectives.base import Loss, Objective, Sample
from vesalius.train.objectives.samples import model_inputs, read_tokens
from vesalius.train.parallel import World, clip_grad_norm, gather_state, load_state, unwrap
from vesalius.train.plugs import KEPT, Plug
from vesalius.train.select import ADAPTER, LORA, has_lora, plain_state, save_adapter

Precision = Literal["float32", "bfloat16", "float16"]
TOO_MUCH = "raise accumulate (the same step in smaller parts), or lower data.rows, data.length or the model's sizes"


@dataclass(frozen=True)
class StepLog:
    """What one step was.

    Attributes:
        step: the step, from 0; after it `step + 1` updates have been made.
        loss: mean over targets, nats.
        lr: learning rate of the first parameter group.
        grad_norm: before clipping.
        tokens: read by all processes together.
        targets: what the loss is the mean over.
        seconds: wall clock, data included.
        logs: further means over targets, by name.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    targets: float
    seconds: float
    logs: Mapping[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def is_exact(wanted: bool | None, device: torch.device) -> bool:
    """Whether to train deterministically: as asked; if nothing is asked, on a CPU."""
    return wanted if wanted is not None else device.type == "cpu"


class Trainer:
    """Trains a model on a source of batches; `step()` makes one update.

    Args:
        model: a transformers model (or any module whose forward takes the sample's inputs and returns `.logits`).
        source: batches by step.
        objective: what is foretold.
        optimizer: over the parameters that are to change; `lr` of each group is its peak.
        schedule: step -> factor of the peak learning rate.
        seed: of everything drawn.
        accumulate: micro-batches a step; changes memory, not the gradient.
        clip: largest global gradient norm; None for no clipping.
        precision: `bfloat16` and `float16` run the forward pass under autocast.
        world: the processes that share the work; alone if None.
        plugs: what changes by the step beside the parameters.

    Example:
        >>> trainer = Trainer(model, order, objective, optimizer, schedule)      # doctest: +SKIP
        >>> for log in trainer.steps(1000): print(log.step, log.loss)            # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float] = lambda step: 1.0,
        *,
        seed: int = 0,
        accumulate: int = 1,
        clip: float | None = 1.0,
        precision: Precision = "float32",
        world: World | None = None,
        plugs: Sequence[Plug] = (),
    ) -> None:
        self.model, self.source, self.objective = model, source, objective
        self.optimizer, self.schedule = optimizer, schedule
        self.seed, self.accumulate, self.clip, self.precision = seed, accumulate, clip, precision
        self.world, self.plugs = world or World.single(), tuple(plugs)
        self.done = 0  # updates made
        self.device = next(model.parameters()).device
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
        self._parameters = [p for g in optimizer.param_groups for p in g["params"]]
        takes_cache = "use_cache" in inspect.signature(unwrap(model).forward).parameters
        self.always: dict[str, Any] = {"use_cache": False} if takes_cache else {}
        self.always |= getattr(objective, "asks", {})  # such as hidden states
        self._scaler = torch.amp.GradScaler(self.device.type) if precision == "float16" else None
        self.carry = Carry.of(model, source, self.world)
        if source.rows % (self.world.data * accumulate):
            raise VesaliusError(
                f"{source.rows} rows a batch cannot be shared among {self.world.data} processes with {accumulate} "
                "micro-batches each; change data.rows or accumulate so that it divides"
            )

    # -- one step

    def sample(self, step: int) -> Sample:
        """What all processes together read and foretell at a step."""
        return self.objective.sample(self.source.batch(step), self.seed)

    def gradients(self, step: int) -> tuple[dict[str, Tensor], Sample]:
        """Adds the gradient of the step's mean loss to the parameters; returns sums over this process's targets."""
        whole = self.sample(step)
        count = whole.count()
        if not count:
            raise RunError(f"the batch of step {step} has no targets: the objective masks all of it")
        first, size = self.world.rows(len(whole)).start, len(whole) // self.world.data // self.accumulate
        sums: dict[str, Tensor] = {}
        for i in range(self.accumulate):
            self._seed(step, i)
            rows = slice(first + i * size, first + (i + 1) * size)
            micro = whole[rows].to(self.device)
            state = {} if self.carry is None else {"past_key_values": self.carry.cache(step, rows)}
            with self.world.local(self.model, last=i == self.accumulate - 1), self._autocast():
                loss = self._with_terms(self._loss(micro, **state), micro)
                scaled = loss.total * self.world.scale(count)
            if self.carry is not None:
                self.carry.keep(state["past_key_values"], rows)
            (scaled if self._scaler is None else self._scaler.scale(scaled)).backward()
            for name, value in {"loss": loss.total, **loss.logs}.items():
                sums[name] = sums.get(name, 0) + value.detach()
        return sums, whole

    def step(self) -> StepLog:
        """Makes one update."""
        began = time.perf_counter()
        step = self.done
        factor = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        for plug in self.plugs:
            plug.begin(step)
        with memory_errors(TOO_MUCH):
            sums, whole = self.gradients(step)
        count = whole.count()
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        for plug in self.plugs:
            plug.ready(step)
        norm = clip_grad_norm(self._parameters, self.clip)
        means = {k: float(self.world.sum(v)) / count for k, v in sums.items()}
        loss = means.pop("loss")
        if loss != loss or abs(loss) == float("inf"):
            raise RunError(f"the loss of step {step} is {loss}; lower the learning rate, or clip gradients")
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        for plug in self.plugs:
            plug.end(step)
        if self.carry is not None:
            self.carry.commit()
        lr = float(self.optimizer.param_groups[0]["lr"])
        return StepLog(step, loss, lr, float(norm), read_tokens(whole), count, time.perf_counter() - began, means)

    def steps(self, until: int) -> Iterator[StepLog]:
        """Updates until `until` of them have been made, one log each."""
        self.model.train()
        while self.done < until:
            yield self.step()

    def _loss(self, micro: Sample, **state: Any) -> Loss:
        for plug in self.plugs:
            plug.read(micro)
        inputs = model_inputs(micro, unwrap(self.model))
        return self.objective.loss(self.model(**inputs, **self.always, **state), micro)

    def _with_terms(self, loss: Loss, micro: Sample) -> Loss:
        """The loss with what plugs add to its mean."""
        terms = {k: v * micro.count() for plug in self.plugs for k, v in plug.terms().items()}
        if not terms:
            return loss
        total = loss.total + torch.stack(list(terms.values())).sum()
        return Loss(total, {**loss.logs, **{k: v.detach() for k, v in terms.items()}})

    def _seed(self, step: int, micro: int) -> None:
        mixed = np.random.SeedSequence([self.seed, step, self.world.data_rank, micro])
        number = int(mixed.generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(number)  # `torch.manual_seed` asks every kind of device: 1 ms a step
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    @torch.no_grad()
    def evaluate(self, source: Source, batches: int) -> dict[str, float]:
        """Mean loss and logs over the first batches of another source, in nats a target; nothing is drawn or kept."""
        was = self.model.training
        self.model.eval()
        sums: dict[str, float] = {}
        count = 0.0
        for step in range(batches):
            whole = self.objective.sample(source.batch(step), self.seed)
            count += whole.count()
            mine = whole[self.world.rows(len(whole))]
            size = -(-len(mine) // self.accumulate)
            for start in range(0, len(mine), size):
                micro = mine[slice(start, start + size)].to(self.device)
                with self._autocast():
                    loss = self._loss(micro)
                for name, value in {"loss": loss.total, **loss.logs}.items():
                    sums[name] = sums.get(name, 0.0) + float(self.world.sum(value))
        self.model.train(was)
        return {k: v / max(count, 1) for k, v in sums.items()} | {"targets": count}

    # -- keeping

    def save(self, folder: Path, note: Mapping[str, Any], tokenizer: Any = None, state: bool = True) -> None:
        """Writes a checkpoint (see `checkpoints`), the same bytes for the same state; called by all processes."""
        weights, tensors = gather_state(self.model, self.optimizer)
        tensors = tensors | (self.carry.tensors() if self.carry is not None else {})
        if not self.world.is_main:
            self.world.barrier()
            return
        model: Any = unwrap(self.model)
        adapters: dict[str, Tensor] = {}
        if has_lora(model):
            weights, adapters = plain_state(model, weights)
            tensors = tensors | adapters
        for number, plug in enumerate(self.plugs):
            weights = plug.weights(weights)
            tensors = tensors | {f"{KEPT}{number}/{name}": value for name, value in plug.tensors().items()}

        def fill(place: Path) -> None:
            with quiet_transformers():
                _plain(model).save_pretrained(place, state_dict=weights)
            for plug in self.plugs:
                plug.written(place)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
            if adapters:
                save_adapter(model, adapters, place / ADAPTER)
            if state:
                checkpoints.save_tensors(place / checkpoints.STATE, tensors)
            (place / checkpoints.NOTE).parent.mkdir(exist_ok=True)
            scaler = self._scaler.state_dict() if self._scaler is not None else None
            told = {**note, "step": self.done, "seed": self.seed, "optimizer": _settings(self.optimizer)}
            (place / checkpoints.NOTE).write_bytes(dump({**told, "scaler": scaler}))

        try:
            checkpoints.write(folder, fill)
        finally:
            self.world.barrier()

    def load_weights(self, folder: Path) -> None:
        """Takes up the weights and the step of a checkpoint, and leaves the optimizer as it is."""
        checkpoints.check(folder)
        try:
            load_state(self.model, None, self._weights(folder))
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(f"{folder} does not fit this model: {' '.join(str(error).split())}") from error
        self.done = int(read_json(folder / checkpoints.NOTE, "branch from another step")["step"])

    def _weights(self, folder: Path) -> dict[str, Tensor]:
        """A checkpoint's weights by the names they have in the model (transformers may save them under others)."""
        model: Any = unwrap(self.model)
        with quiet_transformers():
            again = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
        return dict(again.state_dict())

    def load(self, folder: Path, with_settings: bool = True) -> dict[str, Any]:
        """Goes on from a checkpoint: weights, optimizer, step. Returns its note.

        Args:
            folder: the checkpoint.
            with_settings: the optimizer's settings too, and not only its tensors.

        Raises:
            RunError: if a file is missing or was changed, or the checkpoint belongs to another model or optimizer.
        """
        checkpoints.check(folder)
        note = read_json(folder / checkpoints.NOTE, "resume from another step")
        if checkpoints.STATE not in checkpoints.manifest(folder):
            raise RunError(f"{folder} was saved without the trainer's state (checkpoints.keep_state: last)")
        tensors = checkpoints.load_tensors(folder / checkpoints.STATE)
        adapters = {n.removeprefix(LORA): tensors.pop(n) for n in list(tensors) if n.startswith(LORA)}
        carried = {n: tensors.pop(n) for n in list(tensors) if n.startswith(CARRIED)}
        plugged = {n: tensors.pop(n) for n in list(tensors) if n.startswith(KEPT)}  # a branch may leave them behind
        if self.carry is not None:
            self.carry.load(carried)
        try:
            if has_lora(unwrap(self.model)):  # the frozen weights are those of the source, as at the start
                weights = {**unwrap(self.model).state_dict(), **adapters}
            else:
                weights = self._weights(folder)
            load_state(self.model, self.optimizer, weights, tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise RunError(f"{folder} does not fit this model and optimizer: {' '.join(str(error).split())}") from error
        if with_settings:
            for group, saved in zip(self.optimizer.param_groups, note["optimizer"], strict=True):
                group.update(saved)
        if self._scaler is not None and note.get("scaler"):
            self._scaler.load_state_dict(note["scaler"])
        self.done = int(note["step"])
        for number, plug in enumerate(self.plugs):
            mine = f"{KEPT}{number}/"
            plug.load({n.removeprefix(mine): t for n, t in plugged.items() if n.startswith(mine)}, self.done)
        return note


def _plain(model: Any) -> Any:
    """The model, or, of one that FSDP made a class of its own for, a shell of the class it was."""
    if FSDPModule not in type(model).__mro__:
        return model
    kind: Any = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        return kind(model.config)


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group, as JSON."""
    kinds = (int, float, str, bool, type(None), tuple, list)
    return [{k: v for k, v in g.items() if k != "params" and isinstance(v, kinds)} for g in optimizer.param_groups]
