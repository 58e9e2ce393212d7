"""LLM.int8(): its arithmetic on planted outliers, in a model that has learnt something, and as a lens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from change_helpers import perplexity, scaled_norms
from families import some_ids, tiny
from torch import nn

import vesalius
from vesalius.change.llm_int8 import llm_int8, outlier_columns, outlier_tables, rms_thresholds
from vesalius.change.quantize import eight_bit_share, linear_bytes, naive
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.int8 import Int8Linear, Parts, Scheme
from vesalius.model.saving import save_model

WIDTH, PLANTED = 768, [3, 100, 101, 400, 512, 767]


def planted(seed: int) -> tuple[torch.Tensor, nn.Linear]:
    """Inputs N(0, 1) with six columns sixty times as large, and weights N(0, 1)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(256, WIDTH, generator=draw)
    x = x.clamp(-5.5, 5.5)  # six sigma by chance is no planted outlier
    x[:, PLANTED] *= 60
    module = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    module.weight.copy_(torch.randn(WIDTH, WIDTH, generator=draw))
    return x, module


def error(made: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, module: nn.Linear) -> float:
    """Of the output, relative."""
    return float((made(x) - module(x)).norm() / module(x).norm())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_outliers_cost_what_the_paper_says(seed: int) -> None:
    x, module = planted(seed)
    columns = torch.tensor(PLANTED)
    kept = error(Int8Linear.of(module, Scheme(threshold=6.0), columns=columns), x, module)
    dequantised = error(Int8Linear.of(module, Scheme(threshold=6.0)), x, module)
    rows = error(Int8Linear.of(module, Scheme()), x, module)
    tensor = error(Int8Linear.of(module, Scheme(weights="tensor", inputs="tensor")), x, module)
    assert rows >= 15 * kept  # 22x
    assert rows >= 4 * dequantised  # 5.7x
    assert tensor > rows
    found = (x.abs() >= 6).any(0).nonzero()[:, 0].tolist()
    assert found == PLANTED and 1 - len(found) / WIDTH >= 0.99
    zero_points = Scheme(threshold=6.0, weight_zero=True, input_zero=True)
    assert error(Int8Linear.of(module, zero_points), x, module) < 1.2 * dequantised


def test_bitsandbytes_says_the_same() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed; pip install 'vesalius[quantization]'")
    import bitsandbytes as bnb

    x, module = planted(0)
    module.weight.copy_(module.weight.half())  # theirs is rounded to float16 before anything else
    x = x.half().float()
    theirs = bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(module.state_dict())
    with torch.no_grad():
        wanted = theirs.to("cpu")(x.half()).float()
    ours = Int8Linear.of(module, Scheme(threshold=6.0))
    apart = (ours.codes.int() - theirs.weight.data.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 1e-3  # ties of float16 are rounded either way
    assert abs(error(ours, x, module) / error(lambda _: wanted, x, module) - 1) < 0.05
    same = Int8Linear(Parts(theirs.weight.data, ours.scale), Scheme(threshold=6.0))
    assert (same(x) - wanted).abs().max() <= 0.02 * wanted.std()  # 0.8 %: its output is float16


def test_outliers_that_change_nothing_break_naive_rounding_alone(trained_gpt2: Model, held_out: torch.Tensor) -> None:
    """Norms forty times as large in three channels, the next weights a fortieth."""
    before = perplexity(trained_gpt2, held_out)
    model = scaled_norms(trained_gpt2, [5, 17, 40], 40.0)
    assert perplexity(model, held_out) == pytest.approx(before, rel=1e-4)
    assert perplexity(naive(model), held_out) >= 1.2 * before
    small = llm_int8(model)
    assert perplexity(small, held_out) <= 1.005 * before
    kept = llm_int8(model, columns=outlier_columns(model, held_out[:8]))
    assert perplexity(kept, held_out) <= 1.005 * before
    assert perplexity(llm_int8(model, 0.0), held_out) > perplexity(small, held_out)
    share = eight_bit_share(small, held_out[:4])
    assert 0.9 < share < 1
    own, half = linear_bytes(small)
    assert own <= 0.55 * half
    by_state, features = outlier_tables(model, held_out[:8])
    emergent = set(features[features["emergent"]]["channel"])
    assert emergent == {5, 17, 40}
    assert by_state["channels"].min() >= 1


def test_a_threshold_in_root_mean_squares_finds_outliers_of_any_size(
    trained_gpt2: Model, held_out: torch.Tensor, tmp_path: Path
) -> None:
    """The outliers as above, and then all inputs a hundredth as large: nothing reaches 6, and as much is lost."""
    before = perplexity(trained_gpt2, held_out)
    large = scaled_norms(trained_gpt2, [5, 17, 40], 40.0)
    model = scaled_norms(large, list(range(large.d_model)), 0.01)
    assert perplexity(model, held_out) == pytest.approx(before, rel=1e-4)
    unseen = perplexity(llm_int8(model), held_out)
    found = rms_thresholds(model, held_out[:8])
    small = llm_int8(model, found)
    assert perplexity(small, held_out) <= 1.005 * before < 1.01 * before < unseen
    block = "transformer.h.1."
    for name, times in ((f"{block}attn.c_attn", 0.01), (f"{block}mlp.c_fc", 0.01), (f"{block}mlp.c_proj", 1.0)):
        assert found[name] == pytest.approx(times * rms_thresholds(large, held_out[:8])[name], rel=1e-3)
    save_model(small, tmp_path / "small")
    assert "thresholds of their own" in (tmp_path / "small" / "int8.json").read_text()
    assert torch.equal(vesalius.open(str(tmp_path / "small")).logits(held_out[:4]), small.logits(held_out[:4]))


def test_the_first_token_alone_is_told_apart() -> None:
    """A channel that is large at position 0 only counts with it, not without."""
    model = tiny("gpt2")
    with torch.no_grad():
        model.hf.transformer.wpe.weight[0, 9] += 500.0
    _, features = outlier_tables(model, some_ids(4, 10), threshold=4.5)
    row = features[features["channel"] == 9].iloc[0]
    assert row["layers"] > row["later_layers"] and row["positions"] >= 0.06
    assert bool(row["emergent"]) and not bool(row["later_emergent"])
    with pytest.raises(VesaliusError, match="with threshold 0 no column is an outlier"):
        llm_int8(model, 0.0, columns={"transformer.h.0.mlp.c_fc": torch.tensor([1])})
