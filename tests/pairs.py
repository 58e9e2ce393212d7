"""Pairs of random ids with a plain logit-difference metric, for tests that need no text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from families import VOCAB, some_ids
from torch import Tensor

from vesalius.model import Model, Pairs


@dataclass(frozen=True)
class PlainLogitDiff:
    name: str = "logit-diff"
    unit: str = "logit"

    def tokens(self, pairs: Pairs) -> Tensor:
        return torch.tensor(sorted({t for group in [*pairs.answers, *pairs.wrong] for t in group}))

    def __call__(self, logits: Tensor, pairs: Pairs) -> Tensor:
        where = {int(t): i for i, t in enumerate(self.tokens(pairs))}
        out = []
        for row in range(pairs.n_examples):
            right, wrong = where[pairs.answers[row][0]], where[pairs.wrong[row][0]]
            out.append(logits[row, 0, right] - logits[row, 0, wrong])
        return torch.stack(out)


def random_pairs(model: Model, rows: int = 3, length: int = 9, shared: int = 0, seed: int = 0) -> Pairs:
    clean, corrupted = some_ids(rows, length, seed=seed + 1), some_ids(rows, length, seed=seed + 2)
    corrupted[:, :shared] = clean[:, :shared]
    decoder = torch.tensor([[0, 7, 8]] * rows) if model.kind == "encoder-decoder" else None
    at = 2 if decoder is not None else length - 1
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCAB, (rows, 2), generator=generator)
    return Pairs(
        clean=clean,
        corrupted=corrupted,
        mask=torch.ones_like(clean),
        reads=torch.full((rows, 1), at),
        read_mask=torch.ones(rows, 1, dtype=torch.bool),
        row_example=torch.arange(rows),
        row_right=torch.ones(rows, dtype=torch.bool),
        answers=[[int(t)] for t in tokens[:, 0]],
        wrong=[[int(t) if int(t) != int(tokens[i, 0]) else int(t) - 1] for i, t in enumerate(tokens[:, 1])],
        metric=PlainLogitDiff(),
        decoder=decoder,
    )
