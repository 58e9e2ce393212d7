"""Declared changes of the data from a step on: what a branched run sees in place of what the first run saw.

Two rules, both written down in full so that a run's record can rebuild them:

    tokens   {id: id}, both ways at once. Exact: rows, places and counts stay as they were.
    words    {"he": "she", ...}, whole words, all at once, their capitals kept. Each stretch of one document in a row
             is decoded, changed and tokenised again. What stays unchanged keeps its ids. A stretch that does not come
             back from its own text (a character cut by the row's edge, WordPiece) is left as it is and counted. If the
             row gets longer its end is cut, if shorter it is filled and masked: both are counted by `effect`.

A function of one's own is no rule here: it could not be recorded. For that, rewrite the documents, build a second store
and start an order over it; its rows are then not those of the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.batches import Batch
from vesalius.corpus.documents import CorpusError
from vesalius.corpus.store import Encoder, Tokens
from vesalius.records import request_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from vesalius.corpus.order import Order


@dataclass
class Effect:
    """What a rule did to one batch."""

    changed: int = 0  # tokens (rule `tokens`) or stretches (rule `words`) that were changed
    left: int = 0  # stretches that hold such a word and could not be changed
    cut_tokens: int = 0
    filled_tokens: int = 0


class Rewritten:
    """An order whose batches are changed from a step on; a `Source`.

    Args:
        order: the order (or one rewritten already).
        from_step: the first step that is changed.
        tokens: ids to ids.
        words: words to words.

    Raises:
        CorpusError: not exactly one rule, or an id outside of the vocabulary.
    """

    def __init__(
        self,
        order: Order | Rewritten,
        from_step: int,
        *,
        tokens: Mapping[Any, Any] | None = None,
        words: Mapping[str, str] | None = None,
    ) -> None:
        if bool(tokens) == bool(words):
            raise CorpusError("give one rule that is not empty: tokens={id: id} or words={'he': 'she'}")
        self.order, self.from_step = order, from_step
        self.tokens = {int(k): int(v) for k, v in (tokens or {}).items()}  # JSON has text for keys
        self.words = dict(words or {})
        self.store: Tokens = order.store
        self.rows: int = order.rows
        self.length: int = order.length
        self.vocab_size: int = order.vocab_size
        for number in [*self.tokens, *self.tokens.values()]:
            if not 0 <= number < self.vocab_size:
                raise CorpusError(f"token {number} is outside of the vocabulary of {self.vocab_size}")
        self.fingerprint = request_hash(self.describe())

    def describe(self) -> dict[str, Any]:
        """The order and the rule; `Order.from_description` builds it again."""
        rule = {"tokens": {str(k): v for k, v in self.tokens.items()}} if self.tokens else {"words": self.words}
        return {"kind": "rewritten", "order": self.order.describe(), "from_step": self.from_step, "rule": rule}

    def batch(self, step: int) -> Batch:
        """The batch of a step, changed if it is late enough."""
        return self._changed(step)[0]

    def effect(self, step: int) -> Effect:
        """What the rule did at a step."""
        return self._changed(step)[1]

    def rewritten(self, from_step: int, **rule: Mapping[Any, Any]) -> Rewritten:
        """Changed once more."""
        return Rewritten(self, from_step, **rule)

    def _changed(self, step: int) -> tuple[Batch, Effect]:
        batch = self.order.batch(step)
        if step < self.from_step:
            return batch, Effect()
        if self.tokens:
            table = np.arange(self.vocab_size)
            table[list(self.tokens)] = list(self.tokens.values())
            ids = table[batch.ids]
            return Batch(step, ids, batch.segments, batch.mask), Effect(int((ids != batch.ids).sum()))
        return self._reworded(batch)

    def _reworded(self, batch: Batch) -> tuple[Batch, Effect]:
        effect = Effect()
        ids, segments = batch.ids.copy(), batch.segments.copy()
        mask = np.ones(ids.shape, dtype=bool) if batch.mask is None else batch.mask.copy()
        fill = 0 if self.store.separator is None else self.store.separator
        width = ids.shape[1]
        for row in range(len(ids)):
            real = int((segments[row] >= 0).sum())
            edges = [0, *(np.flatnonzero(np.diff(segments[row, :real])) + 1).tolist(), real]
            parts, changed = [], False
            for first, last in zip(edges, edges[1:], strict=False):
                piece = self._stretch(ids[row, first:last], effect)
                changed = changed or piece is not None
                parts.append((ids[row, first:last].copy() if piece is None else piece, int(segments[row, first])))
            if not changed:
                continue
            new = np.concatenate([p for p, _ in parts])
            where = np.concatenate([np.full(len(p), s) for p, s in parts])
            had = mask[row].sum()
            effect.cut_tokens += max(0, len(new) - width)
            new, where = new[:width], where[:width]
            ids[row], segments[row], mask[row] = fill, -1, False
            ids[row, : len(new)], segments[row, : len(new)], mask[row, : len(new)] = new, where, True
            effect.filled_tokens += max(0, int(had) - len(new))
        return Batch(batch.step, ids, segments, None if mask.all() else mask), effect

    def _stretch(self, ids: NDArray[np.int64], effect: Effect) -> NDArray[np.int64] | None:
        """The ids of one document's stretch after the change; None if nothing changes."""
        ends = -1 if self.store.separator is None else self.store.separator
        head = np.flatnonzero(ids == ends)
        lead = 1 if len(head) and head[0] == 0 else 0
        end = len(ids) - (1 if len(head) and head[-1] == len(ids) - 1 and len(ids) > lead else 0)
        body = ids[lead:end]
        text = self.store.tokenizer.decode(body.tolist(), clean_up_tokenization_spaces=False)
        new = self._pattern.sub(self._replace, text)
        if new == text:
            return None
        same, other = self._encoder([text, new])
        if not np.array_equal(np.asarray(same, dtype=np.int64), body):
            effect.left += 1
            return None
        effect.changed += 1
        return np.concatenate([ids[:lead], np.asarray(other, dtype=np.int64), ids[end:]])

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.store.tokenizer)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest = sorted(self.words, key=len, reverse=True)
        return re.compile(r"\b(?:" + "|".join(map(re.escape, longest)) + r")\b", re.IGNORECASE)

    def _replace(self, match: re.Match[str]) -> str:
        old = match[0]
        new = self.words.get(old) or {k.lower(): v for k, v in self.words.items()}[old.lower()]
        if old in self.words or old.islower():
            return new
        return new.upper() if old.isupper() and len(old) > 1 else new[:1].upper() + new[1:]


def token_map(tokenizer: PreTrainedTokenizerFast, words: Mapping[str, str]) -> dict[int, int]:
    """A rule `tokens` for words: each with and without a space before it, small and capitalised.

    Raises:
        CorpusError: a word with a space before it is not one token, so that the rule cannot be exact; use `words`.
    """
    encoder, table = Encoder(tokenizer), {}
    for old, new in words.items():
        for shape in (str, str.capitalize):
            for space in (" ", ""):
                pair = [np.asarray(i, dtype=np.int64) for i in encoder([space + shape(old), space + shape(new)])]
                if all(len(p) == 1 for p in pair):
                    table[int(pair[0][0])] = int(pair[1][0])
                elif space and shape is str:
                    many = old if len(pair[0]) != 1 else new
                    raise CorpusError(f"' {many}' is not one token of this tokenizer; use the rule words=")
    return table
