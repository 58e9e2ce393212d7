"""Fine-tuning a model with codebooks in it: a run whose folder is the model with its codes.

Codes start at k-means centres of the activations they will replace; the model and its codes are then trained on the
next token together, by the project's trainer:

    loss = cross entropy + weight * mean (out - in)^2 / mean in^2, the latter at the start; mean over the codebooks

Codes that were used less than `least` of what they would be if all were used alike, since the last look `every` steps
before, are replaced by activations. What the model loses is told beside the same model as it was, with the codes only
put in (no training), and fine-tuned as long without codes if that is asked for (`plain`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vesalius import checkpoints
from vesalius.corpus.batches import Batch, Source
from vesalius.corpus.documents import CorpusError
from vesalius.corpus.order import Order
from vesalius.corpus.synthetic import synthetic_source
from vesalius.errors import VesaliusError
from vesalius.features.codebooks.books import MODEL, NOTE, TENSORS, Codebooks
from vesalius.features.dictionaries import sitting
from vesalius.features.dictionaries.places import place_name, read
from vesalius.features.dictionaries.reading import Tell, silent
from vesalius.model import Model
from vesalius.model.hooks import Hooks
from vesalius.model.memory import memory_errors
from vesalius.runs import Run
from vesalius.train.assembly import store_of
from vesalius.train.ledger import peak_memory_bytes
from vesalius.train.objectives import Loss, Objective, Sample, generator, make_objective
from vesalius.train.objectives.special import needs_for
from vesalius.train.optimizers import make_optimizer
from vesalius.train.parallel import World
from vesalius.train.schedules import make_schedule
from vesalius.train.trainer import Trainer, deterministic, is_exact

COMMAND = "codebook-train"
MEMORY = "lower --rows, --length or --size"


@dataclass(frozen=True)
class CodebookRecipe:
    """How codebooks are trained.

    Attributes:
        size: codes of each codebook. k: on at once. steps, rows, length: of training.
        lr: peak rate of AdamW. weight_decay: of the codes and matrices. weight: of the distance in the loss.
        every: steps between looks for unused codes. least: share of even use below which a code is replaced.
        start_tokens: activations for k-means. plain: fine-tune the model without codes as well, to compare.
    """

    size: int = 1000
    k: int = 8
    steps: int = 300
    rows: int = 8
    length: int = 128
    lr: float = 5e-4
    weight_decay: float = 0.01
    weight: float = 1.0
    every: int = 50
    least: float = 0.05
    start_tokens: int = 8192
    check_batches: int = 8
    plain: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "k", "rows", "length", "start_tokens", "check_batches"):
            if getattr(self, name) < 1:
                raise VesaliusError(f"codebooks cannot be trained with {name} {getattr(self, name)}; give 1 or more")
        if self.steps < 0 or not 0 < self.lr < math.inf or not 0 <= self.weight < math.inf:
            raise VesaliusError(f"steps {self.steps}, lr {self.lr:g}, weight {self.weight:g}: no negative numbers")


class Coded(nn.Module, sitting.Kept):
    """The model with its codebooks, as something to train."""

    def __init__(self, model: Model, books: Codebooks | None) -> None:
        super().__init__()
        self.hf = model.hf
        if books is not None:
            self.books = books
        self._bench = (model, books)
        self.config = model.hf.config

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The model's output."""
        model, books = self._bench
        taps = {} if books is None else books.taps()
        with Hooks(model.hf, model.anatomy, taps):
            return self.hf(input_ids=input_ids, use_cache=False, **inputs)

    @property
    def coded(self) -> Codebooks | None:
        """Its codebooks."""
        return self._bench[1]


@dataclass(frozen=True)
class _Objective:
    base: Objective
    module: Coded
    weight: float
    scale: float

    def sample(self, batch: Batch, seed: int) -> Sample:
        return self.base.sample(batch, seed)

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        made = self.base.loss(outputs, sample)
        if self.module.coded is None:
            return made
        missed = self.module.coded.missed() / self.scale
        return Loss(
            made.total + self.weight * missed * sample.count(),
            {**made.logs, "nll": made.total.detach(), "missed": missed.detach() * sample.count()},
        )


def train_codebooks(
    model: Model,
    places: Sequence[str],
    source: str | Path | Sequence[str | Path],
    recipe: CodebookRecipe | None = None,
    *,
    out: Path | str | None = None,
    fresh: bool = False,
    command_line: str = "",
    tell: Tell = silent,
    **options: Any,
) -> Path:
    """Fine-tunes a copy of a model with codebooks; returns the run's folder, which `Codebooks.load` opens.

    Args:
        model: a causal model; it is left as it is. places: see `Codebooks`.
        source: corpora by name, files or folders; or `synthetic:NAME`, with its options.
        recipe: see `CodebookRecipe`.

    Raises:
        VesaliusError: naming what of the model, the text or the recipe is at fault.

    Example:
        >>> folder = train_codebooks(model, ["L4.MLP", "L5.MLP"], "foldoc")     # doctest: +SKIP
        >>> model, books = Codebooks.load(folder)                                # doctest: +SKIP
    """
    recipe = recipe or CodebookRecipe()
    books = Codebooks(model, places, recipe.size, recipe.k, recipe.seed)
    train, held_out = data_of(model, source, recipe, tell, options)
    request = {
        "command": COMMAND,
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "places": [place_name(s) for s in books.sites],
        "text": str(source),
        "data": [train.fingerprint, held_out.fingerprint],
        **asdict(recipe),
    }
    with Run.start(request, out, fresh, command_line) as run:
        if fresh:
            sitting.forget(run)
        if not run.done:
            with memory_errors(MEMORY), deterministic(is_exact(None, model.device)):
                _Work(run, model, books, recipe, train, held_out, str(source), tell).go(command_line)
            sitting.forget(run)
    return run.folder


def data_of(
    model: Model, source: str | Path | Sequence[str | Path], recipe: CodebookRecipe, tell: Tell, options: dict[str, Any]
) -> tuple[Source, Source]:
    """Batches to train on, and others to judge by."""
    if isinstance(source, str) and source.startswith("synthetic:"):
        name = source.removeprefix("synthetic:")
        made = [
            synthetic_source(name, rows=recipe.rows, length=recipe.length, seed=recipe.seed, split=split, **options)
            for split in ("train", "test")
        ]
        if made[0].vocab_size > int(model.hf.config.vocab_size):
            raise VesaliusError(
                f"{name} has {made[0].vocab_size} symbols and {model.name} reads {model.hf.config.vocab_size}"
            )
        return made[0], made[1]
    if model.tokenizer is None:
        raise VesaliusError(f"{model.name} has no tokenizer, so no text can be read with it")
    longest = model.n_positions
    if longest and recipe.length > longest:
        raise VesaliusError(f"rows of {recipe.length} tokens are longer than {model.name} reads ({longest})")
    names = [str(source)] if isinstance(source, (str, Path)) else [str(s) for s in source]
    store = store_of(names, model.tokenizer, lambda text: tell(text, None))
    needed = max(recipe.steps * recipe.rows * recipe.length, 2 * recipe.size)
    try:
        train, kept = store.split(0.05)
    except CorpusError as error:
        raise CorpusError(f"{', '.join(names)}: {error}; {needed:,} tokens are needed") from None
    if train.n_tokens < needed or kept.n_tokens < recipe.rows * recipe.length:
        raise CorpusError(
            f"{', '.join(names)} has {train.n_tokens:,} tokens to train on and {kept.n_tokens:,} held out; {needed:,} "
            f"and {recipe.rows * recipe.length:,} are needed: add text, or lower --steps, --rows or --length"
        )
    return (
        Order(train, recipe.length, recipe.rows, recipe.seed, tail="drop"),
        Order(kept, recipe.length, recipe.rows, 0, tail="drop"),
    )


class _Work:
    """The steps of a run."""

    def __init__(
        self,
        run: Run,
        model: Model,
        books: Codebooks,
        recipe: CodebookRecipe,
        train: Source,
        held_out: Source,
        text: str,
        tell: Tell,
    ) -> None:
        self.run, self.original, self.books, self.recipe = run, model, books, recipe
        self.train, self.held_out, self.text, self.tell = train, held_out, text, tell
        self.model = model.copied()

    def go(self, command_line: str) -> None:
        """From wherever it stands to the end."""
        run, recipe = self.run, self.recipe
        with run.stage("codes"):
            scale = self._start()
        base = make_objective("causal-lm", needs_for(self.model.hf, self.model.tokenizer))
        self.model.hf.requires_grad_(True).train()
        self.books.train().requires_grad_(True)
        module = Coded(self.model, self.books)
        coded = self._trainer(module, _Objective(base, module, recipe.weight, scale))
        if not run.has("before"):
            found = {"model": self._loss(None), "codes put in": self._loss(self.books)}
            run.save_json("before", found)
        if recipe.steps:
            sitting.train(run, coded, recipe.steps, self.tell, lambda done: self._look(coded, done))
        self.model.hf.eval().requires_grad_(False)
        self.books.eval().requires_grad_(False)
        losses = {**run.json("before"), "with codes": self._loss(self.books), "without, after": self._loss(None)}
        if recipe.plain:
            losses["as long without codes"] = self._plain(base)
        finished = Model.wrap(self.model.hf, self.model.tokenizer, name=f"{self.original.name}-codes")
        self._keep(finished)
        self._sum_up(losses, command_line)

    def _trainer(self, module: Coded, objective: Any) -> Trainer:
        recipe = self.recipe
        optimizer = make_optimizer("adamw", module, lr=recipe.lr, weight_decay=recipe.weight_decay)
        schedule = make_schedule("linear", max(1, recipe.steps), warmup=0.05)
        world = World.single(self.model.device)
        return Trainer(module, self.train, objective, optimizer, schedule, seed=recipe.seed, world=world)

    def _start(self) -> float:
        """k-means centres of activations; the mean square of an activation, which scales the distance."""
        recipe, squares = self.recipe, []
        batches = -(-recipe.start_tokens // (recipe.rows * recipe.length))  # a short corpus is read again
        ids = [torch.from_numpy(self.train.batch(i).ids[:, :-1].copy()) for i in range(batches)]
        for site in self.books.sites:
            self.tell(f"codes of {place_name(site)}", None)
            book = self.books.book(site)
            x = torch.cat([read(self.model, site, row)[:, self.books.skip :].flatten(0, 1) for row in ids])
            book.start(x[: recipe.start_tokens].unflatten(-1, (book.groups, book.width)).cpu(), recipe.seed)
            squares.append(float(x.pow(2).mean()))
        return float(np.mean(squares))

    def _look(self, trainer: Trainer, done: int) -> None:
        """Replaces codes that are hardly used."""
        recipe = self.recipe
        if not recipe.every or done % recipe.every or done > 0.8 * recipe.steps:
            return
        for number, site in enumerate(self.books.sites):
            book = self.books.book(site)
            even = float(book.uses.sum()) / (book.groups * book.size)
            book.replace_dead(trainer.optimizer, generator(recipe.seed, done, f"dead {number}"), recipe.least * even)

    @torch.no_grad()
    def _loss(self, books: Codebooks | None) -> float:
        """Mean loss a target on held-out batches, nats."""
        was = self.model.hf.training
        self.model.hf.eval()
        base = make_objective("causal-lm", needs_for(self.model.hf, self.model.tokenizer))
        total = count = 0.0
        modes = None if books is None else books.training
        if books is not None:
            books.eval()
        module = Coded(self.model, books)
        for step in range(self.recipe.check_batches):
            sample = base.sample(self.held_out.batch(step), 0).to(self.model.device)
            total += float(base.loss(module(**sample.inputs), sample).total)
            count += sample.count()
        self.model.hf.train(was)
        if books is not None and modes is not None:
            books.train(modes)
        return total / count

    def _plain(self, base: Objective) -> float:
        """The held-out loss of the original, fine-tuned as long without codes."""
        kept = self.model
        self.model = self.original.copied()
        self.model.hf.requires_grad_(True).train()
        trainer = self._trainer(Coded(self.model, None), base)
        for log in trainer.steps(self.recipe.steps):
            if log.step % 50 == 0:
                self.tell(f"without codes, step {log.step}/{self.recipe.steps}", log.step / max(1, self.recipe.steps))
        found = self._loss(None)
        self.model = kept
        return found

    def _keep(self, finished: Model) -> None:
        """Model and codes as the run's own files."""
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            folder = self.books.save(place, finished)
            shelf = self.run.folder / MODEL
            checkpoints.write(shelf, lambda part: _copied(folder / MODEL, part))
            for name in (TENSORS, NOTE):
                self.run.save_file(name, (folder / name).read_bytes())

    def _sum_up(self, losses: dict[str, float], command_line: str) -> None:
        log = self.run.table("log") if self.run.has("log.parquet") else pd.DataFrame()
        rise = losses["with codes"] - losses["model"]
        snap = losses["codes put in"] - losses["model"]
        count = len(self.books.sites)
        lead = (
            f"With {self.recipe.size:,} codes, {self.recipe.k} at a time, at {count} place{'s' * (count > 1)} the loss "
            f"is {losses['with codes']:.3f} nats on held-out text, {rise:+.3f} against the model as it was; codes put "
            f"in without training cost {snap:+.3f}."
        )
        if "as long without codes" in losses:
            lead += f" The model fine-tuned as long without codes has {losses['as long without codes']:.3f}."
        summary = {
            "model": self.original.name,
            "places": [place_name(s) for s in self.books.sites],
            "size": self.recipe.size,
            "k": self.recipe.k,
            "text": self.text,
            "losses": losses,
            "steps": len(log),
            "seconds": float(log["seconds"].sum()) if len(log) else 0.0,
            "peak_bytes": peak_memory_bytes(),
            "lead": lead,
            "notes": [],
            "command": command_line,
        }
        self.run.save_json("summary", summary)


def _copied(source: Path, target: Path) -> None:
    import shutil

    for file in sorted(source.iterdir()):
        if file.name != checkpoints.MANIFEST:
            shutil.copy2(file, target / file.name)


__all__ = ["COMMAND", "CodebookRecipe", "Coded", "data_of", "train_codebooks"]
