"""Observables: linear questions asked of the logits, such as " she" less " he".

    n . logits = n . (W_U norm(x) + b)          at the final norm's output: the direction W_U n, and a constant

Output scale and output projection are part of W_U, whether or not it is tied to the embedding. Logits with a soft cap
are read before it: the cap keeps their order. Dunefsky and Cohan 2024, "Observable Propagation", arXiv 2312.16291.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vesalius.errors import ModelError, VesaliusError
from vesalius.model import Model
from vesalius.model.weights import parameter_of
from vesalius.tasks.encode import Encoder

_SIDES = re.compile(r"(?:^|\s+)-(?:\s+|$)")
_QUOTED = re.compile(r"""(['"])(.*)\1""")


def unembedding(model: Model, tokens: Tensor | None = None) -> Tensor:
    """Rows (token or vocabulary, d_model) that turn the final norm's output into logits, output scale included.

    Raises:
        ModelError: for a model without an unembedding, or with more than a matrix there (BERT's head).
    """
    stack = model.anatomy.main
    if not stack.head:
        raise ModelError(f"{model.name} is an encoder without an unembedding: it has no logits to observe")
    if stack.unembed is None:
        raise ModelError(
            f"the head of {model.name} is more than a matrix (a dense layer, an activation and a norm come first), so "
            "no observable of its logits is linear; open a causal or an encoder-decoder model"
        )
    weight = parameter_of(stack.unembed, "weight")
    assert weight is not None
    rows = (weight if tokens is None else weight[tokens.to(weight.device)]).detach().float()
    if stack.project_out is not None:
        project = parameter_of(stack.project_out, "weight")  # (narrow, d_model)
        assert project is not None
        rows = rows @ project.float()
    return rows * stack.logit_scale


@dataclass(frozen=True)
class Observable:
    """A linear functional of the logits.

    Attributes:
        text: how it was asked for. weights: by token id.
        notes: words of which only the first piece is observed.

    Example:
        >>> Observable.parse(" she - he", model).weights          # doctest: +SKIP
        {1038: 1.0, 384: -1.0}
    """

    text: str
    weights: Mapping[int, float]
    notes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str | Observable, model: Model) -> Observable:
        """Reads `she, her - he, him`: words, each as it stands after a space, less other words.

        Each side is the mean over its words. In quotes a word is taken to the letter (`'ing' - 'ed'`), with the space
        it has or has not; `#123` is a token by its number. The second side may be left out. Of a word of several tokens
        the first is observed, and a note says so.

        Raises:
            VesaliusError: for an empty side, an unknown token, or one that stands on both sides.
        """
        if isinstance(text, Observable):
            return text
        unembedding(model, torch.tensor([0]))  # refuses models without one
        sides = _SIDES.split(text)
        if len(sides) > 2 or not all(s.strip(" ,") for s in sides):
            raise VesaliusError(
                f"'{text}' is no observable; write words less other words, such as 'she - he' or 'she, her - he, him'"
            )
        weights: dict[int, float] = {}
        notes: list[str] = []
        for sign, side in zip((1.0, -1.0), sides, strict=False):
            items = [item.strip() for item in side.split(",") if item.strip()]
            for item in items:
                token = _token(item, model, notes)
                if weights.get(token, sign) * sign < 0:
                    raise VesaliusError(f"observable '{text}': {item} begins with a token of the other side, too")
                weights[token] = weights.get(token, 0.0) + sign / len(items)
        return cls(text.strip(), weights, tuple(dict.fromkeys(notes)))

    def value(self, logits: Tensor) -> Tensor:
        """The value n . logits, (...), from (..., vocabulary)."""
        ids = torch.tensor(list(self.weights), device=logits.device)
        return logits[..., ids].float() @ torch.tensor(list(self.weights.values()), device=logits.device)

    def direction(self, model: Model) -> Tensor:
        """The direction W_U n at the final norm's output, (d_model,)."""
        rows = unembedding(model, torch.tensor(list(self.weights)))
        return torch.tensor(list(self.weights.values()), device=rows.device) @ rows


def _token(item: str, model: Model, notes: list[str]) -> int:
    size = unembedding_size(model)
    if item.startswith("#") and item[1:].isdecimal():
        if int(item[1:]) >= size:
            raise VesaliusError(f"{item} is no token of {model.name}; its vocabulary ends at #{size - 1}")
        return int(item[1:])
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer; name tokens by number, such as #17")
    encoder = Encoder(model.tokenizer)
    quoted = _QUOTED.fullmatch(item)
    ids = encoder.ids(quoted[2]) if quoted else encoder.beyond("the", f" {item}") or encoder.ids(item)
    shown = model.tokenizer.decode(list(ids)) if ids else ""
    if not ids or (ids[0] == model.tokenizer.unk_token_id and shown.strip() != (quoted[2] if quoted else item).strip()):
        raise VesaliusError(f"{item} is unknown to the tokenizer of {model.name}; choose another word")
    if len(ids) > 1:
        notes.append(f"{item} is {encoder.show(ids)} to this tokenizer; only the first piece is observed")
    return int(ids[0])


def unembedding_size(model: Model) -> int:
    """Tokens that have a logit."""
    unembed: Any = model.anatomy.main.unembed
    return int(unembed.weight.shape[0])
