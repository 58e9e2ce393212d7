"""The block that all architectures share, and the one mask that tells attention what it may see.

sequential       x = x + mixer(norm(x));  x = x + ffn(norm(x))
post-norm        x = norm(x + mixer(x));  x = norm(x + ffn(x))
parallel         x = x + mixer(norm1(x)) + ffn(norm2(x))       parallel-shared: norm1 is norm2

A decoder that reads an encoder has cross-attention, with a norm and a sum of its own, between mixer and ffn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vesalius.build.feedforwards import FEEDFORWARDS
from vesalius.build.mixers import MIXERS, Context
from vesalius.build.mixers.attention import Attention
from vesalius.errors import VesaliusError

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture
    from vesalius.build.positions import PositionScheme


def norm_of(architecture: Architecture) -> nn.Module:
    """A new norm of the architecture's kind, over d_model."""
    n = architecture.norm
    if n.kind == "rms":
        return nn.RMSNorm(architecture.d_model, eps=n.eps)
    return nn.LayerNorm(architecture.d_model, eps=n.eps, bias=n.bias)


class Block(GradientCheckpointingLayer):
    """One layer: a mixer, cross-attention if `cross`, a feed-forward, their norms and residuals.

    Returns the residual stream and the named losses of its parts.
    """

    def __init__(self, architecture: Architecture, layer: int, config: Any = None, cross: bool = False) -> None:
        super().__init__()
        a = architecture
        self.shape, self.layer, self.post, self.causal = a.block, layer, a.norm.place == "post", a.kind != "masked"
        self.norm_mixer = norm_of(a)
        self.mixer = MIXERS.get(a.stack[layer])(a, config)
        if cross:
            self.norm_cross = norm_of(a)
            self.cross = Attention(a, config, cross=True)
        if a.block != "parallel-shared":
            self.norm_ffn = norm_of(a)
        self.ffn = FEEDFORWARDS.get(a.feed_forward)(a)
        self.drop = nn.Dropout(a.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        input_ids: Tensor | None = None,
        embedding: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        context = Context(
            causal=self.causal,
            attention_mask=None if self.mixer.recurrent else attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            past=getattr(past_key_values, "self_attention_cache", past_key_values),
            layer=self.layer,
            input_ids=input_ids,
            embedding=embedding,
        )
        x = hidden_states
        mixed, mixer_losses = self.mixer(x if self.post else self.norm_mixer(x), context)
        mixed = self.drop(mixed)
        if self.shape != "sequential":
            read = mixed_norm(self, x)
            fed, losses = self.ffn(read)
            return x + mixed + self.drop(fed), {**mixer_losses, **losses}
        x = x + mixed
        x = self.norm_mixer(x) if self.post else x
        if encoder_hidden_states is not None:
            context = Context(
                causal=False,
                attention_mask=encoder_attention_mask,
                past=past_key_values,
                layer=self.layer,
                source=encoder_hidden_states,
            )
            read, _ = self.cross(x if self.post else self.norm_cross(x), context)
            x = x + self.drop(read)
            x = self.norm_cross(x) if self.post else x
        fed, losses = self.ffn(x if self.post else self.norm_ffn(x))
        x = x + self.drop(fed)
        return self.norm_ffn(x) if self.post else x, {**mixer_losses, **losses}


def mixed_norm(block: Block, x: Tensor) -> Tensor:
    """What the feed-forward of a parallel block reads."""
    norm = block.norm_mixer if block.shape == "parallel-shared" else block.norm_ffn
    read: Tensor = norm(x)
    return read


class Placed(NamedTuple):
    """Where the tokens of a batch are, and what each may see: the tensors that blocks take."""

    positions: Tensor  # (batch or 1, pos), 0 at padding
    recurrent: Tensor | None  # the same for recurrent mixers: -1 at padding; None where nothing is special
    mask: Tensor | None  # (batch or 1, head or 1, query, key), additive


def place(
    architecture: Architecture,
    scheme: PositionScheme,
    batch: int,
    length: int,
    *,
    past: int = 0,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    explicit: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Placed:
    """Positions and the attention mask of a batch.

    Args:
        past: positions in the cache, before these.
        attention_mask: (batch, past + pos), 1 for real tokens; or four axes, (batch, 1 or head, query, key), true
            where a query may look or added to scores: then it stands for everything, the future included.
        position_ids: (batch or 1, pos); counted from the real tokens of the mask or segment if None.
        segment_ids: (batch, pos): tokens see their own segment only, and its positions start at 0.
        explicit: always give a mask, for attention functions that do not know of the future by themselves.

    Raises:
        VesaliusError: for masks of another shape, and for those a recurrent mixer cannot follow.
    """
    total, causal = past + length, architecture.kind != "masked"
    recurrent = any(MIXERS.get(name).recurrent for name in set(architecture.stack))
    keep: Tensor | None = None  # (batch or 1, 1, query, key)
    real: Tensor | None = None  # (batch, key)
    given: Tensor | None = None
    if attention_mask is not None and attention_mask.dim() == 4:
        if recurrent:
            raise VesaliusError(
                "a mask of pairs of positions cannot be followed by a recurrent mixer; give segment_ids, or a mask of "
                "two axes"
            )
        given = attention_mask
    elif attention_mask is not None:
        if attention_mask.shape != (batch, total):
            raise VesaliusError(
                f"attention_mask of shape {tuple(attention_mask.shape)} where {(batch, total)} is right (the cache's "
                "positions included); give 1 for every real token"
            )
        real = None if bool(attention_mask.all()) else attention_mask.bool()
    keys = measured = torch.arange(total, device=device).unsqueeze(0)
    if real is not None:
        keys = (real.long().cumsum(-1) - 1).clamp(min=0)
        keep = real[:, None, None, :]
    if segment_ids is not None:
        if past:
            raise VesaliusError("segment_ids cannot follow a cache; give whole sequences, or no past_key_values")
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        keep = same.unsqueeze(1) if keep is None else keep & same.unsqueeze(1)
        starts = torch.ones_like(segment_ids, dtype=torch.bool)
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        index = torch.arange(length, device=device).expand_as(segment_ids)
        keys = index - torch.where(starts, index, 0).cummax(-1).values
    special = real is not None or segment_ids is not None or position_ids is not None
    if position_ids is None:
        position_ids = keys[:, -length:]
    elif not past:
        keys = measured = position_ids
    measured = measured if scheme.kind == "t5" else keys  # T5's distances count hidden tokens
    if causal and given is None and (explicit or keep is not None or (past and length > 1)):
        ones = torch.ones(length, total, dtype=torch.bool, device=device).tril(past)
        keep = ones if keep is None else keep & ones
    mask = _additive(keep, dtype) if given is None else _additive(given, dtype)
    bias = scheme.bias(measured[:, -length:], measured, dtype)
    if bias is not None:
        if mask is None and causal and length > 1:
            mask = _additive(torch.ones(length, total, dtype=torch.bool, device=device).tril(past), dtype)
        mask = bias if mask is None else bias + mask
    if mask is not None and mask.dim() == 2:
        mask = mask[None, None]
    steps = None
    if recurrent and special:
        steps = position_ids if real is None else position_ids.masked_fill(~real[:, -length:], -1)
    return Placed(position_ids, steps, mask)


def reach(mask: Tensor | None, batch: int, source: int, dtype: torch.dtype) -> Tensor | None:
    """What a cross-attention may read of an encoder's states, as an additive mask; None for all of them.

    Args:
        mask: the encoder's, (batch, source), 1 for real tokens; or four axes, (batch, 1 or head, query, source).

    Raises:
        VesaliusError: for a mask of another shape.
    """
    if mask is None or mask.dim() == 4:
        return _additive(mask, dtype)
    if mask.shape != (batch, source):
        raise VesaliusError(
            f"attention_mask of shape {tuple(mask.shape)} where the encoder's states are {(batch, source)}; give 1 for "
            "every real token of the encoder"
        )
    return None if bool(mask.all()) else _additive(mask.bool()[:, None, None, :], dtype)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where a query may look, the lowest number where not: a row without keys then has no NaN."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
