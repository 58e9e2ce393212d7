"""What was seen when: from a step to its text, and from a text to the steps at which it was a target.

A string is sought in the text, not in one way of tokenising it: the bytes of all tokens are laid end to end (tokenizers
that write bytes: byte-level BPE, Unigram with byte fallback, plain bytes) or each document is decoded (others), so a
match may begin and end within a token. `how="tokens"` seeks the ids that the string alone is tokenised to, which is
faster and misses every other way of cutting it.

A stretch of text counts as seen in an epoch when each of its tokens has been a target. After `step` steps the batches
0..step-1 have been seen, as in the checkpoint of that name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vesalius.corpus.documents import CorpusError
from vesalius.corpus.order import Order
from vesalius.corpus.rewrite import Rewritten
from vesalius.corpus.store import Encoder, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_TOKENS = 1 << 22  # searched at once
NO_TEXT = b"\xff"  # stands for special tokens: it occurs in no UTF-8 text, so that no match crosses them
COLUMNS = ["document", "id", "source", "line", "char", "place", "tokens"]


class Occurrence(NamedTuple):
    """A string in a store."""

    document: int
    char: int  # first character within the document
    place: int  # first token, in the store
    tokens: int  # that it touches


class Viewer:
    """Looks from steps to text and back, for one order.

    Args:
        order: what a run read; if its data were changed from a step on, `step` and `text` show the changed rows, and
            `find` and `exposures` follow the text before the change and mark the steps after it as `rewritten`.
        store: the store of the order; only to be given if it is another handle on the same.

    Example:
        >>> viewer = Viewer(order)  # doctest: +SKIP
        >>> viewer.find("In the beginning")[["id", "epoch", "step", "row"]]  # doctest: +SKIP
    """

    def __init__(self, order: Order | Rewritten, store: Tokens | None = None) -> None:
        self.order = order
        self.store = order.store if store is None else store
        if self.store.fingerprint != order.store.fingerprint:
            raise CorpusError("the order was made for another store; give the store it was made for")
        base: Order | Rewritten = order
        self.changed_from: int | None = None
        while isinstance(base, Rewritten):
            self.changed_from = min(base.from_step, base.from_step if self.changed_from is None else self.changed_from)
            base = base.order
        self.base: Order = base

    def text(self, step: int) -> list[str]:
        """The rows of a step, decoded, special tokens shown, padding left out."""
        batch = self.order.batch(step)
        return [self._decode(ids[segments >= 0]) for ids, segments in zip(batch.ids, batch.segments, strict=True)]

    def step(self, step: int) -> pd.DataFrame:
        """The stretches of documents in a step, one a row of the table.

        Columns: row, position (first, within the row), document, id, source, line, first_token and last_token (within
        the document; last is one past), char_start and char_end (in the document's text), text, rewritten. Of changed
        rows the places in the document are missing.
        """
        batch = self.order.batch(step)
        changed = self.changed_from is not None and step >= self.changed_from
        places, epochs = self.base._places(step)
        index, rows = self.store.index, []
        for row, (ids, segments) in enumerate(zip(batch.ids, batch.segments, strict=True)):
            real = int((segments >= 0).sum())
            edges = [0, *(np.flatnonzero(np.diff(segments[:real])) + 1).tolist(), real]
            for first, last in zip(edges, edges[1:], strict=False):
                number = int(segments[first])
                about = index.iloc[number]
                span: list[int | None] = [None] * 4
                if not changed:
                    stream = np.clip(places[row, [first, last - 1]], 0, None)
                    if self.base.shuffle == "documents":
                        stream = self.base._to_store(stream, int(epochs[row]))
                    begin, end = (stream - self.store.bounds[number]).tolist()
                    end += 1
                    whole = self.store.ids(number)
                    chars = [len(self._decode(whole[:n])) for n in (begin, min(end, len(whole)))]
                    span = [begin, end, *chars]
                text = self._decode(ids[first:last])
                rows.append((row, first, number, about["id"], about["source"], about["line"], *span, text, changed))
        names = ["row", "position", "document", "id", "source", "line", "first_token", "last_token"]
        frame = pd.DataFrame(rows, columns=[*names, "char_start", "char_end", "text", "rewritten"])
        places_in = ["first_token", "last_token", "char_start", "char_end"]
        return frame.astype(dict.fromkeys(places_in, "Int64"))

    def occurrences(self, string: str, how: Literal["text", "tokens"] = "text") -> pd.DataFrame:
        """Where a string stands in the store; `frame.attrs["unplaced"]` counts matches that no tokens could be told of.

        Columns: document, id, source, line, char (first, within the document), place (first token, in the store),
        tokens (that it touches).
        """
        if not string:
            raise CorpusError("an empty string is everywhere; give some text to find")
        if string.encode("utf-8", "replace").decode() != string:
            raise CorpusError("the text to find is not valid Unicode; give it as UTF-8")
        self._unplaced = 0
        if how == "tokens":
            found = list(self._by_tokens(string))
        elif self._bytes is not None:
            found = list(self._by_bytes(string.encode()))
        else:
            found = list(self._by_text(string))
        index = self.store.index
        rows = [(f.document, *index.iloc[f.document][["id", "source", "line"]], *f[1:]) for f in found]
        frame = pd.DataFrame(rows, columns=COLUMNS)
        frame.attrs["unplaced"] = self._unplaced
        return frame

    def find(self, what: str | int, epochs: int = 1, how: Literal["text", "tokens"] = "text") -> pd.DataFrame:
        """The steps at which a string, or the document of a number, was a target, over so many epochs.

        Columns: those of `occurrences`, and epoch, step and row (of the first token), last_step (of the last: the
        exposure is complete after it), split (over rows), rewritten (the data were changed by then).
        """
        spots = self._document(what) if isinstance(what, int) else self.occurrences(what, how)
        rows = []
        for epoch in range(epochs):
            for spot in spots.to_dict("records"):
                seen = self.base.where(np.arange(spot["place"], spot["place"] + spot["tokens"]), epoch)
                if (seen.steps < 0).any():
                    continue  # in a tail that is dropped, or beyond the tokens in use
                split = bool((seen.rows != seen.rows[0]).any() or (seen.steps != seen.steps[0]).any())
                last = int(seen.steps.max())
                changed = self.changed_from is not None and last >= self.changed_from
                rows.append((*spot.values(), epoch, int(seen.steps[0]), int(seen.rows[0]), last, split, changed))
        names = [*COLUMNS, "epoch", "step", "row", "last_step", "split", "rewritten"]
        frame = pd.DataFrame(rows, columns=names).sort_values(["last_step", "row"], ignore_index=True)
        frame.attrs.update(spots.attrs)
        return frame

    def exposures(self, what: str | int, step: int, how: Literal["text", "tokens"] = "text") -> int:
        """How often a string, or a document, was seen whole in the first `step` steps, unchanged."""
        found = self.find(what, self.base.epochs_until(step), how)
        return int(((found["last_step"] < step) & ~found["rewritten"].astype(bool)).sum())

    def counts(self, step: int) -> NDArray[np.int64]:
        """How often each document was seen whole in the first `step` steps, (document,); changed data count too."""
        bounds, last = self.store.bounds, int(self.store.separator is not None)
        total = np.zeros(self.store.n_documents, dtype=np.int64)
        ends = np.maximum(bounds[1:] - last, bounds[:-1] + 1)
        for epoch in range(self.base.epochs_until(step)):
            starts = np.clip(bounds[:-1], 0, self.base.n_tokens - 1)
            stops = np.clip(ends, 1, self.base.n_tokens)
            if self.base.shuffle == "documents":
                layout = self.base._layout(epoch)
                at = np.empty(len(layout.documents), dtype=np.int64)
                at[layout.documents] = np.arange(len(at))
                begin = layout.bounds[at]  # of each document in use
                n = len(begin)
                lengths = (stops - starts)[:n]
                starts = np.concatenate([begin, np.zeros(len(starts) - n, dtype=np.int64)])
                stops = np.concatenate([begin + lengths, np.ones(len(stops) - n, dtype=np.int64)])
            when = self._row_steps(epoch)  # (row of the stream + 1,)
            first, final = starts // self.base.length, (stops - 1) // self.base.length
            cap = len(when) - 1
            pairs = np.stack([np.minimum(first, cap), np.minimum(final + 1, cap)], axis=1).ravel()
            latest = np.maximum.reduceat(when, pairs)[::2]
            total += (latest < step) & (final < cap) & (ends <= self.base.n_tokens)
        return total

    def _row_steps(self, epoch: int) -> NDArray[np.int64]:
        order = self.base
        number = order.table(epoch)
        when = np.zeros(order.rows_per_epoch + 1, dtype=np.int64)
        when[number] = (epoch * order.rows_per_epoch + np.arange(order.rows_per_epoch)) // order.rows
        return when

    def _document(self, number: int) -> pd.DataFrame:
        if not 0 <= number < self.store.n_documents:
            raise CorpusError(f"there is no document {number}; the store has 0 to {self.store.n_documents - 1}")
        first, last = int(self.store.bounds[number]), int(self.store.bounds[number + 1])
        size = max(1, last - first - int(self.store.separator is not None))
        about = self.store.index.iloc[number]
        return pd.DataFrame([(number, about["id"], about["source"], about["line"], 0, first, size)], columns=COLUMNS)

    def _decode(self, ids: NDArray[np.int64]) -> str:
        return str(self.store.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        return token_bytes(self.store.tokenizer)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Runs of whole documents, as numbers of the first and one past the last."""
        bounds, first = self.store.bounds, 0
        while first < self.store.n_documents:
            last = int(np.searchsorted(bounds, bounds[first] + CHUNK_TOKENS, side="right")) - 1
            last = min(max(last, first + 1), self.store.n_documents)
            yield first, last
            first = last

    def _by_bytes(self, needle: bytes) -> Iterator[Occurrence]:
        table = self._bytes or []
        sizes = np.array([len(t) for t in table])
        flat = np.frombuffer(b"".join(table), dtype=np.uint8)
        begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        bounds = self.store.bounds
        for first, last in self._chunks():
            ids = self.store.at(np.arange(bounds[first], bounds[last]))
            lengths = sizes[ids]
            ends = np.cumsum(lengths)
            starts = ends - lengths
            if not len(ends) or not ends[-1]:
                continue
            text = flat[np.repeat(begins[ids] - starts, lengths) + np.arange(ends[-1])].tobytes()
            at = text.find(needle)
            while at >= 0:
                token = int(np.searchsorted(ends, at, side="right"))
                final = int(np.searchsorted(ends, at + len(needle) - 1, side="right"))
                place = int(bounds[first]) + token
                document = int(self.store.document_at(place))
                opening = int(starts[int(bounds[document] - bounds[first])])
                char = len(text[opening:at].decode("utf-8", "replace"))
                if final < int(bounds[document + 1] - bounds[first]):  # stores without separators: one document only
                    yield Occurrence(document, char, place, final - token + 1)
                at = text.find(needle, at + 1)

    def _by_text(self, string: str) -> Iterator[Occurrence]:
        encoder = Encoder(self.store.tokenizer)
        for document in range(self.store.n_documents):
            text = self.store.text(document)
            at = text.find(string)
            if at < 0:
                continue
            same = np.array_equal(np.asarray(encoder([text])[0], dtype=np.int64), self.store.ids(document))
            offsets = np.array(encoder.offsets(text)).reshape(-1, 2)
            while at >= 0:
                touched = np.flatnonzero((offsets[:, 0] < at + len(string)) & (offsets[:, 1] > at))
                if same and len(touched):
                    place = int(self.store.bounds[document] + touched[0])
                    yield Occurrence(document, at, place, int(touched[-1] - touched[0] + 1))
                else:
                    self._unplaced += 1
                at = text.find(string, at + 1)

    def _by_tokens(self, string: str) -> Iterator[Occurrence]:
        wanted = np.asarray(Encoder(self.store.tokenizer)([string])[0], dtype=np.int64)
        bounds = self.store.bounds
        for first, last in self._chunks():
            ids = self.store.at(np.arange(bounds[first], bounds[last]))
            hits = np.flatnonzero(ids[: max(0, len(ids) - len(wanted) + 1)] == wanted[0])
            for hit in hits:
                place = int(bounds[first]) + int(hit)
                document = int(self.store.document_at(place))
                inside = place + len(wanted) <= bounds[document + 1]
                if inside and np.array_equal(ids[hit : hit + len(wanted)], wanted):
                    before = self.store.at(np.arange(bounds[document], place))
                    yield Occurrence(document, len(self._decode(before)), place, len(wanted))


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes] | None:
    """The bytes that each id writes, `NO_TEXT` for special ones; None if ids do not simply write bytes."""
    from vesalius.corpus.tokenizers import byte_signs

    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = state.get("decoder") or {}
    kinds = [d["type"] for d in decoder.get("decoders", [decoder])] if decoder else []
    table = [NO_TEXT] * len(tokenizer)
    special = {entry["id"] for entry in state["added_tokens"]}
    signs = {sign: byte for byte, sign in enumerate(byte_signs())}
    for piece, number in tokenizer.get_vocab().items():
        if number in special:
            continue
        if kinds == ["ByteLevel"]:
            table[number] = bytes(signs[c] for c in piece)
        elif kinds == ["ByteFallback", "Fuse"]:
            spelt = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            table[number] = bytes([int(piece[3:5], 16)]) if spelt else piece.encode()
        else:
            return None
    return table
