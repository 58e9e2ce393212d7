"""A random finite-state machine whose states are written as two digits (TokFSM of Tamkin et al. 2023, 2310.17230).

    <begin> 0 7  4 1  1 3  9 9 ...       state 7, 41, 13, 99: each follows from the one before by one of its edges

No token is a state: a model has to put two digits together, and a probe or a code of its hidden states can be asked
whether it did.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.synthetic import Ids, Synthetic

BEGIN = 10  # digits are 0 to 9
PAIR = 2  # tokens of a state


class Machine(Synthetic):
    """A walk through the machine. Ids: digits 0 to 9, 10 begin. Scored: every digit from the second state on.

    The edges belong to the seed, alike for every split: `table` (state, edge), each row different states. The best
    reader knows the edges and not which is taken.
    """

    name = "fsm"
    defaults = {"states": 100, "edges": 10, "length": 128}
    states: int
    edges: int

    def prepare(self) -> None:
        self.refuse_unless(2 <= self.states <= 100, "2 to 100 states are wanted, which two digits can write")
        self.refuse_unless(1 <= self.edges <= self.states, f"1 to {self.states} edges a state are wanted")
        self.refuse_unless(
            self.length >= 2 * PAIR and self.length % PAIR == 0, "an even length of at least 4 is wanted"
        )
        self.vocab_size = 11
        rng = np.random.default_rng([self.seed, *b"fsm edges"])
        self.table = np.argsort(rng.random((self.states, self.states)), axis=1)[:, : self.edges]  # (state, edge)
        self.successors = np.zeros((self.states, self.states), dtype=bool)
        np.put_along_axis(self.successors, self.table, True, axis=1)
        visited = np.full(self.states, 1 / self.states)
        shares = np.zeros((self.length // PAIR, self.states))
        for step in range(len(shares)):  # how often each state is stood in, step by step
            shares[step] = visited
            visited = visited @ (self.successors / self.edges)
        stood = shares[:-1].mean(0)
        tens = np.stack([np.bincount(row // 10, minlength=10) for row in self.table])  # (state, digit)
        self.optimal = float(stood @ ((tens.max(1) + (tens > 0).sum(1)) / 2)) / self.edges
        reached = stood @ (self.successors / self.edges)
        digits = np.bincount(np.arange(self.states) // 10, reached, 10) + np.bincount(
            np.arange(self.states) % 10, reached, 10
        )
        self.chance = float(digits.max() / 2)

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        walk = np.empty((self.rows, self.length // PAIR), dtype=np.int64)
        walk[:, 0] = rng.integers(0, self.states, self.rows)
        chosen = rng.integers(0, self.edges, walk.shape)
        for at in range(1, walk.shape[1]):
            walk[:, at] = self.table[walk[:, at - 1], chosen[:, at]]
        digits = np.stack(np.divmod(walk, 10), axis=2).reshape(self.rows, -1)
        ids = np.concatenate([np.full((self.rows, 1), BEGIN), digits], axis=1)
        mask = np.ones(ids.shape, dtype=bool)
        mask[:, : 1 + PAIR] = False
        return ids, mask

    def states_of(self, ids: Ids) -> Ids:
        """The state that each token completes, (row, pos); -1 at the begin token and at first digits."""
        found = np.full(ids.shape, -1, dtype=np.int64)
        found[:, 2::2] = 10 * ids[:, 1:-1:2][:, : found[:, 2::2].shape[1]] + ids[:, 2::2]
        return found
