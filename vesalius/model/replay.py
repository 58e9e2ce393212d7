"""A recorded forward pass that can be taken up again at any block, for a few positions, with many variants at once.

Three savings, each exact: start from the recorded residual stream at the first touched block; run variants of one
layer as one batch and unembed only the answer rows at the answer positions; with causal attention recompute only
positions from the first differing token, against the recorded keys and values of the positions before it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vesalius.model.hooks import Hooks, Site, Tap, own_attention
from vesalius.model.memory import memory_errors
from vesalius.model.model import Model

# The largest activation of a batch of variants on a CPU. Larger ones are fresh pages from the system each time, and
# small batches give several cores enough to share: a few per cent of a sweep, and much of its memory.
QUICK_BYTES = 3 * 2**20

# Tensor arguments that blocks take: (batch axis, query-position axis).
_AXES: dict[str, tuple[int, int | None]] = {
    "attention_mask": (0, 2),
    "position_embeddings": (0, 1),
    "position_ids": (0, 1),
    "alibi": (0, None),
    "input_ids": (0, 1),
    "embedding": (0, 1),
}


class _Prefix:
    """Stands in for a cache while blocks are replayed: recorded keys and values, then the new ones."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], copies: int) -> None:
        self.keys, self.values, self.copies = keys, values, copies

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        old_k, old_v = self.keys[layer], self.values[layer]
        if old_k.shape[1] != key.shape[1]:  # keys written per query head while the recording kept them grouped
            group = key.shape[1] // old_k.shape[1]
            old_k = old_k.repeat_interleave(group, dim=1)
        if old_v.shape[1] != value.shape[1]:
            old_v = old_v.repeat_interleave(value.shape[1] // old_v.shape[1], dim=1)
        if self.copies > 1:
            old_k, old_v = old_k.repeat(self.copies, 1, 1, 1), old_v.repeat(self.copies, 1, 1, 1)
        return torch.cat([old_k, key], dim=2), torch.cat([old_v, value], dim=2)


class _Caught(Exception):
    """Ends a block's pass once its keys and values are known."""


class _Catch:
    """Stands in for a cache to learn a block's keys and values, and nothing else of it."""

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> None:
        self.key, self.value = key, value
        raise _Caught


class Tape:
    """One recorded forward pass of a batch, replayable from any block.

    Args:
        model: the model. ids, mask: (row, pos). reads: positions whose logits are wanted (row, read).
        start: first position that later variants may change; positions before it are never recomputed. Ignored (0)
            where attention is not causal.
        capture: sites to record on the way, at all positions.

    Attributes:
        replayable: False where the whole model must be run again for each variant (encoder-decoder models).
    """

    def __init__(
        self,
        model: Model,
        ids: Tensor,
        mask: Tensor,
        reads: Tensor,
        *,
        start: int = 0,
        capture: Sequence[Site] = (),
        decoder: Tensor | None = None,
    ) -> None:
        self.model, self.ids, self.mask, self.decoder = model, ids, mask, decoder
        self.reads = reads.to(model.device)
        self.rows = ids.shape[0]
        stack = model.anatomy.main
        self.replayable = model.kind != "encoder-decoder"
        self.start = min(start, int(reads.min())) if stack.causal and self.replayable else 0
        self.hidden: list[Tensor] = []
        self.arguments: list[dict[str, Any]] = []
        self.sites: dict[Site, Tensor] = {}
        self._record(capture)

    @property
    def length(self) -> int:
        """Positions each replay computes."""
        return self.ids.shape[1] - self.start

    @property
    def reads_ids(self) -> bool:
        """Whether some block reads token ids or embeddings beside the residual stream."""
        return any(isinstance(a.get(name), Tensor) for a in self.arguments for name in ("input_ids", "embedding"))

    def on(self, model: Model) -> Tape:
        """The same recording, replayed through another model object of the same weights."""
        if model is self.model:
            return self
        other = copy.copy(self)
        other.model = model
        return other

    def _record(self, capture: Sequence[Site]) -> None:
        model, blocks = self.model, self.model.anatomy.main.blocks
        cache = DynamicCache() if self.start > 0 else None
        handles = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            bound.update(bound.pop("kwargs", {}))
            self.hidden.append(bound.pop("hidden_states"))
            self.arguments.append(bound)

        every: dict[Site, list[Tap]] = {}
        for site in capture:
            every[site] = [lambda x, s=site: self.sites.__setitem__(s, x)]  # type: ignore[misc]
        last: dict[str, Tensor] = {}
        end = Site("resid_post", len(blocks) - 1, model.anatomy.main.prefix)
        every.setdefault(end, []).append(lambda x: last.__setitem__("x", x))
        inputs = model.inputs(self.ids, self.mask, self.decoder)
        if model.anatomy.main.causal:
            inputs["use_cache"] = cache is not None
        if cache is not None:
            inputs["past_key_values"] = cache
        try:
            for block in blocks if self.replayable else ():
                handles.append(block.module.register_forward_pre_hook(note, with_kwargs=True))
            with torch.no_grad(), memory_errors(), own_attention(model.hf), Hooks(model.hf, model.anatomy, every):
                trunk = model.hf.base_model if self.replayable else model.hf
                trunk(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.final = _gather(last["x"], self.reads)  # (row, read, d)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        if cache is not None:
            for layer in cache.layers:
                assert layer.keys is not None and layer.values is not None
                self.keys.append(layer.keys[:, :, : self.start])
                self.values.append(layer.values[:, :, : self.start])
        for arguments in self.arguments:
            for name, value in arguments.items():
                tensors = value if isinstance(value, tuple) else (value,)
                if any(isinstance(t, Tensor) for t in tensors) and name not in _AXES:
                    raise NotImplementedError(
                        f"blocks of {model.anatomy.family} take a tensor '{name}' unknown to replay"
                    )

    def _at(self, layer: int, copies: int, start: int, stop: int, past: Any) -> dict[str, Any]:
        """The block's recorded arguments for `copies` variants of every row, positions [start, stop)."""

        def cut(name: str, x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(cut(name, t) for t in x)
            if not isinstance(x, Tensor):
                return None if name in ("past_key_values", "layer_past") else x
            batch, query = _AXES[name]
            if query is not None and x.shape[query] > 1:
                x = x.narrow(query, start, stop - start)
            if copies > 1 and x.shape[batch] > 1:
                x = x.repeat(copies, *[1] * (x.dim() - 1))
            return x

        arguments = {name: cut(name, x) for name, x in self.arguments[layer].items()}
        if "use_cache" in arguments:
            arguments["use_cache"] = False
        if past is not None:
            arguments["layer_past" if "layer_past" in arguments else "past_key_values"] = past
        return arguments

    def replay(
        self,
        layer: int,
        copies: int = 1,
        taps: Mapping[Site, Sequence[Tap]] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Runs blocks from `layer` on, for `copies` variants of every row at once.

        Args:
            layer: the first block that is run again.
            taps: see (copies * row, pos - start, ...) tensors, variant-major.
            hidden: residual stream to start from, (copies * row, pos - start, d); the recorded one if None.

        Returns:
            The residual stream after the last block at the reads, (copies * row, read, d).
        """
        model, stack = self.model, self.model.anatomy.main
        if not self.replayable:
            return self._rerun(copies, taps or {})
        if hidden is None:
            hidden = self.hidden[layer][:, self.start :]
            if copies > 1:
                hidden = hidden.repeat(copies, 1, 1)
        end = self.ids.shape[1]
        last = len(stack.blocks) - 1
        trim = self._trimmed(layer, last, taps or {})
        past = _Prefix(self.keys, self.values, copies) if self.start else None
        with memory_errors(), own_attention(model.hf), Hooks(model.hf, model.anatomy, taps or {}):
            shared: dict[int, dict[str, Any]] = {}
            for index in range(layer, last if trim else last + 1):
                key = id(self.arguments[index].get("attention_mask"))
                if key not in shared:  # most blocks share their arguments
                    shared = {key: self._at(index, copies, self.start, end, past)}
                out = stack.blocks[index].module(hidden, **shared[key])
                hidden = out[0] if isinstance(out, tuple) else out
            if trim:
                hidden = self._last_block(hidden, copies, trim)
        reads = (self.reads - (trim or self.start)).repeat(copies, 1)
        return _gather(hidden, reads)

    def _trimmed(self, layer: int, last: int, taps: Mapping[Site, Sequence[Tap]]) -> int:
        """First position the last block has to compute (its queries before the first read matter to nothing), or 0."""
        if not self.model.anatomy.main.causal or layer >= last or any(s.layer == last for s in taps):
            return 0
        first = int(self.reads.min())
        return first if first > self.start else 0

    def _last_block(self, hidden: Tensor, copies: int, first: int) -> Tensor:
        """The last block at positions from `first` on: of the earlier ones only keys and values are computed."""
        last = len(self.model.anatomy.main.blocks) - 1
        block = self.model.anatomy.main.blocks[last].module
        catch = _Catch()
        with suppress(_Caught):
            block(hidden[:, : first - self.start], **self._at(last, copies, self.start, first, catch))
        keys, values = [catch.key] * (last + 1), [catch.value] * (last + 1)
        if self.start:
            keys[last], values[last] = _Prefix(self.keys, self.values, copies).update(catch.key, catch.value, last)
        past = _Prefix(keys, values, 1)
        out = block(hidden[:, first - self.start :], **self._at(last, copies, first, self.ids.shape[1], past))
        return out[0] if isinstance(out, tuple) else out

    def _rerun(self, copies: int, taps: Mapping[Site, Sequence[Tap]]) -> Tensor:
        model = self.model
        last: dict[str, Tensor] = {}
        end = Site("resid_post", model.n_layers - 1, model.anatomy.main.prefix)
        every = {site: list(functions) for site, functions in taps.items()}
        every.setdefault(end, []).append(lambda x: last.__setitem__("x", x))
        decoder = None if self.decoder is None else self.decoder.repeat(copies, 1)
        inputs = model.inputs(self.ids.repeat(copies, 1), self.mask.repeat(copies, 1), decoder) | {"use_cache": False}
        with memory_errors(), own_attention(model.hf), Hooks(model.hf, model.anatomy, every):
            model.hf(**inputs)
        return _gather(last["x"], self.reads.repeat(copies, 1))

    def bytes_per_copy(self) -> int:
        """Rough working memory of one variant: a few activations of one block at a time."""
        a = self.model.anatomy
        width = 6 * a.d_model + 4 * a.d_mlp + 4 * a.n_heads * a.d_head + 3 * a.n_heads * self.ids.shape[1]
        keys = 4 * a.n_heads * a.d_head * self.ids.shape[1]
        return self.rows * (self.length * width + keys) * self.model.hf.dtype.itemsize

    def copies_within(self, memory_gb: float) -> int:
        """How many variants to replay at once: as many as fit the memory and, on a CPU, keep its allocator quick."""
        fit = int(memory_gb * 2**30 / self.bytes_per_copy())
        if self.model.device.type == "cpu":
            widest = self.rows * self.length * max(self.model.anatomy.d_mlp, self.model.anatomy.d_model)
            fit = min(fit, QUICK_BYTES // (widest * self.model.hf.dtype.itemsize))
        return max(1, fit)


def _gather(hidden: Tensor, reads: Tensor) -> Tensor:
    """Positions `reads` (row, read) of hidden (row, pos, d): (row, read, d)."""
    index = reads.to(hidden.device).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)
