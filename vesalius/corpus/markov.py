"""A Markov chain with copied spans: text whose bigrams are known, and a tenth of which bigrams cannot foretell.

    chain chain chain ... | s7 s2 s9 s4 s0 s5 | s7 s2 s9 s4 s0 s5 | chain chain ...

Chain symbols follow one another by a matrix of transitions that belongs to the seed. Now and then a span of symbols of
another kind is drawn, written twice, and the chain goes on from where it was: within the second writing each symbol is
known from the first, and to a reader of the current token alone any span symbol is as likely as any other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.synthetic import Ids, Synthetic


class MarkovSpans(Synthetic):
    """Ids 0..chain-1 are the chain's, chain..chain+symbols-1 those of spans. Scored: all from the second on.

    Every row has, with probability `rows_with`, one span of `span` symbols (written twice) at a random place: by
    default a tenth of all tokens. `sharpness` is of the Dirichlet distribution that rows of transitions are drawn from.
    """

    name = "markov-spans"
    defaults = {"chain": 48, "symbols": 24, "span": 8, "rows_with": 0.4, "sharpness": 0.15, "length": 64}
    chain: int
    symbols: int
    span: int
    rows_with: float
    sharpness: float

    def prepare(self) -> None:
        self.refuse_unless(self.chain >= 2 and self.sharpness > 0, "a chain of 2 symbols or more is wanted")
        self.refuse_unless(2 <= self.span <= self.symbols, "a span of 2 up to all of the span symbols is wanted")
        self.refuse_unless(self.length >= 2 * self.span + 2, f"a length of at least {2 * self.span + 2} is wanted")
        self.refuse_unless(0 <= self.rows_with <= 1, "a share of rows from 0 to 1 is wanted")
        self.vocab_size = self.chain + self.symbols
        rng = np.random.default_rng([self.seed, *b"markov-spans chain"])
        drawn = rng.dirichlet(np.full(self.chain, self.sharpness), self.chain)
        self.transitions = 0.98 * drawn + 0.02 / self.chain  # (from, to)
        self._sums = self.transitions.cumsum(1)
        at = np.full(self.chain, 1 / self.chain)
        seen, right = np.zeros(self.chain), 0.0
        for _ in range(self.length):
            right += float(at @ self.transitions.max(1)) / self.length
            at = at @ self.transitions
            seen += at / self.length
        spans = 2 * self.span * self.rows_with / self.length  # share of the tokens
        guesses = sum(1 / (self.symbols - k) for k in range(1, self.span))
        self.optimal = (1 - spans) * right + self.rows_with * (self.span + guesses) / self.length
        self.chance = max((1 - spans) * float(seen.max()), spans / self.symbols)

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        width = self.length + 1
        ids = np.empty((self.rows, width), dtype=np.int64)
        ids[:, 0] = rng.integers(0, self.chain, self.rows)
        coins = rng.random(ids.shape)
        for at in range(1, width):
            ids[:, at] = np.minimum((self._sums[ids[:, at - 1]] < coins[:, at, None]).sum(1), self.chain - 1)
        for row in np.flatnonzero(rng.random(self.rows) < self.rows_with):
            span = self.chain + rng.permutation(self.symbols)[: self.span]
            at = int(rng.integers(1, width - 2 * self.span))
            ids[row, at + 2 * self.span :] = ids[row, at : width - 2 * self.span].copy()  # goes on after the span
            ids[row, at : at + 2 * self.span] = np.tile(span, 2)
        return ids, np.ones(ids.shape, dtype=bool)

    def in_chain(self, ids: Ids) -> NDArray[np.bool_]:
        """Which tokens a transition of the chain foretells: those of the chain whose predecessor is one, too."""
        found = np.zeros(ids.shape, dtype=bool)
        found[:, 1:] = (ids[:, 1:] < self.chain) & (ids[:, :-1] < self.chain)
        return found

    def copied(self, ids: Ids) -> NDArray[np.bool_]:
        """Which tokens belong to a second writing, its first one left out."""
        found = np.zeros(ids.shape, dtype=bool)
        found[:, self.span + 1 :] = (ids[:, self.span + 1 :] >= self.chain) & (
            (ids[:, self.span + 1 :] == ids[:, 1 : -self.span]) & (ids[:, self.span : -1] == ids[:, : -self.span - 1])
        )
        return found
