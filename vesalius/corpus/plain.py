"""Rows of plain text for one model: what calibration reads, and what tells whether a change did harm."""

from __future__ import annotations

import torch
from torch import Tensor

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
    from vesalius.corpus import documents

    if model.tokenizer is None:
        raise ModelError(f"{model.name} was opened without a tokenizer, so no text can be read; open it with one")
    most = int(getattr(model.hf.config, "max_position_embeddings", 0) or 0)
    if most and length > most:
        raise VesaliusError(
            f"texts of {length} tokens are longer than {model.name} reads ({most}); give a lower length"
        )
    encoder, passed = Encoder(model.tokenizer), 0
    found: list[tuple[int, ...]] = []
    for document in documents(corpus):
        ids = (*encoder.prefix, *encoder.ids(document.text[: 12 * length]))
        if len(ids) < length:
            continue
        if passed < skip:
            passed += 1
            continue
        found.append(ids[:length])
        if len(found) == rows:
            return torch.tensor(found)
    after = f" after the first {skip}" if skip else ""
    raise VesaliusError(
        f"{corpus} has {len(found)} documents of {length} tokens{after}, and {rows} are needed; name another corpus, "
        "or ask for fewer or shorter ones"
    )
