"""Structurally recursive functions as rows to learn: the successor of a binary number, and walks of a tree.

    <begin> x1 x2 ... xn ~ ~ <gives> y1 y2 ... ym <end>

The input is filled up to `width` with a symbol that means nothing, so that `<gives>` always stands at the same place
and longer inputs than were trained on have somewhere to stand. Scored: the output and its `<end>`.

**Binary numbers** are built by 01 (one), X0 b (twice b) and X1 b (twice b, plus one):

    s(01) = X0 01        s(X0 b) = X1 b        s(X1 b) = X0 s(b)

so the depth of the recursion is the number of X1 that the number begins with. With `order: least` it is written as it
is built, least significant first; with `order: most` backwards, and the depth shows only at the end. Uniform numbers
have geometric depths; here the depth is drawn first, uniformly from 0 to `depth`, then the size from those that allow
it, up to `size` symbols, then the rest.

**Trees** are `( label left right )`, `.` where there is none. The output lists the labels in pre-, in- or post-order;
with `steps` above 0, the expression after so many unfoldings of the leftmost tree, as in

    in(( L l r )) = in(l) L in(r)

The height is drawn first, uniformly from 1 to `depth`, then the tree.

An eighth of the inputs of 7 symbols and more is held out of training, the same for every seed, and is what every other
split is drawn from.

After "Can Transformers Learn to Solve Problems Recursively?" (Zhang et al. 2023, arXiv 2305.14699).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.batches import Batch
from vesalius.corpus.documents import CorpusError
from vesalius.corpus.synthetic import Ids, Synthetic

PAD, END, BEGIN, GIVES, FILL = range(5)  # the first two are the padding and the end of T5
X0, X1, ONE = 5, 6, 7
OPEN, CLOSE, NONE, LABEL = 5, 6, 7, 8  # trees: labels from 8 on
HELD_OUT = 8  # one input in so many
SMALLEST_HELD_OUT = 7
PADDING = -1  # of `Batch.segments`
TRIES = 200  # draws of an input of the right split

Symbols = tuple[int, ...]


def held_out(x: Sequence[int]) -> bool:
    """Whether an input belongs to the test split."""
    return len(x) >= SMALLEST_HELD_OUT and zlib.crc32(bytes(x)) % HELD_OUT == 0


class Recursive(Synthetic):
    """What the tasks share: rows, splits, and what an input's size and depth are."""

    width: int
    size: int
    depth: int

    def prepare(self) -> None:
        self.refuse_unless(1 <= self.size <= self.width, f"a size of 1 to {self.width} (width) is wanted")
        need = self.width + 2 + self.longest + 1
        self.refuse_unless(self.length + 1 >= need, f"a length of at least {need - 1} is wanted")

    def _commonest(self) -> float:
        """The share of the commonest symbol among those scored, over a thousand draws."""
        rng = np.random.default_rng([*b"commonest"])
        scored = [s for _ in range(1000) for s in (*self.answer(self.draw(rng)), END)]
        return float(np.bincount(scored).max() / len(scored))

    @property
    def longest(self) -> int:
        """Symbols of the longest output to an input that fills the width."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator) -> Symbols:
        """One input of the training distribution."""
        raise NotImplementedError

    def answer(self, x: Sequence[int]) -> Symbols:
        """The right output."""
        raise NotImplementedError

    def depth_of(self, x: Sequence[int]) -> int:
        """How deep the recursion goes."""
        raise NotImplementedError

    def inputs(self, size: int, depth: int, n: int, seed: int = 0) -> list[Symbols]:
        """Up to `n` different inputs of one size and depth, none that was trained on; fewer where there are fewer."""
        raise NotImplementedError

    def trained_on(self, x: Sequence[int]) -> bool:
        """Whether training may have had this input."""
        return len(x) <= self.size and self.depth_of(x) <= self.depth and not held_out(x)

    def prompt(self, x: Sequence[int]) -> list[int]:
        """What a model reads before it answers."""
        if len(x) > self.width:
            raise CorpusError(f"{self.name}: an input of {len(x)} symbols is wider than {self.width}; raise width")
        return [BEGIN, *x, *[FILL] * (self.width - len(x)), GIVES]

    def write(self, rng: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
        ids = np.full((self.rows, self.length + 1), PAD, dtype=np.int64)
        mask = np.zeros(ids.shape, dtype=bool)
        for i in range(self.rows):
            for _ in range(TRIES):
                x = self.draw(rng)
                if self.split == "train" or len(x) < SMALLEST_HELD_OUT:
                    good = not held_out(x) and self.split == "train"
                else:
                    good = held_out(x)
                if good:
                    break
            else:
                raise CorpusError(f"{self.name} with size {self.size}: no input is held out; raise size to 9 or more")
            prompt, answer = self.prompt(x), (*self.answer(x), END)
            ids[i, : len(prompt)] = prompt
            ids[i, len(prompt) : len(prompt) + len(answer)] = answer
            mask[i, len(prompt) : len(prompt) + len(answer)] = True
        return ids, mask

    def batch(self, step: int) -> Batch:
        """The rows of a step; what follows `<end>` is padding."""
        found = super().batch(step)
        found.segments[found.ids == PAD] = PADDING
        return found


class BinarySuccessor(Recursive):
    """The successor of a binary number. Ids: 5 is X0, 6 is X1, 7 is 01."""

    name = "binary_successor"
    defaults: dict[str, Any] = {"order": "least", "size": 10, "depth": 4, "width": 14, "length": 31}
    order: str

    def prepare(self) -> None:
        super().prepare()
        self.refuse_unless(self.order in ("least", "most"), "order least or most (significant first) is wanted")
        self.refuse_unless(0 <= self.depth < self.size, f"a depth of 0 to {self.size - 1} is wanted")
        self.vocab_size, self.chance = 8, self._commonest()

    @property
    def longest(self) -> int:
        return self.width + 1

    def draw(self, rng: np.random.Generator) -> Symbols:
        depth = int(rng.integers(0, self.depth + 1))
        return self._number(int(rng.integers(depth + 1, self.size + 1)), depth, rng)

    def _number(self, size: int, depth: int, rng: np.random.Generator) -> Symbols:
        rest = size - depth - 2  # free symbols after the one that ends the recursion
        tail = (X0, *(X0 + rng.integers(0, 2, rest)).tolist(), ONE) if rest >= 0 else (ONE,)
        return self.written((X1,) * depth + tail)

    def written(self, x: Sequence[int]) -> Symbols:
        """From least significant first to the order of this task, or back."""
        return tuple(x) if self.order == "least" else tuple(reversed(x))

    def depth_of(self, x: Sequence[int]) -> int:
        x = self.written(x)
        return next(i for i, s in enumerate(x) if s != X1)

    def answer(self, x: Sequence[int]) -> Symbols:
        x = self.written(x)
        depth = next(i for i, s in enumerate(x) if s != X1)
        after = (X1, *x[depth + 1 :]) if x[depth] == X0 else (X0, ONE)
        return self.written((X0,) * depth + after)

    def inputs(self, size: int, depth: int, n: int, seed: int = 0) -> list[Symbols]:
        if not 0 <= depth < size:
            return []
        rng = np.random.default_rng([seed, size, depth, *b"inputs"])
        known = size <= self.size and depth <= self.depth
        free = max(0, size - depth - 2)
        found: dict[Symbols, None] = {}
        for _ in range(n * 20 if free > 0 else 1):
            x = self._number(size, depth, rng)
            if not (known and self.trained_on(x)):
                found[x] = None
            if len(found) == min(n, 2**free):
                break
        return list(found)


class TreeTraversal(Recursive):
    """The labels of a tree in pre-, in- or post-order. Ids: 5 opens, 6 closes, 7 is no tree, 8 on are labels."""

    name = "tree_traversal"
    defaults: dict[str, Any] = {
        "order": "pre", "steps": 0, "size": 37, "depth": 3, "labels": 8, "width": 45, "length": 92,
    }  # fmt: skip
    order: str
    steps: int
    labels: int

    def prepare(self) -> None:
        super().prepare()
        self.refuse_unless(self.order in ("pre", "in", "post"), "order pre, in or post is wanted")
        self.refuse_unless(self.steps >= 0 and self.labels >= 2, "steps of 0 or more and 2 labels or more are wanted")
        self.refuse_unless(self.depth >= 1 and self.size >= 5 * self.depth, "5 symbols a level are wanted")
        self.vocab_size, self.chance = LABEL + self.labels, self._commonest()

    @property
    def longest(self) -> int:
        return self.width // 4 if not self.steps else self.width

    def draw(self, rng: np.random.Generator) -> Symbols:
        for _ in range(TRIES):
            x = self._tree(int(rng.integers(1, self.depth + 1)), rng)
            if len(x) <= self.size:
                return x
        raise CorpusError(f"tree_traversal: no tree of height {self.depth} has {self.size} symbols; raise size")

    def _tree(self, height: int, rng: np.random.Generator) -> Symbols:
        """A tree of exactly this height."""
        if height == 0:
            return (NONE,)
        deep = self._tree(height - 1, rng)
        other = self._tree(int(rng.integers(0, height)), rng)
        sides = (deep, other) if rng.random() < 0.5 else (other, deep)
        return (OPEN, LABEL + int(rng.integers(self.labels)), *sides[0], *sides[1], CLOSE)

    def depth_of(self, x: Sequence[int]) -> int:
        open_, most = 0, 0
        for s in x:
            open_ += (s == OPEN) - (s == CLOSE)
            most = max(most, open_)
        return most

    def answer(self, x: Sequence[int]) -> Symbols:
        found, left = list(x), self.steps or len(x)
        while left and OPEN in found:
            at = found.index(OPEN)
            parts, end = self._parts(found, at)
            found[at:end] = self._unfolded(*parts)
            left -= 1
        return tuple(found)

    def _parts(self, x: Sequence[int], at: int) -> tuple[tuple[int, Symbols, Symbols], int]:
        """Label, left and right of the tree that opens at a place, and where it ends."""
        left = self._end(x, at + 2)
        right = self._end(x, left)
        return (x[at + 1], tuple(x[at + 2 : left]), tuple(x[left:right])), right + 1

    def _end(self, x: Sequence[int], at: int) -> int:
        open_ = 0
        while True:
            open_ += (x[at] == OPEN) - (x[at] == CLOSE)
            at += 1
            if open_ == 0:
                return at

    def _unfolded(self, label: int, left: Symbols, right: Symbols) -> list[int]:
        left, right = (() if t == (NONE,) else t for t in (left, right))
        order = {"pre": ((label,), left, right), "in": (left, (label,), right), "post": (left, right, (label,))}
        return [s for part in order[self.order] for s in part]

    def inputs(self, size: int, depth: int, n: int, seed: int = 0) -> list[Symbols]:
        rng = np.random.default_rng([seed, size, depth, *b"inputs"])
        found: dict[Symbols, None] = {}
        for _ in range(n * TRIES if 5 * depth <= size + depth and size <= self.width else 0):
            x = self._tree(depth, rng)
            if len(x) == size and not self.trained_on(x):
                found[x] = None
            if len(found) == n:
                break
        return list(found)

    @cached_property
    def sizes(self) -> list[int]:
        """Sizes that trees have: five symbols for one node, four more for each other."""
        return list(range(5, self.width + 1, 4))
