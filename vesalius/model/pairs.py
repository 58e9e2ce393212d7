"""Clean and counterfactual prompts as tensors, and what is read from the logits.

`Pairs` is what a task hands to the bench: nothing below `tasks/` knows about text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor


class Metric(Protocol):
    """A number per example, differentiable in the logits. Larger means more of the right answer."""

    @property
    def name(self) -> str:
        """The registered name."""

    @property
    def unit(self) -> str:
        """What one step of the value is: logit, nat, probability."""

    def tokens(self, pairs: Pairs) -> Tensor | None:
        """Vocabulary ids the metric looks at, (token,), or None when it needs all of them (a softmax)."""

    def __call__(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Values (example,) from logits (row, read, len(tokens) or vocabulary)."""


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts, aligned token by token, and where and how to read the answer.

    A *row* is one sequence given to the model. Single-token answers have one row an example; multi-token answers have
    one row for each acceptable or wrong continuation (teacher-forced).

    Attributes:
        clean, corrupted: token ids (row, pos). Padding is on the left for causal models, on the right otherwise.
        mask: 1 for real tokens, 0 for padding (row, pos); the same for clean and corrupted.
        reads: positions whose logits are read (row, read); in decoder positions if `decoder` is given.
        read_mask: False where a row has fewer reads than the widest (row, read).
        targets: ids of the teacher-forced continuation at each read (row, read), or None for single-token answers.
        row_example: index of the example each row belongs to (row,).
        row_right: True for rows that carry a right answer (row,); all True for single-token answers.
        answers, wrong: acceptable and wrong first tokens of each example (single-token answers).
        metric: what is measured.
        positions: named positions (row,), -1 where a row lacks that position.
        decoder: decoder token ids (row, pos) for encoder-decoder models.
        options: first tokens of all continuations of each example that accuracy chooses among, the right one included
            (single-token answers); None where that is answers + wrong.
    """

    clean: Tensor
    corrupted: Tensor
    mask: Tensor
    reads: Tensor
    read_mask: Tensor
    row_example: Tensor
    row_right: Tensor
    answers: Sequence[Sequence[int]]
    wrong: Sequence[Sequence[int]]
    metric: Metric
    targets: Tensor | None = None
    positions: dict[str, Tensor] = field(default_factory=dict)
    decoder: Tensor | None = None
    options: Sequence[Sequence[int]] | None = None

    @property
    def n_rows(self) -> int:
        return self.clean.shape[0]

    @property
    def n_examples(self) -> int:
        return len(self.answers)

    @property
    def length(self) -> int:
        return self.clean.shape[1]

    @property
    def first_difference(self) -> int:
        """First position at which any row's clean and corrupted tokens differ (`length` if none does)."""
        differs = (self.clean != self.corrupted).any(dim=0).nonzero()
        return int(differs[0]) if len(differs) else self.length

    @property
    def prompts(self) -> list[str]:
        """A short hash of the clean tokens of each example, (example,)."""
        found = [""] * self.n_examples
        for row, example in enumerate(self.row_example.tolist()):
            found[example] = found[example] or _digest(self.clean[row][self.mask[row].bool()].tolist())
        return found

    @property
    def fingerprint(self) -> str:
        """Identifies every token, where answers are read and what they are: a changed tokenizer shows here."""
        tensors = (self.clean, self.corrupted, self.mask, self.reads, self.row_example, self.row_right)
        more = (self.targets, self.decoder, *(self.positions[k] for k in sorted(self.positions)))
        return _digest(
            [
                [None if t is None else t.tolist() for t in (*tensors, *more)],
                [[list(ids) for ids in some] for some in (self.answers, self.wrong, self.options or ())],
                [self.metric.name, self.metric.unit],
            ]
        )

    def value(self, logits: Tensor) -> Tensor:
        """The metric of every example, (example,), from logits at the reads, (row, read, token)."""
        return self.metric(logits, self)

    def swap(self) -> Pairs:
        """The same with clean and corrupted exchanged."""
        return replace(self, clean=self.corrupted, corrupted=self.clean)

    def take(self, examples: Sequence[int]) -> Pairs:
        """Only these examples, in this order, with columns of padding common to all rows removed."""
        order = [int(e) for e in examples]
        of = [(self.row_example == e).nonzero().flatten() for e in order]  # an example may be taken twice
        none = torch.empty(0, dtype=torch.long)
        rows = torch.cat([none, *of])
        new_index = torch.cat([none, *(torch.full((len(r),), i) for i, r in enumerate(of))])
        mask = self.mask[rows]
        used = mask.any(dim=0).nonzero().flatten()
        lo, hi = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, self.length)
        shift = 0 if self.decoder is not None else lo
        return replace(
            self,
            clean=self.clean[rows, lo:hi],
            corrupted=self.corrupted[rows, lo:hi],
            mask=mask[:, lo:hi],
            reads=(self.reads[rows] - shift).clamp(min=0),  # unused reads may lie in the padding that goes
            read_mask=self.read_mask[rows],
            row_example=new_index.to(self.row_example),
            row_right=self.row_right[rows],
            answers=[self.answers[e] for e in order],
            wrong=[self.wrong[e] for e in order],
            targets=None if self.targets is None else self.targets[rows],
            positions={k: torch.where(v[rows] >= 0, v[rows] - lo, v[rows]) for k, v in self.positions.items()},
            decoder=None if self.decoder is None else self.decoder[rows],
            options=None if self.options is None else [self.options[e] for e in order],
        )

    def batches(self, size: int) -> list[Pairs]:
        """Consecutive groups of at most `size` examples, similar lengths kept as they come."""
        return [self.take(range(i, min(i + size, self.n_examples))) for i in range(0, self.n_examples, size)]


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
