"""From a recipe to what the trainer needs: data, model, objective, optimizer, schedule."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer, PreTrainedModel

from vesalius import checkpoints
from vesalius.build import Architecture, build, preset
from vesalius.corpus.batches import Source
from vesalius.corpus.documents import CorpusError, Document
from vesalius.corpus.order import Order
from vesalius.corpus.rewrite import Rewritten
from vesalius.corpus.sources import documents, stamp
from vesalius.corpus.store import FORMAT, Tokens, TokenStore, tokenizer_sha256
from vesalius.corpus.symbols import symbol_tokenizer
from vesalius.corpus.synthetic import synthetic_source
from vesalius.corpus.tokenizers import train_tokenizer
from vesalius.corpus.viewer import Viewer
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model.constant_norms import constants_of
from vesalius.model.sources import load, resolve
from vesalius.model.sources.cache import cache_folder
from vesalius.records import plain, read_json, request_hash
from vesalius.train.norms import NormRemoval
from vesalius.train.objectives import make_objective
from vesalius.train.objectives.special import needs_for
from vesalius.train.optimizers import make_optimizer
from vesalius.train.parallel import World, parallelize, unwrap
from vesalius.train.plugs import Plug
from vesalius.train.recipe import Recipe
from vesalius.train.schedules import make_schedule
from vesalius.train.select import Slices, add_lora, choose, slices
from vesalius.train.trainer import Trainer

Tell = Callable[[str], None]
TOKENIZER = {"kind": "bpe", "vocab_size": 4096}  # trained on the corpus where a recipe names none
PADDED = 64  # new models have a vocabulary of a multiple of this


def _silent(text: str) -> None:
    return


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        source: the training batches. held_out: rows of documents kept apart, or None.
        tokenizer: of the corpus; a synthetic task's own.
        store: the tokens, None for a synthetic task.
        bytes_per_token: of the held-out text, None for a synthetic task.
    """

    source: Source
    held_out: Source | None
    tokenizer: Any
    store: Tokens | None
    bytes_per_token: float | None

    @cached_property
    def description(self) -> dict[str, Any]:
        """What decides the batches, as JSON."""
        held_out = self.held_out.fingerprint if self.held_out is not None else None
        tokenizer = tokenizer_sha256(self.tokenizer)
        told = {"fingerprint": self.source.fingerprint, "held_out": held_out, "tokenizer": tokenizer}
        return plain({**self.source.describe(), **told})

    def viewer(self) -> Viewer:
        """Looks text up in the order; see `vesalius.corpus.Viewer`.

        Raises:
            VesaliusError: for a synthetic task, which has no documents.
        """
        if not isinstance(self.source, (Order, Rewritten)):
            raise VesaliusError("this run was trained on a synthetic task, which has no documents; use --step")
        return Viewer(self.source)

    def rows(self, step: int) -> list[dict[str, Any]]:
        """The rows of a step as a person reads them: row, documents (id, and where in it), text, rewritten."""
        if not isinstance(self.source, (Order, Rewritten)):
            ids = self.source.batch(step).ids
            return [{"row": i, "documents": "", "text": self.tokenizer.decode(r.tolist())} for i, r in enumerate(ids)]
        found = []
        for row, mine in self.viewer().step(step).groupby("row"):
            spans = [
                f"{r['id']} [{r['char_start']}-{r['char_end']}]" if r["char_start"] is not pd.NA else str(r["id"])
                for r in mine.to_dict("records")
            ]
            changed = bool(mine["rewritten"].any())
            told = {"row": int(str(row)), "documents": ", ".join(spans), "text": "".join(mine["text"])}
            found.append(told | ({"rewritten": True} if changed else {}))
        return found

    def seen(self, text: str | None, document: str | None, until: int) -> pd.DataFrame:
        """Where a string or a document (by its id) was a target before a step.

        Returns:
            id, char (in the document), epoch, step, row, last_step, split (over rows), rewritten.
        """
        viewer = self.viewer()
        if document is not None:
            known = viewer.store.index["id"]
            places = np.flatnonzero(known == document)
            if not len(places):
                raise UnknownName("document", document, known.tolist())
            what: list[str | int] = [int(p) for p in places]
        else:
            what = [text or ""]
        found = pd.concat([viewer.find(w, viewer.base.epochs_until(until)) for w in what], ignore_index=True)
        found = found[found["last_step"] < until].sort_values(["last_step", "row"], ignore_index=True)
        return found[["id", "char", "epoch", "step", "row", "last_step", "split", "rewritten"]]


def data_of(recipe: Recipe, tell: Tell = _silent) -> Data:
    """The data of a recipe; a token store that was built before is found again.

    Raises:
        VesaliusError: for a corpus that is missing, empty or not text, or a setting that cannot be.
    """
    section = recipe.data
    seed = recipe.seed if section.seed is None else section.seed
    if section.synthetic is not None:
        made = partial(synthetic_source, section.synthetic, rows=section.rows, length=section.length, seed=seed)
        task = _plugged("data.settings", made, section.settings, "rows", "length", "seed", "split", "name", "kind")
        test = _plugged("data.settings", partial(made, split="test"), section.settings)
        return Data(task, test, symbol_tokenizer(task.vocab_size), None, None)
    names = [section.corpus] if isinstance(section.corpus, str) else list(section.corpus or [])
    stamps = [stamp(n, _telling(tell)) for n in names]
    tokenizer, made_of = _tokenizer(recipe, names, stamps, tell)
    store = _stored(names, stamps, tokenizer, made_of, section.deduplicate, tell)
    if not section.held_out:
        train: Tokens = store
        kept = None
    else:
        train, kept = store.split(section.held_out)
    source = Order(train, section.length, section.rows, seed, section.shuffle, tokens=section.first_tokens)
    held_out = Order(kept, section.length, section.rows, 0, "none") if kept is not None else None
    read: Source = source
    if recipe.branch is not None and recipe.branch.swap:
        read = source.rewritten(recipe.branch.step, words=recipe.branch.swap)
    return Data(read, held_out, tokenizer, train, _bytes_per_token(kept))


def store_of(names: Sequence[str], tokenizer: Any, tell: Tell = _silent) -> TokenStore:
    """The token store of some corpora, files or folders under a tokenizer that is at hand; kept in the cache.

    Documents end with the tokenizer's end-of-text token, where it has one.

    Raises:
        VesaliusError: for a corpus that is missing, empty or not text, or a tokenizer without a fast form.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise VesaliusError("a corpus is read through a fast tokenizer (tokenizer.json), and this model has none")
    stamps = [stamp(n, _telling(tell)) for n in names]
    ends = tokenizer.eos_token_id is not None or tokenizer.sep_token_id is not None
    made_of = tokenizer_sha256(tokenizer)
    return _stored(list(names), stamps, tokenizer, made_of, False, tell, "eos" if ends else None)


def _stored(
    names: list[str],
    stamps: list[str],
    tokenizer: Any,
    made_of: Any,
    deduplicate: bool,
    tell: Tell,
    separator: str | None = "eos",
) -> TokenStore:
    """Builds the store in the cache, or finds it there; a damaged one is built anew."""
    inputs = _hash(names, stamps, deduplicate)
    folder = cache_folder(None) / "stores" / _hash(inputs, made_of, FORMAT)[:24]
    build_store = partial(
        TokenStore.build,
        tokenizer=tokenizer,
        folder=folder,
        separator=separator,
        deduplicate=deduplicate,
        inputs=inputs,
    )
    try:
        return build_store(_all(names), progress=_telling(tell))
    except CorpusError as problem:
        if not folder.exists():
            raise
        tell(f"{problem}: making it anew")  # what lies in the cache is damaged; what it is made of vouches for it
        return build_store(_all(names), progress=_telling(tell), overwrite=True)


def _plugged(key: str, make: Callable[..., Any], settings: Mapping[str, Any], *taken: str) -> Any:
    """What a section of the recipe names, made with its settings; what cannot be is a refusal that names the key.

    Args:
        key: of the section. make: called with the settings. taken: names that are given by other keys.
    """
    for name in taken:
        if name in settings:
            raise VesaliusError(f"recipe key {key}.{name} is not a setting: it is given elsewhere; leave it out")
    try:
        return make(**settings)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        raise VesaliusError(
            f"recipe key {key} cannot be ({given[:200]}): {' '.join(str(error).split())[:200]}"
        ) from None


def _telling(tell: Tell) -> Callable[[str, float | None], None]:
    return lambda message, share: tell(message)


def _hash(*things: Any) -> str:
    return request_hash({"of": list(things)})


def _all(names: list[str]) -> Iterator[Document]:
    for name in names:
        yield from documents(name)


def _tokenizer(recipe: Recipe, names: list[str], stamps: list[str], tell: Tell) -> tuple[Any, Any]:
    """The tokenizer, and what it is made of (for the store's place)."""
    wanted = recipe.data.tokenizer
    if wanted is None and recipe.model.source is not None:
        wanted = recipe.model.source
    if isinstance(wanted, str):
        if Path(wanted).expanduser().is_dir() and (Path(wanted).expanduser() / "tokenizer.json").exists():
            place = Path(wanted).expanduser()
        else:
            place = resolve(wanted).folder
        found = AutoTokenizer.from_pretrained(place)
        if not getattr(found, "is_fast", False):
            raise VesaliusError(f"the tokenizer of {wanted} has no fast form (tokenizer.json); choose another")
        return found, tokenizer_sha256(found)
    settings = dict(wanted or TOKENIZER)
    key = _hash(settings, names, stamps)
    folder = cache_folder(None) / "tokenizers" / key[:24]
    if not _sound(folder):
        shutil.rmtree(folder, ignore_errors=True)
        tell(f"training a tokenizer ({', '.join(f'{k} {v}' for k, v in settings.items())})")
        made = _plugged("data.tokenizer", partial(train_tokenizer, _all(names)), settings, "documents")
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        made.save_pretrained(part)
        (part / "sha256").write_text(tokenizer_sha256(made))
        with contextlib.suppress(OSError):  # another process was first
            part.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
    return AutoTokenizer.from_pretrained(folder), key


def _sound(folder: Path) -> bool:
    """Whether a tokenizer trained earlier is there, and is what was trained."""
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return bool(tokenizer_sha256(found) == (folder / "sha256").read_text())
    except Exception:  # whatever is wrong with the files, they are made again
        return False


def _bytes_per_token(tokens: Tokens | None) -> float | None:
    """UTF-8 bytes a token stands for in held-out text; None where the store does not know the size of its text."""
    if tokens is None or bool((tokens.index["bytes"] < 0).any()):
        return None
    return float(tokens.index["bytes"].sum()) / max(tokens.n_tokens, 1)


# ---- the model


def model_of(recipe: Recipe, tokenizer: Any) -> PreTrainedModel:
    """The model of a recipe with its first weights: new ones by the seed, or those of its source."""
    section = recipe.model
    if section.source is not None:
        located = resolve(section.source)
        model, _ = load(located, None, None)
        if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
            raise VesaliusError(
                f"the tokenizer has {len(tokenizer)} tokens and {section.source} {model.config.vocab_size}; leave out "
                "data.tokenizer to use the model's own"
            )
    else:
        changes = dict(section.architecture)
        if tokenizer is not None:
            changes.setdefault("vocab_size", -(-len(tokenizer) // PADDED) * PADDED)
        if recipe.data.length > int(changes.get("max_length") or 0):
            changes.setdefault("max_length", recipe.data.length)
        made = preset(section.preset, **changes) if section.preset else Architecture(**changes)
        if recipe.data.length > made.max_length:
            raise VesaliusError(
                f"data.length {recipe.data.length} is more than the model's max_length {made.max_length}; change one"
            )
        if tokenizer is not None and len(tokenizer) > made.vocab_size:
            raise VesaliusError(
                f"the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {made.vocab_size}; raise "
                "model.architecture.vocab_size"
            )
        seed = recipe.seed if section.init_seed is None else section.init_seed
        model = build(made, seed, stock=section.stock)
    if constants_of(model) and recipe.norms is None:
        raise VesaliusError(
            f"some norms of {section.source} are constants, which an ordinary checkpoint cannot hold; go on with its "
            "own run (--resume, --branch)"
        )
    model.requires_grad_(True).train()
    if recipe.dropout is not None:
        _set_dropout(model, recipe.dropout)
    return model


def _set_dropout(model: PreTrainedModel, share: float) -> None:
    """Dropout of one share everywhere; the modules and what the config says of them."""
    found = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = share
            found += 1
        for name in ("attention_dropout", "attn_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)
                found += 1
    for name in list(vars(model.config)):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(model.config, name), (int, float)):
            setattr(model.config, name, share)
    if not found and share:
        raise VesaliusError(f"{type(model).__name__} has no dropout to set; leave out dropout")


@dataclass
class Assembly:
    """Everything a sitting of a run needs."""

    trainer: Trainer
    data: Data
    recipe: Recipe
    removal: NormRemoval | None = None
    held: int = 0  # numbers in trained tensors that stay as they are

    @property
    def lineage(self) -> dict[str, Any]:
        """Where a branch comes from; empty for a run of its own."""
        branch = self.recipe.branch
        return {} if branch is None else {"parent": branch.run, "step": branch.step}

    @property
    def tokenizer(self) -> Any:
        """Saved with every checkpoint."""
        return self.data.tokenizer

    @property
    def held_out(self) -> Source | None:
        """Batches for evaluation."""
        return self.data.held_out

    @property
    def bytes_per_token(self) -> float | None:
        """For bits per byte; None where the loss is not over all tokens of a text."""
        return self.data.bytes_per_token if self.recipe.objective.name in ("causal-lm", "full-lm") else None

    @property
    def description(self) -> dict[str, Any]:
        """What decides the batches."""
        return self.data.description

    def branch(self, trainer: Trainer, folder: Path) -> None:
        """Goes on from another run's checkpoint: all of it if the optimizer is the same, else weights and step."""
        checkpoints.check(folder)
        note = read_json(folder / checkpoints.NOTE, "branch from another step")
        if note.get("data", {}).get("tokenizer") != self.description["tokenizer"]:
            raise VesaliusError(f"{folder} was trained with another tokenizer; give data.tokenizer as that run has it")
        same = note.get("recipe", {}).get("optimizer", {}).get("name") == self.recipe.optimizer.name
        if note.get("recipe", {}).get("norms") and (self.recipe.norms is None or not same):
            raise VesaliusError(
                f"{folder} belongs to a run that takes norms out; branch from it with its norms and its optimizer, or "
                f"train on from its end as from any model (model.source: {folder.parent.parent}@last)"
            )
        if same:
            trainer.load(folder, with_settings=False)
        else:
            trainer.load_weights(folder)


def _check_rates(settings: Mapping[str, Any]) -> None:
    """Refuses what torch's own optimizers would meet at their first step."""
    for name in ("lr", "eps", "weight_decay"):
        value = settings.get(name, 0.0)
        if name in settings and (isinstance(value, bool) or not isinstance(value, (int, float, list, tuple))):
            raise VesaliusError(f"recipe key optimizer.{name} is {value!r}; give a number")
        if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
            raise VesaliusError(f"recipe key optimizer.{name} is {value}; give a number of 0 or more")
    betas = settings.get("betas")
    if betas is not None:
        fine = isinstance(betas, (list, tuple)) and len(betas) in (2, 3)
        if not fine or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas):
            raise VesaliusError(
                f"recipe key optimizer.betas is {betas!r}; give two numbers (Adan three) from 0 to below 1"
            )


def assemble(
    recipe: Recipe, world: World, tell: Tell = _silent, strategy: str = "ddp", sequence_parallel: bool = False
) -> Assembly:
    """Everything a recipe asks for, made and fitted together.

    Raises:
        VesaliusError: naming what does not fit, before the first step.
    """
    plan = partial(make_schedule, recipe.schedule.name, recipe.steps)
    schedule = _plugged("schedule", plan, recipe.schedule.settings, "total")
    if world.size > 1 and not world.is_main:  # the main process builds stores and tokenizers; others find them
        world.barrier()
    data = data_of(recipe, tell)
    if world.size > 1 and world.is_main:
        world.barrier()
    model = model_of(recipe, data.tokenizer)
    settings = recipe.parameters
    if settings.lora is not None:
        add_lora(model, settings.lora, recipe.seed)
    elif settings.roles or settings.only or settings.freeze:
        choose(model, settings.roles, settings.only, settings.freeze)
    parts = [s for s in slices(model, settings.only) if s.tensor.requires_grad]
    if parts and world.size > 1:
        raise VesaliusError("single heads are trained in one process; start without torchrun, or name L3.attn")
    removal = None if recipe.norms is None else _removal(recipe, model, data, world)
    needs = needs_for(model, data.tokenizer)
    aim = partial(make_objective, recipe.objective.name, needs, tokenizer=data.tokenizer)
    objective = _plugged("objective", aim, recipe.objective.settings, "needs", "tokenizer")
    shared = parallelize(model, world, strategy, sequence_parallel=sequence_parallel)
    _check_rates(recipe.optimizer.settings)
    update = partial(make_optimizer, recipe.optimizer.name, unwrap(shared))
    optimizer = _plugged("optimizer", update, recipe.optimizer.settings, "model")
    trainer = Trainer(
        shared,
        data.source,
        objective,
        optimizer,
        schedule,
        seed=recipe.seed,
        accumulate=recipe.accumulate,
        clip=recipe.clip,
        precision=recipe.precision,
        world=world,
        plugs=[
            *([] if removal is None else [removal]),
            *([Slices(parts)] if parts else []),
            *([objective] if isinstance(objective, Plug) else []),  # one that learns numbers of its own
        ],
    )
    return Assembly(trainer, data, recipe, removal, sum(s.held for s in parts))


def _removal(recipe: Recipe, model: PreTrainedModel, data: Data, world: World) -> NormRemoval:
    """What takes the norms out, if there are steps enough for it."""
    assert recipe.norms is not None
    if world.size > 1:
        raise VesaliusError("norms are taken out in one process; start without torchrun")
    if recipe.parameters.lora is not None:
        raise VesaliusError("norms are taken out of whole models, not beside LoRA adapters; leave out parameters.lora")
    made = NormRemoval(model, recipe.norms, None if data.store is None else data.store.separator)
    if recipe.steps <= made.last_step:
        raise VesaliusError(
            f"the last norm becomes one number at step {made.last_step}, and there are {recipe.steps} steps; give "
            f"{made.last_step + 1} or more, or smaller gaps (norms.gap_v, ...)"
        )
    return made
