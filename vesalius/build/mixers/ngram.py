"""Hard-wired n-gram heads: a token reads what stood after the last n tokens before (Akyürek et al. 2024).

    z_t = mean over { j <= t : x[j-n .. j-1] = x[t-n+1 .. t] } of V h_j  +  Q h_t        (0 for the mean of nothing)
    y   = O [z of all heads]

The paper's layer, y = T0 mean_j h_j + T1 h_t, with T0 = O V and T1 = O Q. Heads take the orders in turn. Whom a head
reads is decided by the token ids alone, so that nothing has to be learnt to find it; on the bench its pattern can be
read and changed as attention's can, `q` is what a head has of its own token, and `k`, which it has none of, is `v`.

A cache keeps token ids where attention keeps keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vesalius.build.architecture import Section
from vesalius.build.mixers.base import Context, Mixer
from vesalius.errors import VesaliusError

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture


ORDERS = (1, 2, 3)


class NgramOptions(Section):
    """Settings of n-gram heads: how many last tokens have to match; head h takes orders[h % len(orders)].

    None: 1, 2 and 3, as far as there are heads.
    """

    orders: tuple[int, ...] | None = Field(None, min_length=1)


class Ngram(Mixer):
    """n-gram heads of several orders, averaged values, one output projection."""

    Options = NgramOptions
    hard_wired: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("input_ids",)

    def __init__(self, architecture: Architecture, config: Any = None) -> None:
        super().__init__(architecture, config)
        a = architecture
        orders = NgramOptions(**a.mixer_options.get("ngram", {})).orders or ORDERS[: a.heads]
        if min(orders) < 1 or len(orders) > a.heads:
            raise VesaliusError(
                f"mixer_options.ngram.orders={list(orders)} with heads={a.heads}; give orders of 1 or more, and a head "
                "at least for each"
            )
        self.orders = tuple(orders[h % len(orders)] for h in range(a.heads))
        self.q = nn.Linear(a.d_model, a.heads * a.d_head, bias=a.bias)
        self.v = nn.Linear(a.d_model, a.kv_heads * a.d_head, bias=a.bias)
        self.o = nn.Linear(a.heads * a.d_head, a.d_model, bias=a.bias)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        if context.input_ids is None:
            raise VesaliusError("n-gram heads match token ids; give input_ids, not inputs_embeds")
        d, new = self.architecture.d_head, x.shape[1]
        ids = context.input_ids.expand(x.shape[0], -1)
        own, v = (p(x).unflatten(-1, (-1, d)).transpose(1, 2) for p in (self.q, self.v))  # (batch, head, pos, d_head)
        if context.past is not None:
            keys, v = context.past.update(ids[:, None, :, None], v, context.layer)
            ids = keys[:, 0, :, 0]
        visible = _visible(context.attention_mask, new, ids.shape[1], x.device)
        by_order = {n: _mean_over(matches(ids, n, visible)).to(v.dtype) for n in set(self.orders)}
        pattern = torch.stack([by_order[n] for n in self.orders], dim=1)  # (batch, head, query, key)
        for tap in getattr(self, "_vesalius_pattern", ()):  # how the bench reads and changes patterns
            changed = tap(pattern)
            pattern = pattern if changed is None else changed
        if v.shape[1] != len(self.orders):
            v = v.repeat_interleave(len(self.orders) // v.shape[1], dim=1)
        z = pattern @ v + own
        return self.o(z.transpose(1, 2).flatten(-2)), {}

    @classmethod
    def parameters_of(cls, architecture: Architecture) -> int:
        a = architecture
        inner, shared = a.heads * a.d_head, a.kv_heads * a.d_head
        return a.d_model * (2 * inner + shared) + (inner + shared + a.d_model if a.bias else 0)

    @classmethod
    def flops(cls, architecture: Architecture, length: int) -> int:
        """Projections and means; comparing ids is no matrix product."""
        a = architecture
        projections = 2 * length * a.d_model * a.d_head * (2 * a.heads + a.kv_heads)
        return projections + 2 * length * length * a.heads * a.d_head

    @classmethod
    def state_bytes(cls, architecture: Architecture, length: int, itemsize: int = 4) -> int:
        return (architecture.kv_heads * architecture.d_head * itemsize + 8) * length


def matches(ids: Tensor, n: int, visible: Tensor) -> Tensor:
    """Which keys stand after an earlier occurrence of a query's last n tokens, (batch, query, key) bool.

    Args:
        ids: (batch, key), the last of which are the queries. n: tokens that have to match.
        visible: (batch or 1, query, key): what a query may see; tokens it may not see match nothing.

    Example:
        >>> two = matches(torch.tensor([[5, 6, 5, 6]]), 1, torch.ones(1, 4, 4).tril().bool())
        >>> two[0].nonzero().tolist()
        [[2, 1], [3, 2]]
    """
    rows, total = ids.shape
    visible = visible.expand(rows, -1, -1)
    queries = visible.shape[1]
    at = torch.arange(total - queries, total, device=ids.device)  # where the queries stand
    found = torch.ones_like(visible)  # by the place of a match's last token
    for back in range(n):
        mine = (at - back).clamp(min=0)
        there = torch.zeros_like(visible)
        there[..., back:] = visible[..., : total - back]
        theirs = torch.zeros_like(ids)
        theirs[:, back:] = ids[:, : total - back]
        seen = visible.gather(2, mine.expand(rows, -1)[..., None]) & (at >= back)[:, None]  # (batch, query, 1)
        found &= (ids[:, mine][:, :, None] == theirs[:, None, :]) & there & seen
    after = torch.zeros_like(found)
    after[..., 1:] = found[..., :-1]
    return after & visible


def _mean_over(found: Tensor) -> Tensor:
    """Weights of a mean over what was found, 0 everywhere where nothing was."""
    return found / found.sum(-1, keepdim=True).clamp(min=1)


def _visible(mask: Tensor | None, queries: int, total: int, device: torch.device) -> Tensor:
    """What queries may see, from an additive mask; all before them without one. (batch or 1, query, key)."""
    if mask is None:
        return torch.ones(1, queries, total, dtype=torch.bool, device=device).tril(total - queries)
    return mask[:, 0] > torch.finfo(mask.dtype).min / 2
