"""Losses of the same tokens with more or less before them, against a plain forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import some_ids, tiny

from vesalius.build import build, preset
from vesalius.errors import VesaliusError
from vesalius.evaluate.windows import last_losses
from vesalius.model import Model


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_losses_are_of_the_last_tokens_given_so_many_before_them(family: str):
    model, ids = tiny(family), some_ids(5, 20)
    for length, last in ((19, 4), (10, 10), (6, 1)):
        found = last_losses(model, ids, length, last, batch=2)
        assert found.shape == (5, last)
        for row, losses in zip(ids, found, strict=True):
            read = row[-(length + 1) :]
            with torch.no_grad():
                chance = model.hf(read[None, :-1]).logits[0].log_softmax(-1)
            plain = [-float(chance[i - 1, read[i]]) for i in range(length + 1 - last, length + 1)]
            assert np.allclose(losses, plain, atol=1e-5)


def test_learned_positions_refuse_to_go_past_their_end_and_alibi_goes_on():
    ids = np.random.default_rng(0).integers(0, 64, (2, 40))
    for kind in ("learned", "alibi"):
        made = build(preset("tiny-bloom", positions={"kind": kind}, max_length=16, vocab_size=64), 0)
        model = Model.wrap(made, name=kind)
        assert np.isfinite(last_losses(model, ids, 16, 8)).all()
        if kind == "alibi":
            assert np.isfinite(last_losses(model, ids, 32, 8)).all()
        else:
            with pytest.raises(VesaliusError, match="max_length=16"):
                last_losses(model, ids, 32, 8)


def test_rows_too_short_are_refused():
    with pytest.raises(VesaliusError, match="one token more"):
        last_losses(tiny("llama"), some_ids(2, 9), 9, 3)
