"""The order of training: which tokens stand in which row of which step, as a function and not as a state.

The tokens of a store (or the first `tokens` of them) are cut into rows of `length` targets; a row also reads the token
before its first target, so that rows overlap by one and every token is a target exactly once an epoch. (Before the very
first stands the separator; where there is none, that token twice.) Epoch e has a permutation of its own:

    rows        the rows in a shuffled order
    documents   the documents in a shuffled order, then cut, then the rows shuffled
    none        as they lie in the store
    stream      each row of the batch reads on where it stopped in the step before (Languini 2309.11197)

Any step costs the same. The order depends on (tokens, seed, rows, length) alone, not on processes or micro-batches, and
two stores of one shape are shuffled alike. `describe()` is enough to build it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vesalius.corpus.batches import Batch
from vesalius.corpus.documents import CorpusError
from vesalius.corpus.shuffle import Permutation
from vesalius.corpus.store import Tokens
from vesalius.errors import UnknownName
from vesalius.records import request_hash

if TYPE_CHECKING:
    from vesalius.corpus.rewrite import Rewritten

Shuffle = Literal["rows", "documents", "none", "stream"]
Tail = Literal["mask", "drop"]


class Seen(NamedTuple):
    """Where places of a store are targets in one epoch."""

    steps: NDArray[np.int64]  # -1 where the place is never a target (a dropped tail)
    rows: NDArray[np.int64]


class _Layout(NamedTuple):
    """The stream of one epoch: its documents in order, and where each begins."""

    documents: NDArray[np.int64]
    bounds: NDArray[np.int64]


class Order:
    """The batches of a run over a store; a `Source`.

    Args:
        store: a token store, or a view of one.
        length: tokens read in a row.
        rows: in a batch.
        seed: of the permutations.
        shuffle: rows, documents, none or stream.
        tokens: use only the first so many tokens of the store, again and again.
        tail: what becomes of a last row that is not full: "mask" fills it (segment -1, no targets), "drop" leaves
            those tokens out. Streams always drop. `dropped_tokens` says how many.

    Example:
        >>> order = Order(store, length=64, rows=8, seed=1)  # doctest: +SKIP
        >>> again = Order.from_description(order.describe(), store)  # doctest: +SKIP
        >>> digest(order.batch(40)) == digest(again.batch(40))  # doctest: +SKIP
        True
    """

    def __init__(
        self,
        store: Tokens,
        length: int,
        rows: int,
        seed: int = 0,
        shuffle: Shuffle = "rows",
        *,
        tokens: int | None = None,
        tail: Tail = "mask",
    ) -> None:
        for name, value in (("length", length), ("rows", rows), ("tokens", tokens)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise CorpusError(f"{name} is {value!r}; a whole number of at least 1 is wanted")
        for kind, got, known in (("shuffle", shuffle, get_args(Shuffle)), ("tail", tail, get_args(Tail))):
            if got not in known:
                raise UnknownName(kind, str(got), known)
        if tokens is not None and tokens > store.n_tokens:
            raise CorpusError(f"tokens={tokens} of a store that has {store.n_tokens}; ask for at most that")
        self.store, self.length, self.rows, self.seed, self.shuffle, self.tail = (
            store,
            length,
            rows,
            seed,
            shuffle,
            tail,
        )
        self.tokens = tokens
        self.n_tokens = store.n_tokens if tokens is None else tokens
        self.vocab_size = store.vocab_size
        last = int(store.document_at(self.n_tokens - 1))
        self._bounds = np.append(store.bounds[: last + 1], self.n_tokens)  # the last document may be cut
        self._layouts: dict[int, _Layout] = {}
        if shuffle == "stream":
            self._steps = self.n_tokens // (rows * length)
            self.rows_per_epoch = self._steps * rows
        else:
            self.rows_per_epoch = self.n_tokens // length if tail == "drop" else -(-self.n_tokens // length)
        if not self.rows_per_epoch:
            needed = f"{rows} streams of {length}" if shuffle == "stream" else f"one row of {length}"
            raise CorpusError(f"{self.n_tokens} tokens do not fill {needed}; shorten the rows or add text")
        self.dropped_tokens = max(0, self.n_tokens - self.rows_per_epoch * length)
        self.fingerprint = request_hash(self.describe())

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every token is a target once; an epoch may end within a step."""
        return self.rows_per_epoch / self.rows

    def describe(self) -> dict[str, Any]:
        """All that decides the batches."""
        return {
            "kind": "order",
            "store": self.store.fingerprint,
            "length": self.length,
            "rows": self.rows,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "tokens": self.tokens,
            "tail": self.tail,
            "n_tokens": self.n_tokens,
            "rows_per_epoch": self.rows_per_epoch,
            "dropped_tokens": self.dropped_tokens,
        }

    @staticmethod
    def from_description(description: Mapping[str, Any], store: Tokens) -> Order | Rewritten:
        """The order that `describe()` tells of, over the store it was made for.

        Raises:
            CorpusError: the store is another, or the description lacks something.
        """
        if description.get("kind") == "rewritten":
            from vesalius.corpus.rewrite import Rewritten

            base = Order.from_description(description["order"], store)
            return Rewritten(base, description["from_step"], **description["rule"])
        try:
            wanted = description["store"]
            chosen = {k: description[k] for k in ("length", "rows", "seed", "shuffle", "tokens", "tail")}
        except KeyError as error:
            raise CorpusError(f"the description of an order lacks {error}; take what Order.describe() gave") from None
        if wanted != store.fingerprint:
            raise CorpusError(
                f"the order was made for a store with fingerprint {wanted[:12]}, not {store.fingerprint[:12]}; "
                "open the store (and split) it was made for"
            )
        return Order(store, **chosen)

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0; the same whenever it is asked for."""
        places, epochs = self._places(step)
        valid = places < self.n_tokens
        inside = np.clip(places, 0, self.n_tokens - 1)  # (row, length + 1)
        if self.shuffle == "documents":
            for epoch in np.unique(epochs):
                inside[epochs == epoch] = self._to_store(inside[epochs == epoch], int(epoch))
        ids = self.store.at(inside)
        segments = np.searchsorted(self._bounds, inside, side="right") - 1
        fill = 0 if self.store.separator is None else self.store.separator
        before = places < 0
        if self.store.separator is not None:
            ids[before] = fill
        ids[~valid], segments[~valid] = fill, -1
        return Batch(step, ids, segments, None if valid.all() else valid)

    def _places(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places in the stream of its epoch, (row, length + 1), and the epoch of each row."""
        number, epochs = self._rows_of(step)
        return number[:, None] * self.length - 1 + np.arange(self.length + 1), epochs

    def _rows_of(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which row of the epoch's stream each row of the batch is, and its epoch."""
        if step < 0:
            raise CorpusError(f"there is no step {step}; they count from 0")
        if self.shuffle == "stream":
            epoch, at = divmod(step, self._steps)
            streams = (np.arange(self.rows) + epoch) % self.rows  # so that a stream goes on in the next one
            return streams * self._steps + at, np.full(self.rows, epoch)
        running = step * self.rows + np.arange(self.rows)
        epochs, number = running // self.rows_per_epoch, running % self.rows_per_epoch
        if self.shuffle != "none":
            for epoch in np.unique(epochs):
                here = epochs == epoch
                number[here] = self._permutation(int(epoch))(number[here])
        return number, epochs

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(self.rows_per_epoch, self.seed, epoch, "rows")

    def _layout(self, epoch: int) -> _Layout:
        if epoch not in self._layouts:
            n = len(self._bounds) - 1
            documents = Permutation(n, self.seed, epoch, "documents")(np.arange(n))
            bounds = np.concatenate([[0], np.cumsum(np.diff(self._bounds)[documents])])
            if len(self._layouts) > 1:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[epoch] = _Layout(documents, bounds)
        return self._layouts[epoch]

    def _to_store(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        layout = self._layout(epoch)
        at = np.searchsorted(layout.bounds, places, side="right") - 1
        return places - layout.bounds[at] + self._bounds[layout.documents[at]]

    def where(self, places: ArrayLike, epoch: int) -> Seen:
        """In which step and row places of the store are targets during an epoch: the inverse of `batch`."""
        stream = np.array(places, dtype=np.int64, ndmin=1)
        outside = (stream < 0) | (stream >= self.n_tokens)
        stream[outside] = 0
        if self.shuffle == "documents":
            layout = self._layout(epoch)
            documents = np.searchsorted(self._bounds, stream, side="right") - 1
            at = np.empty(len(layout.documents), dtype=np.int64)
            at[layout.documents] = np.arange(len(at))
            stream = stream - self._bounds[documents] + layout.bounds[at[documents]]
        number = stream // self.length
        never = outside | (number >= self.rows_per_epoch)
        if self.shuffle == "stream":
            rows = (number // self._steps - epoch) % self.rows
            steps = epoch * self._steps + number % self._steps
        else:
            if self.shuffle != "none":
                number = self._permutation(epoch).inverse(np.where(never, 0, number))
            running = epoch * self.rows_per_epoch + number
            steps, rows = running // self.rows, running % self.rows
        return Seen(np.where(never, -1, steps), np.where(never, -1, rows))

    def epochs_until(self, step: int) -> int:
        """How many epochs have at least begun once `step` steps are done."""
        done = step * self.rows
        return -(-done // self.rows_per_epoch)

    def table(self, epoch: int) -> NDArray[np.int64]:
        """Row numbers of an epoch in the order they are read, (rows_per_epoch,): the whole index table, to be kept."""
        places = np.arange(self.rows_per_epoch)
        if self.shuffle == "stream":
            at, row = places // self.rows, places % self.rows
            return (row + epoch) % self.rows * self._steps + at
        return places if self.shuffle == "none" else self._permutation(epoch)(places)

    def carries(self, step: int) -> NDArray[np.bool_]:
        """Which rows read on exactly where the same row of the step before stopped, (row,): state may be carried."""
        if step == 0 or self.shuffle not in ("stream", "none"):
            return np.zeros(self.rows, dtype=bool)
        now, before = self._rows_of(step)[0], self._rows_of(step - 1)[0]
        return now == before + 1

    def rewritten(self, from_step: int, **rule: Mapping[Any, Any]) -> Rewritten:
        """The same order with its data changed from a step on; see `vesalius.corpus.rewrite.Rewritten`."""
        from vesalius.corpus.rewrite import Rewritten

        return Rewritten(self, from_step, **rule)


def digest(batch: Batch) -> str:
    """sha256 of the tokens, documents and mask of a batch; equal batches have equal ones on every machine."""
    mask = np.ones(batch.ids.shape, dtype=bool) if batch.mask is None else batch.mask
    head = f"{batch.ids.shape}".encode()
    parts = (batch.ids.astype("<i8"), batch.segments.astype("<i8"), mask.astype("u1"))
    return hashlib.sha256(head + b"".join(p.tobytes() for p in parts)).hexdigest()
