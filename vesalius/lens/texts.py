"""What features are measured on: states of the stream over some text, and their moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.intervene import locate
from vesalius.parts import Part, parse_part

Floats = NDArray[np.float64]
ROW = 128  # tokens read at once, of the same text


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the stream's states at one place, over some text.

    Attributes:
        mean: (d_model,). covariance: (d_model, d_model), divided by n. n: tokens. at: the place.
    """

    mean: Floats
    covariance: Floats
    n: int
    at: Part


def token_rows(model: Model, texts: Iterable[str], n: int | None, length: int = ROW) -> list[Tensor]:
    """Rows of token ids (1, pos), each the next `length` tokens of a text, until they hold n tokens to read.

    The first token of a row is not read. None: all of the texts.

    Raises:
        VesaliusError: if the texts hold fewer.
    """
    if model.tokenizer is None:
        raise VesaliusError(f"{model.name} has no tokenizer, so texts cannot be read; open it with one")
    longest = model.n_positions or length
    rows: list[Tensor] = []
    found = 0
    for text in texts:
        ids = torch.tensor(model.tokenizer(text)["input_ids"], dtype=torch.long)
        for piece in ids.split(min(length, longest)):
            if n is not None and found >= n:
                return rows
            if len(piece) > 1:
                rows.append(piece[: None if n is None else n - found + 1].unsqueeze(0))
                found += len(rows[-1][0]) - 1
    if not found or (n is not None and found < n):
        raise VesaliusError(
            f"the texts hold {found} tokens to read (first ones left out), fewer than {n or 1}; give more"
        )
    return rows


def states(model: Model, rows: Sequence[Tensor], at: Part | str) -> Tensor:
    """The stream's states at one place, (token, d_model); the first token of each row, unlike all others, left out."""
    where = locate(parse_part(at))
    stack = where.site.stack
    found = []
    for ids in rows:
        decoder = ids if stack == "dec" else torch.zeros(1, 1, dtype=torch.long) if stack else None
        run = model.run(ids, capture=[where.site], decoder=decoder)
        found.append(run[where.site][0, 1:].float().cpu())
    return torch.cat(found)


def moments(model: Model, rows: Sequence[Tensor], at: Part | str) -> Moments:
    """Mean and covariance of the states at a place over rows of token ids, streamed: d_model^2 numbers for any text."""
    where = parse_part(at)
    model.anatomy.require(where)
    total = np.zeros(model.d_model)
    products = np.zeros((model.d_model, model.d_model))
    count = 0
    for row in rows:
        x = states(model, [row], where).double().numpy()
        total, products, count = total + x.sum(0), products + x.T @ x, count + len(x)
    mean = total / count
    return Moments(mean, products / count - np.outer(mean, mean), count, where)
