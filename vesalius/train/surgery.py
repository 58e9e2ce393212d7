"""New tokens for a trained model: rows added to its embedding and its output layer, each with a known origin.

What the model says about the old tokens does not change: their rows are untouched, and so are their logits for every
text of old tokens. In a tied model a new row is read and written alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vesalius.errors import UnknownName, VesaliusError

How = Literal["mean", "random", "subword", "zero"]


@dataclass(frozen=True)
class Surgery:
    """What was added to a model.

    Attributes:
        ids: id of each token asked for, by its text.
        rows: origin of each row, columns token, id, status (`known`: the vocabulary had it, `spare`: the row was there
            without a token, `added`), origin, pieces (ids whose mean it is, for `subword`).
        vocab_before: rows of the embedding before.
        vocab_after: rows of it now.
    """

    ids: dict[str, int]
    rows: pd.DataFrame
    vocab_before: int
    vocab_after: int


@torch.no_grad()
def add_tokens(
    model: Any,
    tokenizer: Any,
    tokens: Sequence[str],
    how: How = "mean",
    seed: int = 0,
    special: bool = True,
) -> Surgery:
    """Adds tokens to a tokenizer and rows for them to a model, in place.

    Args:
        model: a `PreTrainedModel`; its input embedding, and its output layer whether tied or not, get the rows.
        tokenizer: its tokenizer.
        tokens: texts of the tokens, such as `special.sentinels(100)`; those it has are left as they are.
        how: what new rows hold: `mean` of the old rows (every new token starts with an average logit); `random`: drawn
            from a normal distribution with the old rows' mean and deviation in each dimension; `subword`: the mean of
            the rows of the token's pieces in the old vocabulary; `zero`.
        seed: of `random`.
        special: whether the tokenizer keeps them whole and skips them when it decodes.

    Raises:
        VesaliusError: if a token is given twice, or `subword` finds no piece of it in the old vocabulary.

    Example:
        >>> add_tokens(model, tokenizer, ["[NLU]", "[NLG]", "[S2S]"]).ids            # doctest: +SKIP
        {'[NLU]': 50257, '[NLG]': 50258, '[S2S]': 50259}
    """
    if how not in get_args(How):
        raise UnknownName("way to fill new rows", str(how), get_args(How))
    names = list(tokens)
    if twice := sorted({t for t in names if names.count(t) > 1} | {t for t in names if not t}):
        raise VesaliusError(f"token {twice[0]!r} is given twice or is empty; name each token once")
    had = set(tokenizer.get_vocab())
    fresh = [t for t in names if t not in had]
    pieces = {t: _pieces(tokenizer, t) for t in fresh} if how == "subword" else {}
    before = int(model.get_input_embeddings().weight.shape[0])
    used = sorted({i for i in tokenizer.get_vocab().values() if i < before})  # a padded vocabulary has rows of no token
    tokenizer.add_tokens(fresh, special_tokens=special)
    ids = {t: int(tokenizer.convert_tokens_to_ids(t)) for t in names}
    needed = max(ids.values(), default=-1) + 1
    rng = np.random.default_rng([seed, *b"surgery"])
    old = [t.clone() for t in _tables(model)]
    if needed > before:
        model.resize_token_embeddings(needed, mean_resizing=False)
    for table, was in zip(_tables(model), old, strict=True):
        filled = _rows(was, [ids[t] for t in fresh], used, how, [pieces.get(t, []) for t in fresh], rng)
        table[[ids[t] for t in fresh]] = filled.to(table)
    rows = [
        {
            "token": t,
            "id": ids[t],
            "status": "known" if t in had else "spare" if ids[t] < before else "added",
            "origin": "kept" if t in had else how,
            "pieces": pieces.get(t, []),
        }
        for t in names
    ]
    frame = pd.DataFrame(rows, columns=["token", "id", "status", "origin", "pieces"])
    return Surgery(ids, frame, before, int(model.get_input_embeddings().weight.shape[0]))


def _pieces(tokenizer: Any, token: str) -> list[int]:
    """Ids of the token's text without its brackets, in the vocabulary as it is."""
    text = token.strip("<>[]{}|").replace("_", " ")
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i != unknown]
    if not found:
        raise VesaliusError(f"token {token!r} has no piece in the old vocabulary; use how='mean' or 'random'")
    return found


def _tables(model: Any) -> list[Tensor]:
    """What has one row a token: the input embedding, an untied output layer, its bias."""
    embedding: Tensor = model.get_input_embeddings().weight
    found = [embedding.data]
    output: nn.Module | None = model.get_output_embeddings()
    if output is None:
        return found
    weight, bias = output.weight, getattr(output, "bias", None)
    if isinstance(weight, Tensor) and weight is not embedding and weight.data_ptr() != embedding.data_ptr():
        found.append(weight.data)
    if isinstance(bias, Tensor):
        found.append(bias.data)
    return found


def _rows(
    table: Tensor, ids: list[int], used: list[int], how: How, pieces: list[list[int]], rng: np.random.Generator
) -> Tensor:
    """(token, ...) new rows of one table, in float32 or wider."""
    known = table[torch.tensor(used, device=table.device)]
    known = known.float() if known.dtype in (torch.float16, torch.bfloat16) else known
    shape = (len(ids), *table.shape[1:])
    if not ids or how == "zero":
        return known.new_zeros(shape)
    mean = known.mean(0)
    if how == "mean":
        return mean.expand(shape)
    if how == "random":
        drawn = torch.from_numpy(rng.standard_normal(shape)).to(known)
        return mean + drawn * known.std(0)
    return torch.stack([table[torch.tensor(p, device=table.device)].to(known).mean(0) for p in pieces])
