"""Slow references: transformers' own model, one prompt at a time, with PyTorch hooks on modules named here by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pairs import PlainLogitDiff
from torch import Tensor, nn

from vesalius.model import Model, Pairs
from vesalius.parts import Part

Change = Callable[[Tensor], Tensor]


class Layout(NamedTuple):
    """Blocks; the matrix that mixes the heads; the module whose output an MLP adds to the residual stream."""

    blocks: str
    heads: str
    mlp: str


LAYOUTS = {
    "gpt2": Layout("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt-neox": Layout("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "gptj": Layout("transformer.h", "attn.out_proj", "mlp.fc_out"),
    "bloom": Layout("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": Layout("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "llama": Layout("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "qwen3": Layout("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": Layout("model.layers", "self_attn.o_proj", "post_feedforward_layernorm"),
    "bert": Layout("bert.encoder.layer", "attention.output.dense", "output.dense"),
}
T5 = {
    "enc": ("encoder.block", {"head": "layer.0.SelfAttention.o", "mlp": "layer.1.DenseReluDense.wo"}),
    "dec": (
        "decoder.block",
        {"head": "layer.0.SelfAttention.o", "xhead": "layer.1.EncDecAttention.o", "mlp": "layer.2.DenseReluDense.wo"},
    ),
}


def module_of(model: Model, part: Part) -> nn.Module:
    if part.stack:
        blocks, names = T5[part.stack]
        return model.hf.get_submodule(f"{blocks}.{part.layer}.{names[part.kind]}")
    layout = LAYOUTS[model.name]
    return model.hf.get_submodule(f"{layout.blocks}.{part.layer}.{layout.mlp if part.kind == 'mlp' else layout.heads}")


def forward(model: Model, changes: Mapping[Part, Change], **inputs: Any) -> tuple[Tensor, dict[Part, Tensor]]:
    """Logits, and what each part in `changes` did before it was changed: heads (row, pos, d_head), MLPs (row, pos, d).

    Cross-attention reads the encoder's positions and writes at the decoder's, as do all parts of the decoder.
    """
    seen: dict[Part, Tensor] = {}
    handles = []

    def hook(part: Part, change: Change) -> None:
        width = model.hf.config.d_kv if part.stack else getattr(model.hf.config, "head_dim", None)
        width = width or model.hf.config.hidden_size // model.hf.config.num_attention_heads
        lanes = slice(None) if part.kind == "mlp" else slice(part.index * width, (part.index + 1) * width)

        def changed(x: Tensor) -> Tensor:
            flat, x = x, x.view(1, -1, x.shape[-1]) if x.dim() == 2 else x
            seen[part] = x[..., lanes].clone()
            x = x.clone()
            x[..., lanes] = change(seen[part])
            return x.view(flat.shape)

        module = module_of(model, part)
        if part.kind == "mlp":
            handles.append(module.register_forward_hook(lambda _, __, out: changed(out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, args: (changed(args[0]), *args[1:])))

    for part, change in changes.items():
        hook(part, change)
    try:
        return model.hf(**inputs, use_cache=False).logits if model.kind != "masked" else model.hf(**inputs).logits, seen
    finally:
        for handle in handles:
            handle.remove()


class Prompt(NamedTuple):
    """One row of some pairs without its padding."""

    clean: Tensor  # (1, pos)
    corrupted: Tensor
    decoder: Tensor | None
    read: int
    right: int
    wrong: int
    start: int  # padded columns before it

    def ids(self, side: str) -> Tensor:
        return self.clean if side == "clean" else self.corrupted

    def inputs(self, side: str) -> dict[str, Tensor]:
        found = {"input_ids": self.ids(side)}
        return found if self.decoder is None else found | {"decoder_input_ids": self.decoder}

    def difference(self, logits: Tensor) -> Tensor:
        return logits[0, self.read, self.right] - logits[0, self.read, self.wrong]


def prompts(pairs: Pairs) -> list[Prompt]:
    """The rows of pairs with single-token answers, each alone."""
    found = []
    for row in range(pairs.n_rows):
        real = pairs.mask[row].bool()
        start = int(real.nonzero()[0])
        seq2seq = pairs.decoder is not None
        read = int(pairs.reads[row, 0])
        found.append(
            Prompt(
                pairs.clean[row, real][None],
                pairs.corrupted[row, real][None],
                pairs.decoder[row : row + 1] if seq2seq else None,
                read if seq2seq else read - start,
                pairs.answers[row][0],
                pairs.wrong[row][0],
                start,
            )
        )
    return found


def identity(x: Tensor) -> Tensor:
    return x


def record(model: Model, prompt: Prompt, side: str, parts: list[Part]) -> tuple[float, dict[Part, Tensor]]:
    """The logit difference of one run, and what parts did in it."""
    with torch.no_grad():
        logits, seen = forward(model, dict.fromkeys(parts, identity), **prompt.inputs(side))
    return float(prompt.difference(logits)), seen


def patched(model: Model, prompt: Prompt, side: str, changes: Mapping[Part, Change]) -> float:
    """The logit difference of one run with parts changed."""
    with torch.no_grad():
        logits, _ = forward(model, changes, **prompt.inputs(side))
    return float(prompt.difference(logits))


def put(value: Tensor, at: list[int] | None = None) -> Change:
    """Gives a part this value, at some positions or all."""

    def change(x: Tensor) -> Tensor:
        if at is None:
            return value.expand_as(x)
        x = x.clone()
        x[:, at] = value.expand_as(x)[:, at]
        return x

    return change


def padded_pairs(model: Model, lengths: list[int], padding: str, shared: int = 0, seed: int = 0) -> Pairs:
    """Random pairs of prompts of these lengths; the first `shared` tokens of a prompt are those of its counterpart."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max(lengths)
    clean, corrupted, mask = (torch.zeros(rows, width, dtype=torch.long) for _ in range(3))
    last, starts = [], []
    for row, length in enumerate(lengths):
        start = width - length if padding == "left" else 0
        at = slice(start, start + length)
        a, b = (torch.randint(5, model.hf.config.vocab_size, (length,), generator=generator) for _ in range(2))
        b[:shared] = a[:shared]
        clean[row, at], corrupted[row, at], mask[row, at] = a, b, 1
        last.append(start + length - 1)
        starts.append(start)
    tokens = torch.stack([torch.randperm(model.hf.config.vocab_size, generator=generator)[:2] for _ in range(rows)])
    seq2seq = model.kind == "encoder-decoder"
    return Pairs(
        clean=clean,
        corrupted=corrupted,
        mask=mask,
        reads=torch.full((rows, 1), 2) if seq2seq else torch.tensor(last)[:, None],
        read_mask=torch.ones(rows, 1, dtype=torch.bool),
        row_example=torch.arange(rows),
        row_right=torch.ones(rows, dtype=torch.bool),
        answers=tokens[:, :1].tolist(),
        wrong=tokens[:, 1:].tolist(),
        metric=PlainLogitDiff(),
        positions={"first": torch.tensor(starts), "end": torch.tensor(last), "second": torch.tensor(starts) + 1},
        decoder=torch.tensor([[0, 7, 8]] * rows) if seq2seq else None,
    )


class Shelf:
    """A store that is struck down when its k-th piece is about to be kept, and refuses to keep a piece twice."""

    def __init__(self, pieces: int = 10**9) -> None:
        self.pieces = pieces
        self.kept: dict[str, NDArray[np.float64]] = {}

    def get(self, key: str) -> NDArray[np.float64] | None:
        return self.kept.get(key)

    def put(self, key: str, values: NDArray[np.float64]) -> None:
        if len(self.kept) == self.pieces:
            raise KeyboardInterrupt
        assert key not in self.kept  # nothing is computed twice
        self.kept[key] = values.copy()
