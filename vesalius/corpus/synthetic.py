"""Synthetic sequences with a known best answer: what a mixer can and cannot do, on one page.

Each is a `Source`: `batch(step)` is a pure function of (seed, step), fresh rows at every step. Scored tokens are those
where `mask` is True; a model that guesses scores `chance` on them, the best possible one `optimal` (top-1 accuracy).
Ids 0..vocab_size-1 are plain numbers; what they mean stands in each class.

Papers: H3 2212.14052 (induction, associative recall), Zoology 2312.04927 (MQAR), Mamba 2312.00752 (selective copy),
Olsson 2022 (repeated random sequences).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.batches import Batch
from vesalius.corpus.documents import CorpusError
from vesalius.errors import UnknownName
from vesalius.records import request_hash
from vesalius.registry import Registry

Ids = NDArray[np.int64]
SYNTHETIC: Registry[type[Synthetic]] = Registry("synthetic task")


class Synthetic:
    """A task that writes its own rows.

    Args:
        rows: in a batch.
        length: tokens read; a row has one more.
        seed: another seed gives other rows.
        split: "train", "test" or any other word: rows of another stream.
    """

    name = ""
    defaults: dict[str, Any] = {}

    def __init__(
        self, rows: int = 32, length: int | None = None, seed: int = 0, split: str = "train", **options: Any
    ) -> None:
        for key in options:
            if key not in self.defaults:
                raise UnknownName(f"option of {self.name}", key, [k for k in self.defaults if k != "length"])
        self.options = {**self.defaults, **options}
        self.rows, self.seed, self.split = rows, seed, split
        self.length = int(self.options.pop("length") if length is None else length)
        self.options.pop("length", None)
        if rows < 1 or self.length < 1:
            raise CorpusError(f"rows is {rows} and length {self.length}; both must be at least 1")
        for key, value in self.options.items():
            setattr(self, key, value)
        self.prepare()
        self.fingerprint = request_hash(self.describe())

    vocab_size: int
    chance: float
    optimal: float = 1.0

    def prepare(self) -> None:
        """Checks the options and sets vocab_size, chance and optimal."""
        raise NotImplementedError

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids and scored tokens, both (row, length + 1)."""
        raise NotImplementedError

    def batch(self, step: int) -> Batch:
        """The rows of a step."""
        if step < 0:
            raise CorpusError(f"there is no step {step}; they count from 0")
        ids, mask = self.write(self.rng(step))
        mask[:, 0] = False  # nothing stands before it
        segments = np.broadcast_to(step * self.rows + np.arange(self.rows)[:, None], ids.shape).copy()
        return Batch(step, ids.astype(np.int64), segments, mask)

    def rng(self, step: int) -> np.random.Generator:
        """The stream of chance that a step's rows are drawn from."""
        return np.random.default_rng([self.seed, step, *f"{self.name}/{self.split}".encode()])

    def describe(self) -> dict[str, Any]:
        """All that decides the batches; `synthetic_source` builds the task again from it."""
        own = {"rows": self.rows, "length": self.length, "seed": self.seed, "split": self.split}
        return {"kind": "synthetic", "name": self.name, **own, **self.options}

    def refuse_unless(self, holds: bool, wanted: str) -> None:
        """Raises `CorpusError` with what is wanted."""
        if not holds:
            raise CorpusError(f"{self.name} with length {self.length} and {self.options}: {wanted}")


def synthetic_source(name: str, **options: Any) -> Synthetic:
    """A task of `SYNTHETIC` by name and options, or by all that its `describe` gave."""
    options.pop("kind", None)
    return SYNTHETIC.get(name)(**options)


def _distinct(rng: np.random.Generator, rows: int, n: int, k: int) -> Ids:
    """Different numbers below n, k in each row, in random order, (row, k)."""
    return np.argsort(rng.random((rows, n)), axis=1)[:, :k]


@SYNTHETIC.register("induction", summary="what followed the trigger last time follows it again", paper="2212.14052")
class Induction(Synthetic):
    """Random symbols 0..vocab-2; the trigger (vocab-1) stands once within and once at the end; scored: what follows."""

    name = "induction"
    defaults = {"vocab": 20, "length": 30}
    vocab: int

    def prepare(self) -> None:
        self.refuse_unless(self.vocab >= 3 and self.length >= 4, "at least vocab 3 and length 4 are wanted")
        self.vocab_size, self.chance = self.vocab, 1 / (self.vocab - 1)

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        ids = rng.integers(0, self.vocab - 1, (self.rows, self.length + 1))
        each = np.arange(self.rows)
        at = rng.integers(0, self.length - 2, self.rows)
        ids[each, at] = ids[:, -2] = self.vocab - 1
        ids[:, -1] = ids[each, at + 1]
        mask = np.zeros(ids.shape, dtype=bool)
        mask[:, -1] = True
        return ids, mask


@SYNTHETIC.register("assoc_recall", summary="a key seen before is asked for its value", paper="2212.14052")
class AssociativeRecall(Synthetic):
    """Pairs key value key value ... then a key seen before; keys are 0..half-1, values half..2 half-1; the map is
    redrawn in each row. Scored: the value of the last key.
    """

    name = "assoc_recall"
    defaults = {"vocab": 10, "length": 21}
    vocab: int

    def prepare(self) -> None:
        self.refuse_unless(self.vocab >= 4 and self.vocab % 2 == 0, "an even vocab of at least 4 is wanted")
        self.refuse_unless(self.length % 2 == 1 and self.length >= 3, "an odd length of at least 3 is wanted")
        self.vocab_size, self.chance = self.vocab, 2 / self.vocab

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        half, pairs = self.vocab // 2, (self.length - 1) // 2
        values = half + rng.integers(0, half, (self.rows, half))  # (row, key)
        keys = rng.integers(0, half, (self.rows, pairs + 1))
        keys[:, -1] = keys[np.arange(self.rows), rng.integers(0, pairs, self.rows)]
        ids = np.stack([keys, np.take_along_axis(values, keys, axis=1)], axis=2).reshape(self.rows, -1)
        mask = np.zeros(ids.shape, dtype=bool)
        mask[:, -1] = True
        return ids, mask


@SYNTHETIC.register("mqar", summary="many keys are asked for their values in one row", paper="2312.04927")
class MultiQueryRecall(Synthetic):
    """`pairs` different keys with values, then every key once more in random order among noise, each followed by its
    value. 0 is noise, keys are 1..half, values above. Scored: the values of the second time.
    """

    name = "mqar"
    defaults = {"vocab": 64, "pairs": 8, "length": 64}
    vocab: int
    pairs: int

    def prepare(self) -> None:
        half = (self.vocab - 1) // 2
        self.refuse_unless(1 <= self.pairs <= half, f"1 to {half} pairs are wanted")
        self.refuse_unless(self.length + 1 >= 4 * self.pairs, f"a length of at least {4 * self.pairs - 1} is wanted")
        self.vocab_size, self.chance = self.vocab, 1 / half

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        half, width = (self.vocab - 1) // 2, self.length + 1
        keys = 1 + _distinct(rng, self.rows, half, self.pairs)
        values = 1 + half + rng.integers(0, half, keys.shape)
        ids = np.zeros((self.rows, width), dtype=np.int64)
        ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2] = keys, values
        order = _distinct(rng, self.rows, self.pairs, self.pairs)
        free = (width - 2 * self.pairs) // 2  # slots of two for the queries
        slots = np.sort(_distinct(rng, self.rows, free, self.pairs), axis=1)
        at = 2 * self.pairs + 2 * slots
        each = np.arange(self.rows)[:, None]
        ids[each, at], ids[each, at + 1] = keys[each, order], values[each, order]
        mask = np.zeros(ids.shape, dtype=bool)
        mask[each, at + 1] = True
        return ids, mask


@SYNTHETIC.register("selective_copy", summary="data scattered in noise is recalled in order", paper="2312.00752")
class SelectiveCopy(Synthetic):
    """`data` symbols (2..vocab-1) scattered in noise (0); after a mark (1) they follow in order. Scored: those."""

    name = "selective_copy"
    defaults = {"vocab": 16, "data": 16, "length": 80}
    vocab: int
    data: int

    def prepare(self) -> None:
        room = self.length - self.data
        self.refuse_unless(self.vocab >= 3 and self.data >= 1, "at least vocab 3 and data 1 are wanted")
        self.refuse_unless(room >= self.data, f"a length of at least {2 * self.data} is wanted")
        self.vocab_size, self.chance = self.vocab, 1 / (self.vocab - 2)

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        room = self.length - self.data
        ids = np.zeros((self.rows, self.length + 1), dtype=np.int64)
        symbols = rng.integers(2, self.vocab, (self.rows, self.data))
        at = np.sort(_distinct(rng, self.rows, room, self.data), axis=1)
        ids[np.arange(self.rows)[:, None], at] = symbols
        ids[:, room] = 1
        ids[:, room + 1 :] = symbols
        mask = np.zeros(ids.shape, dtype=bool)
        mask[:, room + 1 :] = True
        return ids, mask


@SYNTHETIC.register("dyck", summary="brackets of k kinds, the closing kind is to be known", paper="2105.11115")
class Dyck(Synthetic):
    """Balanced brackets of `kinds` kinds, depth at most `depth`: id 2 k opens, 2 k + 1 closes. Scored: closings.

    `depth_of` tells at which depth each token stands. Among closings alone the kind is the whole question, so
    chance is 1 / kinds; a model that also weighs openings scores lower until it learns when a closing must come.
    """

    name = "dyck"
    defaults = {"kinds": 2, "depth": 6, "length": 64}
    kinds: int
    depth: int

    def prepare(self) -> None:
        self.refuse_unless(self.kinds >= 1 and self.depth >= 1, "at least one kind and depth 1 are wanted")
        self.vocab_size, self.chance = 2 * self.kinds, 1 / self.kinds

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        width = self.length + 1
        ids = np.zeros((self.rows, width), dtype=np.int64)
        mask = np.zeros(ids.shape, dtype=bool)
        stack = np.zeros((self.rows, self.depth + 1), dtype=np.int64)
        height = np.zeros(self.rows, dtype=np.int64)
        coins, kinds = rng.random(ids.shape), rng.integers(0, self.kinds, ids.shape)
        each = np.arange(self.rows)
        for at in range(width):  # one step of all rows
            left = width - at
            opens = (height == 0) | ((coins[:, at] < 0.5) & (height < self.depth))
            opens &= height + 1 <= left - 1 if width % 2 == 0 else height < left
            stack[each[opens], height[opens]] = kinds[opens, at]
            height = height + np.where(opens, 1, -1)
            ids[:, at] = np.where(opens, 2 * kinds[:, at], 2 * stack[each, np.maximum(height, 0)] + 1)
            mask[:, at] = ~opens
        return ids, mask

    def depth_of(self, ids: Ids) -> Ids:
        """How many brackets are open around each token, itself counted."""
        opens = ids % 2 == 0
        return np.cumsum(np.where(opens, 1, -1), axis=1) + ~opens


@SYNTHETIC.register("parity", summary="whether the ones so far are odd", paper="2207.04901")
class Parity(Synthetic):
    """bit, answer, bit, answer ...: bits are 0 and 1, answers 2 (even so far) and 3 (odd). Scored: the last answer, or
    every one with `every=True`. Train on one length, test on a longer one.
    """

    name = "parity"
    defaults = {"every": True, "length": 79}
    every: bool
    chance = 0.5

    def prepare(self) -> None:
        self.refuse_unless(self.length % 2 == 1, "an odd length is wanted")
        self.vocab_size = 4

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        bits = rng.integers(0, 2, (self.rows, (self.length + 1) // 2))
        ids = np.stack([bits, 2 + np.cumsum(bits, axis=1) % 2], axis=2).reshape(self.rows, -1)
        mask = np.zeros(ids.shape, dtype=bool)
        mask[:, 1::2] = True
        if not self.every:
            mask[:, :-1] = False
        return ids, mask


@SYNTHETIC.register("markov2", summary="the next token is a table of the last two, with noise")
class Markov2(Synthetic):
    """x[t] = table[x[t-1], x[t-2]], and with probability `noise` any symbol instead. The table belongs to the seed,
    alike for every split. Scored: all from the third on.
    """

    name = "markov2"
    defaults = {"vocab": 16, "noise": 0.1, "length": 64}
    vocab: int
    noise: float

    def prepare(self) -> None:
        self.refuse_unless(self.vocab >= 2 and 0 <= self.noise < 1, "vocab of 2 or more, 0 <= noise < 1 are wanted")
        self.vocab_size, self.chance = self.vocab, 1 / self.vocab
        self.optimal = 1 - self.noise + self.noise / self.vocab
        rng = np.random.default_rng([self.seed, *b"markov2 table"])
        self.table = rng.integers(0, self.vocab, (self.vocab, self.vocab))

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        shape = (self.rows, self.length + 1)
        free = rng.integers(0, self.vocab, shape)
        noisy = rng.random(shape) < self.noise
        ids = free.copy()
        for at in range(2, shape[1]):
            ids[:, at] = np.where(noisy[:, at], free[:, at], self.table[ids[:, at - 1], ids[:, at - 2]])
        mask = np.ones(shape, dtype=bool)
        mask[:, :2] = False
        return ids, mask


@SYNTHETIC.register("repeat", summary="random tokens, then the same again", paper="2209.11895")
class Repeat(Synthetic):
    """A random sequence of half the row, then the same again: induction heads foretell the second half but its first
    token. `period` makes it shorter and repeats it more often. Scored: all from the second token of the second time.

    With `vary` each row draws a period of its own, from half of it up to all of it. A fixed period can be learnt by
    position alone: a head that looks a fixed distance back solves it and is no induction head.
    """

    name = "repeat"
    defaults = {"vocab": 256, "period": 0, "vary": True, "length": 63}
    vocab: int
    period: int
    vary: bool

    def prepare(self) -> None:
        self.span = self.period or (self.length + 1) // 2
        self.refuse_unless(1 < self.span <= self.length - 1, "a period of 2 to length - 1 is wanted")
        self.refuse_unless(self.vocab >= 2, "at least vocab 2 is wanted")
        self.vocab_size, self.chance = self.vocab, 1 / self.vocab

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        once = rng.integers(0, self.vocab, (self.rows, self.span))
        least = max(2, self.span // 2) if self.vary else self.span
        spans = rng.integers(least, self.span + 1, (self.rows, 1))
        places = np.arange(self.length + 1)[None]  # (1, length + 1)
        ids = np.take_along_axis(once, places % spans, axis=1)
        return ids, places > spans


SYNTHETIC.add(
    "succession",
    "vesalius.corpus.succession:Succession",
    summary="the next day, month, letter or number, or the same again",
    paper="2312.09230",
)
SYNTHETIC.add(
    "markov-spans",
    "vesalius.corpus.markov:MarkovSpans",
    summary="a Markov chain, and spans that are written twice",
    paper="2504.15471",
)

SYNTHETIC.add(
    "binary_successor",
    "vesalius.corpus.recursion:BinarySuccessor",
    summary="the successor of a binary number, by its recursive definition",
    paper="2305.14699",
)

SYNTHETIC.add(
    "tree_traversal",
    "vesalius.corpus.recursion:TreeTraversal",
    summary="the labels of a tree in pre-, in- or post-order, whole or a few unfoldings",
    paper="2305.14699",
)
SYNTHETIC.add(
    "facts",
    "vesalius.corpus.facts:Facts",
    summary="a relation of a subject, or the subject itself, among noise: what only memory can tell",
    paper="2403.19521",
)
SYNTHETIC.add(
    "fsm",
    "vesalius.corpus.machine:Machine",
    summary="states of a random machine, each written as two digits; which may follow is to be known",
    paper="2310.17230",
)
SYNTHETIC.add(
    "icll",
    "vesalius.corpus.automata:RegularLanguages",
    summary="strings of a random regular language, another one in each row",
    paper="2401.12973",
)
