"""Text for dictionaries: rows of tokens from corpora or prompts, and the vectors that a model has there.

Rows of a corpus are cut one after another, so that most begin within a sentence. A causal model parks attention on the
first position of whatever it reads, and its vector there is no part of the text: it is left out. Prompts get the
tokenizer's beginning-of-text token in front, so that this loses none of their words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.corpus.documents import CorpusError
from vesalius.corpus.order import Order
from vesalius.errors import VesaliusError
from vesalius.features.dictionaries.places import first_read, place_name, read, width_of
from vesalius.features.vectors import _encode as encode_text
from vesalius.model import Model, Site
from vesalius.train.assembly import store_of

Tell = Callable[[str, float | None], None]
LENGTH = 128  # tokens in a row of text
BATCH_TOKENS = 2048  # in one pass
KEPT = 2.0**30  # bytes of a GiB


def silent(text: str, share: float | None) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Rows:
    """Rows of token ids.

    Attributes:
        ids: each (pos,), whatever its length.
        skip: first positions whose vectors are left out.
        what: the corpora's names, or `prompts`. fingerprint: of what decides the rows.
    """

    ids: tuple[Tensor, ...]
    skip: int
    what: str
    fingerprint: str

    @property
    def n_tokens(self) -> int:
        """Tokens whose vectors are read."""
        return sum(max(0, len(row) - self.skip) for row in self.ids)

    def batches(self, tokens: int = BATCH_TOKENS) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(numbers of the rows, ids, mask), rows of one length together, padded on the right where they are not."""
        start = 0
        while start < len(self.ids):
            longest, end = len(self.ids[start]), start + 1
            while end < len(self.ids):
                width = max(longest, len(self.ids[end]))
                if width * (end + 1 - start) > tokens:
                    break
                longest, end = width, end + 1
            mine = self.ids[start:end]
            ids = torch.zeros(len(mine), longest, dtype=torch.long)
            mask = torch.zeros(len(mine), longest, dtype=torch.long)
            for i, row in enumerate(mine):
                ids[i, : len(row)], mask[i, : len(row)] = row, 1
            yield list(range(start, end)), ids, mask
            start = end


class Halves(NamedTuple):
    """Rows to train on, and others to judge by."""

    train: Rows
    held_out: Rows


def corpus_rows(
    model: Model,
    corpora: Sequence[str | Path],
    tokens: int,
    *,
    held_out_tokens: int,
    length: int | None = None,
    held_out: float = 0.05,
    seed: int = 0,
    tell: Tell = silent,
) -> Halves:
    """Rows of some corpora under the model's tokenizer; held-out ones are of other documents.

    Args:
        corpora: names (`vesalius corpora`), files or folders.
        tokens: to train on, at least (rows are whole). held_out_tokens: to judge by, as many of them as there are.
        length: tokens in a row; 128, or as many as the model reads, if None. held_out: share of the documents.

    Raises:
        CorpusError: if the corpora have fewer tokens, saying how many are needed.
    """
    if model.tokenizer is None:
        raise VesaliusError(f"{model.name} has no tokenizer, so no text can be read with it")
    skip = first_read(model)
    longest = model.n_positions
    length = min(LENGTH, longest or LENGTH) if length is None else length
    if length <= skip or (longest and length > longest):
        raise VesaliusError(f"rows of {length} tokens: {model.name} reads {skip + 1} to {longest or 'any number'}")
    names = [str(c) for c in corpora]
    if not names:
        raise CorpusError("no corpus is named; give one of `vesalius corpora`, a file or a folder")
    shown = ", ".join(names)
    store = store_of(names, model.tokenizer, lambda text: tell(text, None))
    wanted = -(-tokens // (length - skip)) * length
    try:
        train, kept = store.split(held_out)
    except CorpusError as error:
        raise CorpusError(f"{shown}: {error}; about {round(wanted / (1 - held_out)):,} tokens are needed") from None
    if train.n_tokens < wanted or kept.n_tokens < length:
        raise CorpusError(
            f"{shown} has {train.n_tokens:,} tokens to train on and {kept.n_tokens:,} held out; {wanted:,} and "
            f"{length} are needed: add text (--corpus A,B), or lower --tokens"
        )
    count = min(held_out_tokens, kept.n_tokens // length * (length - skip))
    return Halves(
        _of_order(Order(train, length, 1, seed, tail="drop"), tokens, skip, shown),
        _of_order(Order(kept, length, 1, 0, tail="drop"), max(1, count), skip, shown),
    )


def _of_order(order: Order, tokens: int, skip: int, what: str) -> Rows:
    n = min(order.rows_per_epoch, -(-tokens // (order.length - skip)))
    ids = tuple(torch.from_numpy(order.batch(i).ids[0, :-1].copy()) for i in range(n))
    return Rows(ids, skip, what, f"{order.fingerprint[:24]}-{n}")


def prompt_rows(model: Model, texts: Sequence[str]) -> Rows:
    """One row a text, with the tokenizer's beginning-of-text token in front.

    Raises:
        VesaliusError: for an empty text, or one that is longer than the model takes.
    """
    import hashlib

    if not texts:
        raise VesaliusError("there are no texts to read; give one or more")
    ids = tuple(torch.tensor(encode_text(model, text, "", "mean")[0]) for text in texts)
    digest = hashlib.sha256(repr([row.tolist() for row in ids]).encode()).hexdigest()[:24]
    return Rows(ids, first_read(model), "prompts", digest)


class Vectors(NamedTuple):
    """What a model has at a site over some rows.

    Attributes:
        x: (token, width) float32. row, position: which token each is, (token,).
    """

    x: Tensor
    row: NDArray[np.int64]
    position: NDArray[np.int64]


def gather(model: Model, site: Site, rows: Rows, *, memory_gb: float = 2.0, tell: Tell = silent) -> Vectors:
    """The vectors of all rows at a site, first positions left out.

    Raises:
        VesaliusError: if they need more memory than stated, or there are none.
    """
    width, n = width_of(model, site), rows.n_tokens
    if n < 1:
        raise VesaliusError("the text has no token to read (first positions are left out): give more of it")
    if n * width * 4 > memory_gb * KEPT:
        most = int(memory_gb * KEPT / (width * 4))
        raise VesaliusError(
            f"{n:,} vectors of width {width} take {n * width * 4 / KEPT:.1f} GiB, over --memory {memory_gb:g}; raise "
            f"it, or lower --tokens to {most:,}"
        )
    x = torch.empty(n, width)
    row, position = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    done = 0
    for numbers, ids, mask in rows.batches():
        found = read(model, site, ids, mask).cpu()
        for i, number in enumerate(numbers):
            mine = found[i, rows.skip : len(rows.ids[number])]
            x[done : done + len(mine)] = mine
            row[done : done + len(mine)] = number
            position[done : done + len(mine)] = np.arange(rows.skip, rows.skip + len(mine))
            done += len(mine)
        tell(f"reading {place_name(site)}, {done:,} of {n:,} tokens", done / n)
    return Vectors(x, row, position)


def words_of(model: Model, ids: Sequence[int]) -> list[str]:
    """Tokens as text, one each."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return [str(i) for i in ids]
    return [tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids]


BEFORE, AFTER = 12, 6  # tokens of a text shown about one


def around(model: Model, ids: Sequence[int], place: int) -> dict[str, str]:
    """A token with the text about it: `before`, `token`, `after`, which follow one another with their blanks."""
    cuts = (max(0, place - BEFORE), place, place + 1, place + 1 + AFTER)
    if model.tokenizer is None:
        parts = ["".join(words_of(model, ids[a:b])) for a, b in pairwise(cuts)]
    else:
        ends = [_decoded(model, ids[cuts[0] : end]) for end in cuts[1:]]
        parts = [ends[0], ends[1][len(ends[0]) :], ends[2][len(ends[1]) :]]
    return dict(zip(("before", "token", "after"), parts, strict=True))


def _decoded(model: Model, ids: Sequence[int]) -> str:
    tokenizer: Any = model.tokenizer
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if len(ids) else ""
