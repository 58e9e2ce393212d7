"""An opened model: a transformers model as it is, its anatomy, and one forward pass that records or changes parts."""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vesalius.errors import ModelError
from vesalius.model.anatomy import Anatomy, Stack, read_anatomy
from vesalius.model.global_attention import global_attention
from vesalius.model.hooks import Hooks, Site, Tap
from vesalius.model.memory import memory_errors
from vesalius.parts import Part

ModelKind = Literal["causal", "masked", "encoder-decoder", "encoder"]
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
# Of these the first position is the one after the padding's id.
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "longformer")
# Forwards that place padded tokens themselves.
_OWN_POSITIONS = ("roberta", "xlm-roberta", "longformer", "opt", "bloom", "t5", "mt5")


@dataclass(frozen=True)
class Capture:
    """What one forward pass recorded.

    Attributes:
        logits: (row, pos, vocabulary) or (row, read, token), as asked; None for encoders without a head.
        sites: recorded tensors in the canonical shapes of `hooks`.
    """

    logits: Tensor | None
    sites: dict[Site, Tensor]

    def __getitem__(self, site: Site | tuple[str, int] | tuple[str, int, str]) -> Tensor:
        return self.sites[Site(*site)]

    def part(self, part: Part) -> Tensor:
        """The recorded activation of a part: (row, pos, d), or (row, pos) for a neuron."""
        from vesalius.model.intervene import locate

        where = locate(part)
        return where.read(self.sites[where.site])


@dataclass(frozen=True)
class Model:
    """A transformers model with its parts named. Weights are frozen and the model is in evaluation mode.

    Attributes:
        hf: the `PreTrainedModel`, untouched.
        tokenizer: its tokenizer, or None.
        anatomy: where its parts are, and its sizes.
        name: short name; spec: what it was opened with; fingerprint: identifies the weights.
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    anatomy: Anatomy
    name: str
    spec: str
    fingerprint: str
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def wrap(
        cls, hf: PreTrainedModel, tokenizer: Any = None, name: str = "", spec: str = "", fingerprint: str = ""
    ) -> Model:
        """An already loaded transformers model on the bench; it is put in evaluation mode and its weights frozen."""
        hf.eval().requires_grad_(False)
        if getattr(hf, "tokenizer", None) is not None and tokenizer is None:
            tokenizer = hf.tokenizer
        name = name or getattr(hf, "name_or_path", "") or type(hf).__name__
        return cls(hf, tokenizer, read_anatomy(hf), name, spec or name, fingerprint or weights_fingerprint(hf))

    def copied(self) -> Model:
        """The same model with weights of its own."""
        with self.alone():
            hf = copy.deepcopy(self.hf).eval().requires_grad_(False)
        return replace(self, hf=hf, anatomy=read_anatomy(hf))

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        return self.anatomy.n_layers

    @property
    def n_heads(self) -> int:
        return self.anatomy.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.anatomy.n_kv_heads

    @property
    def d_model(self) -> int:
        return self.anatomy.d_model

    @property
    def d_head(self) -> int:
        return self.anatomy.d_head

    @property
    def d_mlp(self) -> int:
        return self.anatomy.d_mlp

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.hf.parameters())

    @property
    def n_positions(self) -> int | None:
        """Tokens that can be read at once; None where there is no limit."""
        config = self.hf.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if most and config.model_type in _POSITIONS_AFTER_PADDING:
            most -= int(getattr(config, "pad_token_id", None) or 0) + 1
        return most

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @cached_property
    def device(self) -> torch.device:
        """Where input ids go."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def kind(self) -> ModelKind:
        """`causal`, `masked` (BERT with its head), `encoder-decoder`, or `encoder` (no head)."""
        if "dec" in self.anatomy.stacks:
            return "encoder-decoder"
        if self.anatomy.main.causal:
            return "causal"
        return "masked" if self.anatomy.main.head else "encoder"

    def parts(self, kinds: Sequence[str] = ("head", "mlp")) -> list[Part]:
        """Every part of these kinds, in forward order."""
        return self.anatomy.parts(tuple(kinds))

    def __repr__(self) -> str:
        a = self.anatomy
        kv = f"/{a.n_kv_heads} kv" if a.n_kv_heads != a.n_heads else ""
        return (
            f"Model({self.name}: {a.family}, {self.n_parameters / 1e6:.0f}M parameters, {a.n_layers} blocks x "
            f"{a.n_heads} heads{kv}, d {a.d_model}, mlp {a.d_mlp}, {self.dtype}, {self.device})"
        )

    def alone(self) -> AbstractContextManager[bool]:
        """Held while the model is hooked: two threads at one model would read each other's interventions."""
        lock: AbstractContextManager[bool] = _LOCKS.setdefault(self.hf, threading.RLock())
        return lock

    # -- running -------------------------------------------------------------------------------------------------

    def inputs(self, ids: Tensor, mask: Tensor | None = None, decoder: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments for the transformers model; positions of padded rows count real tokens only.

        Raises:
            ModelError: if the model was put back in training mode, where dropout makes every answer another.
        """
        if self.hf.training:
            raise ModelError(f"{self.name} is in training mode, so dropout changes every answer; call model.hf.eval()")
        kwargs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if mask is not None and bool((mask == 0).any()):
            mask = mask.to(self.device)
            kwargs["attention_mask"] = mask
            if self.anatomy.family not in _OWN_POSITIONS and "position_ids" in _forward_parameters(type(self.hf)):
                kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs |= global_attention(self.hf, kwargs["input_ids"])
        if decoder is not None:
            kwargs["decoder_input_ids"] = decoder.to(self.device)
        return kwargs

    def run(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        capture: Sequence[Site | tuple[str, int] | tuple[str, int, str]] = (),
        taps: Mapping[Site, Sequence[Tap]] | None = None,
        decoder: Tensor | None = None,
    ) -> Capture:
        """One plain forward pass of the whole model.

        Args:
            ids: (row, pos); mask: 1 for real tokens; decoder: decoder ids for encoder-decoder models.
            capture: sites to record (after taps have changed them). Nothing is copied: capture costs no arithmetic.
            taps: functions that may replace sites.
        """
        recorded: dict[Site, Tensor] = {}
        every: dict[Site, list[Tap]] = {site: list(functions) for site, functions in (taps or {}).items()}
        for wanted in capture:
            site = Site(*wanted)
            every.setdefault(site, []).append(lambda x, s=site: recorded.__setitem__(s, x))  # type: ignore[misc]
        with torch.no_grad(), memory_errors(), Hooks(self.hf, self.anatomy, every):
            out = self.hf(**self.inputs(ids, mask, decoder))
        return Capture(getattr(out, "logits", None), recorded)

    def logits(self, ids: Tensor, mask: Tensor | None = None, decoder: Tensor | None = None) -> Tensor:
        """Logits (row, pos, vocabulary) of transformers itself, nothing hooked."""
        logits = self.run(ids, mask, decoder=decoder).logits
        if logits is None:
            raise ModelError(f"{self.name} is an encoder without a head: it has no logits, so no task can be scored")
        return logits

    def readout(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of chosen vocabulary rows from the residual stream after the last block.

        Args:
            hidden: (..., d_model), before the final norm. tokens: vocabulary ids (token,), or None for all.

        Returns:
            (..., token or vocabulary), with the model's soft-capping applied.
        """
        stack = self.anatomy.main
        if not stack.head:
            raise ModelError(f"{self.name} is an encoder without a head: it has no logits, so no task can be scored")
        return self.head(hidden if stack.final_norm is None else stack.final_norm.module(hidden), tokens)

    def head(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """As `readout`, from the residual stream after the final norm."""
        logits = _head_rows(self.anatomy.main, self.stem(hidden), tokens)
        cap = self.anatomy.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def stem(self, hidden: Tensor) -> Tensor:
        """What the unembedding reads, from the residual stream after the final norm: projected and scaled."""
        stack = self.anatomy.main
        if stack.project_out is not None:
            hidden = stack.project_out(hidden)
        return hidden if stack.logit_scale == 1.0 else hidden * stack.logit_scale

    @property
    def unembedding(self) -> nn.Linear | None:
        """The unembedding, where logits are nothing but this map of `stem`; None under a soft-cap or a deeper head."""
        found = self.anatomy.main.unembed
        if self.anatomy.softcap is not None or found is None or not _is_plain(found):
            return None
        return found if isinstance(found, nn.Linear) and found.weight.device.type != "meta" else None


def _head_rows(stack: Stack, hidden: Tensor, tokens: Tensor | None) -> Tensor:
    if tokens is not None and stack.unembed is not None and _is_plain(stack.unembed):
        weight = stack.unembed.weight
        if isinstance(weight, Tensor) and weight.device.type != "meta":
            tokens = tokens.to(weight.device)
            bias = stack.unembed.bias
            hidden = hidden.to(weight.device)
            return nn.functional.linear(hidden, weight[tokens], bias[tokens] if isinstance(bias, Tensor) else None)
    for module in stack.head:
        hidden = module(hidden)
    return hidden if tokens is None else hidden[..., tokens.to(hidden.device)]


def _is_plain(head: nn.Module) -> bool:
    """Whether a head's weight is all it does: no hook of the user's, no adapter around it."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


def _forward_parameters(cls: type) -> set[str]:
    return set(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]


def _bits(flat: Tensor) -> int:
    """The sum of a tensor's bits as whole numbers: a strided sample alone misses whole heads of a wide matrix."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size())
    if whole is None or flat.is_complex() or flat.is_quantized:
        return 0
    return int(flat.contiguous().view(whole).sum(dtype=torch.int64))  # wraps around alike everywhere


def weights_fingerprint(hf: PreTrainedModel, config: bool = True) -> str:
    """A short hash of the architecture and of every weight: a sample of its values, and the sum of all its bits.

    Args:
        config: without it the weights alone count; saving and opening a model changes its config's notes.
    """
    digest = hashlib.sha256(hf.config.to_json_string(use_diff=False).encode() if config else b"")
    for name, tensor in hf.state_dict().items():
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 4096)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if flat.device.type != "meta":
            digest.update(flat[::step].float().cpu().numpy().tobytes())
            digest.update(f"{_bits(flat)}".encode())
    return digest.hexdigest()[:16]
