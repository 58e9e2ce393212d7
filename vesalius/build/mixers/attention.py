"""Softmax attention, multi-head, grouped-query or multi-query (Vaswani et al. 2017; Shazeer 2019; Ainslie et al. 2023).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(d_head) + bias_ts) v_s

Key and value heads are shared by groups of heads / kv_heads query heads. Rotary positions turn q and k; ALiBi's and
T5's biases and all masks arrive as one additive mask. In cross-attention k and v are read from an encoder's states; T5
does not divide by sqrt(d_head).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vesalius.build.architecture import Section
from vesalius.build.mixers.base import Context, Mixer

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture

BUILT_IN = ("sdpa", "eager", None)  # names under which `torch` itself attends; any other goes to transformers' table


class AttentionOptions(Section):
    """Settings of attention: whether scores are divided by sqrt(d_head). None: all but T5's are."""

    scaled: bool | None = None


class Attention(Mixer):
    """Attention by `F.scaled_dot_product_attention`, or by whatever function transformers has been told to use."""

    Options = AttentionOptions
    bidirectional = True
    needs_positions = True

    def __init__(self, architecture: Architecture, config: Any = None, cross: bool = False) -> None:
        super().__init__(architecture, config)
        a = architecture
        self.q = nn.Linear(a.d_model, a.heads * a.d_head, bias=a.bias)
        self.k = nn.Linear(a.d_model, a.kv_heads * a.d_head, bias=a.bias)
        self.v = nn.Linear(a.d_model, a.kv_heads * a.d_head, bias=a.bias)
        self.o = nn.Linear(a.heads * a.d_head, a.d_model, bias=a.bias)
        # under the names that transformers' attention functions ask for
        self.is_causal = a.kind != "masked" and not cross
        self.num_key_value_groups = a.heads // a.kv_heads
        self.scaled = a.scaled_scores

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        if context.source is not None:
            q, (k, v) = self._heads(self.q(x)), self._read(context.source, context)
        else:
            q, k, v = (self._heads(p(x)) for p in (self.q, self.k, self.v))
            if context.position_embeddings is not None:
                q, k = (rotate(side, *context.position_embeddings) for side in (q, k))
            if context.past is not None:
                k, v = context.past.update(k, v, context.layer)
        z = self._attend(q, k, v, context)  # (batch, pos, head, d_head)
        return self.o(z.flatten(-2)), {}

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, pos, head * d_head) as (batch, head, pos, d_head)."""
        return x.unflatten(-1, (-1, self.architecture.d_head)).transpose(1, 2)

    def _read(self, source: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values of an encoder's states; a cache keeps those of its first call."""
        past, layer = context.past, context.layer
        if past is not None and past.is_updated.get(layer):
            kept = past.cross_attention_cache.layers[layer]
            return kept.keys, kept.values
        k, v = self._heads(self.k(source)), self._heads(self.v(source))
        if past is not None:
            k, v = past.cross_attention_cache.update(k, v, layer)
            past.is_updated[layer] = True
        return k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        mask, dropout = context.attention_mask, self.architecture.dropout if self.training else 0.0
        implementation = getattr(self.config, "_attn_implementation", None)
        if implementation not in BUILT_IN:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            attend = ALL_ATTENTION_FUNCTIONS[implementation]
            scaling = self.architecture.d_head**-0.5 if self.scaled else 1.0
            return attend(self, q, k, v, mask, scaling=scaling, dropout=dropout)[0]
        # "is_causal" compares positions counted from the start of both, so it fits only where all keys are new
        causal = mask is None and context.causal and q.shape[2] > 1
        scale, grouped = None if self.scaled else 1.0, q.shape[1] != k.shape[1]
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        return z.transpose(1, 2)

    @classmethod
    def parameters_of(cls, architecture: Architecture) -> int:
        a = architecture
        inner, shared = a.heads * a.d_head, 2 * a.kv_heads * a.d_head
        weights = a.d_model * (2 * inner + shared)
        return weights + (inner + shared + a.d_model if a.bias else 0)

    @classmethod
    def flops(cls, architecture: Architecture, length: int) -> int:
        """Projections, and scores and sums over all pairs of positions (masked ones are computed too)."""
        a = architecture
        projections = 2 * length * a.d_model * a.d_head * (2 * a.heads + 2 * a.kv_heads)
        return projections + 4 * length * length * a.heads * a.d_head

    @classmethod
    def state_bytes(cls, architecture: Architecture, length: int, itemsize: int = 4) -> int:
        return 2 * architecture.kv_heads * architecture.d_head * length * itemsize


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first dimensions of every head by its position's angles (Su et al. 2021, arXiv 2104.09864).

    Args:
        x: (batch, head, pos, d_head). cos, sin: (batch or 1, pos, dims); dimension i turns with i + dims / 2.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, still], dim=-1)
