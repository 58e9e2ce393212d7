"""Outlier Suppression+: nothing changes before rounding, planted shifts are found, and the order of methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from change_helpers import losses, perplexity, scaled_norms
from families import some_ids, tiny

from vesalius.change.edit import recording
from vesalius.change.linears import ShiftedLinear, merged, replaced
from vesalius.change.os_plus import fold, migrations, on_stream, sites, smooth_quant
from vesalius.change.quantize import moved, moved_scheme, naive
from vesalius.errors import ModelError
from vesalius.model import Model
from vesalius.scores import bootstrap_mean

FOLDED = ["gpt2", "opt", "bloom", "gpt-neox", "gpt-neox-serial", "gptj", "llama", "llama-bias", "qwen3", "gemma",
          "gemma2", "gemma3", "phi", "phi3"]  # fmt: skip
SHIFTS = {"gpt2", "opt", "bloom", "gpt-neox", "gpt-neox-serial", "phi"}
CHANNELS = [5, 17, 40, 63]


@pytest.mark.parametrize("family", FOLDED)
def test_folding_changes_nothing(family: str) -> None:
    """With shifts and scales drawn by chance for every channel, larger than a search would give."""
    model, ids = tiny(family), some_ids()
    found = migrations(model, some_ids(4, 12, seed=1), moved_scheme())
    draw = torch.Generator().manual_seed(0)
    drawn = [
        type(m)(m.where, torch.randn(m.shift.shape, generator=draw) * m.where.shifts,
                torch.randn(m.scale.shape, generator=draw).exp())
        for m in found
    ]  # fmt: skip
    before = model.logits(ids)
    with recording(model, "os+") as recorder:
        fold(recorder, model, drawn)
    after = model.logits(ids)
    assert (after - before).abs().max() <= 1e-4
    assert len(recorder.edit)  # something did change
    assert any(m.where.shifts for m in found) == (family in SHIFTS)
    gated = model.anatomy.gated
    assert sum(s.kind == "up" for s in sites(model)) == (model.n_layers if gated else 0)
    recorder.edit.undo(model)
    assert torch.equal(model.logits(ids), before)


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt-350m"])
def test_the_stream_of_post_norm_models_stays(family: str) -> None:
    """Readers shift and divide their own input; the norm also feeds the shortcut and is not touched."""
    model, ids = tiny(family), some_ids()
    found = migrations(model, some_ids(4, 12, seed=1), moved_scheme())
    own = on_stream(found)
    assert len(own) == 4 * model.n_layers  # queries, keys, values, and the MLP's first map
    changed = replaced(model, lambda n, m: ShiftedLinear.of(m, *own[n]), own)
    assert (changed.logits(ids) - model.logits(ids)).abs().max() <= 1e-4
    assert torch.allclose(merged(changed).logits(ids), changed.logits(ids), atol=1e-5)
    done = moved(model, some_ids(4, 12, seed=1))
    assert done.difference == 0 and done.folded is model
    apart = float((done.model.logits(ids) - model.logits(ids)).abs().max() / model.logits(ids).std())
    assert 0 < apart < 0.3


@pytest.fixture(scope="module")
def corrupted(trained_opt: Model) -> Model:
    """The trained OPT, four channels of its norms scaled by thirty and offset by twenty times that, made up for."""
    return scaled_norms(trained_opt, CHANNELS, 30.0, 20.0 * 30.0)


def test_planted_offsets_are_found_and_cost_nothing(
    trained_opt: Model, corrupted: Model, held_out: torch.Tensor
) -> None:
    text, judged = held_out[:16], held_out[16:]
    clean = perplexity(trained_opt, judged)
    assert perplexity(corrupted, judged) == pytest.approx(clean, rel=1e-3)
    assert perplexity(naive(corrupted), judged) >= 2 * clean
    assert perplexity(moved(corrupted, text, "plain").model, judged) >= 2 * clean
    uncorrupted = perplexity(moved(trained_opt, text, "plain").model, judged)
    done = moved(corrupted, text)
    assert perplexity(done.model, judged) <= 1.02 * uncorrupted
    assert (done.folded.logits(judged) - corrupted.logits(judged)).abs().max() <= 1e-3
    found, true = [], []
    for a, b in zip(
        migrations(corrupted, text, moved_scheme()), migrations(trained_opt, text, moved_scheme()), strict=True
    ):
        found += a.shift.tolist()
        true += [600.0 + 30 * float(z) if c in CHANNELS else float(z) for c, z in enumerate(b.shift)]
    assert np.corrcoef(found, true)[0, 1] >= 0.99
    shifts = np.array(found).reshape(-1, 64)[:, CHANNELS]
    assert np.allclose(shifts, np.array(true).reshape(-1, 64)[:, CHANNELS], rtol=0.02)


def test_the_order_at_six_bits(corrupted: Model, held_out: torch.Tensor) -> None:
    text, judged = held_out[:16], held_out[16:]
    scheme = moved_scheme(6)
    found = {m: perplexity(moved(corrupted, text, m, scheme).model, judged) for m in ("os+", "smoothquant", "plain")}
    assert found["os+"] <= found["smoothquant"] <= found["plain"]
    still, best = (losses(moved(corrupted, text, "os+", scheme, shift=s).model, judged) for s in (False, True))
    assert bootstrap_mean((still - best).double().numpy(), 0)[0] > 0  # over the same rows, 95 %


def test_the_search_is_never_worse_than_nothing_moved() -> None:
    model, text = tiny("opt"), some_ids(4, 24)
    for m in migrations(model, text, moved_scheme(6), shift=False):
        assert m.error <= m.plain_error * (1 + 1e-6)
        assert float(m.scale.min()) >= 1 and not m.shift.any()
        wide = m.scale > 1
        assert not wide.any() or m.threshold > 0
    for m in smooth_quant(model, text):
        assert m.where.kind == "norm" and (m.scale > 0).all()


def test_models_of_two_stacks_are_refused() -> None:
    with pytest.raises(ModelError, match="OS\\+ is for models of one stack"):
        moved(tiny("t5"), some_ids())
