"""What a tuned lens is trained to do, in the form the trainer takes: a module to run and a loss over its states.

    loss = sum over layers l of KL(final || lens_l), summed over the states that are trained

Layers share nothing but the forward pass: no parameter, and no term of the loss, belongs to two of them, and Adam moves
each number by its own gradients, so a layer comes out the same whichever others are trained beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.checkpoints import load_tensors, save_tensors
from vesalius.corpus.batches import Batch
from vesalius.errors import ModelError, VesaliusError
from vesalius.lens.base import layer_name, residual_sites
from vesalius.lens.divergence import candidates, final_side, kl_to_final
from vesalius.lens.tuned import TENSORS, TunedLens
from vesalius.model import Model
from vesalius.model.hooks import Hooks, Site, Tap
from vesalius.train.objectives import IGNORED, Loss, Objective, Sample, generator, make_objective
from vesalius.train.objectives.samples import MaskedSample
from vesalius.train.objectives.special import needs_for

OBJECTIVE = {"causal": "causal-lm", "masked": "masked-lm", "encoder-decoder": "span-corruption"}


@dataclass(frozen=True)
class States:
    """What the frozen model gave: the stream at every layer, each (row, pos, d_model), and the step it was read for."""

    states: list[Tensor]


class Reader(nn.Module):
    """The frozen model as something to train through: only the lens's translators are its parameters.

    Args:
        lens: what is trained. model: what is read; it is not a part of this module, so that it is neither saved nor
            put into training mode.
    """

    def __init__(self, lens: TunedLens, model: Model) -> None:
        super().__init__()
        self.lens = lens
        self.config = model.hf.config
        self._bench = (model,)
        body = model.hf.base_model
        takes = inspect.signature(body.forward).parameters
        self._body = (body,)
        self._always: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}

    @property
    def model(self) -> Model:
        """What is read."""
        return self._bench[0]

    @torch.no_grad()
    def forward(self, **inputs: Any) -> States:
        """The stream at every layer; the model's own head is not run."""
        recorded: dict[Site, Tensor] = {}
        sites = residual_sites(self.model)

        def note(site: Site) -> list[Tap]:
            def tap(x: Tensor) -> None:
                recorded[site] = x

            return [tap]

        with Hooks(self.model.hf, self.model.anatomy, {site: note(site) for site in sites}):
            self._body[0](**inputs, **self._always)
        return States([recorded[site] for site in sites])

    # -- what the trainer keeps of it

    def save_pretrained(self, folder: Path, state_dict: Mapping[str, Tensor]) -> None:
        """The translators alone."""
        save_tensors(Path(folder) / TENSORS, dict(state_dict))

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype) -> _Saved:
        """What `save_pretrained` wrote."""
        return _Saved(load_tensors(Path(folder) / TENSORS))


@dataclass(frozen=True)
class _Saved:
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors


@dataclass(frozen=True)
class LensObjective:
    """KL to the model's final distribution at some positions of a batch.

    Attributes:
        reader: what is trained.
        base: makes inputs from rows of tokens, and says which positions foretell something.
        states: positions trained in a step, drawn anew each time; all of them if fewer.
        skip: first positions of a row that are left out: a causal model parks attention there, and its state says
            nothing about the text.
        words: size of the sample that stands for the vocabulary, or None for all of it.
    """

    reader: Reader
    base: Objective
    states: int
    skip: int
    words: int | None = None

    def sample(self, batch: Batch, seed: int) -> Sample:
        """The base's sample, with targets left only where a state is trained."""
        made = self.base.sample(batch, seed)
        targets = made.targets.clone()
        targets[:, : self.skip] = IGNORED
        open_ = (targets.flatten() != IGNORED).nonzero()[:, 0]
        if len(open_) > self.states:
            rng = generator(seed, batch.step, "lens")
            kept = torch.from_numpy(rng.permutation(len(open_))[: self.states])
            chosen = torch.full_like(targets.flatten(), IGNORED)
            chosen[open_[kept]] = targets.flatten()[open_[kept]]
            targets = chosen.view_as(targets)
        if isinstance(made, MaskedSample):
            return MaskedSample(made.given, made.mask, targets, None, made.restart_positions)
        return Sample(made.inputs, targets)

    def loss(self, outputs: States, sample: Sample) -> Loss:
        """The sum over layers and states; logs a sum for each layer."""
        model, lens = self.reader.model, self.reader.lens
        valid = sample.targets != IGNORED
        final = final_side(model, outputs.states[-1][valid])
        words = None
        if self.words is not None and model.unembedding is not None and self.words < len(final.mean):
            # what is drawn follows from the states, which follow from (seed, step): nothing has to be kept
            drawn = torch.Generator().manual_seed(_number(sample.targets))
            words = candidates(model.unembedding, final.mean, self.words, drawn)
        logs = {}
        total = torch.zeros((), device=lens.bias.device)
        for number, states in enumerate(outputs.states[:-1]):
            kl = kl_to_final(model, lens.translate(states[valid], number - 1), final, words).sum()
            logs[layer_name(number - 1)] = kl.detach()
            total = total + kl
        return Loss(total, logs)


def _number(targets: Tensor) -> int:
    """A number that follows from the tokens, to draw by."""
    places = torch.arange(1, targets.numel() + 1, device=targets.device)
    return int((targets.flatten().long() * places).sum()) & 0x7FFFFFFF


def objective_for(reader: Reader, states: int, words: int | None = None) -> LensObjective:
    """The objective that suits the model's kind: next tokens, hidden words, or corrupted spans.

    Raises:
        ModelError: for an encoder without a head. VesaliusError: for a head that cannot be sampled from.
    """
    model = reader.model
    if model.kind not in OBJECTIVE:
        raise ModelError(f"{model.name} is an encoder without a head: it foretells nothing, so no lens can be trained")
    if words is not None and words < 2:
        raise VesaliusError(f"{words} words cannot stand for a vocabulary; give some thousands, or 0 for all of it")
    needs = needs_for(model.hf, model.tokenizer)
    settings = {"whole_words": False} if model.kind == "masked" else {}
    base = make_objective(OBJECTIVE[model.kind], needs, tokenizer=model.tokenizer, **settings)
    return LensObjective(reader, base, states, 1 if model.kind == "causal" else 0, words)
