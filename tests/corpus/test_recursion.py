"""Recursive functions against arithmetic and plain recursion, and how their inputs are distributed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vesalius.corpus.documents import CorpusError
from vesalius.corpus.recursion import (
    BEGIN,
    END,
    FILL,
    GIVES,
    LABEL,
    ONE,
    PAD,
    X0,
    X1,
    BinarySuccessor,
    TreeTraversal,
    held_out,
)
from vesalius.corpus.synthetic import synthetic_source


def value(task: BinarySuccessor, x: tuple[int, ...]) -> int:
    least = task.written(x)
    assert least[-1] == ONE and ONE not in least[:-1]
    return int("1" + "".join(str(s - X0) for s in reversed(least[:-1])), 2)


@pytest.mark.parametrize("order", ["least", "most"])
def test_the_successor_is_one_more(order: str) -> None:
    task = BinarySuccessor(order=order)
    rng = np.random.default_rng(0)
    for _ in range(300):
        x = task.draw(rng)
        number = value(task, x)
        assert value(task, task.answer(x)) == number + 1
        trailing = len(bin(number)) - len(bin(number).rstrip("1"))
        assert task.depth_of(x) == min(trailing, len(x) - 1)  # the leading one is 01 itself


def test_the_definition_of_the_paper() -> None:
    task = BinarySuccessor()
    assert task.answer((ONE,)) == (X0, ONE)
    assert task.answer((X0, X1, ONE)) == (X1, X1, ONE)
    assert task.answer((X1, X1, X0, X1, ONE)) == (X0, X0, X1, X1, ONE)
    assert BinarySuccessor(order="most").answer((ONE, X1, X1)) == (ONE, X0, X0, X0)


def test_depths_are_uniform_and_splits_apart() -> None:
    train, test = (BinarySuccessor(rows=4000, split=s) for s in ("train", "test"))
    ids = train.batch(0).ids
    depths = Counter()
    for row in ids:
        x = tuple(int(s) for s in row[1 : list(row).index(GIVES)] if s != FILL)
        depths[train.depth_of(x)] += 1
        assert not held_out(x) and len(x) <= 10
    assert sorted(depths) == [0, 1, 2, 3, 4] and max(depths.values()) < 1.2 * min(depths.values())
    seen = {tuple(row[: train.width + 2]) for row in ids}
    assert not seen & {tuple(row[: train.width + 2]) for row in test.batch(0).ids}


def test_rows_say_what_is_scored() -> None:
    batch = BinarySuccessor(rows=8).batch(3)
    assert batch.mask is not None
    for ids, mask, segments in zip(batch.ids, batch.mask, batch.segments, strict=True):
        assert ids[0] == BEGIN and ids[15] == GIVES and mask[:16].sum() == 0
        end = list(ids).index(END)
        assert mask[16 : end + 1].all() and not mask[end + 1 :].any()
        assert (ids[end + 1 :] == PAD).all() and (segments[end + 1 :] == -1).all() and (segments[: end + 1] >= 0).all()


def test_inputs_of_a_cell_have_its_size_and_depth() -> None:
    task = BinarySuccessor()
    for size, depth in ((10, 2), (10, 8), (13, 3), (9, 8)):
        found = task.inputs(size, depth, 12)
        assert found and len(set(found)) == len(found)
        assert all(len(x) == size and task.depth_of(x) == depth and not task.trained_on(x) for x in found)
    assert task.inputs(4, 1, 5) == [] and task.inputs(5, 5, 5) == []  # all trained on; no such number


def walk(tree: object, order: str) -> list[int]:
    if tree is None:
        return []
    label, left, right = tree  # type: ignore[misc]
    a, b = walk(left, order), walk(right, order)
    return {"pre": [label, *a, *b], "in": [*a, label, *b], "post": [*a, *b, label]}[order]


def parsed(x: list[int]) -> object:
    if x.pop(0) == 7:
        return None
    label = x.pop(0)
    left, right = parsed(x), parsed(x)
    x.pop(0)
    return label, left, right


@pytest.mark.parametrize("order", ["pre", "in", "post"])
def test_walks_are_those_of_plain_recursion(order: str) -> None:
    task = TreeTraversal(order=order)
    rng = np.random.default_rng(0)
    for _ in range(100):
        x = task.draw(rng)
        assert list(task.answer(x)) == walk(parsed(list(x)), order)
        assert 1 <= task.depth_of(x) <= 3 and len(x) % 4 == 1


def test_steps_unfold_one_tree_after_another() -> None:
    a, b, c = LABEL, LABEL + 1, LABEL + 2
    x = (5, a, 5, b, 7, 7, 6, 5, c, 7, 7, 6, 6)  # ( a (b . .) (c . .) )
    one, two = (TreeTraversal(order="in", steps=n).answer(x) for n in (1, 2))
    assert one == (5, b, 7, 7, 6, a, 5, c, 7, 7, 6) and two == (b, a, 5, c, 7, 7, 6)
    assert TreeTraversal(order="in", steps=3).answer(x) == TreeTraversal(order="in").answer(x) == (b, a, c)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(CorpusError, match="a depth of 0 to 9 is wanted"):
        BinarySuccessor(depth=10)
    with pytest.raises(CorpusError, match="a length of at least 31 is wanted"):
        BinarySuccessor(length=20)
    with pytest.raises(CorpusError, match="order pre, in or post"):
        TreeTraversal(order="level")
    again = synthetic_source(**BinarySuccessor(order="most", seed=3).describe())
    assert np.array_equal(again.batch(2).ids, BinarySuccessor(order="most", seed=3).batch(2).ids)
