"""Lenses: the residual stream after any block, read as a distribution over next tokens; and a prompt's trajectory.

A lens is a function (model, hidden, layer, tokens) -> logits. The plain one is the model's own ending applied early,

    logit lens(h) = unembed(norm(h))                                      (nostalgebraist 2020)

and the tuned one puts a learnt affine map of that layer before it (`vesalius.lens.tuned`). Layer -1 is the embedding,
layer l is the stream after block l; a lens on the last layer is the model. The model's own final norm, projection,
unembedding and soft-cap are used as they are, so any opened family can be read: BERT through its masked-language head,
T5 through its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import ModelError, UnknownName, VesaliusError
from vesalius.model import Model, Site
from vesalius.registry import Registry

EMBEDDING = -1
CHUNK = 128  # positions whose logits exist at once: 25 MB at 49k words

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Lens(Protocol):
    """Reads hidden states as logits."""

    name: str

    def __call__(self, model: Model, hidden: Tensor, layer: int, tokens: Tensor | None = None) -> Tensor:
        """Logits (..., vocabulary or token) of states (..., d_model) taken at a layer."""
        ...

    def translate(self, hidden: Tensor, layer: int) -> Tensor:
        """What the lens hands to the model's ending, (..., d_model); differentiable in the states."""
        ...


class LogitLens:
    """The model's own final norm and unembedding, applied to any layer."""

    name = "logit"

    def __call__(self, model: Model, hidden: Tensor, layer: int, tokens: Tensor | None = None) -> Tensor:
        return model.readout(hidden, tokens)

    def translate(self, hidden: Tensor, layer: int) -> Tensor:
        return hidden


Opener = Callable[[Model, "str | Path | None", bool], Lens]
LENSES: Registry[Opener] = Registry("lens")


@LENSES.register("logit", "the model's own ending, applied early", "nostalgebraist 2020", needs="nothing")
def _logit(model: Model, source: str | Path | None, transfer: bool) -> Lens:
    if source is not None:
        raise VesaliusError(f"the logit lens is not trained, so it cannot be read from '{source}'; use the tuned lens")
    return LogitLens()


LENSES.add(
    "tuned",
    "vesalius.lens.tuned:open_tuned",
    "a learnt affine map of each layer before the model's own ending",
    "Belrose et al. 2023, arXiv 2303.08112",
    needs="a run of `vesalius lens train`",
)


def open_lens(
    lens: str | Path | Lens, model: Model, source: str | Path | None = None, *, transfer: bool = False
) -> Lens:
    """A lens by name, by the run or folder it was saved to, or as it is.

    Args:
        lens: `logit`, `tuned`, another registered name, or where a tuned lens lies.
        model: what it shall read.
        source: where the named lens lies, if it is a trained one.
        transfer: accept a lens that was trained on another model of the same shape.

    Raises:
        UnknownName: if it is neither a name nor a place.
    """
    if not isinstance(lens, (str, Path)):
        return lens
    if str(lens) in LENSES:
        return LENSES.get(str(lens))(model, source, transfer)
    if "/" in str(lens) or Path(lens).exists():
        return LENSES.get("tuned")(model, lens, transfer)
    raise UnknownName("lens", str(lens), LENSES.names(), "A trained lens is given by its run's folder.")


def layers(model: Model) -> range:
    """All layers a lens can read: -1 for the embedding, then one after each block."""
    return range(EMBEDDING, model.n_layers)


def layer_name(layer: int) -> str:
    """`embed`, `L0`, `L1`, ..."""
    return "embed" if layer == EMBEDDING else f"L{layer}"


class Residuals(NamedTuple):
    """The residual stream of some rows at every layer.

    Attributes:
        states: one (row, pos, d_model) a layer, the embedding first, what the final norm reads last.
        logits: the model's own, (row, pos, vocabulary).
    """

    states: list[Tensor]
    logits: Tensor


def residual_sites(model: Model) -> list[Site]:
    """Where the states of `layers(model)` are recorded; in encoder-decoders, of the decoder."""
    prefix = model.anatomy.main.prefix
    return [Site("resid_pre", 0, prefix), *(Site("resid_post", n, prefix) for n in range(model.n_layers))]


def residuals(model: Model, ids: Tensor, mask: Tensor | None = None, decoder: Tensor | None = None) -> Residuals:
    """One forward pass that records the stream at every layer.

    Args:
        model: a model with a head.
        ids: (row, pos). mask: 1 for real tokens. decoder: decoder ids for encoder-decoder models.

    Raises:
        ModelError: if the model has no head, and so no distribution to compare with.
    """
    sites = residual_sites(model)
    run = model.run(ids, mask, capture=sites, decoder=decoder)
    if run.logits is None:
        raise ModelError(f"{model.name} is an encoder without a head: it foretells nothing, so no lens can read it")
    return Residuals([run[site] for site in sites], run.logits)


# -- prompts


def encode(model: Model, prompt: str | Sequence[int] | Tensor) -> Tensor:
    """A prompt's ids (1, pos): text through the model's tokenizer (with what it puts around a text), or ids as given.

    Raises:
        VesaliusError: if it is empty, or text for a model without a tokenizer, or longer than the model can read.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise VesaliusError("the prompt is empty; give some text")
        if model.tokenizer is None:
            raise VesaliusError(f"{model.name} has no tokenizer; give the prompt as token ids")
        ids = torch.tensor([list(model.tokenizer(prompt)["input_ids"])])
    else:
        ids = torch.as_tensor(prompt).long()
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise VesaliusError(f"a prompt is one row of tokens, and this has shape {tuple(ids.shape)}")
    longest = model.n_positions
    if longest and ids.shape[1] > longest:
        raise VesaliusError(f"the prompt has {ids.shape[1]} tokens, and {model.name} reads {longest}; shorten it")
    return ids


def token_id(model: Model, token: str | int) -> int:
    """The id of a single token, given as text exactly as the tokenizer has it (mostly with its leading space).

    Raises:
        VesaliusError: if the text is unknown, or several tokens, saying which.
    """
    size = int(model.hf.config.vocab_size)
    if isinstance(token, int):
        if not 0 <= token < size:
            raise VesaliusError(f"there is no token {token}; the vocabulary has {size}")
        return token
    if model.tokenizer is None:
        raise VesaliusError(f"{model.name} has no tokenizer; give tokens as ids")
    found = list(model.tokenizer(token, add_special_tokens=False)["input_ids"])
    if found == [model.tokenizer.unk_token_id] and token != model.tokenizer.unk_token:
        raise VesaliusError(f"'{token}' is unknown to the tokenizer of {model.name}; choose another word")
    if len(found) == 1:
        return int(found[0])
    spaced = list(model.tokenizer(f" {token}", add_special_tokens=False)["input_ids"])
    hint = f"; ' {token}' with its leading space is one" if len(spaced) == 1 else "; give one of them, or its id"
    parts = ", ".join(repr(text_of(model, i)) for i in found)
    raise VesaliusError(f"'{token}' is {len(found)} tokens ({parts}){hint}")


def text_of(model: Model, token: int) -> str:
    """A token's text, or its number for a model without a tokenizer."""
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([int(token)]))


def position_of(length: int, position: int) -> int:
    """A position of a prompt, negative ones counted from its end.

    Raises:
        VesaliusError: if there is none such.
    """
    if not -length <= position < length:
        raise VesaliusError(f"there is no position {position}: the prompt has {length} tokens, 0 to {length - 1}")
    return position % length


# -- trajectories


@dataclass(frozen=True)
class Trajectory:
    """What a lens reads at every layer and position of one prompt.

    Attributes:
        model, lens: names. layers: layer numbers, -1 for the embedding. positions: which positions of the prompt.
        tokens: their texts.
        top_ids: likeliest tokens, (layer, pos, k). top_probs: their probabilities.
        entropy: of the lens's distribution, nats, (layer, pos).
        kl: from the model's final distribution to the lens's, KL(final || lens), nats, (layer, pos).
        nll: surprisal of the token that does come next, nats, (layer, pos); NaN at the end, and where reading is not
            from left to right.
        chosen: texts of the tokens asked about. chosen_probs: (layer, pos, token). chosen_ranks: from 1.
        texts: of every token in `top_ids`.
    """

    model: str
    lens: str
    layers: list[int]
    positions: list[int]
    tokens: list[str]
    top_ids: Ints
    top_probs: Floats
    entropy: Floats
    kl: Floats
    nll: Floats
    chosen: list[str]
    chosen_probs: Floats
    chosen_ranks: Ints
    texts: dict[int, str]

    @property
    def depth(self) -> Ints:
        """Prediction depth of each position: the first layer from which on the likeliest token is the final one."""
        same = self.top_ids[:, :, 0] == self.top_ids[-1, :, 0]  # (layer, pos)
        settled = np.logical_and.accumulate(same[::-1])[::-1]
        return np.asarray(self.layers)[settled.argmax(axis=0)]

    def top(self, layer: int, position: int = -1) -> list[tuple[str, float]]:
        """The likeliest tokens at a layer and a place in `positions`, with their probabilities.

        Raises:
            VesaliusError: if there is no such layer or place.
        """
        if layer not in self.layers:
            last = layer_name(self.layers[-1])
            raise VesaliusError(f"there is no layer {layer}: {self.model} has the embedding (-1) and L0 to {last}")
        row, place = self.layers.index(layer), position_of(len(self.positions), position)
        ids, probs = self.top_ids[row, place], self.top_probs[row, place]
        return [(self.texts[int(i)], float(p)) for i, p in zip(ids, probs, strict=True)]

    def to_frame(self) -> pd.DataFrame:
        """A tidy table, a row a layer and position: top token, its p, entropy, kl, nll, p and rank of chosen ones."""
        rows = []
        for i, layer in enumerate(self.layers):
            for j, position in enumerate(self.positions):
                row: dict[str, Any] = {"layer": layer, "name": layer_name(layer), "position": position}
                row |= {"token": self.tokens[j], "top": self.texts[int(self.top_ids[i, j, 0])]}
                row |= {"p": self.top_probs[i, j, 0], "entropy": self.entropy[i, j], "kl": self.kl[i, j]}
                row["nll"] = self.nll[i, j]
                for c, text in enumerate(self.chosen):
                    row |= {f"p {text}": self.chosen_probs[i, j, c], f"rank {text}": int(self.chosen_ranks[i, j, c])}
                rows.append(row)
        return pd.DataFrame(rows)


class Measured(NamedTuple):
    """What is kept of a distribution, for each of some states."""

    top_ids: Tensor  # (state, k)
    top_probs: Tensor
    entropy: Tensor  # (state,)
    kl: Tensor
    nll: Tensor
    chosen_probs: Tensor  # (state, chosen)
    chosen_ranks: Tensor


def measured(log_q: Tensor, log_p: Tensor, following: Tensor, top: int, chosen: Tensor) -> Measured:
    """Numbers of the lens's log-probabilities log_q (state, vocabulary), beside the final ones log_p.

    Args:
        log_q: natural logarithms, float32.
        log_p: the model's own.
        following: ids of the tokens that come next, (state,).
        top: how many of the likeliest to keep.
        chosen: ids asked about, (chosen,).
    """
    q, p = log_q.exp(), log_p.exp()
    best = q.topk(top, dim=-1)
    mine = log_q[:, chosen]
    ranks = torch.stack([(log_q > column[:, None]).sum(-1) + 1 for column in mine.unbind(-1)], -1) if len(chosen) else (
        torch.zeros(len(q), 0, dtype=torch.long)
    )  # fmt: skip
    return Measured(
        best.indices,
        best.values,
        entropy(log_q, q),
        divergence(log_p, log_q, p),
        -log_q.gather(-1, following[:, None])[:, 0],
        mine.exp(),
        ranks,
    )


def divergence(log_p: Tensor, log_q: Tensor, p: Tensor | None = None) -> Tensor:
    """KL(p || q) of log-probabilities (..., vocabulary), nats; words with p = 0 count nothing."""
    p = log_p.exp() if p is None else p
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def entropy(log_q: Tensor, q: Tensor | None = None) -> Tensor:
    """Entropy of log-probabilities (..., vocabulary), nats."""
    q = log_q.exp() if q is None else q
    return -torch.where(q > 0, q * log_q, 0.0).sum(-1)


@torch.no_grad()
def trajectory(
    model: Model,
    prompt: str | Sequence[int] | Tensor,
    lens: str | Path | Lens = "logit",
    *,
    top: int = 5,
    tokens: Sequence[str | int] = (),
    positions: Sequence[int] | None = None,
    decoder: str | Sequence[int] | Tensor | None = None,
    transfer: bool = False,
) -> Trajectory:
    """What a lens reads at every layer and position of a prompt.

    Args:
        model: an opened model with a head.
        prompt: text, or token ids.
        lens: `logit`, `tuned`, the folder of a trained lens, or a lens.
        top: likeliest tokens to keep.
        tokens: tokens whose probability and rank is wanted, as text or ids.
        positions: which positions to read; all if None.
        decoder: what the decoder of an encoder-decoder has written so far; its start token alone if None.
        transfer: accept a lens that was trained on another model of the same shape.

    Raises:
        VesaliusError: for an empty prompt, a text that is not one token, a position that is not there.

    Example:
        >>> found = trajectory(model, "The capital of France is", tokens=[" Paris"])   # doctest: +SKIP
        >>> found.to_frame()                                                           # doctest: +SKIP
    """
    reader = open_lens(lens, model, transfer=transfer)
    ids = encode(model, prompt)
    written = _decoder(model, decoder)
    read = ids if written is None else written
    where = list(range(read.shape[1])) if positions is None else [position_of(read.shape[1], i) for i in positions]
    size = int(model.hf.config.vocab_size)
    if not 1 <= top <= size:
        raise VesaliusError(f"{top} likeliest tokens cannot be shown; ask for 1 to {size}")
    chosen = torch.tensor([token_id(model, t) for t in tokens], dtype=torch.long)
    found = residuals(model, ids, decoder=written)
    at = torch.tensor(where)
    log_p = found.logits[0, at].float().log_softmax(-1).cpu()  # (pos, vocabulary)
    leftward = model.kind in ("causal", "encoder-decoder")
    after = read[0, (at + 1).clamp(max=read.shape[1] - 1)]
    pieces = []
    for layer, states in zip(layers(model), found.states, strict=True):
        here = []
        for start in range(0, len(at), CHUNK):
            part = slice(start, start + CHUNK)
            logits = reader(model, states[0, at[part]], layer)
            here.append(measured(logits.float().log_softmax(-1).cpu(), log_p[part], after[part], top, chosen))
        pieces.append([torch.cat(x) for x in zip(*here, strict=True)])
    whole = Measured(*(torch.stack(x).double().numpy() for x in zip(*pieces, strict=True)))  # type: ignore[arg-type]
    known = (at + 1 < read.shape[1]).numpy() & leftward
    top_ids = np.asarray(whole.top_ids).astype(np.int64)
    return Trajectory(
        model.name,
        reader.name,
        list(layers(model)),
        where,
        [text_of(model, int(read[0, i])) for i in where],
        top_ids,
        np.asarray(whole.top_probs),
        np.asarray(whole.entropy),
        np.asarray(whole.kl),
        np.where(known, np.asarray(whole.nll), np.nan),
        [text_of(model, int(i)) for i in chosen],
        np.asarray(whole.chosen_probs),
        np.asarray(whole.chosen_ranks).astype(np.int64),
        {int(i): text_of(model, int(i)) for i in np.unique(top_ids)},
    )


def _decoder(model: Model, decoder: str | Sequence[int] | Tensor | None) -> Tensor | None:
    """What the decoder has written, after its start token; None for models of one stack."""
    if model.kind != "encoder-decoder":
        if decoder is not None:
            raise VesaliusError(f"{model.name} has no decoder of its own; leave out what it has written")
        return None
    start = torch.tensor([[int(getattr(model.hf.config, "decoder_start_token_id", 0) or 0)]])
    if decoder is None:
        return start
    if isinstance(decoder, str):
        if model.tokenizer is None:
            raise VesaliusError(f"{model.name} has no tokenizer; give what it has written as token ids")
        decoder = list(model.tokenizer(decoder, add_special_tokens=False)["input_ids"])
    return torch.cat([start, torch.as_tensor(decoder).long().view(1, -1)], dim=1)
