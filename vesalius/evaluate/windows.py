"""Loss of the same tokens with more or less before them: does a model use, and bear, a longer text?

    loss(length) = mean over rows and over the last n tokens of a row of  -log p(token | the `length` tokens before the
    row's last one)

The targets are the same for every length, so that their losses can be compared pair by pair. Press et al. 2022, ALiBi
(arXiv 2108.12409); sliding windows with last-n targets as in Stanic et al. 2023 (arXiv 2309.11197).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vesalius.errors import VesaliusError
from vesalius.model import Model


def last_losses(model: Model, rows: ArrayLike, length: int, last: int, batch: int = 16) -> NDArray[np.float64]:
    """Losses of the last tokens of each row when the model reads so many tokens, nats, (row, last).

    Args:
        model: a causal language model.
        rows: token ids, (row, length + 1 or more); what lies before the last `length + 1` is not read.
        length: tokens read. last: targets, at most `length`.
        batch: rows read together.

    Raises:
        VesaliusError: if rows are too short, or the model has fewer positions than that.

    Example:
        >>> short, long = (last_losses(model, rows, n, 128).mean() for n in (128, 512))  # doctest: +SKIP
    """
    ids = torch.as_tensor(np.asarray(rows, dtype=np.int64))
    if ids.dim() != 2 or not len(ids) or not 1 <= last <= length < ids.shape[1]:
        raise VesaliusError(
            f"the last {last} of {length} tokens of rows {tuple(ids.shape)}: give 1 <= last <= length, and rows of one "
            "token more than length"
        )
    found = np.zeros((len(ids), last))
    with torch.inference_mode(), model.alone():
        for start in range(0, len(ids), batch):
            piece = ids[start : start + batch, -(length + 1) :].to(model.device)
            logits = model.hf(**model.inputs(piece[:, :-1])).logits[:, -last:].float()  # (row, last, vocabulary)
            chance = logits.log_softmax(-1).gather(-1, piece[:, -last:, None])[..., 0]
            found[start : start + batch] = -chance.double().cpu().numpy()
    return found
