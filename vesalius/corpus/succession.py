"""Succession: an item somewhere in a row of noise, and a question about it at the end.

    <begin> ~ Wednesday ~ ~ ~ NEXT  -> Thursday        <begin> ~ ~ 37 (7) ~ NEXT  -> 38
    <begin> ~ ~ ~ Wednesday ~ SAME  -> Wednesday       <begin> 37 (3.) ~ ~ ~ SAME -> 37

The item's place varies, so attention has to fetch it; since both questions are asked of the same items, one head cannot
answer both. Days and months begin again after the last; numbers and letters do not. A number is followed by one of its
digits, which one by chance: as spelling does in real text, that ties numbers ten apart together.

After Gould et al. 2023 (arXiv 2312.09230), for trained models in which the successor head is known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.synthetic import Ids, Synthetic

BEGIN, NEXT, SAME = range(3)
NUMBERS = 0.6  # share of the rows that are about numbers


class Series(NamedTuple):
    """One kind of item: its first token, how many there are, and whether the first follows the last."""

    name: str
    first: int
    size: int
    around: bool


class Succession(Synthetic):
    """An item among noise, then NEXT (its successor) or SAME (itself). Scored: the answer, and a number's digit.

    Ids: 0 begin, 1 NEXT, 2 SAME, `noise` symbols, 10 last digits, 10 first digits, `numbers` numbers from 0, 7 days,
    12 months, 26 letters. A share `successors` of the rows asks NEXT. The best reader knows which digits a number has,
    but not which of the two comes.
    """

    name = "succession"
    defaults = {"numbers": 100, "noise": 8, "length": 7, "successors": 0.5}
    numbers: int
    noise: int
    successors: float

    def prepare(self) -> None:
        self.refuse_unless(self.length >= 4 and self.noise >= 1, "a length of at least 4 and noise of 1 are wanted")
        self.refuse_unless(10 <= self.numbers <= 100, "10 to 100 numbers are wanted")
        self.refuse_unless(0 <= self.successors <= 1, "a share of NEXT from 0 to 1 is wanted")
        self.digits = 3 + self.noise
        self.vocab_size = self.digits + 20 + self.numbers + 7 + 12 + 26
        self.table, self.weights = self._questions()
        aims = np.bincount(self.table[:, 2], self.weights, self.vocab_size)
        number = self.series["numbers"].first
        for row, weight in zip(self.table, self.weights, strict=True):
            if number <= row[1] < number + self.numbers:
                aims[self._digit(row[1] - number, 0)] += weight / 2
                aims[self._digit(row[1] - number, 1)] += weight / 2
        self.chance = float(aims.max() / aims.sum())
        self.optimal = float((1 + NUMBERS / 2) / (1 + NUMBERS))

    @property
    def series(self) -> dict[str, Series]:
        """The kinds of items."""
        found, at = {}, self.digits + 20
        sizes = (("numbers", self.numbers, False), ("days", 7, True), ("months", 12, True), ("letters", 26, False))
        for name, size, around in sizes:
            found[name] = Series(name, at, size, around)
            at += size
        return found

    def _digit(self, n: int | Ids, first: int | Ids) -> int | Ids:
        """The token of a number's last digit, or of its first."""
        found: Ids = self.digits + np.where(np.asarray(first) == 1, 10 + np.asarray(n) // 10, np.asarray(n) % 10)
        return found

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        ids = 3 + rng.integers(0, self.noise, (self.rows, self.length + 1))
        mask = np.zeros(ids.shape, dtype=bool)
        asked = self.table[rng.choice(len(self.table), self.rows, p=self.weights)]  # (row, 3)
        each, at = np.arange(self.rows), 1 + rng.integers(0, self.length - 3, self.rows)
        ids[:, 0] = BEGIN
        ids[each, at] = asked[:, 1]
        numbers = self.series["numbers"]
        n, which = asked[:, 1] - numbers.first, rng.integers(0, 2, self.rows)
        spelled = (n >= 0) & (n < self.numbers)
        ids[each[spelled], at[spelled] + 1] = self._digit(n[spelled], which[spelled])
        mask[each[spelled], at[spelled] + 1] = True
        ids[:, -2], ids[:, -1] = asked[:, 0], asked[:, 2]
        mask[:, -1] = True
        return ids, mask

    def _questions(self) -> tuple[Ids, NDArray[np.float64]]:
        """Every question with its item and answer, (n, 3), and how often it is asked."""
        rows: list[tuple[int, int, int]] = []
        weights: list[float] = []
        for question in (NEXT, SAME):
            for name, kind in self.series.items():
                known = range(kind.size if kind.around or question == SAME else kind.size - 1)
                share = NUMBERS if name == "numbers" else (1 - NUMBERS) / 3
                share *= self.successors if question == NEXT else 1 - self.successors
                for n in known:
                    answer = n if question == SAME else (n + 1) % kind.size
                    rows.append((question, kind.first + n, kind.first + answer))
                    weights.append(share / len(known))
        return np.array(rows), np.array(weights) / sum(weights)
