"""Pairs cut, joined and exchanged keep every row with its example, its reads and its named positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import PlainLogitDiff, random_pairs

from vesalius.model import Pairs
from vesalius.model.sweep import metric_values, record


def multi_row() -> Pairs:
    """Three examples of 1, 3 and 2 rows, left-padded by 4, 2 and 3; tokens tell their row and column."""
    rows, length = 6, 9
    ids = torch.arange(rows)[:, None] * 100 + torch.arange(length)[None] + 1
    pads = torch.tensor([4, 2, 2, 2, 3, 3])
    mask = (torch.arange(length)[None] >= pads[:, None]).long()
    other = ids.clone()
    other[:, 6] += 50
    other[1, 5] += 50
    return Pairs(
        clean=ids * mask,
        corrupted=other * mask,
        mask=mask,
        reads=torch.tensor([[8, 8], [7, 8], [8, 8], [7, 8], [8, 8], [8, 8]]),
        read_mask=torch.tensor([[1, 0], [1, 1], [1, 0], [1, 1], [1, 0], [1, 0]]).bool(),
        row_example=torch.tensor([0, 1, 1, 1, 2, 2]),
        row_right=torch.tensor([1, 1, 0, 0, 1, 0]).bool(),
        answers=[[11], [12], [13]],
        wrong=[[21], [22], [23]],
        metric=PlainLogitDiff(),
        targets=torch.arange(12).view(6, 2),
        positions={"name": torch.tensor([5, 4, 4, 4, -1, 6]), "end": torch.full((6,), 8)},
        options=[[1, 2], [3], [4, 5, 6]],
    )


def content(pairs: Pairs) -> list[object]:
    """What each example holds, whatever the columns are called: tokens at reads and named places, and all the rest."""
    found: list[object] = []
    for example in range(pairs.n_examples):
        rows = (pairs.row_example == example).nonzero().flatten().tolist()
        held = []
        for r in rows:
            reads = [int(x) for x, on in zip(pairs.reads[r], pairs.read_mask[r], strict=True) if on]
            named = {
                k: None if v[r] < 0 else (int(pairs.clean[r, v[r]]), int(pairs.corrupted[r, v[r]]))
                for k, v in pairs.positions.items()
            }
            real = pairs.mask[r].bool()
            held.append(
                (
                    pairs.clean[r][real].tolist(),
                    pairs.corrupted[r][real].tolist(),
                    [(int(pairs.clean[r, x]), int(pairs.corrupted[r, x])) for x in reads],
                    named,
                    bool(pairs.row_right[r]),
                    None if pairs.targets is None else pairs.targets[r].tolist(),
                )
            )
        options = None if pairs.options is None else pairs.options[example]
        found.append((held, pairs.answers[example], pairs.wrong[example], options))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=5))
def test_taking_examples_keeps_what_each_holds_in_the_order_asked_for(order: list[int]) -> None:
    """Any order, also none, also the same one twice (as a bootstrap does)."""
    pairs = multi_row()
    every = content(pairs)
    taken = pairs.take(order)
    assert content(taken) == [every[e] for e in order]
    assert taken.n_examples == len(order)
    assert taken.n_rows == sum([1, 3, 2][e] for e in order)
    if order:
        assert bool(taken.mask.any(dim=0).all())  # no column is padding in every row
        assert int(taken.reads.min()) >= 0


@pytest.mark.parametrize(("order", "length"), [([0], 5), ([1], 7), ([2], 6), ([0, 2], 6), ([0, 1, 2], 7)])
def test_columns_of_padding_common_to_all_rows_go(order: list[int], length: int) -> None:
    assert multi_row().take(order).length == length


def test_padding_on_the_right_goes_too_and_positions_stay() -> None:
    pairs = multi_row()
    flipped = replace(
        pairs, clean=pairs.clean.flip(1), corrupted=pairs.corrupted.flip(1), mask=pairs.mask.flip(1),
        reads=8 - pairs.reads, positions={},
    )  # fmt: skip
    taken = flipped.take([0])
    assert taken.length == 5 and taken.clean[0].tolist() == flipped.clean[0, :5].tolist()
    assert taken.reads.tolist() == [[0, 0]]


def test_unused_reads_in_the_padding_that_goes_stay_inside() -> None:
    pairs = multi_row()
    pairs = replace(pairs, reads=torch.where(pairs.read_mask, pairs.reads, 0))
    taken = pairs.take([0, 2])
    assert int(taken.reads.min()) >= 0
    assert taken.reads[taken.read_mask].tolist() == [5, 5, 5]


def test_decoder_reads_are_not_moved_by_padding_of_the_encoder() -> None:
    decoder = torch.arange(18).view(6, 3)
    pairs = replace(multi_row(), decoder=decoder, reads=torch.full((6, 2), 2))
    taken = pairs.take([2, 0])
    assert taken.decoder is not None and torch.equal(taken.decoder, decoder[[4, 5, 0]])
    assert taken.reads.tolist() == [[2, 2]] * 3
    assert taken.length == 6


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_are_the_examples_in_order(size: int) -> None:
    pairs = multi_row()
    groups = pairs.batches(size)
    assert [c for g in groups for c in content(g)] == content(pairs)
    assert all(g.n_examples == size for g in groups[:-1]) and 0 < groups[-1].n_examples <= size
    assert pairs.take([]).batches(size) == []


def test_swapping_exchanges_the_prompts_and_nothing_else() -> None:
    pairs = multi_row()
    swapped = pairs.swap()
    assert torch.equal(swapped.clean, pairs.corrupted) and torch.equal(swapped.corrupted, pairs.clean)
    assert content(swapped.swap()) == content(pairs)
    assert swapped.first_difference == pairs.first_difference


def test_the_first_difference_is_that_of_the_earliest_row() -> None:
    pairs = multi_row()
    assert pairs.first_difference == 5  # row 1 differs at 5, the others at 6
    assert pairs.take([0]).first_difference == 6 - 4
    assert pairs.take([2, 0]).first_difference == 6 - 3
    assert pairs.take([1]).first_difference == 5 - 2
    same = replace(pairs, corrupted=pairs.clean)
    assert same.first_difference == same.length


def test_the_metric_of_a_batch_is_that_of_the_whole() -> None:
    model = tiny("llama")
    pairs = random_pairs(model, rows=5)

    def values(some: Pairs) -> torch.Tensor:
        with torch.no_grad():
            return metric_values(model, some, record(model, some, "clean", []).tape.final)[0]

    whole = values(pairs)
    assert torch.allclose(torch.cat([values(g) for g in pairs.batches(2)]), whole, atol=1e-5)
    assert torch.allclose(values(pairs.take([3, 0, 3])), whole[[3, 0, 3]], atol=1e-5)
