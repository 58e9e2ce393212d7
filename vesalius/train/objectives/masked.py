"""Masked language modelling with whole words: foretell words that were hidden, reading both ways.

Devlin et al. 2018, BERT (arXiv 1810.04805), with whole-word masks as in its later release and in Bioformer
(arXiv 2302.01588): 15 % of words; of their tokens 80 % become [MASK], 10 % any token, 10 % stay. What is hidden is
drawn anew at every step. The second task of BERT, next-sentence prediction, is not here: it needs rows made of pairs of
sentences, and RoBERTa (arXiv 1907.11692) and others found no use in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.masks import PADDING, Mask
from vesalius.train.objectives import settings
from vesalius.train.objectives.base import IGNORED, Loss, Needs, Sample, generator
from vesalius.train.objectives.losses import token_loss
from vesalius.train.objectives.ragged import Bools, Ints, padding
from vesalius.train.objectives.samples import MaskedSample
from vesalius.train.objectives.special import require


@dataclass(frozen=True)
class MaskedLM:
    """Objective `masked-lm`: words hidden at random.

    Attributes:
        needs: `mask`; every id in `needs.special` is left alone and put in by no draw.
        word_start: (vocabulary,) bool, which tokens begin a word; see `special.word_starts`.
        whole_words: hide all tokens of a word together; without it every token is a word.
        rate: share of words hidden.
        keep: share of hidden tokens left as they are.
        random: share of hidden tokens replaced by any other token.
        frame: put [CLS] before each row and [SEP] after it.
        cross_document: `allow`: a row is read as one; `mask`: no document of a row reads another.
        restart_positions: with `mask`, count positions from the start of each document.
        z_loss: penalty of log^2 Z, see `losses`.
        chunk: rows whose float32 logits exist at once, see `losses`.
    """

    needs: Needs
    word_start: ArrayLike | None = field(default=None, repr=False)
    whole_words: bool = True
    rate: float = 0.15
    keep: float = 0.1
    random: float = 0.1
    frame: bool = False
    cross_document: Literal["allow", "mask"] = "allow"
    restart_positions: bool = False
    z_loss: float = 0.0
    chunk: int = 0
    _starts: Bools = field(init=False, repr=False)
    _special: Bools = field(init=False, repr=False)
    _ordinary: Ints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        settings.kinds("masked-lm", self.needs.kind, ("masked",))
        for name in ("rate", "keep", "random"):
            settings.number("masked-lm", name, getattr(self, name), 0.0, 1.0)
        settings.number("masked-lm", "keep + random", self.keep + self.random, 0.0, 1.0)
        for name in ("whole_words", "frame", "restart_positions"):
            settings.flag("masked-lm", name, getattr(self, name))
        settings.choice("masked-lm", "cross_document", self.cross_document, ("allow", "mask"))
        settings.number("masked-lm", "z_loss", self.z_loss, 0)
        settings.whole("masked-lm", "chunk", self.chunk, 0)
        require(self.needs, "mask", "objective 'masked-lm'")
        if self.frame:
            require(self.needs, "cls", "objective 'masked-lm' with frame")
            require(self.needs, "sep", "objective 'masked-lm' with frame")
        special = np.zeros(self.needs.vocab_size, dtype=bool)
        special[[i for i in self.needs.special.values() if i < self.needs.vocab_size]] = True
        object.__setattr__(self, "_special", special)
        object.__setattr__(self, "_starts", self._table(special))
        known = self.needs.vocab_size if self.word_start is None else len(np.asarray(self.word_start))
        object.__setattr__(self, "_ordinary", np.flatnonzero(~special[:known]))

    def _table(self, special: Bools) -> Bools:
        if not self.whole_words:
            return np.ones(self.needs.vocab_size, dtype=bool)
        if self.word_start is None:
            raise VesaliusError(
                "masked-lm hides whole words and needs word_start, a table of which tokens begin one "
                "(special.word_starts(tokenizer)); or whole_words: false"
            )
        table = np.ones(self.needs.vocab_size, dtype=bool)
        given = np.asarray(self.word_start, dtype=bool)[: self.needs.vocab_size]
        table[: len(given)] = given
        return table | special

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Rows with words hidden, and the words."""
        rng = generator(seed, batch.step)
        ids, segments = self._framed(batch) if self.frame else (batch.ids[:, :-1].copy(), batch.segments[:, :-1])
        may = (segments != PADDING) & ~self._special[ids]
        if batch.mask is not None and self.frame:
            may[:, 1:-1] &= batch.mask[:, : ids.shape[1] - 2]
        elif batch.mask is not None:
            may &= batch.mask[:, :-1]
        chosen = self._choose(ids, segments, may, rng)
        targets = np.where(chosen, ids, IGNORED)
        at = np.flatnonzero(chosen)
        fate = rng.random(len(at))
        ids.flat[at[fate >= self.keep + self.random]] = self.needs.special["mask"]
        swapped = at[(fate >= self.keep) & (fate < self.keep + self.random)]
        ids.flat[swapped] = self._ordinary[rng.integers(0, len(self._ordinary), len(swapped))]
        return self._sample(ids, segments, targets)

    def _choose(self, ids: Ints, segments: Ints, may: Bools, rng: np.random.Generator) -> Bools:
        """Which tokens are hidden: in each row the given share of its words, rounded up or down by chance."""
        opens = self._starts[ids]
        opens[:, 0] = True
        opens[:, 1:] |= ~may[:, :-1] | (segments[:, 1:] != segments[:, :-1])
        opens &= may
        rows, length = ids.shape
        words = opens.sum(1)  # (row,)
        wanted = np.floor(self.rate * words + rng.random(rows)).astype(np.int64)
        first = np.cumsum(words) - words
        owner = np.repeat(np.arange(rows), words)
        rank = np.empty(len(owner), dtype=np.int64)
        rank[np.argsort(owner + rng.random(len(owner)))] = np.arange(len(owner))
        hidden = rank - first[owner] < wanted[owner]  # (word,)
        number = np.cumsum(opens.ravel()) - 1  # the word each token belongs to
        return (hidden[np.maximum(number, 0)] if len(hidden) else np.zeros(rows * length, bool)).reshape(
            ids.shape
        ) & may

    def _framed(self, batch: Batch) -> tuple[Ints, Ints]:
        """[CLS] row [SEP] in as many positions as are read; the row's last tokens make room."""
        rows, width = batch.ids.shape
        length = width - 1
        ids = np.full((rows, length), padding(self.needs))
        segments = np.full((rows, length), PADDING)
        ids[:, 1:-1] = batch.ids[:, : length - 2]
        segments[:, 1:-1] = batch.segments[:, : length - 2]
        last = 1 + (segments[:, 1:-1] != PADDING).sum(1)
        every = np.arange(rows)
        ids[:, 0], segments[:, 0] = self.needs.special["cls"], batch.segments[:, 0]
        ids[every, last] = self.needs.special["sep"]
        segments[every, last] = np.where(last > 1, segments[every, last - 1], batch.segments[:, 0])
        return ids, segments

    def _sample(self, ids: Ints, segments: Ints, targets: Ints) -> Sample:
        given, aim = {"input_ids": torch.from_numpy(ids)}, torch.from_numpy(targets)
        pad = segments == PADDING
        if self.cross_document == "mask":
            documents = torch.from_numpy(np.ascontiguousarray(segments))
            mask = Mask.full(documents)
            if not mask.is_padding:
                return MaskedSample(given, mask, aim, None, self.restart_positions)
        if pad.any():
            pad[pad.all(1), 0] = False  # a row of nothing but padding reads one token, so that no softmax is empty
            given["attention_mask"] = torch.from_numpy((~pad).astype(np.int64))
        return Sample(given, aim)

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`."""
        return token_loss(outputs.logits, sample, self.z_loss, self.chunk)
