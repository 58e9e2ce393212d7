"""Bigram tables: what follows each token, counted in a corpus and kept as sparse rows.

    P(w | v) = (c(v, w) + m(v) u(w)) / (c(v) + k)        m(v) = k + what of c(v) is not among the kept entries

c counts pairs of neighbours; of each row the `top` most frequent successors are kept, and the rest of its mass, with k
more, is given to the unigram distribution u(w) (add one). So every pair of tokens has a probability, rows of tokens
never seen are u, and a table over a vocabulary of 50,000 stays small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from vesalius.corpus.batches import Source
from vesalius.corpus.documents import CorpusError
from vesalius.corpus.store import Tokens

ENOUGH = 2.0  # tokens for each entry of the vocabulary that occurs, at least
SMOOTHING = 1.0
CHUNK = 1 << 20  # tokens of a store counted at once


class Rows(NamedTuple):
    """Some rows of a table as tensors: sum P log q is the sum of `kept` log q, plus `rest` times the sum of u log q."""

    words: Tensor  # (token, top) ids; 0 where a row has fewer
    kept: Tensor  # (token, top) probability by counts alone; 0 where a row has fewer
    rest: Tensor  # (token,) mass that goes to the unigram distribution


class BigramTable:
    """P(next | current) over a vocabulary.

    Args:
        counts: (vocabulary, vocabulary) pairs, row: the first. tokens: size of the tokenizer's vocabulary; ids from
            there on are padding, and have probability 0. top: entries kept in a row. smoothing: k.

    Example:
        >>> import scipy.sparse
        >>> table = BigramTable(scipy.sparse.csr_array([[0, 3], [1, 1]]), tokens=2, top=1)
        >>> np.round(table.matrix(), 3).tolist()
        [[0.094, 0.906], [0.542, 0.458]]
    """

    def __init__(self, counts: sparse.csr_array, tokens: int, top: int = 64, smoothing: float = SMOOTHING) -> None:
        if top < 1 or not smoothing > 0:
            raise CorpusError(f"a table with top {top} and smoothing {smoothing}: give at least 1, and more than 0")
        self.tokens, self.top, self.smoothing = tokens, top, smoothing
        self.counts = sparse.csr_array(counts)
        self.total = np.asarray(self.counts.sum(axis=1)).ravel().astype(np.float64)  # (vocabulary,) c(v)
        second = np.asarray(self.counts.sum(axis=0)).ravel().astype(np.float64)
        second[:tokens] += 1
        second[tokens:] = 0
        self.unigram = second / second.sum()  # (vocabulary,) u(w)
        self.kept = _largest(self.counts, top)
        lost = self.total - np.asarray(self.kept.sum(axis=1)).ravel()
        self.rest = (smoothing + lost) / (self.total + smoothing)  # (vocabulary,) m(v) / (c(v) + k)

    @property
    def n(self) -> int:
        """Pairs counted."""
        return int(self.total.sum())

    @property
    def kept_share(self) -> float:
        """Share of the counted pairs that the kept entries hold."""
        return float(self.kept.sum() / max(self.total.sum(), 1))

    def log_p(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
        """Natural logarithm of P(second | first), in the shape of the ids."""
        v, w = np.ravel(first), np.ravel(second)
        own = np.asarray(self.kept[v, w]).ravel() / (self.total[v] + self.smoothing)
        with np.errstate(divide="ignore"):
            found: NDArray[np.float64] = np.log(own + self.rest[v] * self.unigram[w]).reshape(np.shape(first))
        return found

    def rows(self, tokens: NDArray[np.int64]) -> Rows:
        """The rows of these tokens (token,), for a loss over the whole vocabulary."""
        start, end = self.kept.indptr[tokens], self.kept.indptr[tokens + 1]
        width = int((end - start).max(initial=1))
        at = start[:, None] + np.arange(max(width, 1))
        there = at < end[:, None]
        at = np.minimum(at, max(self.kept.nnz - 1, 0))
        words = np.where(there, self.kept.indices[at] if self.kept.nnz else 0, 0)
        data = np.where(there, self.kept.data[at] if self.kept.nnz else 0, 0.0)
        kept = data / (self.total[tokens, None] + self.smoothing)
        return Rows(torch.from_numpy(words.astype(np.int64)), torch.from_numpy(kept).float(),
                    torch.from_numpy(self.rest[tokens]).float())  # fmt: skip

    def entropy(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Entropy of the rows of these tokens, nats: what no model of bigrams can go below."""
        unique, back = np.unique(tokens, return_inverse=True)
        safe = np.where(self.unigram > 0, self.unigram, 1.0)
        plain = self.unigram * np.log(safe)
        found = np.empty(len(unique))
        for i, v in enumerate(unique):
            mine = slice(self.kept.indptr[v], self.kept.indptr[v + 1])
            words, rest = self.kept.indices[mine], self.rest[v]
            p = self.kept.data[mine] / (self.total[v] + self.smoothing) + rest * self.unigram[words]
            others = rest * (plain.sum() - plain[words].sum())
            others += rest * np.log(rest) * (self.unigram.sum() - self.unigram[words].sum())
            found[i] = -(p * np.log(p)).sum() - others
        return found[back].reshape(np.shape(tokens))

    def matrix(self) -> NDArray[np.float64]:
        """The whole table (vocabulary, vocabulary): for small vocabularies."""
        own = self.kept.toarray() / (self.total + self.smoothing)[:, None]
        whole: NDArray[np.float64] = own + self.rest[:, None] * self.unigram[None]
        return whole


def _largest(counts: sparse.csr_array, top: int) -> sparse.csr_array:
    """The `top` largest entries of each row; of equal ones those of lower ids."""
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    order = np.lexsort((counts.indices, -counts.data, row))
    rank = np.arange(len(row)) - counts.indptr[row[order]]
    chosen = np.sort(order[rank < top])
    shape = counts.shape
    kept = sparse.csr_array(
        (counts.data[chosen].astype(np.float64), (row[chosen], counts.indices[chosen])), shape=shape
    )
    kept.sort_indices()
    return kept


def count_pairs(
    source: Source | Tokens, vocabulary: int, batches: int | None = None, tell: Callable[[int, int], None] | None = None
) -> sparse.csr_array:
    """How often each token follows each other one, (vocabulary, vocabulary).

    Args:
        source: tokens of a store, all of which are counted, or batches. vocabulary: of the model.
        batches: how many to count, where the source has no end.
        tell: told (done, total).

    Raises:
        CorpusError: if a token lies outside of the vocabulary.
    """
    total = sparse.csr_array((vocabulary, vocabulary), dtype=np.int64)
    pieces = -(-source.n_tokens // CHUNK) if isinstance(source, Tokens) else batches
    assert pieces is not None
    for number in range(pieces):
        v, w = _pairs(source, number)
        if v.size and max(int(v.max()), int(w.max())) >= vocabulary:
            raise CorpusError(f"the text has token {max(int(v.max()), int(w.max()))}, the model only {vocabulary}")
        total = total + sparse.csr_array((np.ones(v.size, dtype=np.int64), (v, w)), shape=total.shape)
        if tell is not None:
            tell(number + 1, pieces)
    return sparse.csr_array(total)


def _pairs(source: Source | Tokens, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Neighbours in one piece of a store, or in one batch."""
    if isinstance(source, Tokens):
        places = np.arange(max(number * CHUNK - 1, 0), min((number + 1) * CHUNK, source.n_tokens))
        ids = source.at(places)
        return ids[:-1], ids[1:]
    batch = source.batch(number)
    there = (batch.segments[:, 1:] >= 0) & (batch.segments[:, :-1] >= 0)
    return batch.ids[:, :-1][there], batch.ids[:, 1:][there]


def bigram_table(
    source: Source | Tokens,
    vocabulary: int,
    *,
    tokens: int | None = None,
    batches: int | None = None,
    top: int = 64,
    smoothing: float = SMOOTHING,
    tell: Callable[[int, int], None] | None = None,
) -> BigramTable:
    """Counts a table, if there is text enough for one.

    Args:
        source, vocabulary, batches, tell: see `count_pairs`. tokens: entries of the tokenizer; all of the vocabulary if
            None. top, smoothing: see `BigramTable`.

    Raises:
        CorpusError: if there are fewer than two pairs for each token that occurs, saying how many are needed.

    Example:
        >>> table = bigram_table(store, model.hf.config.vocab_size)             # doctest: +SKIP
        >>> table.log_p(ids[:, :-1], ids[:, 1:]).mean()                         # doctest: +SKIP
    """
    counts = count_pairs(source, vocabulary, batches, tell)
    n, different = int(counts.sum()), int((np.diff(counts.indptr) > 0).sum())
    needed = int(np.ceil(ENOUGH * max(different, 1) ** 1.25))  # the vocabulary that is seen grows with the text
    if n < needed:
        raise CorpusError(
            f"{n:,} pairs of tokens are too few for a bigram table over the {different:,} different tokens in them: at "
            f"least {needed:,} are needed; add text (--corpus A,B)"
        )
    return BigramTable(counts, vocabulary if tokens is None else min(tokens, vocabulary), top, smoothing)
