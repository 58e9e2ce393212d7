"""Bigram subnetworks: the weights that turn the current token into the next one, found by learnt masks.

    RUN/mask.safetensors, mask.json   the mask, one bit a weight; the run's folder is what `WeightMask.load` takes
    RUN/model/                        the masked model as an ordinary checkpoint
    RUN/log.parquet                   every step: loss, divergence from the table, mean gate, beta
    RUN/variants.parquet              the model, the subnetwork, the model without it, random controls: on held-out text
    RUN/density.parquet, turn.parquet where its weights are; how states turn from this token to the next

Chang and Bergen 2025, "Bigram Subnetworks: Mapping to Next Tokens in Transformer Language Models" (arXiv 2504.15471).
While it runs a checkpoint is kept every few minutes (RUN/steps); they go when it is done.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from vesalius import checkpoints
from vesalius.corpus.batches import Source
from vesalius.corpus.bigrams import BigramTable, bigram_table
from vesalius.corpus.documents import CorpusError
from vesalius.corpus.order import Order
from vesalius.corpus.store import Tokens
from vesalius.corpus.synthetic import synthetic_source
from vesalius.errors import UnknownName, VesaliusError
from vesalius.features.sparsify import MASK, NOTE, BigramObjective, Masks, Sharpen, WeightMask, by_matrix, save_masked
from vesalius.features.subnetwork_measures import means, turn, variants
from vesalius.model import Model
from vesalius.model.memory import memory_errors
from vesalius.model.sources.spec import STEP
from vesalius.records import dump, sha256
from vesalius.run_index import find_run
from vesalius.runs import Run
from vesalius.train.assembly import data_of, store_of
from vesalius.train.objectives.causal import CausalLM
from vesalius.train.objectives.special import needs_for
from vesalius.train.optimizers import OPTIMIZERS, make_optimizer
from vesalius.train.parallel import World
from vesalius.train.running import Stop, recipe_of
from vesalius.train.schedules import make_schedule
from vesalius.train.trainer import Trainer, deterministic, is_exact

COMMAND = "subnetwork"
Tell = Callable[[str, float | None], None]
SAVE_SECONDS = 300.0
TELL_SECONDS = 10.0
SPLITS = ("train", "test")
OF_DATA = ("fingerprint", "held_out", "tokenizer", "split")  # in the description of data, not of the task
CHECK_EVERY = 50  # steps between two counts of undecided masks
COUNTED = 400  # batches of a synthetic task that make its table
MEMORY = "lower --rows or --length"


def _silent(text: str, share: float | None) -> None:
    return


@dataclass(frozen=True)
class MaskRecipe:
    """How masks are learnt.

    Attributes:
        target: `bigram`, the table of the corpus; `text`, its next tokens (the usual pruning mask, for comparison).
        steps: at most. rows, length: of a batch.
        strength: price of the mean mask; the larger, the fewer weights are kept.
        lr: of AdamW on the scores; it falls to a tenth. last_beta: sharpness at the last step.
        stop: end early when fewer masks than this share of the kept ones lie in (0.1, 0.9).
        top: entries kept in a row of the table. held_out: share of the documents. check: held-out batches.
        controls: random masks of the same counts.
    """

    target: Literal["bigram", "text"] = "bigram"
    steps: int = 1000
    rows: int = 16
    length: int = 64
    strength: float = 10.0
    lr: float = 0.01
    last_beta: float = 50_000.0
    stop: float = 0.01
    top: int = 64
    held_out: float = 0.05
    check: int = 8
    controls: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in ("bigram", "text"):
            raise UnknownName("target of a mask", str(self.target), ("bigram", "text"))
        for name, low in (("steps", 1), ("rows", 1), ("length", 2), ("top", 1), ("check", 1), ("controls", 1)):
            if getattr(self, name) < low:
                raise VesaliusError(f"masks cannot be learnt with {name} {getattr(self, name)}; give {low} or more")
        if not 0 < self.lr < math.inf or not 1 <= self.last_beta < math.inf or not 0 <= self.strength < math.inf:
            raise VesaliusError(
                f"lr {self.lr:g}, strength {self.strength:g}, last_beta {self.last_beta:g}: give an lr above 0, a "
                "strength of 0 or more, and a beta of 1 or more"
            )
        if not 0 < self.held_out < 1 or not 0 <= self.stop < 1:
            raise VesaliusError(f"held_out {self.held_out:g} and stop {self.stop:g}: give shares below 1")


@dataclass(frozen=True)
class MaskData:
    """What masks are learnt and judged on."""

    source: Source
    held_out: Source
    counted: Source | Tokens  # what the table is made of
    batches: int | None
    name: str


def mask_data(model: Model, corpora: Sequence[str], recipe: MaskRecipe, tell: Tell = _silent) -> MaskData:
    """Text under the model's own tokenizer; with no corpus named, what a run trained its model on.

    Rows of a synthetic task are as long as they were.

    Raises:
        VesaliusError: for a model without a tokenizer, or one that was not trained here when no corpus is named.
        CorpusError: for a corpus too short to hold anything out.
    """
    if not corpora:
        run = _run_of(model)
        if run is None:
            raise VesaliusError(
                f"name the text the masks are learnt on (--corpus, see `vesalius corpora`) for {model.name}"
            )
        data = data_of(recipe_of(run), lambda text: tell(text, None))
        if data.store is None:
            told = {**data.description, "rows": recipe.rows}
            made = [synthetic_source(**{k: v for k, v in told.items() if k not in OF_DATA}, split=s) for s in SPLITS]
            return MaskData(made[0], made[1], made[0], COUNTED, str(told["name"]))
        store, name = data.store, run.folder.name
    else:
        if model.tokenizer is None:
            raise VesaliusError(f"{model.name} has no tokenizer, so no text can be read with it")
        store, name = store_of(corpora, model.tokenizer, lambda text: tell(text, None)), ", ".join(corpora)
    longest = model.n_positions
    if recipe.rows * recipe.length > store.n_tokens:
        raise CorpusError(
            f"{name} has {store.n_tokens:,} tokens, and one step of {recipe.rows:,} rows of {recipe.length:,} reads "
            f"{recipe.rows * recipe.length:,}; add text, or lower --rows or --length"
        )
    if longest and recipe.length > longest:
        raise VesaliusError(f"rows of {recipe.length} tokens are longer than {model.name} reads ({longest})")
    try:
        train, kept = store.split(recipe.held_out)
    except CorpusError as error:
        raise CorpusError(f"{name}: {error}; a corpus of several documents is needed") from None
    if kept.n_tokens < recipe.length * recipe.check:
        raise CorpusError(
            f"{name} leaves {kept.n_tokens:,} tokens held out, and {recipe.length * recipe.check:,} are needed; add "
            "text, or shorten --length"
        )
    rows = max(1, min(recipe.rows, kept.n_tokens // (recipe.length * recipe.check)))
    return MaskData(
        Order(train, recipe.length, recipe.rows, recipe.seed, "rows", tail="drop"),
        Order(kept, recipe.length, rows, 0, "rows", tail="drop"),
        train,
        None,
        name,
    )


def _run_of(model: Model) -> Run | None:
    """The run a model was trained by, if it was opened as RUN@step512 or as a checkpoint's folder."""
    if (match := STEP.fullmatch(str(model.spec))) is not None:
        return find_run(match["run"])
    folder = Path(model.spec)
    inside = folder.parent.name == checkpoints.FOLDER and (folder.parent.parent / "request.json").exists()
    return Run.open(folder.parent.parent) if inside else None


def learn_masks(
    model: Model,
    corpus: str | Sequence[str] = (),
    recipe: MaskRecipe | None = None,
    *,
    out: Path | str | None = None,
    fresh: bool = False,
    keep_model: bool = True,
    command_line: str = "",
    tell: Tell = _silent,
) -> Path:
    """Finds a subnetwork, going on where an earlier sitting stopped; returns the run's folder.

    Args:
        model: its weights are frozen.
        corpus: names of corpora, files or folders; by default what a model of a run was trained on.
        recipe: see `MaskRecipe`.
        out: the folder that holds runs. fresh: forget what an earlier sitting left.
        keep_model: also write the masked model as a checkpoint.
        tell: told how far it is, as text and a share.

    Raises:
        VesaliusError: naming what of the corpus, the recipe or the disk is at fault.

    Example:
        >>> folder = learn_masks(model, "bible-kjv", MaskRecipe(steps=300))        # doctest: +SKIP
        >>> WeightMask.load(folder, model).share                                   # doctest: +SKIP
    """
    recipe = recipe or MaskRecipe()
    if model.kind != "causal":
        raise VesaliusError(f"{model.name} is {model.kind}; bigrams are what a causal model predicts")
    data = mask_data(model, [corpus] if isinstance(corpus, str) else list(corpus), recipe, tell)
    tokens = None if model.tokenizer is None else len(model.tokenizer)
    tell("counting bigrams", None)
    vocabulary = int(model.hf.config.vocab_size)
    table = bigram_table(data.counted, vocabulary, tokens=tokens, batches=data.batches, top=recipe.top)
    request = {
        "command": COMMAND,
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "corpus": data.name,
        "data": data.source.fingerprint,
        "keep_model": keep_model,
        **asdict(recipe),
    }
    with Run.start(request, out, fresh, command_line) as run:
        if fresh:
            for name in (checkpoints.FOLDER, "model"):
                shutil.rmtree(run.folder / name, ignore_errors=True)
        if not run.done or (keep_model and checkpoints.troubles(run.folder / "model")):
            with memory_errors(MEMORY):
                _Sitting(run, model, recipe, data, table, tell).go(keep_model, command_line)
    return run.folder


class _Sitting:
    """One sitting of a run."""

    def __init__(
        self, run: Run, model: Model, recipe: MaskRecipe, data: MaskData, table: BigramTable, tell: Tell
    ) -> None:
        self.run, self.model, self.recipe, self.data, self.table, self.tell = run, model, recipe, data, table, tell
        self.log: list[dict[str, Any]] = []

    def go(self, keep_model: bool, command_line: str) -> None:
        """From wherever it stands to the end."""
        run, model, recipe = self.run, self.model, self.recipe
        place = run.folder / checkpoints.FOLDER
        with deterministic(is_exact(None, model.device)):
            if not run.has(MASK) or not run.has(NOTE):
                mask = self._learn(place)
                run.save_file(MASK, mask.write_bits)
                run.save_file(NOTE, dump({**mask.describe(), "sha256": sha256(run.folder / MASK)}))
            shutil.rmtree(place, ignore_errors=True)
            mask = WeightMask.load(run.folder, model)
            if keep_model and checkpoints.troubles(run.folder / "model"):
                self.tell("writing the masked model", None)
                shutil.rmtree(run.folder / "model", ignore_errors=True)
                save_masked(model, mask, run.folder / "model")
            density = pd.DataFrame(by_matrix(model, mask))
            run.save_table("density", density)
            if not run.has("variants"):
                with run.stage("held-out text"):
                    found = variants(
                        model,
                        mask,
                        self.table,
                        self.data.held_out,
                        recipe.check,
                        recipe.controls,
                        recipe.seed,
                        self.tell,
                    )
                    run.save_table("variants", found)
            if not run.has("turn"):
                run.save_table("turn", turn(model, mask, self.data.held_out, recipe.check))
        self._sum_up(mask, density, keep_model, command_line)

    def _learn(self, place: Path) -> WeightMask:
        recipe, model = self.recipe, self.model
        masks = Masks(model).to(model.device)
        base = CausalLM(needs_for(model.hf, model.tokenizer))
        objective: Any = base if recipe.target == "text" else BigramObjective(base, self.table)
        plug = Sharpen(masks, recipe.steps, recipe.last_beta, recipe.strength)
        OPTIMIZERS.entry("adamw")
        trainer = Trainer(
            masks,
            self.data.source,
            objective,
            make_optimizer("adamw", masks, lr=recipe.lr, weight_decay=0.0),
            make_schedule("cosine", recipe.steps, warmup=0.02, final=0.1),
            seed=recipe.seed,
            clip=None,
            world=World.single(model.device),
            plugs=[plug],
        )
        step, _ = checkpoints.latest(place)
        if step is not None:
            trainer.load(place / checkpoints.name_of(step))
            if self.run.has("log"):
                old = self.run.table("log")
                self.log = old[old["step"] < step].to_dict("records")  # type: ignore[assignment]
            self.tell(f"going on from step {step}", None)
        saved, told = time.monotonic(), 0.0
        first, began = trainer.done, time.monotonic()
        stopping = Stop(lambda text: self.tell(text, None))
        with masks.applied(), self.run.stage("masks", recipe.steps) as stage, stopping:
            for log in trainer.steps(recipe.steps):
                row = {"step": log.step, "loss": log.loss, "lr": log.lr, "seconds": log.seconds, **log.logs}
                row["size"] = row["size"] / recipe.strength if recipe.strength else float("nan")
                row["beta"], row["undecided"] = masks.beta, float("nan")
                stage.update(trainer.done)
                if trainer.done % CHECK_EVERY == 0 or trainer.done == recipe.steps:
                    row["undecided"] = masks.undecided()
                self.log.append(row)
                if row["undecided"] < recipe.stop:
                    break
                now = time.monotonic()
                if now - told > TELL_SECONDS:
                    told = now
                    self._told(log, row, trainer.done - first, now - began)
                if now - saved > SAVE_SECONDS or stopping.asked:
                    saved = now
                    self._save(trainer, place)
                if stopping.asked and trainer.done < recipe.steps:
                    raise KeyboardInterrupt
        self.run.save_table("log", pd.DataFrame(self.log))
        return masks.mask()

    def _told(self, log: Any, row: dict[str, Any], made: int, seconds: float) -> None:
        left = (self.recipe.steps - log.step - 1) * seconds / made
        gap = f", {row['divergence']:.3f} nats from the table" if "divergence" in row else ""
        text = f"step {log.step + 1:,} of {self.recipe.steps:,}: loss {log.loss:.3f}{gap}, mean mask {row['size']:.3f}"
        self.tell(f"{text}, {left / 60:.0f} min left", (log.step + 1) / self.recipe.steps)

    def _save(self, trainer: Trainer, place: Path) -> None:
        """Keeps this step, and lets go of the one before."""
        self.run.save_table("log", pd.DataFrame(self.log))
        before = checkpoints.steps_in(place)
        trainer.save(place / checkpoints.name_of(trainer.done), {})
        for step in before:
            if step != trainer.done:
                shutil.rmtree(place / checkpoints.name_of(step), ignore_errors=True)

    def _sum_up(self, mask: WeightMask, density: pd.DataFrame, keep_model: bool, command_line: str) -> None:
        run, table = self.run, self.run.table("variants")
        log = run.table("log")
        told = means(table)
        sub, none, drawn = told["subnetwork"], told["no matrices"], told["random"]
        first = density[(density["kind"] == "mlp") & (density["layer"] == density["layer"].min())]
        dense = float(first["kept"].sum() / first["weights"].sum())
        cost = {k: told[k]["nll"] - told["model"]["nll"] for k in ("without it", "without random")}
        aim = "bigrams" if self.recipe.target == "bigram" else "the text"
        whole = told["model"]
        alike = (
            f"their surprisal correlates with the bigram table's by {sub['r']:.2f} (random weights in these numbers "
            f"{drawn['r']:.2f}, no matrices at all {none['r']:.2f}, the whole model {whole['r']:.2f})"
        )
        if math.isnan(sub["r"]):
            alike = "their surprisal, or the bigram table's, is the same for all tokens: nothing to correlate"
        lead = (
            f"{mask.size:,} of {mask.total:,} weights ({mask.share:.1%}), chosen for {aim}: {alike}. The model without "
            f"them loses {cost['without it']:.2f} nats a token, without as many random ones "
            f"{cost['without random']:.2f}. The first MLP keeps {dense:.1%}, "
            f"{dense / max(mask.share, 1e-9):.1f} times the mean."
        )
        last = log["undecided"].dropna()
        notes = []
        if len(last) and float(last.iloc[-1]) >= self.recipe.stop:
            notes.append(
                f"{float(last.iloc[-1]):.1%} (of the kept) masks were undecided at the end; more steps or a larger "
                "--last-beta decide them"
            )
        if self.table.kept_share < 0.5:
            notes.append(f"the kept entries hold {self.table.kept_share:.0%} of all pairs; raise --top")
        run.save_json(
            "summary",
            {
                "model": self.model.name,
                "corpus": self.data.name,
                "target": self.recipe.target,
                "kept": mask.size,
                "weights": mask.total,
                "share": mask.share,
                "steps": int(log["step"].max()) + 1,
                "seconds": float(log["seconds"].sum()),
                "first_mlp": dense,
                "pairs": self.table.n,
                "r": sub["r"],
                "checkpoint": str(run.folder / "model") if keep_model else None,
                "lead": lead,
                "notes": notes,
                "command": command_line,
            },
        )
