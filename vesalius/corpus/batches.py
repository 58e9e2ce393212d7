"""What a trainer is fed: batches of token rows that can be asked for by step.

A source of batches is a pure function of the step. Nothing is consumed, so a run that goes on, a viewer that looks back
and a second process all see the same tokens at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step, for all processes and all micro-batches together.

    Attributes:
        step: the step they belong to, from 0.
        ids: token ids, (row, length + 1): tokens 0..length-1 are read, tokens 1..length are foretold.
        segments: number of the document each token comes from, (row, length + 1); -1 for padding.
        mask: which tokens may be targets, (row, length + 1); None if all.
    """

    step: int
    ids: NDArray[np.int64]
    segments: NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Source(Protocol):
    """Gives the batch of any step, in any order, at the same cost."""

    fingerprint: str  # sha256 over everything that decides the batches
    vocab_size: int
    rows: int  # in one batch
    length: int  # tokens read in one row

    def batch(self, step: int) -> Batch: ...

    def describe(self) -> dict[str, Any]:
        """What decides the batches, as JSON, for the run's manifest."""
        ...
