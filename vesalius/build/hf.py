"""The parts model as transformers classes: configured, saved, loaded, generated from and trained like any other.

`VesaliusConfig` holds an `Architecture`. With Vesalius imported, `AutoModelForCausalLM.from_pretrained(folder)` and its
siblings open such folders without remote code (see `vesalius.autoload`). Position restarts, segments and 4-D masks are
taken by `forward` as in other models of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from vesalius.build.architecture import Architecture, Side
from vesalius.build.mixers import MIXERS
from vesalius.build.positions import PositionScheme
from vesalius.build.skeleton import Block, norm_of, place, reach
from vesalius.errors import VesaliusError


class VesaliusConfig(PreTrainedConfig):
    """An architecture as transformers keeps it, with the sizes under the names that others look for.

    Attributes:
        architecture: `Architecture.to_dict()`; all sizes follow from it.
        vocab_size: follows too, but may be changed by `resize_token_embeddings`.
    """

    model_type = "vesalius"
    keys_to_ignore_at_inference = ["past_key_values"]

    architecture: dict[str, Any] | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    layer_types: list[str] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.architecture is not None:
            a = Architecture.from_dict(self.architecture)
            if self.vocab_size not in (None, a.vocab_size):
                a = a.replace(vocab_size=self.vocab_size)
                self.architecture = a.to_dict()
            self.vocab_size, self.hidden_size, self.num_hidden_layers = a.vocab_size, a.d_model, a.layers
            self.num_attention_heads, self.num_key_value_heads, self.head_dim = a.heads, a.kv_heads, a.d_head
            self.intermediate_size, self.max_position_embeddings = a.d_ff, a.max_length
            self.tie_word_embeddings = a.tied
            # "hybrid": a cache with a place for a state of constant size
            self.layer_types = ["hybrid" if MIXERS.get(name).recurrent else "full_attention" for name in a.stack]
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)

    @property
    def shape(self) -> Architecture:
        """The architecture.

        Raises:
            VesaliusError: if there is none.
        """
        if self.architecture is None:
            raise VesaliusError(
                "this VesaliusConfig has no architecture; make it with VesaliusConfig(architecture=...)"
            )
        data = dict(self.architecture)
        return Architecture.from_dict({**data, "vocab_size": self.vocab_size or data["vocab_size"]})

    # what the family files ask -------------------------------------------------------------------------------------

    @property
    def d_model(self) -> int:
        return int(self.hidden_size or 0)

    @property
    def norm_kind(self) -> str:
        return self.shape.norm.kind

    @property
    def is_causal(self) -> bool:
        return self.shape.kind != "masked"

    @property
    def is_parallel(self) -> bool:
        return self.shape.block != "sequential"

    @property
    def is_post_norm(self) -> bool:
        return self.shape.norm.place == "post"

    @property
    def is_gated(self) -> bool:
        return self.shape.gated

    @property
    def scales_logits(self) -> bool:
        return self.shape.logit_scale != "none"


@dataclass
class VesaliusOutput(ModelOutput):
    """What a model gives: the usual fields, and the losses of its parts by name."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    part_losses: dict[str, Tensor] | None = None


class VesaliusPreTrainedModel(PreTrainedModel):
    """What the classes below share."""

    config_class = VesaliusConfig
    config: VesaliusConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @property
    def takes_mask(self) -> bool:
        """Whether masks of pairs are honoured: not by a mixer that reads in order."""
        a = self.config.shape
        return not any(MIXERS.get(name).recurrent for name in (*a.stack, *a.encoder_stack))


class VesaliusModel(VesaliusPreTrainedModel):
    """Embedding, blocks and final norm; or one side of an encoder-decoder, where the encoder has the embedding."""

    def __init__(self, config: VesaliusConfig, side: Side | None = None) -> None:
        super().__init__(config)
        self.side, a = side, config.shape
        if side is None and a.kind == "encoder-decoder":
            raise VesaliusError(
                f"{type(self).__name__} has one stack and kind='encoder-decoder' two; use build(architecture), or "
                "AutoModelForSeq2SeqLM for a saved one"
            )
        self.architecture = a = a if side is None else a.side(side)
        if side != "decoder":
            self.embed = nn.Embedding(a.vocab_size, a.d_model)
        self.positions = PositionScheme(a)
        if a.token_types:
            self.token_types = nn.Embedding(a.token_types, a.d_model)
        if a.norm.embedding:
            self.norm_embed = norm_of(a)
        self.drop = nn.Dropout(a.dropout)
        self.layers = nn.ModuleList([Block(a, layer, config, cross=side == "decoder") for layer in range(a.layers)])
        if a.norm.place == "pre":
            self.norm = norm_of(a)
        self.gradient_checkpointing = False
        self.wanted = {need for name in set(a.stack) for need in MIXERS.get(name).needs}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        if self.side == "decoder":
            raise NotImplementedError("the embedding is the encoder's; ask the whole model")
        return self.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed = value

    def _embedded(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor, types: Any
    ) -> Any:
        a = self.architecture
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if a.embedding_scale == "sqrt":
            x = x * a.d_model**0.5
        if a.token_types:
            x = x + self.token_types(torch.zeros_like(position_ids) if types is None else types)
        where = self.positions.embed(position_ids)
        x = x if where is None else x + where
        return self.drop(self.norm_embed(x) if a.norm.embedding else x)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **_: Any,
    ) -> VesaliusOutput:
        """The residual stream after the last norm; masks, positions and segments as in `skeleton.place`.

        A decoder takes the states of its encoder (batch, source, d_model) and their mask, as in `skeleton.reach`.
        """
        if self.side != "decoder" and (input_ids is None) == (inputs_embeds is None):
            raise VesaliusError("give either input_ids or inputs_embeds, and not both")
        if output_attentions:
            raise VesaliusError("output_attentions is not kept here; read patterns on the bench: vesalius.open(model)")
        tokens = inputs_embeds if input_ids is None else input_ids
        assert tokens is not None
        dtype, rows = self.dtype, tokens.shape[0]
        causal = self.architecture.kind != "masked"
        use_cache = causal and not self.training and (self.config.use_cache if use_cache is None else use_cache)
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
            if self.side == "decoder":
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        placed = place(
            self.architecture,
            self.positions,
            rows,
            tokens.shape[1],
            past=past,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            explicit=self.config._attn_implementation not in ("sdpa", "eager", None),
            dtype=dtype,
            device=tokens.device,
        )
        x = self._embedded(input_ids, inputs_embeds, placed.positions, token_type_ids)
        extra = {"input_ids": input_ids, "embedding": x}
        arguments: dict[str, Any] = {
            "attention_mask": placed.mask,
            "position_ids": placed.recurrent,
            "position_embeddings": self.positions.rotary(placed.positions, dtype),
            "past_key_values": past_key_values,
            **{name: extra[name] for name in self.wanted},
        }
        if encoder_hidden_states is not None:
            mask = reach(encoder_attention_mask, rows, encoder_hidden_states.shape[1], dtype)
            arguments |= {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": mask}
        hidden, losses = [x], {}
        for layer, block in enumerate(self.layers):
            x, found = block(x, **arguments)
            losses.update({f"L{layer}.{name}": value for name, value in found.items()})
            if output_hidden_states:
                hidden.append(x)
        x = self.norm(x) if self.architecture.norm.place == "pre" else x
        return VesaliusOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            part_losses=losses or None,
        )


class _Transform(nn.Module):
    """BERT's layer before the output layer."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.dense = nn.Linear(architecture.d_model, architecture.d_model)
        self.act = nn.GELU()
        self.norm = norm_of(architecture)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.act(self.dense(x)))
        return x


class _WithHead(VesaliusPreTrainedModel):
    """A parts model with an output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}
    body: ClassVar[type[VesaliusPreTrainedModel]] = VesaliusModel

    def __init__(self, config: VesaliusConfig) -> None:
        super().__init__(config)
        a = config.shape
        self.model = self.body(config)
        if a.head == "transform":
            self.lm_transform = _Transform(a)
        self.lm_head = nn.Linear(a.d_model, a.vocab_size, bias=a.head == "transform")
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def _answer(self, body: VesaliusOutput, keep: int | Tensor) -> VesaliusOutput:
        x = body.last_hidden_state
        assert x is not None
        if isinstance(keep, Tensor):
            x = x[:, keep]
        elif keep:
            x = x[:, -keep:]
        a = self.model.architecture
        if a.logit_scale == "inverse-sqrt":
            x = x * float(a.d_model) ** -0.5
        if a.head == "transform":
            x = self.lm_transform(x)
        return VesaliusOutput(
            logits=self.lm_head(x),
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            part_losses=body.part_losses,
        )


def _with_parts(loss: Tensor, parts: dict[str, Tensor] | None) -> Tensor:
    return loss if not parts else loss + torch.stack(list(parts.values())).sum()


def loss_in_place(out: VesaliusOutput, labels: Tensor) -> Tensor:
    """The mean loss of labels (batch, pos, -100 where nothing is asked), each at its own position, and of the parts."""
    assert out.logits is not None
    loss = nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    return _with_parts(loss, out.part_losses)


class VesaliusForCausalLM(_WithHead, GenerationMixin):
    """A causal language model of parts."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> VesaliusOutput:
        """Logits, and with labels (batch, pos) the mean loss of predicting each from what is before it."""
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            **kwargs,
        )
        out = self._answer(body, logits_to_keep)
        if labels is not None:
            loss = self.loss_function(out.logits, labels, vocab_size=self.config.vocab_size)
            out.loss = _with_parts(loss, out.part_losses)
        return out


class VesaliusForMaskedLM(_WithHead):
    """A bidirectional model of parts that fills in masked tokens."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> VesaliusOutput:
        """Logits, and with labels (batch, pos, -100 where nothing is asked) the mean loss."""
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            **kwargs,
        )
        out = self._answer(body, 0)
        if labels is not None:
            out.loss = loss_in_place(out, labels)
        return out
