"""One description of a language model: sizes, parts by name, and nothing that is learnt.

An `Architecture` is frozen, checked when it is made, and goes to JSON and back unchanged; its hash names it in records
of runs. `build.stock.build` turns it into a model: one of transformers' own classes where one computes the same thing,
this package's parts model otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vesalius.errors import UnknownName, VesaliusError

Kind = Literal["causal", "masked", "encoder-decoder"]
Side = Literal["encoder", "decoder"]
_ITEM = re.compile(r"\[(?P<list>[^\[\]]+)\](?:\*(?P<times>\d+))?|(?P<name>[\w-]+)(?:\*(?P<repeat>\d+))?")


class Section(BaseModel):
    """A frozen group of settings whose refusals are one clear line: unknown keys suggest the near one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        where = type(self).__name__.lower()
        for key in data:
            if key not in type(self).model_fields:
                raise UnknownName(f"{where} key", key, type(self).model_fields)
        try:
            super().__init__(**data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or where
            raise VesaliusError(
                f"{where} key '{key}' cannot be {first.get('input')!r}: {first['msg'].lower()}; change '{key}'"
            ) from None


class Norm(Section):
    """Normalisation: which, where, and what it learns.

    Attributes:
        kind: `layer` (mean and variance) or `rms`. eps: added to the variance.
        bias: a learnt shift; by default with `layer` only, and never with `rms`.
        place: `pre` (before mixer and feed-forward, and once at the end) or `post` (after each sum).
        embedding: one more norm right after the embedding (BLOOM, BERT).
    """

    kind: Literal["layer", "rms"] = "layer"
    eps: float = Field(1e-5, gt=0)
    bias: bool = True
    place: Literal["pre", "post"] = "pre"
    embedding: bool = False

    def __init__(self, **data: Any) -> None:
        data.setdefault("bias", data.get("kind", "layer") != "rms")
        super().__init__(**data)
        if self.kind == "rms" and self.bias:
            raise VesaliusError("norm key 'bias' cannot be True with kind 'rms', which has no shift; drop it")


class Positions(Section):
    """How order is told.

    Attributes:
        kind: `learned` (one vector a position), `rotary`, `alibi`, `t5` (a learnt bias by bucketed distance), `none`.
        base, fraction, scale: rotary only: base of the wavelengths, share of a head's dimensions that turn, and what
            positions are divided by (linear interpolation).
        buckets, max_distance: `t5` only.
    """

    kind: Literal["learned", "rotary", "alibi", "t5", "none"] = "learned"
    base: float = Field(10000.0, gt=1)
    fraction: float = Field(1.0, gt=0, le=1)
    scale: float = Field(1.0, gt=0)
    buckets: int = Field(32, ge=4)
    max_distance: int = Field(128, ge=8)


class Architecture(Section):
    """A model's shape and parts.

    Attributes:
        kind: `causal`, `masked`, or `encoder-decoder` (its encoder reads both ways, its decoder reads the past and, in
            every layer, the encoder).
        layers: blocks (of the decoder). encoder_layers: blocks of the encoder, `layers` if not given.
        d_model, heads, kv_heads, d_head, d_ff: widths; by default kv_heads = heads, d_head = d_model / heads and
            d_ff = 4 d_model.
        vocab_size; max_length: positions that exist (`learned`) or that the model is meant for.
        mixers: what mixes positions, by layer: `attn`, `attn*12`, `[qlstm,attn]*4`, or a list.
        encoder_mixers: those of an encoder-decoder's encoder, `mixers` if not given.
        mixer_options: settings of a mixer by its name, such as {"qlstm": {"block": 16}}.
        feed_forward: a name of `FEEDFORWARDS`.
        block: `sequential`; `parallel` (GPT-NeoX: mixer and feed-forward read the same stream, each with its norm);
            `parallel-shared` (PaLM, GPT-J: with one norm for both).
        bias: biases in all linear maps of the blocks. tied: the output layer is the embedding.
        embedding_scale: `sqrt` multiplies embeddings by sqrt(d_model).
        logit_scale: `inverse-sqrt` divides what goes into the output layer by sqrt(d_model).
        head: `linear`, or `transform` (BERT: one more layer, norm and a bias before and after the output layer).
        token_types: rows of a segment embedding (BERT has 2), 0 for none.
        dropout: on the embedding, attention weights and what each part writes.
        init: a name of `INITS`.

    Example:
        >>> tiny = Architecture(kind="causal", layers=2, d_model=32, heads=4, vocab_size=100, max_length=64)
        >>> tiny.d_head, tiny.d_ff, tiny.stack
        (8, 128, ('attn', 'attn'))
        >>> Architecture.from_json(tiny.to_json()) == tiny
        True
    """

    kind: Kind = "causal"
    layers: int = Field(ge=1)
    encoder_layers: int | None = Field(None, ge=1)
    d_model: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    d_head: int = Field(ge=1)
    d_ff: int = Field(ge=1)
    vocab_size: int = Field(ge=2)
    max_length: int = Field(ge=1)
    mixers: str | tuple[str, ...] = "attn"
    encoder_mixers: str | tuple[str, ...] | None = None
    mixer_options: dict[str, dict[str, Any]] = {}
    feed_forward: str = "gelu"
    block: Literal["sequential", "parallel", "parallel-shared"] = "sequential"
    norm: Norm = Norm()
    positions: Positions = Positions.model_validate({})
    bias: bool = True
    tied: bool = True
    embedding_scale: Literal["none", "sqrt"] = "none"
    logit_scale: Literal["none", "inverse-sqrt"] = "none"
    head: Literal["linear", "transform"] = "linear"
    token_types: int = Field(0, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    init: str = "gpt2"

    def __init__(self, **data: Any) -> None:
        d_model, heads = data.get("d_model"), data.get("heads")
        if isinstance(d_model, int) and isinstance(heads, int) and heads > 0:
            if data.get("d_head") is None:
                if d_model % heads:
                    raise VesaliusError(
                        f"heads={heads} does not divide d_model={d_model}; change one of them, or give d_head"
                    )
                data["d_head"] = d_model // heads
            if data.get("kv_heads") is None:
                data["kv_heads"] = heads
            if data.get("d_ff") is None:
                data["d_ff"] = 4 * d_model
        super().__init__(**data)
        self._check()

    def _check(self) -> None:
        """Refuses what cannot be built, naming the key and the remedy."""
        from vesalius.build.feedforwards import FEEDFORWARDS
        from vesalius.build.init import INITS
        from vesalius.build.mixers import MIXERS

        if self.heads % self.kv_heads:
            raise VesaliusError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}; choose a divisor")
        if len(self.stack) != self.layers:
            raise VesaliusError(
                f"mixers={self.mixers!r} describes {len(self.stack)} layers but layers={self.layers}; make them agree"
            )
        reading = self.encoder_stack
        if reading and len(reading) != self.encoder_depth:
            key = "mixers" if self.encoder_mixers is None else "encoder_mixers"
            raise VesaliusError(
                f"{key}={getattr(self, key)!r} describes {len(reading)} layers but the encoder has "
                f"{self.encoder_depth}; give encoder_mixers for encoder_layers={self.encoder_depth}"
            )
        FEEDFORWARDS.entry(self.feed_forward)
        INITS.entry(self.init)
        for name in sorted({*self.stack, *reading, *self.mixer_options}):
            mixer = MIXERS.get(name)
            mixer.Options(**self.mixer_options.get(name, {}))
            if self.kind == "masked" and not mixer.bidirectional:
                raise VesaliusError(f"mixer '{name}' reads the past only, so kind='masked' cannot use it; use 'attn'")
            if name in reading and not mixer.bidirectional:
                raise VesaliusError(
                    f"mixer '{name}' reads the past only, so the encoder cannot use it; give encoder_mixers='attn'"
                )
            if self.kind != "masked" and not mixer.causal and (name in self.stack or name not in reading):
                raise VesaliusError(f"mixer '{name}' sees the future, so kind='{self.kind}' cannot use it; use 'attn'")
        turning = self.rotary_dims
        if self.positions.kind == "rotary" and (turning < 2 or turning % 2):
            raise VesaliusError(
                f"positions.fraction={self.positions.fraction} turns {turning} of d_head={self.d_head} dimensions; "
                "it must be an even number of at least 2, so change fraction or d_head"
            )
        if self.norm.place == "post" and self.block != "sequential":
            raise VesaliusError(f"norm.place='post' needs block='sequential', not '{self.block}'; change one of them")
        for key in ("encoder_layers", "encoder_mixers"):
            if getattr(self, key) is not None and self.kind != "encoder-decoder":
                raise VesaliusError(f"{key}={getattr(self, key)!r} needs kind='encoder-decoder'; drop it")
        if self.head == "transform" and self.kind != "masked":
            raise VesaliusError(f"head='transform' needs kind='masked', not '{self.kind}'; use head='linear'")
        if self.kind == "encoder-decoder" and self.block != "sequential":
            raise VesaliusError(
                f"block='{self.block}' has no place for cross-attention, so kind='encoder-decoder' cannot use it; use "
                "block='sequential'"
            )
        if self.kind == "encoder-decoder" and self.token_types:
            raise VesaliusError(
                f"token_types={self.token_types} needs kind='causal' or 'masked': the two texts of an encoder-decoder "
                "have a stack each; use token_types=0"
            )

    # -- derived -----------------------------------------------------------------------------------------------------

    @cached_property
    def stack(self) -> tuple[str, ...]:
        """The mixer of every layer, in order."""
        return expand(self.mixers, self.layers)

    @property
    def encoder_depth(self) -> int:
        """Blocks of an encoder-decoder's encoder."""
        return self.encoder_layers or self.layers

    @property
    def encoder_stack(self) -> tuple[str, ...]:
        """The mixer of every layer of the encoder, in order; empty for other kinds."""
        if self.kind != "encoder-decoder":
            return ()
        return expand(self.mixers if self.encoder_mixers is None else self.encoder_mixers, self.encoder_depth)

    @property
    def scaled_scores(self) -> bool:
        """Whether attention divides its scores by sqrt(d_head): unless mixer_options say, all but T5 does."""
        said = self.mixer_options.get("attn", {}).get("scaled")
        return not (self.kind == "encoder-decoder" and self.positions.kind == "t5") if said is None else bool(said)

    def side(self, which: Side) -> Architecture:
        """One stack of an encoder-decoder as an architecture of its own: a masked or a causal model of its parts.

        Example:
            >>> Architecture(
            ...     kind="encoder-decoder", layers=3, encoder_layers=2, d_model=8, heads=2, vocab_size=9, max_length=8
            ... ).side("encoder").layers
            2
        """
        stack = self.encoder_stack if which == "encoder" else self.stack
        options = {name: chosen for name, chosen in self.mixer_options.items() if name in stack}
        options["attn"] = {**self.mixer_options.get("attn", {}), "scaled": self.scaled_scores}
        none = {"encoder_layers": None, "encoder_mixers": None}
        kind = "masked" if which == "encoder" else "causal"
        changes = {"kind": kind, "layers": len(stack), "mixers": stack, "mixer_options": options, **none}
        return Architecture(**{**self.to_dict(), **changes})

    @property
    def rotary_dims(self) -> int:
        """Dimensions of a head that rotary positions turn."""
        return int(self.d_head * self.positions.fraction)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies two projections."""
        from vesalius.build.feedforwards import FEEDFORWARDS

        return bool(FEEDFORWARDS.entry(self.feed_forward).info.get("gated"))

    # -- in and out --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every key present."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """The architecture written by `to_json`.

        Raises:
            VesaliusError: for text that is no JSON object, an unknown key or an impossible value.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise VesaliusError(f"not an architecture: {error}; write one with Architecture.to_json") from None
        if not isinstance(data, dict):
            raise VesaliusError(f"not an architecture: a JSON {type(data).__name__}; it is an object of keys")
        return cls.from_dict(data)

    def replace(self, **changes: Any) -> Architecture:
        """A copy with some keys changed; sections take a mapping of what changes in them.

        Widths that are at their default (d_head, kv_heads, d_ff) follow it, unless they are given too.

        Example:
            >>> Architecture(layers=2, d_model=32, heads=4, vocab_size=9, max_length=8).replace(heads=8).d_head
            4
        """
        data = self.to_dict()
        derived = {"d_head": self.d_model // self.heads, "kv_heads": self.heads, "d_ff": 4 * self.d_model}
        for key, value in derived.items():
            if data[key] == value and key not in changes:
                data[key] = None
        for key, change in changes.items():
            section = isinstance(change, Mapping) and key in ("norm", "positions")
            data[key] = _merged(data[key], change) if section else change
        return type(self)(**data)

    @property
    def hash(self) -> str:
        """Twelve hex digits of the sha256 of its canonical JSON; short forms of the same stack have one hash."""
        data = {**self.to_dict(), "mixers": list(self.stack), "encoder_mixers": list(self.encoder_stack)}
        if self.encoder_stack == expand(self.mixers, self.encoder_depth) or not self.encoder_stack:
            del data["encoder_mixers"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A section with changes; the shift of a norm follows its kind unless given."""
    data = {**old, **new}
    if "kind" in new and "bias" in old and "bias" not in new:
        data.pop("bias")
    return data


def expand(mixers: str | tuple[str, ...] | list[str], layers: int) -> tuple[str, ...]:
    """The mixer of every layer from a short form; one bare name stands for all layers.

    Raises:
        VesaliusError: if it cannot be read.

    Example:
        >>> expand("[qlstm,attn]*2", 4), expand("attn", 3)
        (('qlstm', 'attn', 'qlstm', 'attn'), ('attn', 'attn', 'attn'))
    """
    if not isinstance(mixers, str):
        return tuple(mixers)
    text = mixers.replace(" ", "")
    if re.fullmatch(r"[\w-]+", text):
        return (text,) * layers
    found: list[str] = []
    at = 0
    while at < len(text):
        match = _ITEM.match(text, at)
        if match is None or not (match.end() == len(text) or text[match.end()] == ","):
            raise VesaliusError(
                f"mixers={mixers!r} cannot be read at '{text[at:]}'; write 'attn*12', '[qlstm,attn]*4' or a list"
            )
        if match["list"]:
            found += list(expand(match["list"] + ",", 1)) * int(match["times"] or 1)
        else:
            found += [match["name"]] * int(match["repeat"] or 1)
        at = match.end() + 1
    return tuple(found)
