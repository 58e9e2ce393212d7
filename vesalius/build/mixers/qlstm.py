"""LSTMs by heads: the quasi-LSTM, whose gates see the input only, and the full one (Stanic et al. 2023, Languini).

    f = sigmoid(W_f x + 1)   i = sigmoid(W_i x)   z = tanh(W_z x)   o = sigmoid(W_o x)
    c_t = f_t c_{t-1} + i_t z_t        h_t = o_t tanh(c_t)        y = O [h of all heads]

The quasi-LSTM is linear in its state, so a block of b positions needs no step after step: pairs (product of f, sum) of
neighbours are joined, then those two apart, four apart, ... (a scan in log2 b rounds), and only blocks follow each
other. The paper's triangular matrix of a block, exp(sum of log f), is the same sum with b instead of log2 b products a
position; products of gates need neither logarithms nor a guard against 0, and nothing is divided.

In the full LSTM the gates see h_{t-1} too.

On the bench the gates stand at the sides of a head: the output gate is `q`, the input gate `k`, the candidate z is `v`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vesalius.build.architecture import Section
from vesalius.build.mixers.base import Context, Growth, Mixer, Store

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture

FORGET_BIAS = 1.0  # of the paper's formula: a new network remembers
CLOSED = 1e9  # a gate's input at which it is open or shut to the last bit


class BlockOptions(Section):
    """Settings of the quasi-LSTM: positions computed at once (the paper: 16, and 8 in its size `tiny`)."""

    block: int = Field(16, ge=1)


class _Gated(Mixer):
    """What both LSTMs share: gates, padding, segments, and where the state is kept between calls."""

    recurrent: ClassVar[bool] = True
    growth: ClassVar[Growth] = "n"
    states: ClassVar[int] = 1  # vectors of d_head kept for every head

    def __init__(self, architecture: Architecture, config: Any = None) -> None:
        super().__init__(architecture, config)
        a = architecture
        inner = a.heads * a.d_head
        self.forget = nn.Linear(a.d_model, inner, bias=a.bias)
        self.input = nn.Linear(a.d_model, inner, bias=a.bias)
        self.value = nn.Linear(a.d_model, inner, bias=a.bias)
        self.output = nn.Linear(a.d_model, inner, bias=a.bias)
        self.o = nn.Linear(inner, a.d_model, bias=a.bias)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        d = self.architecture.d_head
        f, i, z, o = (
            p(x).unflatten(-1, (-1, d)).transpose(1, 2) for p in (self.forget, self.input, self.value, self.output)
        )  # (batch, head, pos, d_head)
        f = f + FORGET_BIAS
        if context.position_ids is not None:
            at = context.position_ids[:, None, :, None]
            f = f.masked_fill(at == 0, -CLOSED).masked_fill(at < 0, CLOSED)
            i = i.masked_fill(at < 0, -CLOSED)
        gates, new = torch.cat([f, i, z, o], dim=-1), x.shape[1]
        home = _home(context)
        if context.past is not None and home is None:
            # A cache that keeps something for every position, such as that of a recorded pass: the gates' inputs
            gates, _ = context.past.update(gates, gates[..., :0], context.layer)
        before = None if home is None else _read(home)
        h, state = self.run(gates, before)  # (batch, head, pos, d_head), (batch, head, states * d_head)
        if home is not None:
            _write(home, state.detach(), new)
        return self.o(h[:, :, -new:].transpose(1, 2).flatten(-2)), {}

    def run(self, gates: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and last state from gate inputs (batch, head, pos, 4 * d_head), f, i, z, o, and a state."""
        raise NotImplementedError

    @classmethod
    def parameters_of(cls, architecture: Architecture) -> int:
        a = architecture
        inner = a.heads * a.d_head
        return 5 * a.d_model * inner + (4 * inner + a.d_model if a.bias else 0)

    @classmethod
    def state_bytes(cls, architecture: Architecture, length: int, itemsize: int = 4) -> int:
        return cls.states * architecture.heads * architecture.d_head * itemsize


class QuasiLstm(_Gated):
    """The quasi-LSTM in blocks."""

    Options = BlockOptions

    def __init__(self, architecture: Architecture, config: Any = None) -> None:
        super().__init__(architecture, config)
        self.block = BlockOptions(**architecture.mixer_options.get("qlstm", {})).block

    def run(self, gates: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        f, i, z, o = gates.chunk(4, dim=-1)
        cells = in_blocks(torch.sigmoid(f), torch.sigmoid(i) * torch.tanh(z), before, self.block)
        return torch.sigmoid(o) * torch.tanh(cells), cells[:, :, -1]

    @classmethod
    def flops(cls, architecture: Architecture, length: int) -> int:
        """The projections; the scan has no matrix products."""
        return 2 * length * architecture.d_model * 5 * architecture.heads * architecture.d_head


class Lstm(_Gated):
    """The full LSTM: gates see the head's previous output through one more matrix. One step at a time."""

    states = 2

    def __init__(self, architecture: Architecture, config: Any = None) -> None:
        super().__init__(architecture, config)
        a = architecture
        self.recurrence = nn.Parameter(torch.randn(a.heads, a.d_head, 4 * a.d_head) * a.d_head**-0.5)

    def run(self, gates: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        forget = gates[..., : gates.shape[-1] // 4]
        c, h = (torch.zeros_like(forget[:, :, 0]),) * 2 if before is None else before.chunk(2, dim=-1)
        starts, absents = forget <= -CLOSED, forget >= CLOSED
        some = [bool(x) for x in starts.any(-1).any(0).any(0)]  # positions at which some row begins anew
        outputs = []
        steps = zip(gates.unbind(2), starts.unbind(2), absents.unbind(2), some, strict=True)
        for gate, start, absent, fresh in steps:
            seen = gate + torch.einsum("bhd,hde->bhe", h, self.recurrence)
            if fresh:  # a new sequence sees no output of the old one
                seen = torch.where(start.repeat(1, 1, 4), gate, seen)
            f, i, z, o = seen.chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
            h = torch.where(absent, h, torch.sigmoid(o) * torch.tanh(c))
            outputs.append(h)
        return torch.stack(outputs, dim=2), torch.cat([c, h], dim=-1)

    @classmethod
    def parameters_of(cls, architecture: Architecture) -> int:
        return super().parameters_of(architecture) + 4 * architecture.heads * architecture.d_head**2

    @classmethod
    def flops(cls, architecture: Architecture, length: int) -> int:
        a = architecture
        return 2 * length * a.heads * a.d_head * (5 * a.d_model + 4 * a.d_head)


def in_blocks(forget: Tensor, write: Tensor, before: Tensor | None, block: int) -> Tensor:
    """All states of c_t = forget_t c_{t-1} + write_t, by blocks.

    Args:
        forget, write: (batch, head, pos, d). before: the state before the first position, (batch, head, d), or None.
        block: positions computed at once.

    Returns:
        c, (batch, head, pos, d).
    """
    length = write.shape[2]
    block = min(block, length)
    spare = -length % block  # filled up with steps that change nothing
    kept = F.pad(forget, (0, 0, 0, spare), value=1.0).unflatten(2, (-1, block))  # (batch, head, block, pos, d)
    local = F.pad(write, (0, 0, 0, spare)).unflatten(2, (-1, block))
    apart = 1
    while apart < block:
        # what position t has of the last `apart` positions, and what is left at t of the `apart` before those
        local = local + kept * F.pad(local, (0, 0, apart, 0))[..., :block, :]
        kept = kept * F.pad(kept, (0, 0, apart, 0), value=1.0)[..., :block, :]
        apart *= 2
    state = torch.zeros_like(local[:, :, 0, 0]) if before is None else before
    cells = []
    for mine, share in zip(local.unbind(2), kept.unbind(2), strict=True):
        cells.append(mine + share * state.unsqueeze(2))
        state = cells[-1][:, :, -1]
    return torch.cat(cells, dim=2)[:, :, :length]


def _home(context: Context) -> Any:
    """Where a state of constant size can be kept, if the cache has such a place."""
    if isinstance(context.past, Store):
        return context.past
    layers = getattr(context.past, "layers", ())
    if context.layer < len(layers) and hasattr(layers[context.layer], "update_recurrent_state"):
        return layers[context.layer]
    return None


def _read(home: Any) -> Tensor | None:
    if isinstance(home, Store):
        return home.state
    state: Tensor | None = home.recurrent_states[0]
    return None if state is None else state.clone()  # transformers writes the next one into the same memory


def _write(home: Any, state: Tensor, new: int) -> None:
    if isinstance(home, Store):
        home.state = state
        return
    home.update_recurrent_state(state)
    home.has_previous_state[0] = True
    # transformers asks a cache how long it is: one byte a position counts them
    count = state.new_zeros(state.shape[0], 1, new, 1, dtype=torch.uint8)
    home.update(count, count)
