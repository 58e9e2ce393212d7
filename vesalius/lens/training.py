"""Training a tuned lens on a corpus: a run that can be killed, goes on, and ends with the same bytes.

    RUN/lens.safetensors, lens.json   the lens (see `vesalius.lens.tuned`); the run's folder is what --lens takes
    RUN/log.parquet                   every step: mean KL of each layer, learning rate, tokens, seconds, CPU seconds
    RUN/quality.parquet               this lens and the logit lens on held-out text (see `vesalius.lens.quality`)
    RUN/summary.json                  what it took

Tokens are read once, in the one order that `vesalius.corpus.order` gives a seed: first those of the regression
(`start_share`), then those of the gradient steps, made by the trainer that trains models. Every minute a checkpoint is
kept beside (RUN/start, RUN/steps); they go when the run is done.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch

from vesalius import checkpoints
from vesalius.corpus.batches import Batch, Source
from vesalius.corpus.documents import CorpusError
from vesalius.corpus.order import Order
from vesalius.errors import VesaliusError
from vesalius.lens.base import Lens, LogitLens, layer_name
from vesalius.lens.objective import LensObjective, Reader, objective_for
from vesalius.lens.quality import judge
from vesalius.lens.regression import Regression, describe, typical_size
from vesalius.lens.tuned import COMMAND, NOTE, TENSORS, TunedLens
from vesalius.model import Model
from vesalius.model.memory import memory_errors
from vesalius.records import clock, dump, read_json, sha256
from vesalius.runs import Run
from vesalius.train.assembly import store_of
from vesalius.train.ledger import peak_memory_bytes
from vesalius.train.objectives import IGNORED
from vesalius.train.objectives.samples import model_inputs
from vesalius.train.optimizers import OPTIMIZERS, make_optimizer
from vesalius.train.parallel import World
from vesalius.train.schedules import make_schedule
from vesalius.train.trainer import Trainer, deterministic, is_exact

Tell = Callable[[str, float | None], None]
SAVE_SECONDS = 60.0
TELL_SECONDS = 10.0
ENOUGH = 4  # tokens of the regression for each unknown of a row of the map, at least
WARM_UP = 0.05
MEMORY = "lower --states, --rows or --length"


def _silent(text: str, share: float | None) -> None:
    return


@dataclass(frozen=True)
class LensRecipe:
    """How a lens is trained.

    Attributes:
        tokens: read in all. length: of a row. rows: in a batch. states: trained in a step, at most.
        start: `regression` (see `vesalius.lens.regression`) or `zero`, the logit lens. start_share: of the tokens, for
            the regression.
        words: that stand for the vocabulary in the loss (see `vesalius.lens.divergence`); None for all of it.
        optimizer, lr, weight_decay: Adam moves each number by its own gradients, so that layers are trained apart and
            one rate suits all; the paper's SGD clips the gradients of all layers together.
        rank, bias_only: smaller translators. held_out: share of the documents. check_states: held-out states read at
            the end.
    """

    tokens: int = 120_000
    length: int = 128
    rows: int = 2
    states: int = 256
    start: Literal["regression", "zero"] = "regression"
    start_share: float = 0.5
    words: int | None = 4096
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-3
    rank: int | None = None
    bias_only: bool = False
    held_out: float = 0.05
    check_states: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "rows", "states", "check_states"):
            if getattr(self, name) < 1:
                raise VesaliusError(f"a lens cannot be trained with {name} {getattr(self, name)}; give 1 or more")
        if self.length < 2:
            raise VesaliusError("rows of one token have no state to train on; give a length of 2 or more")
        if self.start not in ("regression", "zero"):
            raise VesaliusError(f"a lens starts from 'regression' or 'zero', not '{self.start}'")
        if self.start == "regression" and not 0 < self.start_share <= 1:
            raise VesaliusError(f"start_share is {self.start_share:g}; give a share of the tokens above 0, at most 1")
        if not 0 < self.held_out < 1:
            raise VesaliusError(f"held_out is {self.held_out:g}; give a share of the documents between 0 and 1")
        OPTIMIZERS.entry(self.optimizer)
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise VesaliusError(f"lr {self.lr:g} and weight_decay {self.weight_decay:g}: give numbers above 0")

    @property
    def batch(self) -> int:
        """Tokens of a batch."""
        return self.rows * self.length

    @property
    def start_steps(self) -> int:
        """Batches the regression reads."""
        return 0 if self.start == "zero" else max(1, round(self.start_share * self.tokens / self.batch))

    @property
    def steps(self) -> int:
        """Gradient steps."""
        return max(0, round(self.tokens / self.batch) - self.start_steps)


class Spent(NamedTuple):
    """Time by the clock on the wall, and of all cores together."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


class _Watch:
    """Adds to what was spent before."""

    def __init__(self, before: Spent) -> None:
        self._wall, self._cpu = time.monotonic() - before.seconds, time.process_time() - before.cpu_seconds

    @property
    def spent(self) -> Spent:
        return Spent(time.monotonic() - self._wall, time.process_time() - self._cpu)


@dataclass(frozen=True)
class _From:
    """A source from some step on."""

    source: Source
    first: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def batch(self, step: int) -> Batch:
        return self.source.batch(step + self.first)


@dataclass(frozen=True)
class LensData:
    """What a lens is trained and judged on."""

    source: Order
    held_out: Order


def lens_data(model: Model, corpora: Sequence[str], recipe: LensRecipe, tell: Tell = _silent) -> LensData:
    """Rows of text under the model's own tokenizer.

    Raises:
        CorpusError: if there are fewer tokens than the recipe reads, saying how many are needed.
        VesaliusError: for a model without a tokenizer, rows longer than it can read, or a corpus that is not there.
    """
    if model.tokenizer is None:
        raise VesaliusError(f"{model.name} has no tokenizer, so no text can be read with it")
    longest = model.n_positions
    if longest and recipe.length > longest:
        raise VesaliusError(f"rows of {recipe.length} tokens are longer than {model.name} reads ({longest})")
    unknowns = 1 if recipe.bias_only else model.d_model + 1
    if recipe.start == "regression" and recipe.start_steps * recipe.batch < ENOUGH * unknowns:
        needed = round(ENOUGH * unknowns / recipe.start_share)
        raise VesaliusError(
            f"{recipe.tokens:,} tokens are too few to fit maps of width {model.d_model}: at least {needed:,} are "
            f"needed (--tokens), so that the regression reads {ENOUGH * unknowns:,}; or start from zero"
        )
    store = store_of(corpora, model.tokenizer, lambda text: tell(text, None))
    names = ", ".join(corpora)
    needed = (recipe.start_steps + recipe.steps) * recipe.batch
    try:
        train, held_out = store.split(recipe.held_out)
    except CorpusError as error:
        total = round(needed / (1 - recipe.held_out))
        raise CorpusError(f"{names}: {error}; {total:,} tokens in several documents are needed") from None
    if train.n_tokens < needed:
        raise CorpusError(
            f"{names} has {train.n_tokens:,} tokens to train on and {held_out.n_tokens:,} held out; {needed:,} are "
            "needed to train on: add text (--corpus A,B), or lower --tokens"
        )
    rows = max(1, min(recipe.rows, held_out.n_tokens // recipe.length))
    if held_out.n_tokens < recipe.length:
        raise CorpusError(
            f"{names} leaves {held_out.n_tokens:,} tokens held out; a row of {recipe.length} is needed: add text, or "
            "shorten --length"
        )
    return LensData(
        Order(train, recipe.length, recipe.rows, recipe.seed, "rows", tail="drop"),
        Order(held_out, recipe.length, rows, 0, "rows", tail="drop"),
    )


def train_lens(
    model: Model,
    corpus: str | Sequence[str],
    recipe: LensRecipe | None = None,
    *,
    out: Path | str | None = None,
    fresh: bool = False,
    command_line: str = "",
    tell: Tell = _silent,
) -> Path:
    """Trains a tuned lens, going on where an earlier sitting stopped; returns the run's folder.

    Args:
        model: what it shall read; its weights are frozen.
        corpus: names of corpora (`vesalius corpora`), files or folders.
        recipe: see `LensRecipe`.
        out: the folder that holds runs. fresh: forget what an earlier sitting left.
        tell: told how far it is, as text and a share.

    Raises:
        VesaliusError: naming what of the corpus, the recipe or the disk is at fault.

    Example:
        >>> folder = train_lens(model, "foldoc")                                    # doctest: +SKIP
        >>> trajectory(model, "The capital of France is", lens=folder)              # doctest: +SKIP
    """
    recipe = recipe or LensRecipe()
    corpora = [corpus] if isinstance(corpus, str) else list(corpus)
    if not corpora:
        raise CorpusError("a lens is trained on text; name a corpus (`vesalius corpora`), a file or a folder")
    data = lens_data(model, corpora, recipe, tell)
    request = {
        "command": COMMAND,
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "corpus": corpora,
        "data": data.source.fingerprint,
        **asdict(recipe),
    }
    with Run.start(request, out, fresh, command_line) as run:
        if fresh:
            for name in ("start", checkpoints.FOLDER):
                shutil.rmtree(run.folder / name, ignore_errors=True)
        if not run.done:
            with memory_errors(MEMORY):
                _Sitting(run, model, corpora, recipe, data, tell).go(command_line)
    return run.folder


class _Sitting:
    """One sitting of a run."""

    def __init__(
        self, run: Run, model: Model, corpora: list[str], recipe: LensRecipe, data: LensData, tell: Tell
    ) -> None:
        self.run, self.model, self.corpora, self.recipe, self.data = run, model, corpora, recipe, data
        self.tell = tell
        settings = {"rank": recipe.rank, "bias_only": recipe.bias_only, "seed": recipe.seed}
        self.lens = TunedLens.for_model(model, **settings)
        self.reader = Reader(self.lens, model)
        self.objective = objective_for(self.reader, recipe.states, recipe.words)
        self.log: list[dict[str, Any]] = []
        self.start: dict[str, Any] = {}

    def go(self, command_line: str) -> None:
        """From wherever it stands to the end."""
        run = self.run
        with deterministic(is_exact(None, self.model.device)):
            if not run.has(TENSORS):
                steps = run.folder / checkpoints.FOLDER
                step, _ = checkpoints.latest(steps)
                if step is None:
                    self._begin()
                self._train(steps, step)
                self._keep()
            self.lens = TunedLens.load(run.folder, self.model)
            self.reader.lens = self.lens
            if not run.has("quality"):
                with run.stage("held-out text"):
                    run.save_table("quality", self._judge())
        for name in ("start", checkpoints.FOLDER):
            shutil.rmtree(run.folder / name, ignore_errors=True)
        self._sum_up(command_line)

    # -- the start

    def _begin(self) -> None:
        """Solves the regression, or sets the scales alone."""
        steps, place = self.recipe.start_steps, self.run.folder / "start"
        sums = Regression(self.model)
        step, _ = checkpoints.latest(place)
        spent = Spent()
        if step is not None:
            folder = place / checkpoints.name_of(step)
            sums.load(checkpoints.load_tensors(folder / checkpoints.STATE))
            note = read_json(folder / checkpoints.NOTE, "start again with --fresh")
            spent = Spent(float(note["seconds"]), float(note["cpu_seconds"]))
        if not steps:
            with torch.no_grad():
                self.lens.scale.copy_(typical_size(self._states(0)[:-1]))
            return
        watch, saved, told = _Watch(spent), time.monotonic(), 0.0
        first = step or 0
        with self.run.stage("regression", steps) as stage:
            for at in range(first, steps):
                sums.add(self._states(at))
                now = time.monotonic()
                if now - told > TELL_SECONDS or at + 1 == steps:
                    told = now
                    mine = watch.spent.seconds - spent.seconds
                    self._told("regression", at + 1 - first, steps - first, mine, at + 1)
                if now - saved > SAVE_SECONDS or at + 1 == steps:
                    saved = now
                    self._save_sums(place, sums, at + 1, watch.spent)
                stage.update(at + 1)
        sums.solve(self.lens)
        self.start = {**describe(sums.counts), **watch.spent._asdict()}

    def _states(self, step: int) -> list[torch.Tensor]:
        sample = self.objective.sample(self.data.source.batch(step), self.recipe.seed).to(self.model.device)
        found = self.reader(**model_inputs(sample, self.reader))
        valid = sample.targets != IGNORED
        return [h[valid] for h in found.states]

    def _save_sums(self, place: Path, sums: Regression, step: int, spent: Spent) -> None:
        def fill(folder: Path) -> None:
            checkpoints.save_tensors(folder / checkpoints.STATE, sums.tensors())
            (folder / checkpoints.NOTE).write_bytes(dump({"step": step, **spent._asdict()}))

        _replace(place, step, lambda folder: checkpoints.write(folder, fill))

    # -- gradient steps

    def _train(self, place: Path, step: int | None) -> None:
        recipe = self.recipe
        if not recipe.steps:
            return
        settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        optimizer = make_optimizer(recipe.optimizer, self.lens, **settings)
        source: Any = _From(self.data.source, recipe.start_steps)
        trainer = Trainer(
            self.reader,
            source,
            self.objective,
            optimizer,
            make_schedule("linear", recipe.steps, warmup=WARM_UP),
            seed=recipe.seed,
            clip=None,
            world=World.single(self.model.device),
        )
        if step is not None:
            note = trainer.load(place / checkpoints.name_of(step))
            self.start = dict(note.get("start", {}))
            if self.run.has("log"):
                old = self.run.table("log")
                self.log = old[old["step"] < step].to_dict("records")  # type: ignore[assignment]
            self.tell(f"going on from step {step}", None)
        first, began, saved, told = trainer.done, time.monotonic(), time.monotonic(), 0.0
        cpu = time.process_time()
        with self.run.stage("training", recipe.steps) as stage:
            for log in trainer.steps(recipe.steps):
                row = {k: v for k, v in asdict(log).items() if k not in ("logs", "loss")}
                before, cpu = cpu, time.process_time()
                self.log.append({**row, "cpu_seconds": cpu - before, "kl": log.loss / self.model.n_layers, **log.logs})
                now, done = time.monotonic(), trainer.done
                if now - told > TELL_SECONDS or done == recipe.steps:
                    told = now
                    name = f"training, KL {self.log[-1]['kl']:.3f}"
                    self._told(name, done - first, recipe.steps - first, now - began, done, recipe.steps)
                if now - saved > SAVE_SECONDS:
                    self._save(trainer, place)
                    saved = time.monotonic()
                stage.update(done)
        self._save(trainer, place)

    def _save(self, trainer: Trainer, place: Path) -> None:
        self.run.save_table("log", pd.DataFrame(self.log))  # first, so that it never lacks a step that was made
        _replace(place, trainer.done, lambda folder: trainer.save(folder, {"start": self.start}))

    def _told(self, what: str, done: int, total: int, seconds: float, step: int, steps: int | None = None) -> None:
        """How far, how fast, how long still."""
        speed = done * self.recipe.batch / max(seconds, 1e-9)
        left = (total - done) * seconds / max(done, 1)
        steps = steps or self.recipe.start_steps
        self.tell(f"{what}, step {step:,}/{steps:,}, {speed:,.0f} tokens/s, {clock(left)} left", step / steps)

    # -- the end

    def _keep(self) -> None:
        """The lens as the run's own files."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k not in ("rank", "bias_only")}
        self.lens.note = {"corpus": self.corpora, "recipe": recipe}
        path = self.run.save_file(TENSORS, self.lens.write_tensors)
        self.run.save_json(NOTE, {**self.lens.describe(self.model), "sha256": sha256(path)})
        trained: dict[str, Any] = {k: float(sum(r[k] for r in self.log)) for k in Spent._fields}
        trained |= {"tokens": sum(int(r["tokens"]) for r in self.log), "steps": len(self.log)}
        self.run.save_json("spent", {"start": self.start, "training": trained, "peak_bytes": peak_memory_bytes()})

    def _judge(self) -> pd.DataFrame:
        every = LensObjective(self.reader, self.objective.base, self.recipe.batch, self.objective.skip)
        lenses: dict[str, Lens] = {"logit": LogitLens(), "tuned": self.lens}
        held_out = self.data.held_out
        return judge(
            self.model,
            lenses,
            every,
            held_out,
            self.recipe.check_states,
            steps=held_out.rows_per_epoch // held_out.rows,
            progress=lambda done, of: self.tell(f"held-out text, {done:,} of {of:,} states", done / of),
        )

    def _sum_up(self, command_line: str) -> None:
        run, found = self.run, self.run.table("quality")
        spent = run.json("spent")
        notes = []
        if left := spent["start"].get("left_out"):
            total = left + spent["start"]["states"]
            notes.append(f"the regression left out {left:,} of {total:,} states, over ten times as long as most")
        states = int(found["n"].iloc[0])
        if states < self.recipe.check_states:
            notes.append(f"all of the held-out text is {states:,} states; {self.recipe.check_states:,} were asked for")
        summary = {
            "model": self.model.name,
            "corpus": ", ".join(self.corpora),
            "recipe": asdict(self.recipe),
            "spent": spent,
            "lead": lead(found),
            "notes": notes,
            "command": command_line,
        }
        run.save_json("summary", summary | thirds(found))


def _replace(place: Path, step: int, write: Callable[[Path], object]) -> None:
    """Keeps one checkpoint: the new one first, then the others go."""
    before = checkpoints.steps_in(place)
    write(place / checkpoints.name_of(step))
    for old in before:
        if old != step:
            shutil.rmtree(place / checkpoints.name_of(old), ignore_errors=True)


def thirds(found: pd.DataFrame) -> dict[str, Any]:
    """Mean KL of both lenses over early, middle and late layers, and over all but the last."""
    wide = found.pivot(index="layer", columns="lens", values="kl")
    wide = wide[wide.index < wide.index.max()]
    parts = {"early": wide.iloc[: len(wide) // 3], "late": wide.iloc[-(len(wide) // 3) or len(wide) :]}
    parts["middle"] = wide.iloc[len(wide) // 3 : len(wide) - len(wide) // 3]
    means = {name: {k: float(v) for k, v in part.mean().items()} for name, part in parts.items() if len(part)}
    return {"kl": {"all": {str(k): float(v) for k, v in wide.mean().items()}, **means}}


def lead(found: pd.DataFrame) -> str:
    """The finding in a sentence."""
    wide = found.pivot(index="layer", columns="lens", values="kl")
    wide = wide[wide.index < wide.index.max()]
    better = int((wide["tuned"] < wide["logit"]).sum())
    ratio = (wide["tuned"] / wide["logit"]).dropna()  # 0 / 0: every layer says what the last one says
    least = f", by {1 - ratio.max():.0%} at least ({layer_name(int(ratio.idxmax()))})" if len(ratio) else ""
    return (
        f"On held-out text the tuned lens is {wide['tuned'].mean():.2f} nats from the final distribution on average "
        f"over layers, the logit lens {wide['logit'].mean():.2f}; it is nearer at {better} of {len(wide)} "
        f"layers{least}."
    )
