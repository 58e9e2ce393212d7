"""The calibration pass against plain sums over what a forward pass records."""

from __future__ import annotations

import pytest
import torch
from families import some_ids, tiny
from torch import Tensor

from vesalius.change.calibration import Channels, Gram, Sample, calibrate
from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model, Site


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


def name_of(model: Model, layer: int) -> str:
    wanted = model.anatomy.main.blocks[layer].down
    return next(n for n, m in model.hf.named_modules() if m is wanted)


def inputs(model: Model, rows: Tensor, mask: Tensor) -> Tensor:
    """(token, channel): a neuron's activation is what the down projection reads."""
    site = Site("neurons", 1)
    every = [model.run(r[m.bool()][None], capture=[site])[site][0] for r, m in zip(rows, mask, strict=True)]
    return torch.cat(every)


def test_every_statistic_is_that_of_the_real_tokens(model: Model) -> None:
    rows = some_ids(5, 9)
    mask = torch.ones_like(rows)
    mask[1, :4] = mask[3, :7] = 0
    x = inputs(model, rows, mask)
    channels, gram, sample = Channels(), Gram(), Sample(20)
    calibrate(model, rows, {name_of(model, 1): [channels, gram, sample]}, mask, batch=2)
    assert channels.n == gram.n == len(x) == int(mask.sum())
    plain = {
        "low": x.min(0).values, "high": x.max(0).values, "largest": x.abs().max(0).values, "mean": x.mean(0),
        "mean_size": x.abs().mean(0), "mean_square": (x**2).mean(0),
    }  # fmt: skip
    for name, expected in plain.items():
        torch.testing.assert_close(getattr(channels, name), expected, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(gram.products, x.T @ x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample.inputs, x[:20], atol=1e-5, rtol=1e-4)


def test_the_batch_changes_nothing(model: Model) -> None:
    rows, found = some_ids(5, 9), []
    for batch in (1, 5):
        channels = Channels()
        calibrate(model, rows, {name_of(model, 0): [channels]}, batch=batch)
        found.append(channels.mean_square)
    torch.testing.assert_close(*found)


def test_what_is_not_there_is_named(model: Model) -> None:
    with pytest.raises(UnknownName, match="model.layers.7"):
        calibrate(model, some_ids(1, 4), {"model.layers.7": [Channels()]})
    with pytest.raises(VesaliusError, match="at least one row"):
        calibrate(model, torch.zeros(0, 4, dtype=torch.long), {name_of(model, 0): [Channels()]})
