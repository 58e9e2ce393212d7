"""Whether a model can fill in: some tokens of a text are replaced by a sentinel, and are to be said after it.

    [mode] x_0 ... x_(s-1) <sentinel> x_(s+k) ... x_n <sentinel>  ->  x_s ... x_(s+k-1)

as denoisers are trained (T5, arXiv 1910.10683; UL2, arXiv 2205.05131): under the prefix mask what is given is read both
ways, under the causal one from the left. Decoding is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vesalius.errors import UnknownName, VesaliusError
from vesalius.model import Model
from vesalius.train.masks import Mask, attention_inputs
from vesalius.train.objectives.special import needs_for, require

ROWS = 256  # decoded together


@dataclass(frozen=True)
class Infill:
    """What was filled in.

    Attributes:
        tokens: what the model said, (row, count).
        right: which of them are the text's own, (row, count).
    """

    tokens: NDArray[np.int64]
    right: NDArray[np.bool_]

    @property
    def exact(self) -> NDArray[np.bool_]:
        """Whether all of the span is right, (row,)."""
        return np.asarray(self.right.all(1), dtype=bool)

    @property
    def accuracy(self) -> float:
        """Share of rows that are exact."""
        return float(self.exact.mean())


def infill(
    model: Model,
    rows: ArrayLike,
    starts: ArrayLike,
    count: int = 1,
    *,
    mode: Literal["R", "X", "S"] | None = None,
    mask: Literal["prefix", "causal"] = "prefix",
    among: ArrayLike | None = None,
    batch: int = ROWS,
) -> Infill:
    """Greedy fillings of one span in each row.

    Args:
        model: a decoder whose tokenizer has sentinels.
        rows: token ids of whole texts, (row, pos).
        starts: where the span begins in each row, (row,).
        count: its tokens.
        mode: whose mode token the text begins with, for models trained with them.
        mask: how what is given is read.
        among: the ids that may be said; all of them if None.
        batch: rows decoded together.

    Raises:
        VesaliusError: if the model is no decoder, lacks the tokens, or a span reaches beyond its row.

    Example:
        >>> infill(model, rows, starts, mode="R").accuracy                           # doctest: +SKIP
        0.97
    """
    if model.kind != "causal":
        raise VesaliusError(f"{model.name} is {model.kind}; only a decoder is asked to fill in here")
    if mask not in ("prefix", "causal"):
        raise UnknownName("mask", mask, ("prefix", "causal"))
    needs = needs_for(model.hf, model.tokenizer)
    sentinel = require(needs, "sentinel_0", "filling in")
    first = [] if mode is None else [require(needs, f"mode_{mode.lower()}", f"filling in with mode {mode}")]
    ids, begin = np.asarray(rows, dtype=np.int64), np.asarray(starts, dtype=np.int64)
    if ids.ndim != 2 or begin.shape != ids.shape[:1] or not len(ids):
        raise VesaliusError(f"rows {ids.shape} and starts {begin.shape}: give one start for each of some rows")
    if count < 1 or begin.min() < 0 or begin.max() + count > ids.shape[1]:
        raise VesaliusError(f"spans of {count} from {begin.min()} to {begin.max()} leave rows of {ids.shape[1]} tokens")
    length = ids.shape[1]
    within = (np.arange(length) >= begin[:, None]) & (np.arange(length) < begin[:, None] + count)  # (row, pos)
    wanted = ids[within].reshape(-1, count)
    given = question(ids, begin, count, sentinel, first)
    barred = _barred(among, int(model.hf.config.vocab_size))
    pieces = [_decode(model, given[i : i + batch], count, mask, barred) for i in range(0, len(ids), batch)]
    said = np.concatenate(pieces)
    return Infill(said, said == wanted)


def question(
    rows: NDArray[np.int64], starts: NDArray[np.int64], count: int, sentinel: int, first: Sequence[int] = ()
) -> NDArray[np.int64]:
    """What the model is given: `first`, the text with the sentinel for the span, and the sentinel that asks for it.

    Example:
        >>> question(np.array([[5, 6, 7, 8]]), np.array([1]), 2, sentinel=0, first=[9]).tolist()
        [[9, 5, 0, 8, 0]]
    """
    n, index = len(rows), np.arange(rows.shape[1])
    opens = index == starts[:, None]  # (row, pos)
    kept = opens | (index < starts[:, None]) | (index >= starts[:, None] + count)
    text = np.where(opens, sentinel, rows)[kept].reshape(n, -1)
    head = np.tile(np.array(first, dtype=np.int64), (n, 1))
    return np.concatenate([head, text, np.full((n, 1), sentinel)], axis=1)


def _barred(among: ArrayLike | None, vocabulary: int) -> torch.Tensor | None:
    if among is None:
        return None
    barred = torch.ones(vocabulary, dtype=torch.bool)
    barred[torch.as_tensor(np.asarray(among, dtype=np.int64))] = False
    return barred


@torch.inference_mode()
def _decode(
    model: Model, given: NDArray[np.int64], count: int, mask: str, barred: torch.Tensor | None
) -> NDArray[np.int64]:
    """The next `count` tokens after what is given, (row, count)."""
    ids = torch.from_numpy(given).to(model.device)
    prefix = torch.full((len(ids),), given.shape[1] - 1, device=ids.device)  # all but the sentinel that asks
    said = []
    with model.alone():
        for _ in range(count):
            more = {}
            if mask == "prefix":
                more = attention_inputs(Mask.prefix(torch.zeros_like(ids), prefix), model.hf)
            logits = model.hf(**{**model.inputs(ids), **more}).logits[:, -1].float()
            if barred is not None:
                logits = logits.masked_fill(barred.to(logits.device), -torch.inf)
            said.append(logits.argmax(-1))
            ids = torch.cat([ids, said[-1][:, None]], 1)
    return torch.stack(said, 1).cpu().numpy()
