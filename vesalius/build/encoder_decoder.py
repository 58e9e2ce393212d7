"""The encoder-decoder of parts: two stacks of the blocks that all architectures share, and one embedding for both.

    states = encoder(source)                            each token reads all others
    logits = head(decoder(target, states))              each token reads those before it and, in every layer, all states

With T5's parts (`presets/t5.yaml`) it computes what transformers' T5 does (Raffel et al. 2020, arXiv 1910.10683); with
others, what no stock class has. The classes are configured, saved, opened and generated from like those of `hf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache, GenerationMixin
from transformers.utils import can_return_tuple

from vesalius.build.hf import (
    VesaliusConfig,
    VesaliusModel,
    VesaliusOutput,
    VesaliusPreTrainedModel,
    _WithHead,
    loss_in_place,
)
from vesalius.errors import VesaliusError


class VesaliusEncoderDecoderConfig(VesaliusConfig):
    """A `VesaliusConfig` of kind `encoder-decoder`; special ids are T5's unless given."""

    model_type = "vesalius-encoder-decoder"

    is_encoder_decoder: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0


@dataclass
class VesaliusEncoderDecoderOutput(VesaliusOutput):
    """As `VesaliusOutput`, of the decoder; and what its encoder gave."""

    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None


class VesaliusEncoderDecoder(VesaliusPreTrainedModel):
    """Both stacks; the embedding is the encoder's."""

    config_class = VesaliusEncoderDecoderConfig

    def __init__(self, config: VesaliusEncoderDecoderConfig) -> None:
        super().__init__(config)
        self.architecture = a = config.shape
        if a.kind != "encoder-decoder":
            raise VesaliusError(
                f"{type(self).__name__} has two stacks and kind='{a.kind}' one; use build(architecture), or "
                f"VesaliusConfig and VesaliusFor{'MaskedLM' if a.kind == 'masked' else 'CausalLM'}"
            )
        self.encoder = VesaliusModel(config, "encoder")
        self.decoder = VesaliusModel(config, "decoder")
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed = value

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> VesaliusEncoderDecoderOutput:
        """The decoder's residual stream after its last norm.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: the encoder's, (batch, source).
            decoder_input_ids, ...: the decoder's, (batch, pos).
            encoder_outputs: what the encoder gave for them before; the first of it are its states, (batch, source,
                d_model). Then `attention_mask` may have four axes, (batch, 1 or head, pos, source).

        Raises:
            VesaliusError: for inputs of which one stack has none or too many, and for those that do not fit together.
        """
        if segment_ids is not None:
            raise VesaliusError(
                "segment_ids number the tokens of one stack and here are two; give one text a row, or encoder_outputs "
                "and masks of four axes"
            )
        if encoder_outputs is None and attention_mask is not None and attention_mask.dim() == 4:
            raise VesaliusError(
                "an attention_mask of four axes cannot be both the encoder's and the cross-attention's; run "
                "get_encoder() with its own, and give its encoder_outputs with attention_mask (batch, 1, pos, source)"
            )
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise VesaliusError("give either decoder_input_ids or decoder_inputs_embeds, and not both; or labels")
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            raise VesaliusError(
                f"past_key_values of an encoder-decoder cannot be a {type(past_key_values).__name__}; give the "
                "EncoderDecoderCache of an earlier call, or none"
            )
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        states = encoder_outputs[0]
        told = self.encoder.embed(decoder_input_ids) if decoder_inputs_embeds is None else decoder_inputs_embeds
        if told.shape[0] != states.shape[0]:
            raise VesaliusError(
                f"the decoder has {told.shape[0]} rows and the encoder {states.shape[0]}; give one row for each"
            )
        out = self.decoder(
            input_ids=decoder_input_ids,
            inputs_embeds=told,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            **kwargs,
        )
        sides = (("enc", getattr(encoder_outputs, "part_losses", None)), ("dec", out.part_losses))
        losses = {f"{side}.{name}": loss for side, found in sides for name, loss in (found or {}).items()}
        return VesaliusEncoderDecoderOutput(
            last_hidden_state=out.last_hidden_state,
            past_key_values=out.past_key_values,
            decoder_hidden_states=out.hidden_states,
            encoder_last_hidden_state=states,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            part_losses=losses or None,
        )


class VesaliusForConditionalGeneration(_WithHead, GenerationMixin):
    """An encoder-decoder of parts that writes text about a text."""

    config_class = VesaliusEncoderDecoderConfig
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed.weight"}
    body: ClassVar[type[VesaliusPreTrainedModel]] = VesaliusEncoderDecoder

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> VesaliusEncoderDecoderOutput:
        """Logits (batch, pos, vocabulary), and with labels (batch, pos, -100 where nothing is asked) the mean loss.

        Without decoder inputs the labels, shifted right, are read. All else as in `VesaliusEncoderDecoder`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        found = self._answer(body, logits_to_keep)
        out = VesaliusEncoderDecoderOutput(**{**body, "last_hidden_state": None, "logits": found.logits})
        if labels is not None:
            out.loss = loss_in_place(out, labels)
        return out

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the decoder reads to foretell labels (batch, pos): them one later, after the start token.

        Raises:
            VesaliusError: if the config names no start token, or no padding for labels of -100.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or (pad is None and bool((labels == -100).any())):
            missing = "decoder_start_token_id" if start is None else "pad_token_id"
            raise VesaliusError(f"the config has no {missing}, with which labels are shifted right; set it")
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return shifted if pad is None else shifted.masked_fill(shifted == -100, pad)
