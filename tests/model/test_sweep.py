"""The sweep against one hook and one full forward pass a part, prompt by prompt; its budget; going on after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from families import tiny
from pairs import random_pairs
from plain import Shelf, padded_pairs, patched, prompts, put, record

from vesalius.model import Intervention, Model, Pairs
from vesalius.model.intervene import locate, sites_of
from vesalius.model.sweep import Recording, Sweep, sweep
from vesalius.parts import Part

FAMILIES = ["llama", "gpt2", "gpt-neox", "gptj", "gemma2", "bloom", "opt", "qwen3", "bert", "t5"]
CLOSE = 1e-4  # logits, single precision


@cache
def opened(family: str) -> Model:
    return tiny(family)


def parts_of(model: Model) -> list[Part]:
    return model.parts(("head", "xhead", "mlp"))


def swept(model: Model, pairs: Pairs, base: str, groups: Sequence[Sequence[Part]], **options: object) -> Sweep:
    """Every group of parts together given its values on the other prompt."""
    parts = [p for group in groups for p in group]
    at = options.pop("at", None)

    def variants(recording: Recording) -> list[list[Intervention]]:
        def one(part: Part) -> Intervention:
            where = locate(part)
            positions = None if at is None else recording.pairs.positions[at]
            return Intervention(part, value=where.read(recording.source[where.site]), positions=positions)

        return [[one(part) for part in group] for group in groups]

    return sweep(model, pairs, variants, base=base, capture=sites_of(parts), **options)


def slow(model: Model, pairs: Pairs, base: str, groups: Sequence[Sequence[Part]], at: str | None = None) -> Sweep:
    """The same, a forward pass a prompt and group."""
    other = "corrupted" if base == "clean" else "clean"
    parts = [p for group in groups for p in group]
    columns, bases = [], []
    for row, prompt in enumerate(prompts(pairs)):
        _, seen = record(model, prompt, other, parts)
        where = None if at is None else [int(pairs.positions[at][row]) - prompt.start]
        bases.append(record(model, prompt, base, [])[0])
        columns.append([patched(model, prompt, base, {p: put(seen[p], where) for p in group}) for group in groups])
    return Sweep(np.array(columns).T, np.array(bases))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["clean", "corrupted"])
@pytest.mark.parametrize(
    ("lengths", "padding", "shared"),
    [([8, 8, 8], "left", 5), ([8, 8], "left", 0), ([5, 9, 7], "left", 3), ([5, 9, 7], "right", 3)],
    ids=["alike, shared beginning", "alike", "left-padded", "right-padded"],
)
def test_every_part_equals_one_hook_and_one_forward(
    family: str, base: str, lengths: list[int], padding: str, shared: int
) -> None:
    model = opened(family)
    pairs = padded_pairs(model, lengths, padding, shared)
    groups = [[p] for p in parts_of(model)]
    got, expected = swept(model, pairs, base, groups), slow(model, pairs, base, groups)
    assert np.abs(got.base - expected.base).max() < CLOSE
    assert np.abs(got.values - expected.values).max() < CLOSE
    moved = np.abs(expected.values - expected.base).max(1)
    assert (moved > 10 * CLOSE).mean() > 0.8  # there was something to get wrong


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma2", "bert"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("at", ["end", "second"])
def test_one_position_alone(family: str, padding: str, at: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, [5, 9, 7], padding, shared=1)
    groups = [[p] for p in parts_of(model)]
    got, expected = swept(model, pairs, "clean", groups, at=at), slow(model, pairs, "clean", groups, at)
    assert np.abs(got.values - expected.values).max() < CLOSE
    everywhere = swept(model, pairs, "clean", groups)
    assert np.abs(got.values - everywhere.values).max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2", "t5"])
def test_several_parts_of_several_blocks_in_one_variant(family: str) -> None:
    model = opened(family)
    pairs = padded_pairs(model, [7, 9, 6], "left", 2)
    parts = parts_of(model)
    groups = [parts[::2], parts[1::3], parts[-2:], parts, parts[4:6]]
    got, expected = swept(model, pairs, "corrupted", groups), slow(model, pairs, "corrupted", groups)
    assert np.abs(got.values - expected.values).max() < CLOSE


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [{"memory_gb": 1e-12}, {"memory_gb": 1e-4}, {"batch": 1}, {"batch": 2}], ids=str)
def test_memory_and_batches_change_nothing(family: str, options: dict[str, float]) -> None:
    """The smallest budget runs one variant at a time: a budget is never refused, only slow."""
    model = opened(family)
    pairs = padded_pairs(model, [6, 9, 7, 9, 5], "left", 2)
    groups = [[p] for p in parts_of(model)]
    whole, pieces = swept(model, pairs, "clean", groups), swept(model, pairs, "clean", groups, **options)
    assert np.abs(whole.values - pieces.values).max() < 1e-5
    assert np.abs(whole.base - pieces.base).max() < 1e-5


def test_the_budget_bounds_the_batch() -> None:
    """Rows that pass a block at once, watched from outside."""
    model = opened("llama")
    pairs = random_pairs(model, rows=4)
    groups = [[p] for p in parts_of(model)]

    def widest(memory_gb: float) -> int:
        rows: list[int] = []
        handle = model.hf.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
        swept(model, pairs, "clean", groups, memory_gb=memory_gb)
        handle.remove()
        return max(rows)

    assert widest(1e-12) == 4  # one variant
    assert widest(1.0) == 4 * (model.n_heads + 1)  # all variants that start at one block
    assert widest(1e-12) < widest(5e-4) < widest(1.0)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("pieces", [0, 1, 4, 7])
def test_a_killed_sweep_goes_on_where_it_stopped(family: str, pieces: int) -> None:
    model = opened(family)
    pairs = padded_pairs(model, [6, 9, 7, 8], "left", 2)
    groups = [[p] for p in parts_of(model)]
    small = {"memory_gb": 3e-4, "batch": 2}

    def blocks(store: Shelf | None) -> tuple[Sweep, int]:
        """The sweep, and how many rows passed the last block's MLP."""
        rows: list[int] = []
        module = model.anatomy.main.blocks[-1].mlp_in
        handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
        try:
            return swept(model, pairs, "clean", groups, store=store, **small), sum(rows)
        finally:
            handle.remove()

    whole, all_rows = blocks(None)
    shelf = Shelf(pieces)
    with pytest.raises(KeyboardInterrupt):
        blocks(shelf)
    assert len(shelf.kept) == pieces
    before = dict(shelf.kept)
    shelf.pieces = 10**9
    again, rows = blocks(shelf)
    assert np.array_equal(again.values, whole.values) and np.array_equal(again.base, whole.base)
    assert all(shelf.kept[key] is before[key] for key in before)
    assert rows < all_rows if pieces else rows == all_rows
    once_more, none = blocks(shelf)
    assert np.array_equal(once_more.values, whole.values) and none == 0


def test_progress_rises_to_the_total() -> None:
    model = opened("gpt2")
    pairs = random_pairs(model, rows=5)
    groups = [[p] for p in parts_of(model)]
    told: list[tuple[int, int]] = []
    swept(model, pairs, "clean", groups, batch=2, memory_gb=1e-12, progress=lambda *now: told.append(now))
    done, totals = zip(*told, strict=True)
    assert set(totals) == {3 * len(groups)}  # three batches of prompts
    assert list(done) == sorted(done) and done[-1] == totals[0]


def test_nothing_is_left_behind_by_an_error() -> None:
    """A variant that fails half way leaves no hook, and the model as it was."""
    model = opened("llama")
    pairs = random_pairs(model)
    before = model.hf(pairs.clean).logits

    def broken(recording: Recording) -> list[list[Intervention]]:
        return [[Intervention(Part("head", 1, 0), value=torch.zeros(2, 2))]]

    with pytest.raises(RuntimeError):
        sweep(model, pairs, broken, base="clean")
    assert torch.equal(model.hf(pairs.clean).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
