"""Which code means what: precision and recall of codes for labels, and the texts in which a code is chosen.

    precision = share of a code's tokens that bear the label        recall = share of the label's tokens that have the
    code

A label is anything told token by token: the state of a machine, a bigram, a pattern in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.features.codebooks.books import Codebooks
from vesalius.features.dictionaries.places import place_name
from vesalius.features.dictionaries.reading import Rows, around, words_of
from vesalius.model import Model

Bools = NDArray[np.bool_]


class Chosen(NamedTuple):
    """The codes of every token.

    Attributes:
        codes: by place, (token, group, k), the most similar first.
        row, position: which token each is, (token,).
    """

    codes: dict[str, NDArray[np.int64]]
    row: NDArray[np.int64]
    position: NDArray[np.int64]


@torch.no_grad()
def chosen(model: Model, books: Codebooks, rows: Rows | Sequence[Tensor]) -> Chosen:
    """The codes that are chosen on some text, first positions left out."""
    ids = rows.ids if isinstance(rows, Rows) else tuple(rows)
    found: dict[str, list[Any]] = {place_name(s): [] for s in books.sites}
    row: list[int] = []
    position: list[int] = []
    batched = Rows(ids, books.skip, "", "")
    with books.attached(model):
        for numbers, batch, mask in batched.batches():
            model.hf(**model.inputs(batch, mask))
            for i, number in enumerate(numbers):
                n = len(ids[number]) - books.skip
                for site in books.sites:
                    picked = books.book(site).chosen
                    assert picked is not None
                    found[place_name(site)].append(picked[i, :n].cpu().numpy())
                row += [number] * n
                position += range(books.skip, books.skip + n)
    return Chosen({k: np.concatenate(v) for k, v in found.items()}, np.array(row), np.array(position))


def fit(found: Chosen, labels: Bools, least: int = 3) -> pd.DataFrame:
    """How well single codes tell a label: place, group, code, precision, recall, f1, tokens; the best f1 first.

    Args:
        labels: of every token of `found`, bool. least: codes chosen on fewer tokens are left out.

    Raises:
        VesaliusError: if no token, or every one, bears the label.
    """
    total = int(labels.sum())
    if len(labels) != len(found.row) or not 0 < total < len(labels):
        raise VesaliusError(f"{total} of {len(labels)} tokens bear the label; some must, and some not")
    rows = []
    for place, codes in found.codes.items():
        for group in range(codes.shape[1]):
            mine = codes[:, group]  # (token, k), different codes, so that all k may be counted at once
            size = int(mine.max()) + 1
            tokens = np.bincount(mine.ravel(), minlength=size)
            hits = np.bincount(mine[labels].ravel(), minlength=size)
            for code in np.flatnonzero((tokens >= least) & (hits > 0)):
                precision, recall = hits[code] / tokens[code], hits[code] / total
                rows.append([place, group, int(code), precision, recall, int(tokens[code])])
    table = pd.DataFrame(rows, columns=["place", "group", "code", "precision", "recall", "tokens"])
    table["f1"] = 2 * table["precision"] * table["recall"] / (table["precision"] + table["recall"])
    return table.sort_values("f1", ascending=False, kind="stable", ignore_index=True)


def pattern_labels(model: Model, rows: Rows, found: Chosen, pattern: str) -> Bools:
    """Which tokens lie in a match of a regular expression in their row's text.

    Raises:
        VesaliusError: for a pattern that is none.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise VesaliusError(f"'{pattern}' is not a regular expression: {error}") from None
    marks = []
    for ids in rows.ids:
        words = words_of(model, ids.tolist())
        ends = np.cumsum([len(w) for w in words])
        inside = np.zeros(len(words), dtype=bool)
        for m in wanted.finditer("".join(words)):
            if m.end() > m.start():
                inside |= (ends > m.start()) & (ends - [len(w) for w in words] < m.end())
        marks.append(inside)
    return np.array([marks[r][p] for r, p in zip(found.row, found.position, strict=True)])


def texts_of(
    model: Model, rows: Rows, found: Chosen, place: str, group: int, code: int, shown: int = 8
) -> pd.DataFrame:
    """Texts in which a code is chosen, one of a row: before, token, after, row, position."""
    where = np.flatnonzero((found.codes[place][:, group] == code).any(-1))
    out: list[dict[str, Any]] = []
    seen: set[int] = set()
    for at in where:
        row, spot = int(found.row[at]), int(found.position[at])
        if row in seen or len(out) == shown:
            continue
        seen.add(row)
        ids = rows.ids[row].tolist()
        out.append({**around(model, ids, spot), "row": row, "position": spot})
    return pd.DataFrame(out, columns=["before", "token", "after", "row", "position"])


def commonest(model: Model, rows: Rows, found: Chosen, place: str, group: int, shown: int = 12) -> pd.DataFrame:
    """The codes of a codebook that are chosen most: code, tokens, share, and the words they are chosen on."""
    codes = found.codes[place][:, group]
    counts = np.bincount(codes.ravel())
    out = []
    for code in np.argsort(-counts, kind="stable")[:shown]:
        where = np.flatnonzero((codes == code).any(-1))
        if not len(where):
            break
        ids = np.array([int(rows.ids[found.row[i]][found.position[i]]) for i in where])
        values, times = np.unique(ids, return_counts=True)
        best = values[np.argsort(-times, kind="stable")[:8]]
        words = ", ".join(repr(w) for w in words_of(model, best.tolist()))
        out.append([int(code), len(where), len(where) / len(codes), len(values), words])
    return pd.DataFrame(out, columns=["code", "tokens", "share", "words", "commonest words"])
