"""Training a sparse autoencoder on a model's activations: a run whose folder is the SAE.

    RUN/cfg.json, sae_weights.safetensors   the SAE, as SAELens reads it (see `vesalius.features.dictionaries.sae`)
    RUN/log.parquet                         every step: loss, error, features on (l0), share that is dead
    RUN/quality.json, density.parquet       what it is worth on held-out text

Activations are read once, scaled so that their mean distance from their mean is sqrt(d) (the scale is recorded, and
folded back into the weights at the end), and trained on in shuffled batches, several times over:

    standard   |x - x^|^2 + l1 * sum f      (l1 rises over the first tenth of the steps)
    topk       |x - x^|^2

Decoder rows have length 1 throughout: gradients are taken through w / |w|, and |w| is set to 1 after each step.
Features that fired on no token since the last look, `resample` steps before, are dead and start anew: towards a vector
that is reconstructed badly (drawn in proportion to its squared error), with an encoder of a fifth of the living ones'
length (Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features), their Adam state cleared. Training
goes through the project's one trainer, so a run that was killed goes on and ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vesalius.checkpoints import save_tensors
from vesalius.corpus.batches import Batch
from vesalius.errors import UnknownName, VesaliusError
from vesalius.features.dictionaries import sitting
from vesalius.features.dictionaries.places import parse_place, place_name, width_of
from vesalius.features.dictionaries.quality import quality
from vesalius.features.dictionaries.reading import Halves, Tell, corpus_rows, gather, prompt_rows, silent
from vesalius.features.dictionaries.sae import CONFIG, SAE, WEIGHTS, keep_largest
from vesalius.model import Model, Site
from vesalius.model.memory import memory_errors
from vesalius.runs import Run
from vesalius.train.ledger import peak_memory_bytes
from vesalius.train.objectives import Loss, Sample, generator
from vesalius.train.optimizers import make_optimizer
from vesalius.train.parallel import World
from vesalius.train.schedules import make_schedule
from vesalius.train.trainer import Trainer, deterministic, is_exact

COMMAND = "sae-train"
FEWEST = 4  # vectors for each feature, at least
RAMP = 0.1  # of the steps, over which the penalty rises
REST = 0.8  # of the steps, after which nothing is resampled: a new feature needs time
DRAWN = 8192  # vectors among which the badly reconstructed are sought
MEMORY = "lower --tokens, --width or --batch"


@dataclass(frozen=True)
class SAERecipe:
    """How an SAE is trained.

    Attributes:
        architecture: `topk` or `standard`. width: features; four times the vectors' width if None.
        k: features on at once (topk). l1: weight of the penalty (standard).
        tokens: read. passes: over them. batch: vectors in a step. length: tokens in a row of text.
        lr: peak rate of Adam. resample: steps between looks for dead features; 0 for never.
        held_out: share of the documents. check_tokens: held-out tokens to judge by. memory_gb: for the activations.
    """

    architecture: Literal["topk", "standard"] = "topk"
    width: int | None = None
    k: int = 32
    l1: float = 5.0
    tokens: int = 60_000
    passes: int = 4
    batch: int = 1024
    length: int = 128
    lr: float = 1e-3
    resample: int = 50
    held_out: float = 0.05
    check_tokens: int = 4096
    memory_gb: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ("topk", "standard"):
            raise UnknownName("architecture that is trained here", str(self.architecture), ("topk", "standard"))
        for name in ("tokens", "passes", "batch", "k", "check_tokens"):
            if getattr(self, name) < 1:
                raise VesaliusError(f"an SAE cannot be trained with {name} {getattr(self, name)}; give 1 or more")
        if not 0 < self.held_out < 1:
            raise VesaliusError(f"held_out is {self.held_out:g}; give a share of the documents between 0 and 1")
        if not 0 < self.lr < math.inf or not 0 <= self.l1 < math.inf or self.resample < 0:
            raise VesaliusError(
                f"lr {self.lr:g}, l1 {self.l1:g}, resample {self.resample}: no negative numbers, lr above 0"
            )

    def features(self, d: int) -> int:
        """How many features for vectors of that width; refuses what cannot be trained."""
        width = 4 * d if self.width is None else self.width
        if width < 2 or (self.architecture == "topk" and self.k > width):
            raise VesaliusError(f"an SAE of {width} features with k {self.k} cannot be; give a --width above k")
        return width


class Trained(nn.Module, sitting.Kept):
    """An SAE while it is trained, on scaled vectors; numbers of vectors are its input.

    Args:
        x: scaled vectors (n, d); they are not a part of this module.
    """

    def __init__(self, x: Tensor, recipe: SAERecipe, width: int, every: int) -> None:
        super().__init__()
        d = x.shape[1]
        drawn = torch.Generator().manual_seed(recipe.seed)
        rows = torch.nn.functional.normalize(torch.randn(width, d, generator=drawn), dim=-1)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.b_dec = nn.Parameter(x.mean(0))
        self.register_buffer("fires", torch.zeros(width))
        self.fires: Tensor
        self._held = (x,)
        self.recipe, self.every = recipe, every

    @property
    def x(self) -> Tensor:
        """The vectors."""
        return self._held[0]

    def encode(self, x: Tensor) -> Tensor:
        """Features of scaled vectors."""
        p = (x - self.b_dec) @ self.W_enc + self.b_enc
        return keep_largest(p, self.recipe.k) if self.recipe.architecture == "topk" else torch.relu(p)

    def decode(self, features: Tensor) -> Tensor:
        """Vectors of features; rows of the decoder count by their direction alone."""
        return features @ torch.nn.functional.normalize(self.W_dec, dim=-1) + self.b_dec

    def forward(self, input_ids: Tensor, ramp: Tensor) -> _Output:
        """Vectors by number, their features and reconstruction."""
        x = self.x[input_ids[:, 0]]
        features = self.encode(x)
        return _Output(x, features, self.decode(features), ramp)

    @torch.no_grad()
    def settle(self) -> None:
        """Sets every decoder row to length 1."""
        self.W_dec.copy_(torch.nn.functional.normalize(self.W_dec, dim=-1))

    @torch.no_grad()
    def resample(self, optimizer: torch.optim.Optimizer, step: int) -> int:
        """Starts dead features anew; returns how many there were."""
        dead = (self.fires == 0).nonzero()[:, 0]
        alive = (self.fires > 0).nonzero()[:, 0]
        self.fires.zero_()
        if not len(dead):
            return 0
        rng = generator(self.recipe.seed, step, "resample")
        sample = torch.from_numpy(rng.permutation(len(self.x))[:DRAWN])
        x = self.x[sample]
        missed = x - self.decode(self.encode(x))
        weights = missed.pow(2).sum(-1).double().numpy() ** 2
        weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(x), 1 / len(x))
        chosen = torch.from_numpy(rng.choice(len(x), size=len(dead), p=weights))
        towards = torch.nn.functional.normalize(missed[chosen], dim=-1)
        length = self.W_enc[:, alive].norm(dim=0).mean() if len(alive) else torch.tensor(1.0)
        self.W_dec[dead] = towards
        self.W_enc[:, dead] = 0.2 * length * towards.T
        self.b_enc[dead] = 0.0
        for tensor, axis in ((self.W_dec, 0), (self.W_enc, 1), (self.b_enc, 0)):
            for value in optimizer.state.get(tensor, {}).values():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    value.index_fill_(axis, dead, 0.0)
        return len(dead)


class _Output(NamedTuple):
    x: Tensor
    features: Tensor
    made: Tensor
    ramp: Tensor


@dataclass(frozen=True)
class _Vectors:
    """Numbers of vectors in shuffled batches, as the trainer takes them."""

    n: int
    rows: int
    seed: int
    fingerprint: str
    vocab_size: int = 0
    length: int = 1

    def batch(self, step: int) -> Batch:
        each = max(1, self.n // self.rows)
        order = np.random.default_rng([self.seed, step // each]).permutation(self.n)
        at = step % each * self.rows
        ids = np.resize(order[at : at + self.rows], self.rows)[:, None]
        return Batch(step, np.repeat(ids, 2, axis=1), np.zeros((self.rows, 2), dtype=np.int64))

    def describe(self) -> dict[str, Any]:
        return {"kind": "vectors", "n": self.n, "rows": self.rows, "seed": self.seed, "of": self.fingerprint}


@dataclass(frozen=True)
class _Objective:
    """Squared error, and the penalty where there is one."""

    module: Trained
    steps: int

    def sample(self, batch: Batch, seed: int) -> Sample:
        ids = torch.from_numpy(batch.ids[:, :1])
        ramp = min(1.0, (batch.step + 1) / max(1.0, RAMP * self.steps))
        return Sample({"input_ids": ids, "ramp": torch.full((len(ids), 1), ramp)}, torch.zeros_like(ids))

    def loss(self, outputs: _Output, sample: Sample) -> Loss:
        recipe, module = self.module.recipe, self.module
        error = (outputs.x - outputs.made).pow(2).sum()
        on = (outputs.features > 0).sum(0)
        if module.training:
            module.fires += on
        total = error
        if recipe.architecture == "standard":
            total = total + recipe.l1 * (outputs.ramp * outputs.features).sum()
        d = outputs.x.shape[1]
        return Loss(total, {"error": error.detach() / d, "l0": on.sum().float()})


def train_sae(
    model: Model,
    place: str | Site,
    corpus: str | Path | Sequence[str | Path] = (),
    recipe: SAERecipe | None = None,
    *,
    prompts: Sequence[str] = (),
    out: Path | str | None = None,
    fresh: bool = False,
    command_line: str = "",
    tell: Tell = silent,
) -> Path:
    """Trains an SAE, going on where an earlier sitting stopped; returns the run's folder.

    Args:
        model: whose activations it explains. place: where, as `L12.resid_post` (see `places`).
        corpus: corpora by name, files or folders; or `prompts`, of which every fourth is held out.
        recipe: see `SAERecipe`. out, fresh, command_line: of the run. tell: told how far it is.

    Raises:
        VesaliusError: naming what of the text, the recipe or the model is at fault.

    Example:
        >>> folder = train_sae(model, "L12.resid_post", "foldoc")         # doctest: +SKIP
        >>> sae = SAE.load(folder, model)                                  # doctest: +SKIP
    """
    recipe = recipe or SAERecipe()
    site = parse_place(place)
    width = recipe.features(width_of(model, site))
    corpora = [corpus] if isinstance(corpus, (str, Path)) else list(corpus)
    if bool(corpora) == bool(prompts):
        raise VesaliusError("an SAE is trained on a corpus or on prompts: name one of them")
    text = _prompts(model, prompts) if prompts else _corpus(model, corpora, recipe, tell)
    have = text.train.n_tokens
    if have < FEWEST * width:
        raise VesaliusError(
            f"{have:,} tokens are too few to train {width:,} features: at least {FEWEST * width:,} are needed "
            f"({FEWEST} a feature); raise --tokens, add text, or lower --width to {max(2, have // FEWEST)}"
        )
    request = {
        "command": COMMAND,
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "place": place_name(site),
        "text": text.train.what,
        "data": [text.train.fingerprint, text.held_out.fingerprint],
        **{k: v for k, v in asdict(recipe).items() if k != "memory_gb"},
        "width": width,
    }
    with Run.start(request, out, fresh, command_line) as run:
        if fresh:
            sitting.forget(run)
        if not run.done:
            with memory_errors(MEMORY), deterministic(is_exact(None, model.device)):
                _go(run, model, site, text, recipe, width, tell, command_line)
            sitting.forget(run)
    return run.folder


def _corpus(model: Model, corpora: Sequence[str | Path], recipe: SAERecipe, tell: Tell) -> Halves:
    return corpus_rows(
        model,
        corpora,
        recipe.tokens,
        held_out_tokens=recipe.check_tokens,
        length=recipe.length,
        held_out=recipe.held_out,
        seed=recipe.seed,
        tell=tell,
    )


def _prompts(model: Model, prompts: Sequence[str]) -> Halves:
    if len(prompts) < 8:
        raise VesaliusError(f"{len(prompts)} prompts are too few to train on and to judge by; give 8 or more")
    kept = [p for i, p in enumerate(prompts) if i % 4 == 3]
    return Halves(prompt_rows(model, [p for i, p in enumerate(prompts) if i % 4 != 3]), prompt_rows(model, kept))


def _go(
    run: Run, model: Model, site: Site, text: Halves, recipe: SAERecipe, width: int, tell: Tell, command_line: str
) -> None:
    if not run.has(WEIGHTS):
        with run.stage("activations"):
            found = gather(model, site, text.train, memory_gb=recipe.memory_gb, tell=tell)
        sae = fit(run, found.x, site, recipe, width, text.train.fingerprint, tell)
        sae.belongs(model)
        sae.metadata |= {"dataset_path": text.train.what, "context_size": recipe.length}
        run.save_file(WEIGHTS, lambda path: save_tensors(path, sae.tensors()))
        run.save_json(CONFIG, sae.config())
    sae = SAE.load(run.folder, model)
    with run.stage("held-out text"):
        judged = quality(model, sae, text.held_out, memory_gb=recipe.memory_gb, tell=tell)
    run.save_json("quality", judged.numbers)
    table = pd.DataFrame({"feature": range(sae.d_sae), "density": judged.density, "largest": judged.largest})
    run.save_table("density", table)
    log = run.table("log")
    summary = {
        "model": model.name,
        "place": sae.place,
        "architecture": sae.architecture,
        "features": sae.d_sae,
        "text": text.train.what,
        "tokens": text.train.n_tokens,
        "steps": len(log),
        "seconds": float(log["seconds"].sum()),
        "peak_bytes": peak_memory_bytes(),
        "quality": judged.numbers,
        "lead": lead(sae, judged.numbers),
        "notes": notes(judged.numbers),
        "command": command_line,
    }
    run.save_json("summary", summary)


def fit(run: Run, x: Tensor, site: Site, recipe: SAERecipe, width: int, fingerprint: str, tell: Tell = silent) -> SAE:
    """The SAE of vectors (token, d), trained into a run.

    Raises:
        VesaliusError: if all vectors are the same.
    """
    lengths = (x - x.mean(0)).norm(dim=-1)  # about the mean: a constant that all share must not set the scale
    if not float(lengths.mean()) > 0:
        raise VesaliusError(f"all vectors at {place_name(site)} are the same; there is nothing to learn from them")
    scale = float(x.shape[1] ** 0.5 / lengths.mean())
    scaled = x * scale
    batch = min(recipe.batch, len(x))
    steps = max(1, recipe.passes * (len(x) // batch))
    every = recipe.resample
    module = Trained(scaled, recipe, width, every)
    optimizer = make_optimizer("adamw", module, lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.999))
    source: Any = _Vectors(len(x), batch, recipe.seed, fingerprint)
    trainer = Trainer(
        module,
        source,
        _Objective(module, steps),
        optimizer,
        make_schedule("linear", steps, warmup=0.05),
        seed=recipe.seed,
        clip=None,
        world=World.single("cpu"),
    )
    started: list[int] = []

    def after(done: int) -> None:
        module.settle()
        if every and done % every == 0 and done <= REST * steps:
            started.append(module.resample(optimizer, done))

    sitting.train(run, trainer, steps, tell, after)
    return folded(module, scale, site, recipe)


@torch.no_grad()
def folded(module: Trained, scale: float, site: Site, recipe: SAERecipe) -> SAE:
    """The SAE for vectors as the model has them: encode(x) = scaled features / scale, decoder rows of length 1."""
    tensors = {
        "W_enc": module.W_enc,
        "b_enc": module.b_enc / scale,
        "W_dec": torch.nn.functional.normalize(module.W_dec, dim=-1),
        "b_dec": module.b_dec / scale,
    }
    told = {"vesalius_scale": scale, "vesalius_recipe": asdict(recipe)}
    k = recipe.k if recipe.architecture == "topk" else None
    return SAE(recipe.architecture, tensors, site, k=k, metadata=told)


def lead(sae: SAE, q: dict[str, Any]) -> str:
    """What it is worth, in two sentences."""
    text = (
        f"{sae.d_sae:,} features explain {q['explained']:.1%} of the variance at {sae.place} on {q['tokens']:,} "
        f"held-out tokens, {q['l0']:.1f} of them at a time."
    )
    if "recovered_mean" in q:
        mean = q["recovered_mean"]
        text += (
            f" With the reconstruction in its place the model's loss is {q['ce_spliced']:.2f} nats (as it is "
            f"{q['ce_clean']:.2f}, mean-ablated {q['ce_mean']:.2f})"
        )
        if mean["mean"] is None:
            return text + "; the ablation costs it nothing, so that no share of a loss is recovered."
        text += f": {mean['mean']:.1%} [{mean['low']:.1%}, {mean['high']:.1%}] of the loss is recovered."
    return text


def notes(q: dict[str, Any]) -> list[str]:
    """What a reader must know."""
    found = []
    if q["dead"] > 0.3:
        found.append(
            f"{q['dead']:.0%} of the features fire on none of {q['tokens']:,} held-out tokens: some are rare, most "
            "were trained on too little; lower --width or raise --tokens"
        )
    if q["explained"] < 0.5:
        found.append("less than half of the variance is explained: what the features show is a part of what is there")
    return found
