"""What a head does, read off its weights: W_OV, what it writes for what it reads, and W_QK, whom it attends to.

    write of head h   pattern . x W_OV,          W_OV = W_V W_O          (d_model, d_model), rank d_head
    its scores        x_query W_QK x_key^T,      W_QK = W_Q R W_K^T      before the division by sqrt(d_head)

Both are kept as factors (`LowRank`). Elhage et al. 2021 (transformer-circuits.pub/2021/framework).

Folding. Heads read the normed stream. With `fold`, the gains of the norms (and LayerNorm's centring) are part of the
matrices, on the reading sides, after the output where a sandwich norm follows, and on queries and keys where they are
normed: what remains of a norm is one positive number a token. Norm and projection offsets become biases.

Rotary positions turn queries against keys, so W_QK depends on the distance. R is the identity at offset 0; with
`offsets` n it is the mean turn over a key 0 to n positions back. Additive position biases (ALiBi, T5) are no part of
W_QK. Key and value weights of shared heads are indexed, never untied.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.errors import ModelError, PartError
from vesalius.model.anatomy import Block, Side
from vesalius.model.low_rank import LowRank
from vesalius.model.model import Model
from vesalius.model.norms import NormView
from vesalius.parts import Kind, Part


@dataclass(frozen=True)
class HeadWeights:
    """The weights of all heads of one attention (self- or cross-attention) of one block.

    Attributes:
        parts: its heads. ov, qk: (head, d_model, d_model), factored.
        value_bias, query_bias, key_bias: (head, d_head), zero where there is none; norm offsets included if folded.
        out_bias: what the output projection adds for all heads together, (d_model,).
        folded: whether norm gains are part of the matrices. offsets: distances over which the rotary turn is averaged.
        rotary: whether the turn is other than the identity for some distance.
    """

    parts: list[Part]
    ov: LowRank
    qk: LowRank
    query_bias: Tensor
    key_bias: Tensor
    value_bias: Tensor
    out_bias: Tensor
    folded: bool
    offsets: int
    rotary: bool


def head_weights(
    model: Model,
    layer: int,
    stack: str | None = None,
    *,
    cross: bool = False,
    fold: bool = True,
    offsets: int = 0,
    turns: Sequence[Tensor | None] | None = None,
) -> HeadWeights:
    """The heads of one block as low-rank matrices, float32.

    Args:
        model: the model. layer: its block. stack: `enc` or `dec`; by default the one that ends in the logits.
        cross: the cross-attention of that block. fold: put norm gains in (see the module).
        offsets: average W_QK over keys 0 to so many positions back, where positions are rotary.
        turns: of every block, from `rotary_turns`, if many blocks are read.

    Raises:
        PartError: if there is no such block, or its mixer is no attention. ModelError: for query or key norms that mix
            heads.

    Example:
        >>> ov = head_weights(model, 9).ov[6]                       # doctest: +SKIP
        >>> ov.svd().s[:3], ov.eigenvalues().real.mean()            # doctest: +SKIP
    """
    a = model.anatomy
    prefix = a.main.prefix if stack is None else stack
    kind: Kind = "xhead" if cross else "head"
    block = a.attention_of(Part(kind, layer, 0, stack=prefix))
    if getattr(block.attn, "recurrent", False) or getattr(block.attn, "hard_wired", False):
        raise PartError(
            f"L{layer} of {model.name} mixes positions with {type(block.attn).__name__}, not with attention: its heads "
            "have no W_OV and no W_QK"
        )
    every: dict[Side, tuple[Tensor, Tensor]] = {}
    for side in ("q", "k", "v"):
        weight, bias = a.head_in(block, side)
        weight = weight.float()
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.float()
        norm = reading_norm(model, block, side) if fold else None
        if norm is not None:
            if norm.bias is not None:
                bias = bias + norm.bias.to(weight.device) @ weight
            weight = norm.transpose(weight.mT).mT
        if fold and side != "v" and block.head_norms:
            weight, bias = _head_norm(model, block, side, weight, bias)
        every[side] = (weight, bias)
    out = a.head_out(block).float()
    out_bias = getattr(block.o, "bias", None)
    out_bias = torch.zeros_like(out[0, 0]) if not isinstance(out_bias, Tensor) else out_bias.float()
    if fold and block.norm_attn_out is not None:
        out, out_bias = (block.norm_attn_out.linear(x, torch.ones(())) for x in (out, out_bias))
    query, key = every["q"][0], every["k"][0]
    if turns is None and offsets:
        turns = rotary_turns(model, offsets, prefix)
    turn = turns[layer] if turns is not None and not cross else None
    if turn is not None:
        query = query @ turn.to(query)
    parts = [Part(kind, layer, h, stack=prefix) for h in range(a.n_heads)]
    return HeadWeights(
        parts,
        LowRank(every["v"][0], out),
        LowRank(query, key.mT),
        every["q"][1],
        every["k"][1],
        every["v"][1],
        out_bias,
        fold,
        offsets if turn is not None else 0,
        turn is not None,
    )


def reading_norm(model: Model, block: Block, side: Side) -> NormView | None:
    """The norm whose output a side of a block's heads reads; None where it reads the stream itself."""
    a = model.anatomy
    if a.post_norm:
        return None
    of_cross = "enc" in a.stacks and block.attn is not a.block(block.layer, block.stack).attn
    return a.stack("enc").final_norm if of_cross and side != "q" else block.norm_in


def _head_norm(model: Model, block: Block, side: Side, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gain of a query or key norm put into (head, d_model, d_head) and (head, d_head)."""
    if len(block.head_norms) != 2:
        raise ModelError(f"{model.name} norms only one of queries and keys; its W_QK cannot be folded (fold=False)")
    norm = block.head_norms["qk".index(side)]
    if norm.gain.numel() not in (1, model.d_head):
        raise ModelError(
            f"{model.name} norms queries over all heads together ({type(norm.module).__name__} of "
            f"{norm.gain.numel()}), so no head has a W_QK of its own with the gains folded (fold=False)"
        )
    one = torch.ones((), device=weight.device)
    weight, bias = norm.linear(weight, one), norm.linear(bias, one)
    return weight, bias if norm.bias is None else bias + norm.bias.to(bias)


@torch.no_grad()
def rotary_turns(model: Model, offsets: int, stack: str | None = None) -> list[Tensor | None]:
    """The mean turn between a query and keys 0 to `offsets` positions before it, (d_head, d_head), for each block.

    None for a block without rotary positions. Read from what the blocks themselves are given in a forward pass.
    """
    if offsets < 0:
        raise ModelError(f"rotary positions over {offsets} offsets; give 0 or more")
    prefix = model.anatomy.main.prefix if stack is None else stack
    blocks = model.anatomy.stack(prefix).blocks
    given: dict[int, Any] = {}

    def note(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given[layer] = {**bound, **bound.get("kwargs", {})}.get("position_embeddings")

    longest = model.n_positions or offsets + 1
    ids = torch.zeros(1, min(offsets, longest - 1) + 1, dtype=torch.long)
    handles = [
        block.module.register_forward_pre_hook(partial(note, layer), with_kwargs=True)
        for layer, block in enumerate(blocks)
    ]
    try:
        model.run(ids, decoder=ids if model.kind == "encoder-decoder" else None)
    finally:
        for handle in handles:
            handle.remove()
    return [_turn(model, block, given.get(layer), ids.shape[1]) for layer, block in enumerate(blocks)]


def _turn(model: Model, block: Block, given: Any, length: int) -> Tensor | None:
    d = model.d_head
    identity = torch.eye(d)
    if getattr(block.attn, "use_rope", True) in (False, 0):
        return None
    table = getattr(block.attn, "embed_positions", None)
    if isinstance(table, Tensor):  # GPT-J: sine and cosine of pairs of neighbours
        sin, cos = (x.repeat_interleave(2, -1) for x in table[:length].float().cpu().chunk(2, -1))  # (offset, turning)
    elif isinstance(given, tuple) and len(given) == 2:
        cos, sin = (x[0].float().cpu() for x in given)  # (offset, turning)
    else:
        return None
    n = cos.shape[-1]
    turning = identity[:n, :n]
    if isinstance(table, Tensor):
        swapped = torch.stack([-turning[:, 1::2], turning[:, ::2]], dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
    at = [turning * c + swapped * s for c, s in zip(cos, sin, strict=True)]  # q turned at each position is q @ at
    mean = torch.eye(d)
    mean[:n, :n] = torch.stack(at).mean(0) @ at[0].T
    return mean
