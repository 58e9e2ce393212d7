"""Texts of unequal length, cut into what is given and what is foretold, and laid into rows; all rows at once.

A batch is kept flat: one array of tokens, and beside it the number of the example each belongs to. A token is either
kept or noise. From that two streams follow (Raffel et al. 2020, T5, arXiv 1910.10683):

    inputs:   [mode] kept tokens, each run of noise replaced by a sentinel
    targets:  each run of noise after its sentinel, then [eos]

For a decoder the two are joined, example by example, before anything is padded, so that padding stands only at the
row's end; an encoder-decoder gets one stream on each side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.train.masks import PADDING, Mask
from vesalius.train.objectives.base import IGNORED, Needs, Sample
from vesalius.train.objectives.samples import MaskedSample

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Texts:
    """Examples laid end to end.

    Attributes:
        ids: (token,) all tokens.
        lengths: (example,) tokens of each.
        rows: (example,) the row each belongs to, ascending.
        count: rows of the batch.
    """

    ids: Ints
    lengths: Ints
    rows: Ints
    count: int

    @property
    def starts(self) -> Ints:
        """(example,) index of the first token of each."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def owners(self) -> Ints:
        """(token,) the example each token belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def first(self, lengths: Ints) -> Texts:
        """The first so many tokens of each; examples of none are left out."""
        offset = np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths)
        keep = lengths > 0
        kept = self.ids[offset < np.repeat(lengths, self.lengths)]
        return Texts(kept, lengths[keep], self.rows[keep], self.count)


def texts(batch: Batch, by_document: bool) -> Texts:
    """The batch's rows without padding; one example a document, or one a row."""
    valid = batch.segments != PADDING
    row, _ = np.nonzero(valid)
    edge = np.ones(len(row), dtype=bool)
    edge[1:] = row[1:] != row[:-1]
    if by_document:
        segment = batch.segments[valid]
        edge[1:] |= segment[1:] != segment[:-1]
    starts = np.flatnonzero(edge)
    lengths = np.diff(np.append(starts, len(row)))
    return Texts(batch.ids[valid], lengths, row[starts], len(batch))


def span_counts(lengths: Ints, rate: Floats, span: Floats) -> tuple[Ints, Ints]:
    """(noise tokens, spans) of texts of these lengths, rounded as T5 does; at least one of each, and one token kept."""
    noise = np.clip(np.rint(lengths * rate), 1, np.maximum(lengths - 1, 1)).astype(np.int64)
    spans = np.clip(np.rint(noise / span), 1, np.maximum(np.minimum(noise, lengths - noise), 1)).astype(np.int64)
    return noise, spans


def parts(lengths: Ints, counts: Ints, rng: np.random.Generator) -> Ints:
    """Each length cut into `counts` positive parts, every way of cutting equally likely; the parts, end to end."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    key = owner + 0.5 + 0.5 * rng.random(len(owner))
    key[starts] = np.arange(len(lengths))  # the first item always starts a part
    rank = np.empty(len(owner), dtype=np.int64)
    rank[np.argsort(key)] = np.arange(len(owner))
    begins = np.flatnonzero(rank - starts[owner] < counts[owner])
    return np.diff(np.append(begins, len(owner)))


def span_noise(lengths: Ints, noise: Ints, spans: Ints, rng: np.random.Generator) -> Bools:
    """Which tokens are noise, (token,): spans at least one token apart, every such placing equally likely.

    T5's own draw begins every text with a kept run and ends it with a span, so that a text of one span always has it
    at the end; here a span may stand anywhere.
    """
    kept = parts(lengths - noise + 2, spans + 1, rng)  # one too many in the first and the last run, which may be empty
    last = np.cumsum(spans + 1) - 1
    kept[last] -= 1
    kept[last - spans] -= 1
    runs_of = 2 * spans + 1
    first = np.cumsum(runs_of) - runs_of  # of each text's runs: kept and noise by turns
    runs = np.zeros(len(kept) + int(spans.sum()), dtype=np.int64)
    is_noise = np.zeros(len(runs), dtype=bool)
    owner = np.repeat(np.arange(len(spans)), spans)
    is_noise[first[owner] + 1 + 2 * (np.arange(len(owner)) - (np.cumsum(spans) - spans)[owner])] = True
    runs[~is_noise], runs[is_noise] = kept, parts(noise, spans, rng)
    return np.repeat(is_noise, runs)


@dataclass(frozen=True)
class Stream:
    """Tokens on their way into rows: (token,) ids, the example of each, and its place within the example."""

    ids: Ints
    owners: Ints
    places: Ints
    lengths: Ints  # (example,)


def split(
    given: Texts, noise: Bools, sentinels: Ints, marked: Bools, modes: Ints | None = None, eos: int | None = None
) -> tuple[Stream, Stream]:
    """The two streams of every example.

    Args:
        given: the texts.
        noise: (token,) what is foretold.
        sentinels: ids of the sentinels, in order.
        marked: (example,) whether its runs of noise have sentinels.
        modes: (example,) id put before the inputs, -1 for none.
        eos: id put after the targets.

    Raises:
        VesaliusError: if a text has more runs of noise than there are sentinels.
    """
    owner, starts, n = given.owners, given.starts, len(given.lengths)
    opens = noise.copy()
    opens[1:] &= ~noise[:-1] | (owner[1:] != owner[:-1])
    opens &= marked[owner]
    which = _before(opens, starts, owner)  # runs before this token in its example
    if len(sentinels) <= (most := int(which[opens].max(initial=-1))):
        raise VesaliusError(
            f"a row has {most + 1} noise spans and the vocabulary {len(sentinels)} sentinels; add more with "
            "surgery.add_tokens, or shorten data.length, or lengthen mean spans"
        )
    sentinel = sentinels[which[opens]] if len(sentinels) else which[opens]

    kept = ~noise
    shown = kept | opens
    first = np.zeros(n, dtype=np.int64) if modes is None else (modes >= 0).astype(np.int64)
    ids = given.ids.copy()
    ids[opens] = sentinel
    place = _before(shown, starts, owner) + first[owner]
    inputs = _stream(ids[shown], owner[shown], place[shown], n)
    if modes is not None and first.any():
        at = np.flatnonzero(first)
        inputs = _with(inputs, modes[at], at, np.zeros(len(at), dtype=np.int64))

    place = _before(noise, starts, owner) + _before(opens, starts, owner)
    told = _stream(given.ids[noise], owner[noise], (place + opens)[noise], n)
    told = _with(told, sentinel, owner[opens], place[opens])
    if eos is not None:
        every = np.arange(n)
        told = _with(told, np.full(n, eos), every, told.lengths)
    return inputs, told


def _before(flags: Bools, starts: Ints, owner: Ints) -> Ints:
    """How many flags precede each token within its example."""
    total: Ints = np.cumsum(flags) - flags
    return total - total[starts][owner]


def _stream(ids: Ints, owners: Ints, places: Ints, n: int) -> Stream:
    return Stream(ids, owners, places, np.bincount(owners, minlength=n))


def _with(stream: Stream, ids: Ints, owners: Ints, places: Ints) -> Stream:
    more = np.bincount(owners, minlength=len(stream.lengths))
    return Stream(
        np.concatenate([stream.ids, ids]),
        np.concatenate([stream.owners, owners]),
        np.concatenate([stream.places, places]),
        stream.lengths + more,
    )


def sample_of(
    given: Texts, inputs: Stream, told: Stream, needs: Needs, mask: Literal["prefix", "causal"], restart: bool = False
) -> Sample:
    """The streams as a sample: joined for a decoder, one on each side of an encoder-decoder."""
    if needs.kind == "encoder-decoder":
        return _two_sided(given, inputs, told, needs)
    total = inputs.lengths + told.lengths  # (example,)
    before = np.cumsum(total) - total
    offset = before - before[np.searchsorted(given.rows, given.rows)]  # of each example in its row
    width = int((offset + total).max(initial=2))
    pad = padding(needs)
    ids = np.full((given.count, width), pad)
    documents = np.full((given.count, width), PADDING)
    foretold = np.zeros((given.count, width), dtype=bool)
    for stream, shift, is_told in ((inputs, offset, False), (told, offset + inputs.lengths, True)):
        row, col = given.rows[stream.owners], shift[stream.owners] + stream.places
        ids[row, col] = stream.ids
        documents[row, col] = stream.owners
        foretold[row, col] = is_told
    same = documents[:, 1:] == documents[:, :-1]
    targets = np.where(foretold[:, 1:] & same, ids[:, 1:], IGNORED)
    ids, documents = ids[:, :-1], documents[:, :-1]
    two_way = ~foretold[:, :-1] & (documents != PADDING) if mask == "prefix" else None
    return masked_sample(ids, documents, targets, two_way, restart)


def masked_sample(
    ids: Ints, documents: Ints, targets: Ints, two_way: Bools | None, restart: bool, weights: Floats | None = None
) -> Sample:
    """A sample for a decoder; without a mask where the causal one does, since padding at the end is read by nobody."""
    given = {"input_ids": torch.from_numpy(np.ascontiguousarray(ids))}
    aim = torch.from_numpy(np.ascontiguousarray(targets))
    weight = None if weights is None else torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32))
    segments = torch.from_numpy(np.ascontiguousarray(documents))
    both = None if two_way is None else torch.from_numpy(np.ascontiguousarray(two_way))
    mask = Mask("causal", segments, segments, both)
    if mask.is_plain_causal:
        return Sample(given, aim, weight)
    return MaskedSample(given, mask, aim, weight, restart)


def _two_sided(given: Texts, inputs: Stream, told: Stream, needs: Needs) -> Sample:
    if len(np.unique(given.rows)) < len(given.rows):
        raise VesaliusError("an encoder-decoder takes one text a row; use cross_document: allow")
    pad = padding(needs)
    start = needs.special.get("decoder_start", pad)
    read = np.full((given.count, int(inputs.lengths.max(initial=1))), pad)
    hidden = np.zeros(read.shape, dtype=np.int64)
    targets = np.full((given.count, int(told.lengths.max(initial=1))), IGNORED)
    row = given.rows
    read[row[inputs.owners], inputs.places] = inputs.ids
    hidden[row[inputs.owners], inputs.places] = 1
    hidden[~hidden.any(1), 0] = 1  # a row of nothing but padding reads one token, so that no softmax is empty
    targets[row[told.owners], told.places] = told.ids
    shifted = np.full(targets.shape, pad)
    shifted[:, 0] = start
    shifted[:, 1:] = np.where(targets[:, :-1] == IGNORED, pad, targets[:, :-1])
    tensors = {"input_ids": torch.from_numpy(read), "decoder_input_ids": torch.from_numpy(shifted)}
    if not hidden.all():
        tensors["attention_mask"] = torch.from_numpy(hidden)
    return Sample(tensors, torch.from_numpy(targets))


def padding(needs: Needs) -> int:
    """The id that fills rows up: pad, else eos, else 0."""
    return needs.special.get("pad", needs.special.get("eos", 0))
