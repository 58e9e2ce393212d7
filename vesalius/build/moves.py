"""Where the weights of the parts model are in each stock class, and how they are laid out there.

Layouts: `same`; `turned` (GPT-2 keeps its matrices (in, out)); `joined` (q, k, v one after the other, turned);
`by head` (q, k, v of each head one after the other: GPT-NeoX and BLOOM).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vesalius.build.architecture import Architecture


class Move(NamedTuple):
    """One tensor of a stock class, and the parts that it is made of."""

    theirs: str
    ours: tuple[str, ...]
    layout: Literal["same", "turned", "joined", "by head"] = "same"


def pack(move: Move, parts: list[Tensor], architecture: Architecture) -> Tensor:
    """A stock tensor from its parts."""
    if move.layout == "same":
        return parts[0]
    if move.layout == "turned":
        return parts[0].T if parts[0].ndim == 2 else parts[0]
    if move.layout == "joined":
        joined = torch.cat(parts)
        return joined.T if joined.ndim == 2 else joined
    by_head = [p.unflatten(0, (architecture.heads, architecture.d_head)) for p in parts]
    return torch.stack(by_head, dim=1).flatten(0, 2)  # (head, 3, d_head, ...) to (3 * heads * d_head, ...)


def unpack(move: Move, tensor: Tensor, architecture: Architecture) -> list[Tensor]:
    """The parts of a stock tensor."""
    if move.layout == "same":
        return [tensor]
    if move.layout == "turned":
        return [tensor.T if tensor.ndim == 2 else tensor]
    if move.layout == "joined":
        return list((tensor.T if tensor.ndim == 2 else tensor).chunk(len(move.ours)))
    by_head = tensor.unflatten(0, (architecture.heads, len(move.ours), architecture.d_head))
    return [side.flatten(0, 1) for side in by_head.unbind(1)]


def _both(
    theirs: str, ours: str | tuple[str, ...], layout: Literal["same", "turned", "joined", "by head"]
) -> list[Move]:
    """Weight and bias of a linear map."""
    names = (ours,) if isinstance(ours, str) else ours
    return [Move(f"{theirs}.{w}", tuple(f"{n}.{w}" for n in names), layout) for w in ("weight", "bias")]


def _layers(architecture: Architecture, prefix: str, table: dict[str, tuple[str | tuple[str, ...], str]]) -> list[Move]:
    """Moves of every block: their name to ours and the layout."""
    found = []
    for i in range(architecture.layers):
        for theirs, (ours, layout) in table.items():
            names = (ours,) if isinstance(ours, str) else ours
            mine = tuple(f"model.layers.{i}.{n}" for n in names)
            found += _both(f"{prefix}.{i}.{theirs}", mine, layout)  # type: ignore[arg-type]
    return found


_QKV = ("mixer.q", "mixer.k", "mixer.v")


def _gpt2(a: Architecture) -> list[Move]:
    table: dict[str, tuple[str | tuple[str, ...], str]] = {
        "ln_1": ("norm_mixer", "same"),
        "attn.c_attn": (_QKV, "joined"),
        "attn.c_proj": ("mixer.o", "turned"),
        "ln_2": ("norm_ffn", "same"),
        "mlp.c_fc": ("ffn.up", "turned"),
        "mlp.c_proj": ("ffn.down", "turned"),
    }
    moves = [Move("transformer.wte.weight", ("model.embed.weight",))]
    moves += [Move("transformer.wpe.weight", ("model.positions.table.weight",))]
    moves += _layers(a, "transformer.h", table) + _both("transformer.ln_f", "model.norm", "same")
    return moves + _head(a, "lm_head")


def _neox(a: Architecture) -> list[Move]:
    table: dict[str, tuple[str | tuple[str, ...], str]] = {
        "input_layernorm": ("norm_mixer", "same"),
        "post_attention_layernorm": ("norm_ffn", "same"),
        "attention.query_key_value": (_QKV, "by head"),
        "attention.dense": ("mixer.o", "same"),
        "mlp.dense_h_to_4h": ("ffn.up", "same"),
        "mlp.dense_4h_to_h": ("ffn.down", "same"),
    }
    moves = [Move("gpt_neox.embed_in.weight", ("model.embed.weight",))]
    moves += _layers(a, "gpt_neox.layers", table) + _both("gpt_neox.final_layer_norm", "model.norm", "same")
    return moves + _head(a, "lm_head")


def _llama(a: Architecture) -> list[Move]:
    moves = [
        Move("model.embed_tokens.weight", ("model.embed.weight",)),
        Move("model.norm.weight", ("model.norm.weight",)),
    ]
    names = {
        "self_attn.q_proj": "mixer.q",
        "self_attn.k_proj": "mixer.k",
        "self_attn.v_proj": "mixer.v",
        "self_attn.o_proj": "mixer.o",
        "mlp.gate_proj": "ffn.gate",
        "mlp.up_proj": "ffn.up",
        "mlp.down_proj": "ffn.down",
    }
    for i in range(a.layers):
        theirs, ours = f"model.layers.{i}", f"model.layers.{i}"
        moves.append(Move(f"{theirs}.input_layernorm.weight", (f"{ours}.norm_mixer.weight",)))
        moves.append(Move(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.norm_ffn.weight",)))
        for t, o in names.items():
            both = _both(f"{theirs}.{t}", f"{ours}.{o}", "same")
            moves += both if a.bias else both[:1]
    return moves + _head(a, "lm_head")


def _bloom(a: Architecture) -> list[Move]:
    table: dict[str, tuple[str | tuple[str, ...], str]] = {
        "input_layernorm": ("norm_mixer", "same"),
        "self_attention.query_key_value": (_QKV, "by head"),
        "self_attention.dense": ("mixer.o", "same"),
        "post_attention_layernorm": ("norm_ffn", "same"),
        "mlp.dense_h_to_4h": ("ffn.up", "same"),
        "mlp.dense_4h_to_h": ("ffn.down", "same"),
    }
    moves = [Move("transformer.word_embeddings.weight", ("model.embed.weight",))]
    moves += _both("transformer.word_embeddings_layernorm", "model.norm_embed", "same")
    moves += _layers(a, "transformer.h", table) + _both("transformer.ln_f", "model.norm", "same")
    return moves + _head(a, "lm_head")


def _bert(a: Architecture) -> list[Move]:
    table: dict[str, tuple[str | tuple[str, ...], str]] = {
        "attention.self.query": ("mixer.q", "same"),
        "attention.self.key": ("mixer.k", "same"),
        "attention.self.value": ("mixer.v", "same"),
        "attention.output.dense": ("mixer.o", "same"),
        "attention.output.LayerNorm": ("norm_mixer", "same"),
        "intermediate.dense": ("ffn.up", "same"),
        "output.dense": ("ffn.down", "same"),
        "output.LayerNorm": ("norm_ffn", "same"),
    }
    moves = [
        Move("bert.embeddings.word_embeddings.weight", ("model.embed.weight",)),
        Move("bert.embeddings.position_embeddings.weight", ("model.positions.table.weight",)),
        Move("bert.embeddings.token_type_embeddings.weight", ("model.token_types.weight",)),
        Move("cls.predictions.bias", ("lm_head.bias",)),
    ]
    moves += _both("bert.embeddings.LayerNorm", "model.norm_embed", "same") + _layers(a, "bert.encoder.layer", table)
    moves += _both("cls.predictions.transform.dense", "lm_transform.dense", "same")
    return moves + _both("cls.predictions.transform.LayerNorm", "lm_transform.norm", "same")


def _t5(a: Architecture) -> list[Move]:
    side = {"q": "q", "k": "k", "v": "v", "o": "o"}
    fed = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if a.gated else {"wi": "up", "wo": "down"}
    moves = [Move("shared.weight", ("model.encoder.embed.weight",))]
    for stack, depth, ffn in (("encoder", a.encoder_depth, 1), ("decoder", a.layers, 2)):
        mine, bias = f"model.{stack}", "block.0.layer.0.SelfAttention.relative_attention_bias"
        moves.append(Move(f"{stack}.{bias}.weight", (f"{mine}.positions.biases.weight",)))
        moves.append(Move(f"{stack}.final_layer_norm.weight", (f"{mine}.norm.weight",)))
        parts = [(0, "SelfAttention", "mixer", side), (ffn, "DenseReluDense", "ffn", fed)]
        parts += [(1, "EncDecAttention", "cross", side)] if stack == "decoder" else []
        for i in range(depth):
            for at, theirs, ours, names in parts:
                there, here = f"{stack}.block.{i}.layer.{at}", f"{mine}.layers.{i}"
                moves.append(Move(f"{there}.layer_norm.weight", (f"{here}.norm_{ours}.weight",)))
                there, here = f"{there}.{theirs}", f"{here}.{ours}"
                moves += [Move(f"{there}.{t}.weight", (f"{here}.{o}.weight",)) for t, o in names.items()]
    return moves + _head(a, "lm_head")


def _head(a: Architecture, theirs: str) -> list[Move]:
    return [] if a.tied else [Move(f"{theirs}.weight", ("lm_head.weight",))]


MOVES: dict[str, Callable[[Architecture], list[Move]]] = {
    "GPT2": _gpt2,
    "GPTNeoX": _neox,
    "Llama": _llama,
    "Bloom": _bloom,
    "Bert": _bert,
    "T5": _t5,
}
