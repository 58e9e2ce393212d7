"""From an architecture to a model: a class of transformers where one computes the same, our parts model otherwise.

A stock class fits when everything in the architecture is something it does; `why_not` says for each class what is
missing. `export` moves the weights of a parts model into the stock class, `adopt` the other way; both move numbers and
change none, so logits agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vesalius.build.architecture import Architecture
from vesalius.build.feedforwards import FEEDFORWARDS
from vesalius.build.init import fresh
from vesalius.build.moves import MOVES, Move, pack, unpack
from vesalius.errors import VesaliusError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PLAIN = {
    "embedding_scale": ("none",),
    "logit_scale": ("none",),
    "head": ("linear",),
    "token_types": (0,),
    "positions.scale": (1.0,),
}
_LAYER_NORM = {"norm.kind": ("layer",), "norm.bias": (True,)}
_PRE = {"norm.place": ("pre",), "norm.embedding": (False,)}
_DENSE = {"feed_forward": ("gelu", "gelu-tanh", "relu")}


class _Stock(NamedTuple):
    """One stock class: its names in transformers, the values it can have, and its configuration."""

    model: str
    config: str
    allows: Mapping[str, Sequence[Any]]
    settings: Callable[[Architecture], dict[str, Any]]
    grouped: bool = False  # it can share keys and values, and have heads * d_head != d_model


def _activation(a: Architecture) -> str:
    return FEEDFORWARDS.get(a.feed_forward).activation


def _gpt2(a: Architecture) -> dict[str, Any]:
    sizes = {
        "n_embd": a.d_model,
        "n_layer": a.layers,
        "n_head": a.heads,
        "n_inner": a.d_ff,
        "n_positions": a.max_length,
    }
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), a.dropout)
    return {**sizes, **drops, "activation_function": _activation(a), "layer_norm_epsilon": a.norm.eps}


def _common(a: Architecture) -> dict[str, Any]:
    return {
        "hidden_size": a.d_model,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "intermediate_size": a.d_ff,
        "max_position_embeddings": a.max_length,
        "hidden_act": _activation(a),
    }


def _neox(a: Architecture) -> dict[str, Any]:
    return {
        **_common(a),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": a.positions.base,
            "partial_rotary_factor": a.positions.fraction,
        },
        "use_parallel_residual": a.block == "parallel",
        "layer_norm_eps": a.norm.eps,
        "hidden_dropout": a.dropout,
        "attention_dropout": a.dropout,
    }


def _llama(a: Architecture) -> dict[str, Any]:
    return {
        **_common(a),
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.d_head,
        "rms_norm_eps": a.norm.eps,
        "attention_bias": a.bias,
        "mlp_bias": a.bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": a.positions.base},
    }


def _bloom(a: Architecture) -> dict[str, Any]:
    sizes = {"hidden_size": a.d_model, "n_layer": a.layers, "n_head": a.heads, "seq_length": a.max_length}
    return {**sizes, "layer_norm_epsilon": a.norm.eps}


def _bert(a: Architecture) -> dict[str, Any]:
    drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), a.dropout)
    return {**_common(a), **drops, "type_vocab_size": a.token_types, "layer_norm_eps": a.norm.eps}


def _t5(a: Architecture) -> dict[str, Any]:
    return {
        "d_model": a.d_model,
        "d_kv": a.d_head,
        "d_ff": a.d_ff,
        "num_layers": a.encoder_depth,
        "num_decoder_layers": a.layers,
        "num_heads": a.heads,
        "relative_attention_num_buckets": a.positions.buckets,
        "relative_attention_max_distance": a.positions.max_distance,
        "dropout_rate": a.dropout,
        "layer_norm_epsilon": a.norm.eps,
        "feed_forward_proj": "gated-gelu" if a.gated else "relu",
        "scale_decoder_outputs": a.logit_scale == "inverse-sqrt",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


STOCK: dict[str, _Stock] = {
    "GPT2": _Stock(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **_PLAIN,
            **_LAYER_NORM,
            **_PRE,
            **_DENSE,
            "kind": ("causal",),
            "positions.kind": ("learned",),
            "bias": (True,),
        }
        | {"block": ("sequential",)},
        _gpt2,
    ),
    "GPTNeoX": _Stock(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_PLAIN, **_LAYER_NORM, **_PRE, **_DENSE, "kind": ("causal",), "positions.kind": ("rotary",), "bias": (True,)}
        | {"block": ("sequential", "parallel")},
        _neox,
    ),
    "Llama": _Stock(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_PLAIN, **_PRE, "norm.kind": ("rms",), "kind": ("causal",), "positions.kind": ("rotary",)}
        | {"positions.fraction": (1.0,), "feed_forward": ("swiglu", "geglu", "geglu-tanh")}
        | {"block": ("sequential",), "dropout": (0.0,)},
        _llama,
        grouped=True,
    ),
    "Bloom": _Stock(
        "BloomForCausalLM",
        "BloomConfig",
        {**_PLAIN, **_LAYER_NORM, "norm.place": ("pre",), "norm.embedding": (True,), "kind": ("causal",)}
        | {"positions.kind": ("alibi",), "feed_forward": ("gelu-tanh",), "bias": (True,)}
        | {"block": ("sequential",), "dropout": (0.0,)},
        _bloom,
    ),
    "Bert": _Stock(
        "BertForMaskedLM",
        "BertConfig",
        {**_PLAIN, **_LAYER_NORM, "norm.place": ("post",), "norm.embedding": (True,), "kind": ("masked",)}
        | {"positions.kind": ("learned",), "feed_forward": ("gelu",), "bias": (True,), "tied": (True,)}
        | {"head": ("transform",), "token_types": range(1, 1000), "block": ("sequential",)},
        _bert,
    ),
    "T5": _Stock(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_PLAIN, **_PRE, "norm.kind": ("rms",), "kind": ("encoder-decoder",), "positions.kind": ("t5",)}
        | {"feed_forward": ("relu", "geglu-tanh"), "bias": (False,), "block": ("sequential",)}
        | {"logit_scale": ("none", "inverse-sqrt")},
        _t5,
    ),
}


def why_not(architecture: Architecture) -> dict[str, list[str]]:
    """For each stock class what keeps it from computing this architecture; an empty list where it does.

    Example:
        >>> from vesalius.build import preset
        >>> why_not(preset("tiny-llama"))["Llama"], why_not(preset("tiny-llama"))["T5"][0]
        ([], "kind is 'causal' where T5 has 'encoder-decoder'")
    """
    return {name: list(_differences(name, stock, architecture)) for name, stock in STOCK.items()}


def _differences(name: str, stock: _Stock, a: Architecture) -> Iterator[str]:
    order = sorted(stock.allows, key=lambda key: key != "kind")
    for key in order:
        value: Any = a
        for part in key.split("."):
            value = getattr(value, part)
        if value not in stock.allows[key]:
            allowed = stock.allows[key]
            shown = "1 or more" if isinstance(allowed, range) else " or ".join(repr(v) for v in allowed)
            yield f"{key} is {value!r} where {name} has {shown}"
    mixers = {*a.stack, *a.encoder_stack}
    if mixers != {"attn"}:
        yield f"mixers are {', '.join(sorted(mixers))} where {name} has attn"
    if a.scaled_scores == (name == "T5"):
        yield f"scores are {'' if a.scaled_scores else 'not '}divided by sqrt(d_head), unlike those of {name}"
    if not stock.grouped and a.kv_heads != a.heads:
        yield f"kv_heads is {a.kv_heads} where {name} has one a head, {a.heads}"
    if not stock.grouped and name != "T5" and a.heads * a.d_head != a.d_model:
        yield f"heads * d_head is {a.heads * a.d_head} where {name} has d_model, {a.d_model}"
    if name == "Bloom" and a.d_ff != 4 * a.d_model:
        yield f"d_ff is {a.d_ff} where Bloom has 4 d_model, {4 * a.d_model}"


def stock_name(architecture: Architecture) -> str | None:
    """The stock class that computes this architecture (a key of `STOCK`), or None."""
    return next((name for name, reasons in why_not(architecture).items() if not reasons), None)


def stock_config(architecture: Architecture, **extra: Any) -> PreTrainedConfig | None:
    """The configuration of the stock class that computes this architecture, or None; `why_not` says why.

    Args:
        extra: further settings, such as special token ids.
    """
    import transformers

    name = stock_name(architecture)
    if name is None:
        return None
    a, stock = architecture, STOCK[name]
    # none of transformers' own default ids, which may lie outside this vocabulary
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    settings = {**tokens, "vocab_size": a.vocab_size, "tie_word_embeddings": a.tied, **stock.settings(a), **extra}
    return getattr(transformers, stock.config)(**settings)


def build(architecture: Architecture, seed: int = 0, *, stock: bool = True, **extra: Any) -> PreTrainedModel:
    """A new model with its initial weights; the same seed gives the same weights, to stock classes and ours alike.

    Args:
        seed: of all weights. stock: use a class of transformers where one fits; False for our parts model always.
        extra: further settings of the configuration, such as `eos_token_id`.

    Returns:
        The model in training mode, as transformers makes it.

    Example:
        >>> from vesalius.build import preset
        >>> type(build(preset("tiny-pythia"))).__name__, type(build(preset("tiny-palm"))).__name__
        ('GPTNeoXForCausalLM', 'VesaliusForCausalLM')
    """
    name = stock_name(architecture) if stock else None
    if name is None:
        model = _empty_parts(architecture, **extra)
        with torch.no_grad():
            for ours, tensor in model.named_parameters():
                tensor.copy_(fresh(ours, tensor.shape, architecture, seed))
        return _tied(model, architecture)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in _empty_parts(architecture).named_parameters()}
    model = _empty_stock(architecture, **extra)
    _fill(model, architecture, name, lambda ours: fresh(ours, shapes[ours], architecture, seed))
    return _tied(model, architecture)


def export(model: PreTrainedModel) -> PreTrainedModel:
    """The stock class with the weights of a parts model, in its dtype, on its device and in its mode.

    Raises:
        VesaliusError: if no stock class computes its architecture, with what is missing in the nearest.
    """
    a: Architecture = model.config.shape
    name = stock_name(a)
    if name is None:
        other = {name: found[0].startswith("kind ") for name, found in why_not(a).items()}
        nearest, reasons = min(why_not(a).items(), key=lambda item: (other[item[0]], len(item[1])))
        raise VesaliusError(f"no stock class computes this architecture; nearest is {nearest}: {'; '.join(reasons)}")
    out = _empty_stock(a, **_special_ids(model, a)).to(model.dtype).to(model.device)
    weights = dict(model.named_parameters())
    _fill(out, a, name, lambda ours: weights[ours])
    return _tied(out, a).train(model.training)


def adopt(model: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    """Our parts model with the weights of a stock model: `export` backwards.

    Args:
        model: of the class that `stock_config(architecture)` is for. architecture: what it computes.

    Raises:
        VesaliusError: if the class, a size or the number of layers is another.
    """
    name = stock_name(architecture)
    if name is None or type(model).__name__ != STOCK[name].model:
        wanted = "a parts model" if name is None else STOCK[name].model
        raise VesaliusError(f"{type(model).__name__} cannot be adopted: this architecture is computed by {wanted}")
    out = _empty_parts(architecture, **_special_ids(model, architecture)).to(model.dtype).to(model.device)
    mine, theirs = dict(out.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for move in _moves(model, architecture, name):
            for ours, tensor in zip(move.ours, unpack(move, theirs[move.theirs], architecture), strict=True):
                if mine[ours].shape != tensor.shape:
                    sizes = f"{tuple(tensor.shape)} where the architecture has {tuple(mine[ours].shape)}"
                    raise VesaliusError(
                        f"{move.theirs} cannot be adopted: it gives {ours} {sizes}; change the architecture"
                    )
                mine[ours].copy_(tensor)
    return _tied(out, architecture).train(model.training)


# -- making ------------------------------------------------------------------------------------------------------------


def _empty_parts(architecture: Architecture, **extra: Any) -> PreTrainedModel:
    from vesalius.build.encoder_decoder import VesaliusForConditionalGeneration
    from vesalius.build.hf import VesaliusForCausalLM, VesaliusForMaskedLM

    classes = {
        "causal": VesaliusForCausalLM,
        "masked": VesaliusForMaskedLM,
        "encoder-decoder": VesaliusForConditionalGeneration,
    }
    cls = classes[architecture.kind]
    config = cls.config_class(architecture=architecture.to_dict(), **extra)
    return _without_random(lambda: cls(config))


def _empty_stock(architecture: Architecture, **extra: Any) -> PreTrainedModel:
    import transformers

    name, config = stock_name(architecture), stock_config(architecture, **extra)
    model = _without_random(lambda: getattr(transformers, STOCK[str(name)].model)(config))
    model.tie_weights()
    if name == "T5" and not architecture.tied:  # transformers ties T5's output layer whatever its config says
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    return model


def _without_random(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model whose own initial weights are not wanted: they are not drawn, and the global generator stays put."""
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(devices=[]), no_init_weights():
        return make()


def _tied(model: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    head = model.get_output_embeddings()
    own = head.weight
    model.tie_weights()
    if not architecture.tied:  # see `_empty_stock`
        head.weight = own
    return model


def _special_ids(model: PreTrainedModel, a: Architecture) -> dict[str, Any]:
    """The special token ids of a model's configuration, for its twin's."""
    names = ["pad_token_id", "bos_token_id", "eos_token_id"]
    names += ["decoder_start_token_id"] if a.kind == "encoder-decoder" else []
    return {name: getattr(model.config, name, None) for name in names}


@torch.no_grad()
def _fill(model: PreTrainedModel, a: Architecture, name: str, source: Callable[[str], torch.Tensor]) -> None:
    """Every parameter of a stock model from parts by name."""
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for move in _moves(model, a, name):
        theirs[move.theirs].copy_(pack(move, [source(ours) for ours in move.ours], a))


def _moves(model: PreTrainedModel, a: Architecture, name: str) -> list[Move]:
    """The moves between a stock model and its parts; none of its weights may be without one, nor a move without one."""
    theirs, moves = dict(model.named_parameters(remove_duplicate=False)), MOVES[name](a)
    moved = {id(theirs.get(move.theirs)) for move in moves}
    left = [n for n, p in model.named_parameters() if id(p) not in moved]
    lacks = [move.theirs for move in moves if move.theirs not in theirs]
    if left or lacks:
        found = f"has {', '.join(left[:3])}" if left else f"has no {', '.join(lacks[:3])}"
        raise VesaliusError(
            f"{type(model).__name__} {found}, unlike its architecture; change layers, tied or bias there"
        )
    return moves
