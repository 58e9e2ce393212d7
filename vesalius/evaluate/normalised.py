"""Language-model scores that do not depend on the tokenizer: nats of a text, over its bytes or characters.

Windows of `window` tokens move on by `last`, and only the last `last` tokens of each are scored (all of the first), so
that every token is scored once, with at least window - last tokens before it. With `carry` a recurrent model reads the
text once instead, its state going on from window to window (Languini, arXiv 2309.11197).

    normalised perplexity = exp(nats / characters)        bits per byte = nats / (bytes log 2)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from vesalius.corpus.store import Encoder
from vesalius.errors import VesaliusError


@dataclass(frozen=True)
class TextScore:
    """The loss of a text and the sizes it can be divided by.

    Attributes:
        nats: summed over the tokens.
        tokens, characters, bytes: of the text; bytes are UTF-8.
        window, last: tokens a window, and scored of it.
        carried: whether state went on from window to window.
    """

    nats: float
    tokens: int
    characters: int
    bytes: int
    window: int
    last: int
    carried: bool = False

    @property
    def token_perplexity(self) -> float:
        """Per token: not comparable between tokenizers."""
        return math.exp(self.nats / self.tokens)

    @property
    def per_character(self) -> float:
        """Normalised perplexity over characters, as Languini's reference counts it (and calls it bytes)."""
        return math.exp(self.nats / self.characters)

    @property
    def per_byte(self) -> float:
        """Normalised perplexity over UTF-8 bytes."""
        return math.exp(self.nats / self.bytes)

    @property
    def bits_per_character(self) -> float:
        return self.nats / self.characters / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    def to_dict(self) -> dict[str, Any]:
        """Counts and ratios, for a table."""
        ratios = ("token_perplexity", "per_character", "per_byte", "bits_per_character", "bits_per_byte")
        return {**asdict(self), **{name: getattr(self, name) for name in ratios}}


def text_score(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int,
    last: int | None = None,
    carry: bool = False,
    rows: int = 16,
) -> TextScore:
    """The loss of a causal model on one text.

    Args:
        model: a transformers causal model.
        tokenizer: its fast tokenizer; its end-of-text token, if any, stands before the text.
        text: any length.
        window: tokens read at once.
        last: how many of them are scored; all of them if None.
        carry: for a model all of whose layers are recurrent; windows do not overlap then.
        rows: windows of one batch.

    Raises:
        VesaliusError: for a text of no tokens, and settings that do not fit.

    Example:
        >>> text_score(model.hf, model.tokenizer, text, window=256, last=64).bits_per_byte  # doctest: +SKIP
    """
    last = window if last is None else last
    if not 1 <= last <= window:
        raise VesaliusError(f"last={last} of a window of {window} tokens cannot be scored; give 1 to {window}")
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if carry and (kinds != {"hybrid"} or last != window):
        raise VesaliusError("carry=True takes a model of recurrent layers alone, and last=None; leave one of them out")
    tokens = np.asarray(Encoder(tokenizer)([text])[0], dtype=np.int64)
    if not len(tokens):
        raise VesaliusError("the text has no tokens; give a text that is not empty")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.from_numpy(np.concatenate([[tokens[0] if start is None else start], tokens]))  # 1 + tokens
    was = model.training
    model.eval()
    with torch.no_grad():
        nats = _in_order(model, ids, window) if carry else _in_windows(model, ids, window, last, rows)
    model.train(was)
    return TextScore(nats, len(tokens), len(text), len(text.encode("utf-8")), window, last, carry)


def _in_windows(model: Any, ids: Tensor, window: int, last: int, rows: int) -> float:
    """Windows that end after window, window + last, ... targets; the last one reaches back to be full."""
    n = len(ids) - 1
    ends = sorted({min(e, n) for e in range(window, n + last, last)} | {min(window, n)})
    spans = [(max(0, end - window), before, end) for before, end in zip([0, *ends], ends, strict=False)]
    total = 0.0
    for at in range(0, len(spans), rows):
        part = spans[at : at + rows]
        batch = torch.stack([ids[first : end + 1] for first, _, end in part])  # all are full, or there is one
        nll = _losses(model, batch)
        for row, (first, before, _) in zip(nll, part, strict=True):
            total += float(row[before - first :].double().sum())
    return total


def _in_order(model: Any, ids: Tensor, window: int) -> float:
    cache = DynamicCache(config=model.config)
    pieces = [ids[at : at + window + 1] for at in range(0, len(ids) - 1, window)]
    return sum(float(_losses(model, piece[None], past_key_values=cache).double().sum()) for piece in pieces)


def _losses(model: Any, batch: Tensor, **state: Any) -> Tensor:
    batch = batch.to(next(model.parameters()).device)
    logits = model(batch[:, :-1], use_cache=bool(state), **state).logits.float()  # (row, pos, vocabulary)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").cpu()
