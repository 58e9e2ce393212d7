"""A BERT or RoBERTa becomes a Longformer: sliding-window attention, more positions, the same weights.

    W_q, W_k, W_v     copied as they are, and once more as the projections of global attention
    position i        row i mod n of the n positions learnt
    attention         to the `window` / 2 positions on each side, and from and to the first position ([CLS])

The recipe is Longformer's own (Beltagy et al. 2020, arXiv 2004.05150, section 5): with the window as wide as the text
on each side and no global position, hidden states are those of the source. The class is transformers', so what is saved
opens without Vesalius; transformers asks for the global positions with every input (`global_attention_mask`).

RoBERTa counts positions from pad_token_id + 1, BERT from 0, Longformer like RoBERTa: rows move accordingly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LongformerConfig, LongformerForMaskedLM, LongformerModel, PreTrainedModel

from vesalius.errors import ModelError, VesaliusError
from vesalius.model import Model
from vesalius.model.saving import refuse_scattered
from vesalius.model.sources.quiet import quiet_transformers
from vesalius.train.masks import OFFSET

EMBEDDING = "embeddings.position_embeddings.weight"
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "initializer_range", "layer_norm_eps",
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id",
)  # fmt: skip


def to_longformer(model: Model, window: int, length: int, global_tokens: int = 1, name: str = "") -> Model:
    """The same weights with sliding-window attention; the model given is left as it is.

    Args:
        model: BERT or RoBERTa, with or without its head for masked words.
        window: positions that each position reads, both sides together; an even number. As all do in transformers'
            class, rows are padded to a multiple of it inside the model.
        length: most tokens of a text, [CLS] and [SEP] included.
        global_tokens: how many first positions read all and are read by all; 1 is [CLS] alone, 0 none.
        name: of the new model.

    Raises:
        ModelError: for a model of another kind. VesaliusError: for a window or a length that cannot be.

    Example:
        >>> long = to_longformer(bert, window=128, length=1024)                      # doctest: +SKIP
        >>> long.hf.config.max_position_embeddings
        1025
    """
    hf = _source(model)
    if window < 2 or window % 2:
        raise VesaliusError(f"window {window} is no even number of positions; give 2 or more")
    if length < 1 or not 0 <= global_tokens <= length:
        raise VesaliusError(
            f"length {length} with {global_tokens} global positions cannot be; give 1 or more, and less"
        )
    config = _config(hf, window, length, global_tokens)
    body = hf.base_model.state_dict()
    pooled = any(key.startswith("pooler.") for key in body)
    head = model.anatomy.main.head
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        # `_from_config` is what transformers' Auto classes build with: it takes the dtype
        made: PreTrainedModel = (
            LongformerForMaskedLM._from_config(config, dtype=hf.dtype)
            if head
            else LongformerModel._from_config(config, dtype=hf.dtype, add_pooling_layer=pooled)
        )
    state = {key: tensor for key, tensor in body.items() if key in made.base_model.state_dict()}
    for key in list(state):
        if ".attention.self." in key:
            state[_global(key)] = state[key]
    state[EMBEDDING] = tiled(body[EMBEDDING], _first(hf.config), int(config.pad_token_id) + 1, length)
    missing, _ = made.base_model.load_state_dict(state, strict=False)
    if missing:
        raise ModelError(f"{model.name} has no {missing[0]}, which a Longformer needs; give a BERT or RoBERTa")
    if head:
        _copy_head(model, made)
    made.to(next(hf.parameters()).device)
    tokenizer = copy.deepcopy(model.tokenizer)
    if tokenizer is not None:
        tokenizer.model_max_length = length
    return Model.wrap(made, tokenizer, name or f"{model.name}-longformer", model.spec)


def tiled(table: Tensor, first: int, new_first: int, length: int) -> Tensor:
    """A table of learnt positions for longer texts: its rows again and again.

    Args:
        table: (row, d), positions from row `first` on. new_first: row of the new table's position 0; the rows before
            it stand for no position and are those of the old table, or 0. length: positions of the new table.

    Returns:
        (new_first + length, d).

    Example:
        >>> tiled(torch.tensor([[9.0], [1.0], [2.0]]), first=1, new_first=1, length=5)[:, 0].tolist()
        [9.0, 1.0, 2.0, 1.0, 2.0, 1.0]
    """
    old = table[first:]
    made = table.new_zeros(new_first + length, table.shape[1])
    shared = min(first, new_first)
    made[:shared] = table[:shared]
    made[new_first:] = old[torch.arange(length, device=table.device) % len(old)]
    return made


def _source(model: Model) -> PreTrainedModel:
    """The transformers model, if it can be converted."""
    hf, family = model.hf, model.anatomy.family
    if family not in ("bert", "roberta", "xlm-roberta"):
        raise ModelError(f"{model.name} is {family}; a Longformer is made of BERT or RoBERTa")
    if getattr(hf.config, "is_decoder", False):
        raise ModelError(f"{model.name} reads from the left (is_decoder); a Longformer reads both ways")
    if getattr(hf.config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise ModelError(f"{model.name} has relative positions, which a Longformer cannot hold; give one with a table")
    if hf.config.pad_token_id is None:
        raise ModelError(f"{model.name} has no padding token, and a Longformer counts positions from it; set it")
    if model.anatomy.main.head and hf.config.hidden_act != "gelu":
        raise ModelError(f"{model.name} has {hf.config.hidden_act} in its head, and a Longformer gelu; give another")
    refuse_scattered(hf, model.name)
    return hf


def _first(config: Any) -> int:
    """The row of position 0."""
    return int(config.pad_token_id) + 1 if config.model_type in OFFSET else 0


def _config(hf: PreTrainedModel, window: int, length: int, global_tokens: int) -> LongformerConfig:
    old = hf.config
    told = {key: getattr(old, key) for key in SIZES if hasattr(old, key)}
    positions = int(old.pad_token_id) + 1 + length
    return LongformerConfig(
        **told, attention_window=[window] * int(old.num_hidden_layers), max_position_embeddings=positions,
        global_tokens=global_tokens,
    )  # fmt: skip


def _global(key: str) -> str:
    """`query.weight` -> `query_global.weight`."""
    stem, _, kind = key.rpartition(".")
    return f"{stem}_global.{kind}"


@torch.no_grad()
def _copy_head(model: Model, made: PreTrainedModel) -> None:
    """A d x d matrix with a norm, then one row a token: found by what they are, since names differ."""
    old, new = _head(model.hf, model), _head(made, Model.wrap(made))
    for source, target in zip(old, new, strict=True):
        target.load_state_dict(source.state_dict())
    made.tie_weights()


def _head(hf: PreTrainedModel, model: Model) -> list[nn.Module]:
    out = hf.get_output_embeddings()
    inside = [m for part in model.anatomy.main.head for m in part.modules()]
    dense = [m for m in inside if isinstance(m, nn.Linear) and m is not out]
    norm = [m for m in inside if isinstance(m, nn.LayerNorm)]
    if len(dense) != 1 or len(norm) != 1 or out is None:
        raise ModelError(f"the head of {type(hf).__name__} is not BERT's: a matrix, a norm and an output layer")
    return [dense[0], norm[0], out]
