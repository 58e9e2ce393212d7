"""What a model recites: the next tokens of a text, by greedy decoding from the tokens before them.

    score(row) = 1/m * sum_j [ greedy_j == row[k + j] ],  j = 0..m-1

with the row's first k tokens as the prompt. A row is *extractible* if all m tokens are right; Pythia and its forecasts
take k = m = 32, PaLM k = m = 50. Tokens count at their own position: a continuation that is right but shifted by one
scores about nothing.

Decoding is exact: the token with the largest logit (in float32; of equal ones the lowest id), every token allowed
always, so that a row may go on past an end-of-text token as it did in training. That is `generate(do_sample=False)` of
transformers with no end-of-text token set. All rows have the same length, so nothing is padded; they are decoded
together with the model's own cache of keys and values. Rows decoded together may differ from rows decoded alone by
rounding, which can turn a choice between two tokens whose logits are all but equal: `Recital.margin` tells how close
the closest choice was.

Biderman et al., "Emergent and Predictable Memorization in Large Language Models", arXiv 2304.11158; "Pythia", arXiv
2304.01373; Chowdhery et al., "PaLM", arXiv 2204.02311.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.decode import decode, takes

PROMPT = CONTINUATION = 32  # Pythia's
MEMORY_GB = 0.5  # for the cache and logits of the rows that are decoded together
MOST_ROWS = 256  # more at once win nothing on a CPU
CLOSE = 1e-3  # logits nearer than this to the chosen one may change places with the batch


@dataclass(frozen=True)
class Recital:
    """What was recited of some rows.

    Attributes:
        tokens: what the model said, (row, continuation).
        right: which of them are the row's own, (row, continuation).
        margin: how far the closest choice was from going the other way, in logits, (row,).
        prompt: tokens the model was given of each row.
    """

    tokens: NDArray[np.int64]
    right: NDArray[np.bool_]
    margin: NDArray[np.float32]
    prompt: int

    def __len__(self) -> int:
        return len(self.right)

    @property
    def score(self) -> NDArray[np.float64]:
        """Share of the continuation that is right at its position, (row,)."""
        return self.right.mean(1)

    @property
    def extractible(self) -> NDArray[np.bool_]:
        """Whether all of the continuation is right, (row,)."""
        return np.asarray(self.right.all(1), dtype=bool)

    @property
    def close(self) -> NDArray[np.bool_]:
        """Rows with a choice so close that rounding may have made it, (row,)."""
        return self.margin < CLOSE

    def to_frame(self) -> pd.DataFrame:
        """One row a sequence: score, extractible, right (tokens), run (tokens right before the first error), margin."""
        run = np.cumprod(self.right, axis=1).sum(1)
        return pd.DataFrame(
            {
                "score": self.score,
                "extractible": self.extractible,
                "right": self.right.sum(1),
                "run": run,
                "margin": self.margin,
            }
        )


def recite(
    model: Model,
    rows: ArrayLike | Tensor,
    prompt: int = PROMPT,
    continuation: int = CONTINUATION,
    *,
    batch: int | None = None,
    memory_gb: float = MEMORY_GB,
    progress: Callable[[int, int], object] | None = None,
) -> Recital:
    """Greedy continuations of rows of tokens, compared with how the rows go on.

    Args:
        model: a causal language model.
        rows: token ids, (row, prompt + continuation or more); what is beyond is not looked at.
        prompt: tokens given. continuation: tokens to be recited.
        batch: rows decoded together; as many as `memory_gb` holds, if None.
        memory_gb: for their keys, values and logits.
        progress: told (rows done, rows in all).

    Raises:
        VesaliusError: if rows are too short, hold ids the model does not have, or the model cannot continue text.

    Example:
        >>> import vesalius                                                         # doctest: +SKIP
        >>> model = vesalius.open("runs/train-tiny@step512")                        # doctest: +SKIP
        >>> recite(model, rows, 50, 50).extractible.mean()                          # doctest: +SKIP
        0.016
    """
    ids = _checked(model, rows, prompt, continuation)
    size = batch or rows_in(model, prompt + continuation, memory_gb)
    tokens = np.zeros((len(ids), continuation), dtype=np.int64)
    margin = np.zeros(len(ids), dtype=np.float32)
    for start in range(0, len(ids), size):
        piece = slice(start, start + size)
        lines = decode(model, ids[piece, :prompt].tolist(), continuation)
        tokens[piece], margin[piece] = [line.tokens for line in lines], [line.margin for line in lines]
        if progress is not None:
            progress(min(start + size, len(ids)), len(ids))
    right = tokens == ids[:, prompt : prompt + continuation].numpy()
    return Recital(tokens, right, margin, prompt)


def _checked(model: Model, rows: ArrayLike | Tensor, prompt: int, continuation: int) -> Tensor:
    if model.kind != "causal" or not model.anatomy.main.head:
        what = "has no output layer" if model.kind == "causal" else f"is {model.kind}"
        raise VesaliusError(f"{model.name} {what}; only a causal language model can recite")
    if prompt < 1 or continuation < 1:
        raise VesaliusError(f"a prompt of {prompt} and a continuation of {continuation} tokens: give 1 or more of each")
    ids = torch.as_tensor(np.asarray(rows) if not isinstance(rows, Tensor) else rows).long().cpu()
    need = prompt + continuation
    if ids.dim() != 2 or not len(ids):
        raise VesaliusError(f"rows of shape {tuple(ids.shape)}: give at least one row of tokens, (row, {need} or more)")
    if ids.shape[1] < need:
        raise VesaliusError(
            f"rows have {ids.shape[1]} tokens, too few for {prompt} + {continuation}; lower the prompt or continuation"
        )
    room = model.n_positions
    if room and need - 1 > room:
        raise VesaliusError(
            f"{model.name} has {room} positions, too few for {prompt} + {continuation} tokens; lower one of the two"
        )
    ids = ids[:, :need]
    if int(ids.min()) < 0 or int(ids.max()) >= model.hf.get_input_embeddings().num_embeddings:
        raise VesaliusError(
            f"rows hold token ids {int(ids.min())} to {int(ids.max())}, beyond {model.name}'s vocabulary of "
            f"{model.hf.get_input_embeddings().num_embeddings}; they were made with another tokenizer"
        )
    return ids


def rows_in(model: Model, length: int, memory_gb: float = MEMORY_GB) -> int:
    """How many rows of that length fit the memory: keys and values, the prompt's activations, two sets of logits."""
    bytes_each = torch.finfo(model.dtype).bits // 8
    a = model.anatomy
    cache = 2 * a.n_layers * a.n_kv_heads * a.d_head * length * bytes_each
    work = length * (4 * a.d_model + 2 * a.d_mlp + a.n_heads * length) * bytes_each
    vocabulary = model.hf.config.get_text_config().vocab_size
    logits = vocabulary * 8 * (1 if takes(model.hf, "logits_to_keep") else length)
    return int(max(1, min(MOST_ROWS, memory_gb * 2**30 // (cache + work + logits))))
