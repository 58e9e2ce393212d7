"""Prompts that mean nothing: random tokens, repeated or strung together by a random grammar.

What a head does on them is its own mechanism, not the text's doing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.model import Model

REPEATED_ROWS = 16
REPEATED_LENGTH = 48  # tokens before the repeat, or as many as the model's positions allow
STRING_ROWS = 16
STRING_LENGTH = 96
SYMBOLS = 12  # of a row's own
BRANCHES = 3  # symbols that may follow one


def fitting(model: Model, wanted: int, usual: int, times: int = 1) -> int:
    """The tokens of a row: those wanted; the usual number is cut to the model's positions.

    Args:
        times: the row holds as many of them one after another.

    Raises:
        VesaliusError: if another number was asked for than usual, and it does not fit.
    """
    room = (model.n_positions or times * wanted) // times
    if wanted > room and wanted != usual:
        raise VesaliusError(
            f"a length of {wanted} was asked for and {model.name} reads {times * room}; give {room} or less"
        )
    return min(wanted, room)


def n_tokens(model: Model) -> int:
    """Tokens that both the model and its tokenizer know."""
    size = int(model.hf.config.vocab_size)
    return size if model.tokenizer is None else min(size, len(model.tokenizer))


def usable_tokens(model: Model) -> NDArray[np.int64]:
    """Every token but special ones."""
    special = set(model.tokenizer.all_special_ids) if model.tokenizer is not None else set()
    return np.array([i for i in range(n_tokens(model)) if i not in special])


def repeated(model: Model, seed: int, rows: int = REPEATED_ROWS, length: int = REPEATED_LENGTH) -> Tensor:
    """Rows of random different tokens, each row once and then once more: (row, 2 * length).

    Special tokens are left out; where the vocabulary is smaller than the row, tokens come more than once in a half.
    """
    usable = usable_tokens(model)
    length = max(2, fitting(model, length, REPEATED_LENGTH, 2))
    rng = np.random.default_rng([seed, n_tokens(model), length])
    drawn = [rng.choice(usable, length, replace=len(usable) < length) for _ in range(rows)]
    half = torch.from_numpy(np.stack(drawn))
    return torch.cat([half, half], dim=1)


def unrepeated(ids: Tensor) -> Tensor:
    """The same first halves, each followed by another row's: what `repeated` rows are shuffled prompts of."""
    half = ids.shape[1] // 2
    return torch.cat([ids[:, :half], ids[:, half:].roll(1, 0)], dim=1)


class Strings(NamedTuple):
    """Strings of random grammars: `ids` (row, pos), and the number of symbols of each row."""

    ids: Tensor
    symbols: int


def strings(model: Model, seed: int, rows: int = STRING_ROWS, length: int = STRING_LENGTH) -> Strings:
    """Rows of a random automaton each: symbols of the row's own, each followed by one of a few others.

    As in the model problem of Akyürek et al. 2024 (arXiv 2401.12973), so that what followed two or three tokens before
    comes again, and not only what followed one.
    """
    usable = usable_tokens(model)
    symbols = min(SYMBOLS, len(usable))
    if symbols < 3:
        raise VesaliusError(f"{model.name} has {len(usable)} tokens beside special ones; n-grams need at least 3")
    length, branches = fitting(model, length, STRING_LENGTH), min(BRANCHES, symbols - 1)
    rng = np.random.default_rng([seed, len(usable), length, 7])
    ids = np.empty((rows, length), dtype=np.int64)
    for row in range(rows):
        own = rng.choice(usable, symbols, replace=False)
        follows = [rng.choice([s for s in range(symbols) if s != a], branches, replace=False) for a in range(symbols)]
        at = int(rng.integers(symbols))
        for t in range(length):
            ids[row, t] = own[at]
            at = int(rng.choice(follows[at]))
    return Strings(torch.from_numpy(ids), symbols)


def after_ngram(ids: Tensor, n: int) -> Tensor:
    """Where a token stands that followed an earlier occurrence of a query's last n tokens, (row, query, key).

    Key j belongs to query t if x[j-n .. j-1] = x[t-n+1 .. t] and j <= t.

    Example:
        >>> after_ngram(torch.tensor([[5, 6, 5, 6]]), 1)[0].nonzero().tolist()
        [[2, 1], [3, 2]]
    """
    length = ids.shape[1]
    same = ids[:, :, None] == ids[:, None, :]  # x[t] = x[i], (row, t, i)
    run = same.clone()
    for back in range(1, n):
        shifted = torch.zeros_like(same)
        shifted[:, back:, back:] = same[:, : length - back, : length - back]
        run &= shifted
    run[:, : n - 1] = False
    found = torch.zeros_like(run)
    found[:, :, 1:] = run[:, :, :-1]  # the key stands one after the match's last token
    return found & causal(length)


def causal(length: int) -> Tensor:
    """True where the key is not after the query, (query, key)."""
    return torch.ones(length, length, dtype=torch.bool).tril()
