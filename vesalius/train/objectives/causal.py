"""Language modelling: foretell every token from those before it, or the end of a text from its beginning.

Full language modelling (FLM) puts loss on every token; prefix language modelling (PLM) draws a point, lets what is
before it be read both ways, and puts loss on what comes after (Wang et al. 2022, arXiv 2204.05832).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from vesalius.corpus.batches import Batch
from vesalius.train.masks import PADDING
from vesalius.train.objectives import settings
from vesalius.train.objectives.base import IGNORED, Loss, Needs, Sample, generator
from vesalius.train.objectives.losses import token_loss
from vesalius.train.objectives.ragged import masked_sample, sample_of, split, texts


@dataclass(frozen=True)
class CausalLM:
    """Objective `causal-lm`: the next token, everywhere.

    Attributes:
        needs: nothing beside the kind of model.
        cross_document: `allow`: rows are read as they are; `mask`: no document of a row reads another, and none
            foretells another's first token.
        restart_positions: with `mask`, count positions from the start of each document.
        z_loss: penalty of log^2 Z, see `losses`; PaLM's is 1e-4.
        chunk: rows whose float32 logits exist at once, see `losses`.
    """

    needs: Needs
    cross_document: Literal["allow", "mask"] = "allow"
    restart_positions: bool = False
    z_loss: float = 0.0
    chunk: int = 0

    def __post_init__(self) -> None:
        settings.kinds("causal-lm", self.needs.kind, ("causal",))
        settings.choice("causal-lm", "cross_document", self.cross_document, ("allow", "mask"))
        settings.flag("causal-lm", "restart_positions", self.restart_positions)
        settings.number("causal-lm", "z_loss", self.z_loss, 0)
        settings.whole("causal-lm", "chunk", self.chunk, 0)

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Tokens and their successors; nothing is drawn."""
        targets = next_tokens(batch, by_document=self.cross_document == "mask")
        segments = batch.segments[:, :-1]
        if self.cross_document == "allow":
            if batch.segments.min(initial=0) != PADDING:
                ids = torch.from_numpy(np.ascontiguousarray(batch.ids[:, :-1]))
                return Sample({"input_ids": ids}, torch.from_numpy(targets))
            segments = np.where(segments == PADDING, PADDING, 0)
        return masked_sample(batch.ids[:, :-1], segments, targets, None, self.restart_positions)

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`."""
        return token_loss(outputs.logits, sample, self.z_loss, self.chunk)


@dataclass(frozen=True)
class PrefixLM:
    """Objective `prefix-lm`: what comes after a point drawn uniformly; before it, reading goes both ways.

    A text of n tokens has its prefix end after 1 .. n - 1 of them; all tokens after it are foretold, half of the text
    on average.

    Attributes:
        needs: nothing beside the kind of model; an encoder-decoder reads the prefix in its encoder.
        mask: `prefix`, or `causal` for a decoder that reads from the left throughout.
        cross_document: `allow`: a row is one text; `mask`: each document of a row has a prefix and reads no other.
        restart_positions: with `mask`, count positions from the start of each document.
        z_loss: see `CausalLM`.
        chunk: see `CausalLM`.
    """

    needs: Needs
    mask: Literal["prefix", "causal"] = "prefix"
    cross_document: Literal["allow", "mask"] = "allow"
    restart_positions: bool = False
    z_loss: float = 0.0
    chunk: int = 0

    def __post_init__(self) -> None:
        settings.kinds("prefix-lm", self.needs.kind, ("causal", "encoder-decoder"))
        settings.choice("prefix-lm", "mask", self.mask, ("prefix", "causal"))
        settings.choice("prefix-lm", "cross_document", self.cross_document, ("allow", "mask"))
        settings.flag("prefix-lm", "restart_positions", self.restart_positions)
        settings.number("prefix-lm", "z_loss", self.z_loss, 0)
        settings.whole("prefix-lm", "chunk", self.chunk, 0)

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Tokens, the two-way part, and the successors after it."""
        rng = generator(seed, batch.step)
        given = texts(batch, by_document=self.cross_document == "mask")
        point = 1 + np.floor(rng.random(len(given.lengths)) * (given.lengths - 1)).astype(np.int64)  # tokens of prefix
        offset = np.arange(len(given.ids)) - np.repeat(given.starts, given.lengths)
        foretold = offset >= np.repeat(point, given.lengths)
        if self.needs.kind == "encoder-decoder":
            unmarked = np.zeros(len(point), dtype=bool)
            inputs, told = split(given, foretold, np.zeros(0, dtype=np.int64), unmarked)
            return sample_of(given, inputs, told, self.needs, self.mask)
        real = batch.segments != PADDING
        ends = np.zeros(batch.ids.shape, dtype=bool)
        ends[real] = foretold
        by_document = self.cross_document == "mask"
        targets = np.where(ends[:, 1:], next_tokens(batch, by_document), IGNORED)
        segments = batch.segments[:, :-1]
        if not by_document:
            segments = np.where(real[:, :-1], 0, PADDING)
        two_way = (real & ~ends)[:, :-1] if self.mask == "prefix" else None
        return masked_sample(batch.ids[:, :-1], segments, targets, two_way, self.restart_positions)

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`."""
        return token_loss(outputs.logits, sample, self.z_loss, self.chunk)


def next_tokens(batch: Batch, by_document: bool) -> Any:
    """The successor of each token read, (row, length); -100 for padding, what the batch masks, and across documents."""
    targets = batch.ids[:, 1:].copy()
    after = batch.segments[:, 1:]
    if batch.mask is not None:
        targets[~batch.mask[:, 1:]] = IGNORED
    if by_document:
        targets[after != batch.segments[:, :-1]] = IGNORED
    if batch.segments.min(initial=0) == PADDING:
        targets[(after == PADDING) | (batch.segments[:, :-1] == PADDING)] = IGNORED
    return targets
