"""Rows of plain text for one model: what calibration reads, and what tells whether a change did harm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vesalius.corpus.documents import Document
from vesalius.errors import ModelError, VesaliusError
from vesalius.model import Model
from vesalius.tasks.encode import Encoder


def plain_text(model: Model, corpus: str = "foldoc", rows: int = 16, length: int = 64, skip: int = 0) -> Tensor:
    """The beginnings of some documents, (row, pos): no padding, each its own document.

    Args:
        model: whose tokenizer is used. corpus: a name of `vesalius corpora`, a file or a folder.
        rows, length: how many, and tokens of each. skip: long enough documents to pass over first (held-out text).

    Raises:
        ModelError: without a tokenizer. VesaliusError: if so many long enough documents are not there, or the model
            reads no text of that length.
    """
    found = [ids for _, ids in _chosen(model, corpus, rows, length, skip)]
    if len(found) == rows:
        return torch.tensor(found)
    after = f" after the first {skip}" if skip else ""
    raise VesaliusError(
        f"{corpus} has {len(found)} documents of {length} tokens{after}, and {rows} are needed; name another corpus, "
        "or ask for fewer or shorter ones"
    )


def other_documents(model: Model, corpus: str, rows: int, length: int, skip: int = 0) -> Iterator[Document]:
    """All documents but those whose beginnings `plain_text` gives: what may be trained on when these are held out."""
    from vesalius.corpus import documents

    held = {number for number, _ in _chosen(model, corpus, rows, length, skip)}
    return (document for number, document in enumerate(documents(corpus)) if number not in held)


def _chosen(model: Model, corpus: str, rows: int, length: int, skip: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Number of each document that is long enough, and its first tokens."""
    from vesalius.corpus import documents

    if model.tokenizer is None:
        raise ModelError(f"{model.name} was opened without a tokenizer, so no text can be read; open it with one")
    most = model.n_positions
    if most and length > most:
        raise VesaliusError(
            f"texts of {length} tokens are longer than {model.name} reads ({most}); give a lower length"
        )
    encoder, left = Encoder(model.tokenizer), rows
    for number, document in enumerate(documents(corpus)):
        ids = (*encoder.prefix, *encoder.ids(document.text[: 12 * length]))
        if len(ids) < length:
            continue
        if skip:
            skip -= 1
            continue
        yield number, ids[:length]
        left -= 1
        if not left:
            return
