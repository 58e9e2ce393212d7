"""Sequences of tokens and their histories: which are asked about, and when each was read.

Rows of the training order, documents of its store, or any other texts; equal ones are one sequence that was read
several times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from vesalius.corpus.batches import Source
from vesalius.errors import UnknownName, VesaliusError
from vesalius.evaluate.recite import CONTINUATION, PROMPT

if TYPE_CHECKING:
    from vesalius.corpus.viewer import Viewer

Progress = Callable[[int, int], object]
CANARIES = "canary-*"  # ids that `vesalius.corpus.plant` gives


@dataclass(frozen=True)
class Sequences:
    """Token sequences and when they were read.

    Attributes:
        ids: (sequence, prompt + continuation).
        reads: for each sequence the steps at which it was read, in order; a step stands twice if it was read twice.
        group: what each is (`row`, `canary`, `held-out`, ...), (sequence,).
        name: what each is called, (sequence,).
        prompt: tokens of each that are given.
        cut: reads of each that fell on two rows, so that its beginning was out of sight, (sequence,).
        left_out: why sequences that were asked for are missing, and how many.
    """

    ids: NDArray[np.int64]
    reads: tuple[NDArray[np.int64], ...]
    group: tuple[str, ...]
    name: tuple[str, ...]
    prompt: int = PROMPT
    cut: tuple[int, ...] = ()
    left_out: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.reads) == len(self.group) == len(self.name):
            raise VesaliusError("sequences need as many histories, groups and names as rows of ids")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def continuation(self) -> int:
        """Tokens of each that are to be recited."""
        return int(self.ids.shape[1]) - self.prompt

    def exposures(self, step: int) -> NDArray[np.int64]:
        """How often each was read before the checkpoint of that step, (sequence,)."""
        return np.array([np.searchsorted(r, step, side="left") for r in self.reads], dtype=np.int64)

    @property
    def first(self) -> NDArray[np.int64]:
        """The step at which each was first read; -1 for never, (sequence,)."""
        return np.array([r[0] if len(r) else -1 for r in self.reads], dtype=np.int64)

    def to_frame(self) -> pd.DataFrame:
        """One row each: sequence, name, group, first, reads (in all), cut."""
        reads = [len(r) for r in self.reads]
        return pd.DataFrame(
            {
                "sequence": np.arange(len(self)),
                "name": self.name,
                "group": self.group,
                "first": self.first,
                "reads": reads,
                "cut": self.cut or (0,) * len(self),
            }
        )

    def __add__(self, other: Sequences) -> Sequences:
        if (self.prompt, self.continuation) != (other.prompt, other.continuation):
            raise VesaliusError("sequences of different prompts or continuations cannot be put together")
        return Sequences(
            np.concatenate([self.ids, other.ids]),
            self.reads + other.reads,
            self.group + other.group,
            self.name + other.name,
            self.prompt,
            (self.cut or (0,) * len(self)) + (other.cut or (0,) * len(other)),
            self.left_out + other.left_out,
        )


def rows_of(
    source: Source,
    steps: int,
    n: int | None = None,
    prompt: int = PROMPT,
    continuation: int = CONTINUATION,
    *,
    seed: int = 0,
    group: str = "row",
    seen: bool = True,
    progress: Progress | None = None,
) -> Sequences:
    """The beginnings of rows of a training order, each once, with every step at which a row begins like it.

    Args:
        source: the order. steps: of the training.
        n: so many, drawn from the different ones; all if None.
        prompt, continuation: tokens at the row's beginning that are asked about.
        seed: of the draw. group: what they are called.
        seen: False for rows of an order the model was not trained on: they keep no history.

    Raises:
        VesaliusError: if the rows are shorter than that.
    """
    length = prompt + continuation
    if source.length + 1 < length:
        raise VesaliusError(
            f"rows of this run have {source.length + 1} tokens, too few for {prompt} + {continuation}; lower --k"
        )
    keys, where, padded = [], [], 0
    for step in range(steps):
        batch = source.batch(step)
        whole = (batch.segments[:, :length] >= 0).all(1)
        padded += int((~whole).sum())
        for row in np.flatnonzero(whole):
            window = np.ascontiguousarray(batch.ids[row, :length], dtype="<i8")
            keys.append(hashlib.blake2b(window.tobytes(), digest_size=8).digest())
            where.append((step, int(row)))
        if progress is not None:
            progress(step + 1, steps)
    if not keys:
        raise VesaliusError(f"no row of {steps} steps has {length} tokens of text; lower --k")
    hashes = np.frombuffer(b"".join(keys), dtype="<u8")
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    chosen = np.arange(len(first))
    if n is not None and n < len(first):
        chosen = np.random.default_rng([seed, len(first)]).choice(len(first), n, replace=False)
    chosen = chosen[np.argsort(first[chosen], kind="stable")]  # in the order of training
    steps_of = np.array([s for s, _ in where], dtype=np.int64)
    order = np.argsort(inverse, kind="stable")
    bounds = np.searchsorted(inverse[order], np.arange(len(first) + 1))
    reads, ids, names = [], [], []
    for which in chosen:
        step, row = where[first[which]]
        ids.append(_window(source, step, row, length))
        history = np.sort(steps_of[order[bounds[which] : bounds[which + 1]]])
        reads.append(history if seen else history[:0])
        names.append(f"{group} {step}.{row}")
    left = (("padded rows", padded),) if padded else ()
    return Sequences(np.stack(ids), tuple(reads), (group,) * len(ids), tuple(names), prompt, left_out=left)


def _window(source: Source, step: int, row: int, length: int) -> NDArray[np.int64]:
    return source.batch(step).ids[row, :length].astype(np.int64)


def documents_of(
    viewer: Viewer,
    steps: int,
    which: str | Sequence[str] = "*",
    n: int | None = None,
    prompt: int = PROMPT,
    continuation: int = CONTINUATION,
    *,
    seed: int = 0,
    group: str = "document",
    seen: bool = True,
) -> Sequences:
    """The beginnings of documents, equal texts once, with every step at which one of them was read.

    A prompt begins with the separator that stands before every document in training (if the store has one): without
    it a model is asked for a text in a place it never saw it in. A beginning counts as read at a step when by that step
    each of its tokens has been a target (in that epoch).

    Args:
        viewer: of the order. steps: of the training.
        which: ids, or patterns of ids such as `canary-*`; `canaries` is short for that one.
        n: so many, drawn from the different texts; all if None.
        prompt, continuation: tokens at the document's beginning that are asked about, the separator among the prompt's.
        seed: of the draw. group: what they are called. seen: False for documents the model was not trained on.

    Raises:
        UnknownName: if there is no such document.
        VesaliusError: if none is long enough.
    """
    store = viewer.store
    before = [] if store.separator is None or prompt < 2 else [store.separator]
    length = prompt + continuation - len(before)
    index = store.index
    names = index["id"].astype(str)
    wanted = np.zeros(len(index), dtype=bool)
    for pattern in [which] if isinstance(which, str) else which:
        pattern = CANARIES if pattern == "canaries" else pattern
        match = (names == pattern) | names.map(lambda x, p=pattern: fnmatchcase(x, p))
        if not match.any():
            raise UnknownName("document", pattern, names[:2000])
        wanted |= match.to_numpy()
    long = np.diff(store.bounds) - int(store.separator is not None) >= length
    texts = index["sha256"].to_numpy()
    copies = pd.Series(np.arange(len(index))).groupby(texts, sort=False).agg(list)  # the copies of each text
    chosen = list(dict.fromkeys(texts[wanted & long]))
    short = len(set(texts[wanted & ~long]))
    if not chosen:
        raise VesaliusError(f"none of {short} documents has {prompt} + {continuation} tokens; lower --k")
    if n is not None and n < len(chosen):
        pick = np.sort(np.random.default_rng([seed, len(chosen)]).choice(len(chosen), n, replace=False))
        chosen = [chosen[i] for i in pick]
    members = [np.array(copies[text]) for text in chosen]
    flat = np.concatenate(members)
    owner = np.repeat(np.arange(len(members)), [len(m) for m in members])
    reads: list[list[int]] = [[] for _ in members]
    cut = np.zeros(len(members), dtype=np.int64)
    for epoch in range(viewer.base.epochs_until(steps) if seen else 0):
        spots = viewer.base.where((store.bounds[flat][:, None] + np.arange(length)).ravel(), epoch)
        when, rows = (x.reshape(len(flat), length) for x in spots)
        last = when.max(1)
        read = (when >= 0).all(1) & (last < steps)
        split = ((rows != rows[:, :1]) | (when != when[:, :1])).any(1)
        for i in np.flatnonzero(read):
            reads[owner[i]].append(int(last[i]))
            cut[owner[i]] += int(split[i])
    ids = np.stack([np.concatenate([before, store.ids(int(m[0]))[:length]]).astype(np.int64) for m in members])
    left = ((f"documents of fewer than {length} tokens", short),) if short else ()
    titles = tuple(str(names.iloc[int(m[0])]) for m in members)
    history = tuple(np.sort(np.array(r, dtype=np.int64)) for r in reads)
    return Sequences(ids, history, (group,) * len(ids), titles, prompt, tuple(cut.tolist()), left)


def texts_of(
    ids: Iterable[ArrayLike],
    names: Iterable[str],
    prompt: int = PROMPT,
    continuation: int = CONTINUATION,
    *,
    reads: Iterable[ArrayLike] | None = None,
    group: str = "control",
) -> Sequences:
    """The beginnings of any token sequences, with histories if they have any; shorter ones are left out and counted."""
    length, kept, short = prompt + continuation, [], 0
    arrays = [np.asarray(tokens, dtype=np.int64) for tokens in ids]
    histories = [()] * len(arrays) if reads is None else list(reads)
    for array, history, name in zip(arrays, histories, names, strict=True):
        if len(array) < length:
            short += 1
            continue
        kept.append((array[:length], np.sort(np.asarray(history, dtype=np.int64)), name))
    if not kept:
        raise VesaliusError(f"none of {len(arrays)} texts has {prompt} + {continuation} tokens; lower --k")
    left = ((f"texts of fewer than {length} tokens", short),) if short else ()
    tokens, history, titles = zip(*kept, strict=True)
    return Sequences(np.stack(tokens), tuple(history), (group,) * len(kept), tuple(titles), prompt, left_out=left)
