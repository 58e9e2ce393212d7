"""Prompted training: foretell the answer given the prompt, and nothing else (Muennighoff et al. 2022, BLOOMZ).

What is an answer is said by the batch's mask. Averaged over tokens, long answers decide; averaged over sequences
(BLOOMZ's `lossseq`, arXiv 2211.01786), an answer of one token weighs as much as one of a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.masks import PADDING
from vesalius.train.objectives import settings
from vesalius.train.objectives.base import IGNORED, Loss, Needs, Sample
from vesalius.train.objectives.causal import next_tokens
from vesalius.train.objectives.losses import token_loss
from vesalius.train.objectives.ragged import masked_sample, sample_of, split, texts


@dataclass(frozen=True)
class Prompted:
    """Objective `prompted`: loss on the tokens that `Batch.mask` marks, given all before them in their document.

    Attributes:
        needs: nothing beside the kind of model; an encoder-decoder reads the prompt in its encoder.
        normalise: `token`, or `sequence`: each document's targets weigh 1 together.
        mask: `causal`, or `prefix`: tokens that are not targets are read both ways (one prompt a document).
        cross_document: `mask`: examples packed in one row do not read each other; `allow`: they do.
        restart_positions: count positions from the start of each document.
        z_loss: penalty of log^2 Z, see `losses`.
        chunk: rows whose float32 logits exist at once, see `losses`.
    """

    needs: Needs
    normalise: Literal["token", "sequence"] = "token"
    mask: Literal["causal", "prefix"] = "causal"
    cross_document: Literal["allow", "mask"] = "mask"
    restart_positions: bool = False
    z_loss: float = 0.0
    chunk: int = 0

    def __post_init__(self) -> None:
        settings.kinds("prompted", self.needs.kind, ("causal", "encoder-decoder"))
        settings.choice("prompted", "normalise", self.normalise, ("token", "sequence"))
        settings.choice("prompted", "mask", self.mask, ("prefix", "causal"))
        settings.choice("prompted", "cross_document", self.cross_document, ("allow", "mask"))
        settings.flag("prompted", "restart_positions", self.restart_positions)
        settings.number("prompted", "z_loss", self.z_loss, 0)
        settings.whole("prompted", "chunk", self.chunk, 0)

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Tokens, targets where the mask has them, and their weights; nothing is drawn."""
        if batch.mask is None:
            raise VesaliusError("objective 'prompted' needs to know what is an answer: the batches have no mask")
        self._check(batch)
        given = texts(batch, by_document=True)
        real = batch.segments != PADDING
        if self.needs.kind == "encoder-decoder":
            inputs, told = split(given, batch.mask[real], np.zeros(0, dtype=np.int64), np.zeros(len(given.rows), bool))
            sample = sample_of(given, inputs, told, self.needs, "causal")
            weights = (sample.targets != IGNORED).float()
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
            return sample if self.normalise == "token" else Sample(sample.inputs, sample.targets, weights)
        targets = next_tokens(batch, by_document=True)
        two_way = (real & ~batch.mask)[:, :-1] if self.mask == "prefix" else None
        each = None
        if self.normalise == "sequence":
            owner = np.full(batch.ids.shape, -1)
            owner[real] = given.owners
            at = targets != IGNORED
            sizes = np.bincount(owner[:, 1:][at], minlength=len(given.lengths))
            each = np.zeros(targets.shape)
            each[at] = 1.0 / sizes[owner[:, 1:][at]]
        segments = batch.segments[:, :-1]
        if self.cross_document == "allow":
            segments = np.where(real[:, :-1], 0, PADDING)
        return masked_sample(batch.ids[:, :-1], segments, targets, two_way, self.restart_positions, each)

    def _check(self, batch: Batch) -> None:
        """Refuses a prompt after an answer where prompts are read both ways: the answer would be given away."""
        if self.mask == "causal" and self.needs.kind == "causal":
            return
        mask = batch.mask
        assert mask is not None
        same = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] != PADDING)
        back = mask[:, :-1] & ~mask[:, 1:] & same
        joined = self.cross_document == "allow" and self.needs.kind == "causal"
        if back.any() or (joined and (mask[:, :-1] & ~mask[:, 1:] & (batch.segments[:, 1:] != PADDING)).any()):
            row = int(np.flatnonzero((mask[:, :-1] & ~mask[:, 1:]).any(1))[0])
            raise VesaliusError(
                f"row {row} of step {batch.step} has a prompt after an answer, which could not be read both ways "
                "without giving the answer away; use mask: causal, one turn a document, and cross_document: mask"
            )

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`."""
        return token_loss(outputs.logits, sample, self.z_loss, self.chunk)
