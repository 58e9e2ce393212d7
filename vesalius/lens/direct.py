"""The direct lens: how much of a token's logit each part writes itself, to the last digit.

The state that the unembedding reads is a sum of what the parts wrote. With the final norm's scale held at its actual
value the logit is linear in it:

    logit(a) - logit(b) = sum over parts of (frozen norm of the write) . (W_a - W_b)  +  biases

so the terms of the embedding, all heads, all MLPs (or the neurons of some) and the biases add up to what the model
says. Elhage et al. 2021; primitive of nearly every later attribution. Where the head is more than a linear map (BERT's
transform, Gemma 2's soft-cap) its slope at the actual state is used, and what the slope leaves over is a term of its
own, `head`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import PartError, VesaliusError
from vesalius.lens.base import _decoder, encode, position_of, text_of, token_id
from vesalius.model import Model
from vesalius.model.contributions import contributions, normed
from vesalius.model.weights import bias_of
from vesalius.parts import Part
from vesalius.scores import Scores


@dataclass(frozen=True)
class Attribution:
    """The terms of one logit, or of the difference of two.

    Attributes:
        model: its name. tokens: the prompt's. position: where the next token is foretold.
        answer, against: texts; `against` is None for a plain logit.
        parts: with a term each, in forward order. values: the terms, logits.
        biases: of blocks, norms and unembedding together. head: what a head that is not linear adds; 0 for others.
        logit: what the model itself says, in a pass of its own.
    """

    model: str
    tokens: list[str]
    position: int
    answer: str
    against: str | None
    parts: list[Part]
    values: NDArray[np.float64]
    biases: float
    head: float
    logit: float

    @property
    def total(self) -> float:
        """The sum of all terms; `logit`, up to rounding."""
        return float(self.values.sum() + self.biases + self.head)

    def to_frame(self) -> pd.DataFrame:
        """part, kind, layer, value, and the running total in forward order; biases and head last."""
        rows: list[dict[str, Any]] = [
            {"part": str(p), "kind": p.kind, "layer": p.layer, "value": float(v)}
            for p, v in zip(self.parts, self.values, strict=True)
        ]
        rows.append({"part": "biases", "kind": "bias", "layer": None, "value": self.biases})
        if self.head:
            rows.append({"part": "head", "kind": "head of the model", "layer": None, "value": self.head})
        frame = pd.DataFrame(rows)
        frame["layer"] = frame["layer"].astype("Int64")
        return frame.assign(running=frame["value"].cumsum())

    def by_layer(self) -> pd.DataFrame:
        """What attention and MLP of each layer write together: layer, what, value."""
        frame = self.to_frame()
        names = {"head": "heads", "xhead": "cross-attention", "mlp": "MLP", "neuron": "MLP", "embed": "embedding"}
        frame["what"] = frame["kind"].map(names).fillna("biases")
        return frame.groupby(["layer", "what"], dropna=False, sort=False)["value"].sum().reset_index()

    def scores(self) -> Scores:
        """The same as scores of parts, to be compared with any other method's."""
        info = {"method": "direct", "model": self.model, "unit": "logit", "bias": self.biases, "sum": self.total}
        return Scores(self.parts, self.values, self.values[:, None], info=info)


@torch.no_grad()
def attribute(
    model: Model,
    prompt: str | Sequence[int] | Tensor,
    answer: str | int | None = None,
    against: str | int | None = None,
    *,
    position: int = -1,
    neurons: Sequence[int | str] = (),
    decoder: str | Sequence[int] | Tensor | None = None,
) -> Attribution:
    """Splits the logit of a prompt's next token, or a difference of two, into what each part writes.

    Args:
        model: an opened model with a head.
        prompt: text, or token ids.
        answer: the token asked about, as text or id; the likeliest one if None.
        against: another token, whose logit is taken off.
        position: where the token is foretold; -1 for the end.
        neurons: layers whose MLP is split into neurons, as numbers or `L9.MLP`.
        decoder: what the decoder of an encoder-decoder has written so far.

    Raises:
        VesaliusError: for an empty prompt, a text that is not one token, a layer or position that is not there.

    Example:
        >>> attribute(model, "The capital of France is", " Paris", " Rome").to_frame()   # doctest: +SKIP
    """
    ids = encode(model, prompt)
    written = _decoder(model, decoder)
    read = ids if written is None else written
    place = position_of(read.shape[1], position)
    logits = model.logits(ids, decoder=written)[0, place].float()
    right = int(logits.argmax()) if answer is None else token_id(model, answer)
    wrong = None if against is None else token_id(model, against)
    if wrong == right:
        raise VesaliusError(f"'{text_of(model, right)}' against itself leaves nothing to attribute; name another token")
    split = sorted({_layer(model, n) for n in neurons})
    mask = torch.ones_like(ids)
    found = normed(model, contributions(model, ids, mask, torch.tensor([[place]]), written, split))
    tokens = torch.tensor([right] if wrong is None else [right, wrong])
    signs = torch.tensor([1.0, -1.0])[: len(tokens)]
    with torch.enable_grad():
        leaf = found.final.detach().requires_grad_()
        value = (model.head(leaf, tokens).float() * signs.to(leaf.device)).sum()
        (direction,) = torch.autograd.grad(value, leaf)  # (1, 1, d)
    direction = direction[0, 0].double()
    values = found.values[0, :, 0].double() @ direction
    biases = float(found.bias[0, 0].double() @ direction)
    linear = model.unembedding
    offset = None if linear is None else bias_of(linear)
    if offset is not None:
        biases += float((offset[tokens.to(offset.device)].double().cpu() * signs).sum())
    head = float(value) - float(values.sum()) - biases if linear is None else 0.0
    said = logits[tokens.to(logits.device)].double().cpu() * signs
    return Attribution(
        model.name,
        [text_of(model, int(i)) for i in read[0]],
        place,
        text_of(model, right),
        None if wrong is None else text_of(model, wrong),
        list(found.parts),
        values.cpu().numpy(),
        biases,
        head,
        float(said.sum()),
    )


def _layer(model: Model, name: int | str) -> int:
    """A layer by number or address (`9`, `L9`, `L9.MLP`), of the stack that ends in the logits."""
    match = re.fullmatch(r"(?:dec\.)?L?(\d+)(?:\.mlp)?", str(name), re.IGNORECASE)
    if match is None:
        raise PartError(f"'{name}' names no layer whose neurons can be shown; give L9.MLP, or 9")
    return model.anatomy.require(Part("mlp", int(match[1]), stack=model.anatomy.main.prefix)).layer or 0
