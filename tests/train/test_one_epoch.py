"""What a comparison of one epoch with many rests on: equal steps over exactly a share of the text, and dropout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from train_helpers import small

from vesalius.corpus.order import Order
from vesalius.train.assembly import assemble, data_of
from vesalius.train.parallel import World

STEPS, TARGETS = 8, 8 * 24  # of the recipe of `small`


@pytest.mark.parametrize("epochs", [1, 2, 8])
def test_first_tokens_are_read_so_many_times_and_no_others(text: Path, epochs: int) -> None:
    wanted = STEPS * TARGETS // epochs
    recipe = small(text, steps=STEPS, data__first_tokens=wanted)
    order = data_of(recipe).source
    assert isinstance(order, Order)
    counts = np.zeros(order.store.n_tokens, dtype=int)
    for epoch in range(order.epochs_until(STEPS)):
        seen = order.where(np.arange(order.store.n_tokens), epoch)
        counts += (seen.steps >= 0) & (seen.steps < STEPS)
    assert (counts[:wanted] == epochs).all() and not counts[wanted:].any()
    read = np.sort(np.concatenate([order.batch(s).ids[:, 1:].ravel() for s in range(STEPS)]))
    assert np.array_equal(read, np.sort(np.tile(order.store.at(np.arange(wanted)), epochs)))


def test_dropout_is_for_training_alone(text: Path) -> None:
    plain, dropped = (assemble(small(text, dropout=d), World.single()) for d in (0.0, 0.1))
    found = []
    for made in (plain, dropped):
        assert made.held_out is not None
        before = made.trainer.evaluate(made.held_out, 2)["loss"]
        found.append((before, made.trainer.step().loss))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_held_out_text_is_never_trained_on(text: Path) -> None:
    made = data_of(small(text))
    assert made.held_out is not None and made.store is not None
    held, read = (set(s.index["sha256"]) for s in (made.held_out.store, made.store))  # type: ignore[attr-defined]
    assert held and read and not held & read
