"""Training of classifiers of whole texts: rows with labels, and the loss of the model's class logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vesalius.corpus.batches import Batch
from vesalius.errors import VesaliusError
from vesalius.records import request_hash
from vesalius.train.learning import TextRows
from vesalius.train.objectives.base import Loss, Sample


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Rows of a step and the label of each, (row,)."""

    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class LabelledRows(TextRows):
    """Labelled texts as a `Source`, in an order drawn for each round.

    Args:
        text: (text, pos) ids. labels: (text,) from 0. rows: of a step. seed: of the order. vocab_size: of the model.

    Raises:
        VesaliusError: if there are not as many labels as texts.
    """

    def __init__(self, text: ArrayLike, labels: ArrayLike, rows: int, seed: int, vocab_size: int) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        super().__init__(text, rows, seed, vocab_size)
        if len(self.labels) != len(self.text):
            raise VesaliusError(f"{len(self.labels)} labels for {len(self.text)} texts; give one each")
        self.length = self.text.shape[1]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"kind": "labelled rows", "labels": request_hash({"labels": self.labels.tolist()})}

    def batch(self, step: int) -> LabelledBatch:
        found = super().batch(step)
        return LabelledBatch(step, found.ids, found.segments, None, self.labels[self.chosen(step)])


@dataclass(frozen=True)
class Labelling:
    """The cross-entropy of a text's label, for models whose logits are (row, class); logs `right`.

    Attributes:
        padding: id of tokens that are none; None where every row is full.
    """

    padding: int | None = None

    def sample(self, batch: Batch, seed: int) -> Sample:
        """Whole rows, one target each; nothing is drawn."""
        if not isinstance(batch, LabelledBatch):
            raise VesaliusError("a classifier learns from labels, and the batches have none; give LabelledRows")
        ids = torch.from_numpy(np.ascontiguousarray(batch.ids))
        inputs = {"input_ids": ids}
        if self.padding is not None:
            inputs["attention_mask"] = (ids != self.padding).long()
        return Sample(inputs, torch.from_numpy(batch.labels)[:, None])

    def loss(self, outputs: Any, sample: Sample) -> Loss:
        """See `Objective.loss`."""
        logits, labels = outputs.logits.float(), sample.targets[:, 0]
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return Loss(total, {"right": (logits.detach().argmax(-1) == labels).sum()})
