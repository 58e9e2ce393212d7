"""Token-wise clipping: what it saves on tokens it has not seen, and that it never costs on those it has."""

from __future__ import annotations

import pytest
import torch
from change_helpers import perplexity
from torch import nn

from vesalius.change.clipping import TokenEnds, clipped
from vesalius.change.quantize import Range, moved, moved_scheme
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.int8 import Int8Linear

WIDTH = 32


def tokens(n: int, seed: int, kind: str) -> torch.Tensor:
    """Gaussian tokens: all alike, of many sizes, or one in sixty four times as wide."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=draw)
    if kind == "sizes":
        return x * torch.randn(n, 1, generator=draw).mul(0.7).exp()
    x[torch.rand(n, generator=draw) < (kind == "rare") / 60] *= 4
    return x


@pytest.mark.parametrize("kind", ["alike", "sizes", "rare"])
def test_the_range_that_fits_the_bits_is_taken(kind: str) -> None:
    """Against the mean range of rows: with 4 bits that is too wide, with 8 it cuts the widest tokens off."""
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    seen, plain = TokenEnds(), Range()
    for row in tokens(2560, 0, kind).split(128):
        seen.add(row)
        plain.add(row)
    new, width, ratio = tokens(4000, 1, kind), {}, {}
    for bits in (8, 6, 4):
        scheme = moved_scheme(bits)
        found = clipped(module, seen, scheme, plain.mean)
        width[bits] = float((found[1] - found[0]) / (plain.mean[1] - plain.mean[0]))
        errors = [(Int8Linear.of(module, scheme, e)(new) - module(new)).square().mean() for e in (found, plain.mean)]
        ratio[bits] = float(errors[0] / errors[1])
    assert width[8] > 1 >= width[6] > 0.8 > width[4]
    assert ratio[4] < 0.75 and ratio[6] <= 1
    assert ratio[8] < (1.15 if kind == "alike" else 0.3)  # alike, nothing was cut off worth the wider steps


def test_all_tokens_are_covered_at_the_first_percentile() -> None:
    seen = TokenEnds()
    x = tokens(300, 2, "sizes")
    seen.add(x)
    assert torch.equal(seen.between(1.0), torch.stack(x.aminmax()))
    low, high = seen.between(0.9)
    outside = ((x.amin(1) < low).float().mean() + (x.amax(1) > high).float().mean()) / 2
    assert float(outside) == pytest.approx(0.1, abs=0.01)


def test_a_model_in_six_bits_with_clipping(trained_opt: Model, held_out: torch.Tensor) -> None:
    text, judged = held_out[:16], held_out[16:]
    scheme = moved_scheme(6)
    made = {clip: perplexity(moved(trained_opt, text, "plain", scheme, clip=clip).model, judged) for clip in (0, 1)}
    assert made[1] <= 1.01 * made[0]
    with pytest.raises(VesaliusError, match="here every token has its own"):
        moved(trained_opt, text, "plain", moved_scheme(6, "row"), clip=True)
