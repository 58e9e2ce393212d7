"""What every part adds to the final residual stream: the terms whose sum it is.

For models that norm the stream itself (BERT), a part's contribution is carried through the later norms at their actual
scales. Biases and norm offsets belong to no part and are returned as one term.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vesalius.model.anatomy import Block
from vesalius.model.edges import head_writes
from vesalius.model.hooks import Site
from vesalius.model.model import Model
from vesalius.model.norms import NormView
from vesalius.model.replay import _gather
from vesalius.model.weights import bias_of, matrix
from vesalius.parts import Part


@dataclass(frozen=True)
class Contributions:
    """Direct contributions at chosen positions.

    Attributes:
        parts: embedding, heads (and cross-attention heads), MLPs or their neurons, in forward order.
        values: (row, part, read, d_model). bias: (row, read, d_model).
        final: the recorded residual stream after the last block; values.sum(1) + bias equals it.
    """

    parts: list[Part]
    values: Tensor
    bias: Tensor
    final: Tensor


def contributions(
    model: Model,
    ids: Tensor,
    mask: Tensor,
    reads: Tensor,
    decoder: Tensor | None = None,
    neurons: Collection[int] = (),
) -> Contributions:
    """Every part's direct contribution to the residual stream after the last block.

    Args:
        ids, mask: (row, pos). reads: positions (row, read); decoder positions for encoder-decoder models.
        neurons: layers whose MLP is given neuron by neuron; its bias is then part of `bias`.
    """
    a, stack = model.anatomy, model.anatomy.main
    p = stack.prefix
    names = ["z", "mlp_out", "resid_pre", "resid_post"]
    sites = [Site(n, layer, p) for layer in range(len(stack.blocks)) for n in names]
    if not a.parallel:
        sites += [Site("resid_mid", layer, p) for layer in range(len(stack.blocks))]
    if stack.blocks[0].cross is not None:
        sites += [Site("cross_z", layer, p) for layer in range(len(stack.blocks))]
    sites += [Site("neurons", layer, p) for layer in neurons]
    run = model.run(ids, mask, capture=sites, decoder=decoder)

    def at(name: str, layer: int) -> Tensor:
        x = run[name, layer, p]
        return _gather(x.flatten(2), reads).unflatten(-1, x.shape[2:])

    parts = [Part("embed", stack=p)]
    values = at("resid_pre", 0).unsqueeze(1)  # (row, part, read, d)
    bias = torch.zeros_like(values[:, 0])

    def through(norm: NormView, total: Tensor) -> None:
        """Carries everything so far through a norm of the stream itself."""
        nonlocal values, bias
        scale = norm.scale(total)
        values = norm.linear(values, scale.unsqueeze(1))
        bias = norm.linear(bias, scale) + (0 if norm.bias is None else norm.bias)

    def add_attention(block: Block, z: Tensor, kind: str) -> None:
        nonlocal values, bias
        heads = head_writes(model, block, z)
        parts.extend(Part(kind, block.layer, h, stack=p) for h in range(a.n_heads))  # type: ignore[arg-type]
        values = torch.cat([values, heads], dim=1)
        offset = bias_of(block.o)
        if offset is not None:
            if block.norm_attn_out is not None:
                x = torch.einsum("bshe,hed->bsd", z, a.head_out(block)) + offset
                offset = block.norm_attn_out.linear(offset.expand_as(x), block.norm_attn_out.scale(x))
            bias = bias + offset
        if block.norm_attn_out is not None and block.norm_attn_out.bias is not None:
            bias = bias + block.norm_attn_out.bias

    for block in stack.blocks:
        add_attention(block, at("z", block.layer), "head")
        if block.cross is not None:
            add_attention(block.cross, at("cross_z", block.layer), "xhead")
        if a.post_norm:
            through(block.norm_in, values.sum(1) + bias)
        if block.layer in neurons:
            written = neuron_writes(block, at("neurons", block.layer))
            values, bias = torch.cat([values, written.values], dim=1), bias + written.bias
            parts.extend(Part("neuron", block.layer, i, stack=p) for i in range(written.values.shape[1]))
        else:
            values = torch.cat([values, at("mlp_out", block.layer).unsqueeze(1)], dim=1)
            parts.append(Part("mlp", block.layer, stack=p))
        if a.post_norm:
            through(block.norm_mid, values.sum(1) + bias)
    return Contributions(parts, values, bias, at("resid_post", len(stack.blocks) - 1))


class NeuronWrites(NamedTuple):
    """What an MLP adds to the stream, neuron by neuron.

    Attributes:
        values: (row, neuron, read, d_model). bias: (row, read, d_model).
    """

    values: Tensor
    bias: Tensor


def neuron_writes(block: Block, acts: Tensor) -> NeuronWrites:
    """Each neuron's write, from activations (row, read, d_mlp); through the sandwich norm that may follow."""
    values = acts.transpose(1, 2).unsqueeze(-1) * matrix(block.down).unsqueeze(1)  # (row, neuron, read, d)
    offset = bias_of(block.down)
    bias = torch.zeros_like(values[:, 0]) if offset is None else offset.expand_as(values[:, 0])
    norm = block.norm_mlp_out
    if norm is None:
        return NeuronWrites(values, bias)
    scale = norm.scale(values.sum(1) + bias)
    return NeuronWrites(
        norm.linear(values, scale.unsqueeze(1)), norm.linear(bias, scale) + (0 if norm.bias is None else norm.bias)
    )


def normed(model: Model, found: Contributions) -> Contributions:
    """Contributions as the unembedding sees them: through the final norm at its actual scale, its bias among `bias`."""
    norm = model.anatomy.main.final_norm
    if norm is None:
        return found
    scale = norm.scale(found.final)
    bias = norm.linear(found.bias, scale) + (0 if norm.bias is None else norm.bias)
    return Contributions(found.parts, norm.linear(found.values, scale.unsqueeze(1)), bias, norm.module(found.final))
