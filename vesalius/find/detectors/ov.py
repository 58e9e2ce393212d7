"""What a head would write if it attended to one token alone: its value-output circuit, read in the vocabulary.

A token's effective embedding is what the head reads at it; three forms (Gould et al. 2023, arXiv 2312.09230, use the
first two):

    embedding+mlp0   the token's embedding plus what the first MLP makes of it, block 0's attention cut
    mlp0             what the first MLP makes of it, alone
    contextual       what stands at the head's input when the model reads [first token, token]

Then through the norm, W_V, W_O and the final norm's gain to the logits. Biases and the scales of norms are left out:
the same at every token, or one positive factor, they say nothing of the token read. Elhage et al. 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.detectors.looks import heads_with_patterns, run
from vesalius.model import Model, Site
from vesalius.model.hooks import Tap
from vesalius.model.weights import matrix

Form = Literal["contextual", "embedding+mlp0", "mlp0"]
BATCH = 256  # tokens of a pass


class Values(NamedTuple):
    """What heads read at chosen tokens: `v` by block, (token, head, d_head), bias left out."""

    tokens: list[int]
    v: dict[int, Tensor]


def opening(model: Model) -> int:
    """The token a prompt begins with: the tokenizer's own beginning or end, or its first."""
    tokenizer = model.tokenizer
    found = None if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    config = model.hf.config
    ends = [*(found or ()), getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)]
    size = int(config.vocab_size)
    return next((int(t) for t in ends if isinstance(t, int) and 0 <= t < size), 0)


def head_values(model: Model, tokens: Sequence[int], form: Form = "contextual") -> Values:
    """What every head reads at each token, in one of the three forms.

    Raises:
        UnknownName: for another form.
    """
    if form not in get_args(Form):
        raise UnknownName("form of effective embedding", form, get_args(Form))
    prefix = model.anatomy.main.prefix
    pieces: dict[int, list[Tensor]] = {}
    wanted = torch.tensor(list(tokens))
    for group in wanted.split(BATCH):
        ids = torch.stack([torch.full_like(group, opening(model)), group], dim=1)
        found = _contextual(model, ids, prefix) if form == "contextual" else _static(model, ids, prefix, form)
        for layer, v in found.items():
            pieces.setdefault(layer, []).append(v)
    return Values(list(tokens), {layer: torch.cat(v) for layer, v in sorted(pieces.items())})


def _contextual(model: Model, ids: Tensor, prefix: str) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}

    def read(layer: int) -> Tap:
        def tap(v: Tensor) -> None:  # (row, pos, head, d_head)
            bias = model.anatomy.head_in(model.anatomy.block(layer, prefix), "v")[1]
            found[layer] = (v[:, 1] if bias is None else v[:, 1] - bias).float().cpu()

        return tap

    layers = heads_with_patterns(model)[1]
    run(model, ids, None, {Site("v", n, prefix): [read(n)] for n in layers})
    return found


def _static(model: Model, ids: Tensor, prefix: str, form: Form) -> dict[int, Tensor]:
    """From the first block alone, its attention cut."""
    x = _from_first_block(model, ids, prefix, form)
    return {layer: read_values(model, layer, x) for layer in heads_with_patterns(model)[1]}


def _from_first_block(model: Model, ids: Tensor, prefix: str, form: Form) -> Tensor:
    known: dict[str, Tensor] = {}
    taps: dict[Site, Sequence[Tap]] = {
        Site("resid_pre", 0, prefix): [lambda x: known.__setitem__("embedding", x[:, 1])],
        Site("attn_out", 0, prefix): [torch.zeros_like],
        Site("mlp_out", 0, prefix): [lambda x: known.__setitem__("mlp", x[:, 1])],
    }
    run(model, ids, None, taps)
    return known["mlp"] if form == "mlp0" else known["embedding"] + known["mlp"]  # (token, d)


def embeddings(model: Model, tokens: Sequence[int], form: Form = "embedding+mlp0", layer: int = 1) -> Tensor:
    """Effective embeddings of tokens, (token, d): `contextual` is what enters block `layer` at them."""
    prefix = model.anatomy.main.prefix
    wanted = torch.tensor(list(tokens))
    ids = torch.stack([torch.full_like(wanted, opening(model)), wanted], dim=1)
    if form != "contextual":
        return _from_first_block(model, ids, prefix, form).float().cpu()
    found: list[Tensor] = []
    run(model, ids, None, {Site("resid_pre", layer, prefix): [lambda x: found.append(x[:, 1])]})
    return found[0].float().cpu()


@torch.no_grad()
def read_values(model: Model, layer: int, x: Tensor) -> Tensor:
    """What the heads of a block read at effective embeddings, (token, d) -> (token, head, d_head), bias left out."""
    block = model.anatomy.block(layer, model.anatomy.main.prefix)
    x = x.to(model.device, model.dtype)
    read = x if model.anatomy.post_norm else block.norm_in.module(x)
    weight, _ = model.anatomy.head_in(block, "v")  # (head, d, d_head)
    return torch.einsum("td,hde->the", read, weight.to(read.dtype)).float().cpu()


def ov_logits(model: Model, values: Values, vocabulary: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Block by block, how each head's write at each token bears on the logits of `vocabulary`, (head, token, word)."""
    for layer, v in values.v.items():
        with torch.no_grad():
            out = model.anatomy.head_out(model.anatomy.block(layer, model.anatomy.main.prefix))  # (head, d_head, d)
            yield layer, bearing(model, layer, torch.einsum("the,hed->htd", v, out.float().cpu()), vocabulary)


@torch.no_grad()
def bearing(model: Model, layer: int, write: Tensor, vocabulary: Sequence[int] | None = None) -> Tensor:
    """How a write of heads of a block, (..., d), bears on the logits of these words (of all, if None), (..., word).

    Through the gains of the norms that follow; up to one positive factor a write.
    """
    stack, one = model.anatomy.main, torch.ones(1)
    if stack.unembed is None:
        raise VesaliusError(f"{model.name} has no plain output matrix; its heads cannot be read in the vocabulary")
    out = matrix(stack.unembed)
    out = (out if vocabulary is None else out[:, torch.tensor(list(vocabulary))]).float().cpu()  # (d, word)
    norm = stack.blocks[layer].norm_attn_out
    if norm is not None:
        write = norm.linear(write, one)
    if stack.final_norm is not None:
        write = stack.final_norm.linear(write, one)
    if stack.project_out is not None:
        write = stack.project_out(write.to(model.device, model.dtype)).float().cpu()
    return write @ out
