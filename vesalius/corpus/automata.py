"""In-context language learning: each row holds strings of a random regular language of its own (Akyürek et al. 2024).

    | c a c a b | c a | c b ...       a language in which c may begin, a or b follow c, and so on

A language is a random finite automaton: every state has one to `edges` edges to different other states, each with a
symbol of its own; every state may end a string. Strings are walks from the first state, all edges of a state being
equally likely, of a length drawn evenly. What follows a symbol is to be learnt from the row itself: of 500 languages,
none came twice and 2 were also among 500 of another split, languages of two or three states.

Paper: arXiv 2401.12973, sec. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.batches import Batch
from vesalius.corpus.synthetic import Ids, Synthetic

NOWHERE = -1


@dataclass(frozen=True, eq=False)
class Automaton:
    """A probabilistic finite automaton whose edges are equally likely; state 0 begins, every state may end.

    Attributes:
        table: (state, symbol), the state an edge leads to, -1 where there is none. States that no walk meets may be
            among them.
    """

    table: Ids

    @property
    def states(self) -> int:
        return len(self.table)

    @property
    def next(self) -> NDArray[np.float64]:
        """P(symbol | state) of a string that goes on, (state, symbol)."""
        there = self.table != NOWHERE
        shares: NDArray[np.float64] = there / np.maximum(there.sum(1, keepdims=True), 1)
        return shares

    def accepts(self, word: Sequence[int]) -> bool:
        """Whether a string is of the language."""
        at = 0
        for symbol in word:
            at = int(self.table[at, symbol])
            if at == NOWHERE:
                return False
        return True

    def minimal(self) -> Automaton:
        """The smallest automaton of the same language: unreachable states cut, equivalent ones joined (Moore).

        States are numbered in the order in which a search by symbols meets them, so that two automata have the same
        language if and only if their minimal tables are equal. Joined states have the same edges, so the probabilities
        of strings stay as they were.

        Example:
            >>> twins = Automaton(np.array([[1, -1], [-1, 2], [1, -1]]))     # states 0 and 2 do the same
            >>> twins.minimal().table.tolist()
            [[1, -1], [-1, 0]]
        """
        kind = np.zeros(self.states, dtype=np.int64)  # all accept: one class at first
        while True:
            after = np.where(self.table == NOWHERE, NOWHERE, kind[self.table])
            _, finer = np.unique(np.column_stack([kind, after]), axis=0, return_inverse=True)
            if finer.max() == kind.max():
                break
            kind = finer.ravel()
        order, number = [0], {int(kind[0]): 0}
        rows: list[list[int]] = []
        for state in order:  # grows while it is read
            row = []
            for target in self.table[state]:
                if target != NOWHERE and int(kind[target]) not in number:
                    number[int(kind[target])] = len(number)
                    order.append(int(target))
                row.append(NOWHERE if target == NOWHERE else number[int(kind[target])])
            rows.append(row)
        return Automaton(np.array(rows))


def random_tables(
    rng: np.random.Generator, n: int, states: tuple[int, int], edges: int, symbols: int, least_symbols: int
) -> Ids:
    """Transition tables of n automata as the paper draws them, (automaton, state, symbol); -1 where there is no edge.

    Args:
        states: fewest and most. edges: most edges of a state, each to a different other state. symbols: of which every
            language has a subset of its own, of `least_symbols` or more.
    """
    most = states[1]
    sizes = rng.integers(states[0], most + 1, (n, 1, 1))
    own = np.argsort(np.argsort(rng.random((n, symbols)), axis=1), axis=1) < rng.integers(
        least_symbols, symbols + 1, (n, 1)
    )
    out = rng.integers(1, np.minimum(edges, sizes - 1) + 1, (n, most, 1))
    place = np.arange(most)
    allowed = (place[None, None] < sizes) & (place[:, None] != place)  # never itself
    targets = np.argsort(np.where(allowed, rng.random((n, most, most)), 2.0), axis=2)
    keys = np.argsort(np.where(own[:, None], rng.random((n, most, symbols)), 2.0), axis=2)
    table = np.full((n, most, symbols), NOWHERE, dtype=np.int64)
    width = min(edges, most, symbols)
    kept = np.where(np.arange(width) < out, targets[..., :width], NOWHERE)
    np.put_along_axis(table, keys[..., :width], kept, axis=2)
    return np.where((place < sizes[..., 0])[..., None], table, NOWHERE)


class Rows(NamedTuple):
    """Rows with what is known of them.

    Attributes:
        ids: (row, pos). languages: of each row. states: (row, pos), the state after each token. said: (row, pos), how
            many strings of the row are complete before the token.
    """

    ids: Ids
    languages: list[Automaton]
    states: Ids
    said: Ids


class RegularLanguages(Synthetic):
    """Strings of one random regular language a row. Ids: symbols 0 to `symbols` - 1, and `symbols` between strings.

    Scored: every symbol. Where a string ends is chance, so the token between strings is never a target, and what a
    model says of symbols can be held against the edges of the state (`told`). `optimal` and `chance` are means over
    500 languages: of the best guess of a reader who knows the automaton, and of a guess among all symbols.
    """

    name = "icll"
    defaults = {"symbols": 10, "fewest": 4, "states": 8, "edges": 3, "longest": 20, "length": 128}
    symbols: int
    fewest: int
    states: int
    edges: int
    longest: int

    def prepare(self) -> None:
        self.refuse_unless(2 <= self.fewest <= self.states, "2 states or more are wanted, fewest at most as states")
        self.refuse_unless(1 <= self.edges <= self.symbols, "1 edge or more, and as many symbols, are wanted")
        self.refuse_unless(self.symbols >= 2 and self.longest >= 2, "2 symbols and strings of 2 or more are wanted")
        self.least_symbols = min(max(self.edges, self.fewest), self.symbols)  # of a language
        self.vocab_size, self.chance = self.symbols + 1, 1 / self.symbols
        known = self._draw(np.random.default_rng([self.seed, *b"icll optimal"]), 500)
        shares = known.languages
        best = [shares[r].next.max(1)[known.states[r, :-1]] for r in range(len(shares))]
        scored = known.ids[:, 1:] < self.symbols
        self.optimal = float(np.stack(best)[scored].mean())

    @property
    def separator(self) -> int:
        """The token between strings."""
        return self.symbols

    def _draw(self, rng: np.random.Generator, rows: int) -> Rows:
        width = self.length + 1
        table = random_tables(rng, rows, (self.fewest, self.states), self.edges, self.symbols, self.least_symbols)
        ids, states, said = (np.zeros((rows, width), dtype=np.int64) for _ in range(3))
        each, coins = np.arange(rows), rng.random((rows, width))
        lengths = rng.integers(1, self.longest + 1, (rows, width))  # of the string that would begin here
        at, left, done = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64), np.full(rows, NOWHERE)
        for t in range(width):  # one step of all rows
            ends = left == 0
            there = table[each, at] != NOWHERE  # (row, symbol)
            which = np.minimum((coins[:, t] * there.sum(1)).astype(np.int64), there.sum(1) - 1)
            symbol = (np.cumsum(there, axis=1) == which[:, None] + 1).argmax(1)
            ids[:, t] = np.where(ends, self.separator, symbol)
            at = np.where(ends, 0, table[each, at, symbol])
            done = done + ends
            left = np.where(ends, lengths[:, t], left - 1)
            states[:, t], said[:, t] = at, done
        return Rows(ids, [Automaton(x) for x in table], states, said)

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        ids = self._draw(rng, self.rows).ids
        return ids, ids != self.separator

    def told(self, step: int) -> tuple[Batch, Rows]:
        """The batch of a step with its languages, states and counts of strings."""
        batch = self.batch(step)
        return batch, self._draw(self.rng(step), self.rows)
