"""What is measured of an answer: one number an example, differentiable in the logits, larger for more of the right.

With right answers R and wrong ones W of an example, for single-token answers (l: logits, p: softmax at the read):

    logit-diff   logsumexp(l[R]) - logsumexp(l[W])        (the plain difference where both are one token)
    prob-diff    sum(p[R]) - sum(p[W])
    log-prob     log sum(p[R])

For continuations of several tokens, l of a continuation is the sum of its teacher-forced log-probabilities (natural
logarithm, unit "nat"), and p its exponential. The logit difference is that of the IOI study (arXiv 2211.00593, section
2), the probability difference that of the greater-than study (arXiv 2305.00586, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vesalius.errors import TaskError
from vesalius.model.pairs import Metric, Pairs
from vesalius.registry import Registry

METRICS: Registry[Any] = Registry("metric")


def _columns(lists: Sequence[Sequence[int]], tokens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Padded column indices of each example's ids (example, most) and which of them are real."""
    most = max(1, max((len(ids) for ids in lists), default=0))
    index = torch.tensor([[*ids, *[-1] * (most - len(ids))] for ids in lists], dtype=torch.long).reshape(-1, most)
    real = index >= 0
    if tokens is not None:
        index = torch.searchsorted(tokens, index.clamp(min=0))
    return index.where(real, 0).to(device), real.to(device)


def _wide(logits: Tensor) -> Tensor:
    """Half precision is summed in float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _asked(pairs: Pairs) -> Tensor:
    """Sorted unique ids of all right and wrong answers and options, (token,)."""
    lists = [*pairs.answers, *pairs.wrong, *(pairs.options or ())]
    return torch.tensor(sorted({i for ids in lists for i in ids}), dtype=torch.long)


def _gather(values: Tensor, lists: Sequence[Sequence[int]], tokens: Tensor | None, empty: float) -> Tensor:
    """Values (example, most) of each example's ids from (example, column); `empty` where it has fewer."""
    index, real = _columns(lists, tokens, values.device)
    return values.gather(1, index).where(real, empty)


def continuation_log_probs(logits: Tensor, pairs: Pairs) -> Tensor:
    """Summed log-probability of every row's continuation, (row,), from logits (row, read, vocabulary)."""
    if pairs.targets is None:
        raise TaskError("these pairs have single-token answers; build the task with scoring='sequence'")
    found = _wide(logits).log_softmax(-1).gather(-1, pairs.targets.to(logits.device)[..., None])[..., 0]  # (row, read)
    return found.where(pairs.read_mask.to(logits.device), 0.0).sum(-1)


def _logsumexp_by_example(values: Tensor, pairs: Pairs, right: bool) -> Tensor:
    """Logsumexp over each example's right (or wrong) rows, (example,), from values (row,)."""
    example, is_right = pairs.row_example.to(values.device), pairs.row_right.to(values.device)
    mine = example[None, :] == torch.arange(pairs.n_examples, device=values.device)[:, None]  # (example, row)
    return values[None, :].where(mine & (is_right == right), -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class LogitDiff:
    """Logit of the right answers over that of the wrong ones, by logsumexp.

    Args:
        sequence: whether answers are scored as whole continuations (summed log-probabilities).
    """

    sequence: bool = False
    name: str = "logit-diff"

    @property
    def unit(self) -> str:
        return "nat" if self.sequence else "logit"

    def tokens(self, pairs: Pairs) -> Tensor | None:
        """The right and wrong ids of these pairs, sorted; None for continuations, which need a softmax."""
        return None if self.sequence else _asked(pairs)

    def __call__(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Values (example,) from logits (row, read, len(tokens) or vocabulary)."""
        if self.sequence:
            found = continuation_log_probs(logits, pairs)
            return _logsumexp_by_example(found, pairs, True) - _logsumexp_by_example(found, pairs, False)
        tokens = _asked(pairs)
        held = tokens if logits.shape[-1] == len(tokens) else None
        read = _wide(logits[:, 0])  # (example, token)
        right = _gather(read, pairs.answers, held, -torch.inf).logsumexp(-1)
        return right - _gather(read, pairs.wrong, held, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class ProbDiff:
    """Probability of the right answers together, less that of the wrong ones together; from -1 to 1."""

    sequence: bool = False
    name: str = "prob-diff"
    unit: str = "probability"

    def tokens(self, pairs: Pairs) -> Tensor | None:
        """None: a softmax needs the whole vocabulary."""
        return None

    def __call__(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Values (example,) from logits (row, read, vocabulary)."""
        if self.sequence:
            found = continuation_log_probs(logits, pairs)
            return _logsumexp_by_example(found, pairs, True).exp() - _logsumexp_by_example(found, pairs, False).exp()
        p = _wide(logits[:, 0]).softmax(-1)
        return _gather(p, pairs.answers, None, 0.0).sum(-1) - _gather(p, pairs.wrong, None, 0.0).sum(-1)


@dataclass(frozen=True)
class LogProb:
    """Log-probability of the right answers together, in nats."""

    sequence: bool = False
    name: str = "log-prob"
    unit: str = "nat"

    def tokens(self, pairs: Pairs) -> Tensor | None:
        """None: a softmax needs the whole vocabulary."""
        return None

    def __call__(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Values (example,) from logits (row, read, vocabulary)."""
        if self.sequence:
            return _logsumexp_by_example(continuation_log_probs(logits, pairs), pairs, True)
        return _gather(_wide(logits[:, 0]).log_softmax(-1), pairs.answers, None, -torch.inf).logsumexp(-1)


METRICS.add("logit-diff", LogitDiff, "logit of the right answers less that of the wrong ones", "arXiv 2211.00593")
METRICS.add("prob-diff", ProbDiff, "probability of the right answers less that of the wrong ones", "arXiv 2305.00586")
METRICS.add("log-prob", LogProb, "log-probability of the right answers")


def make_metric(name: str, sequence: bool = False) -> Metric:
    """The metric of that name, for single-token answers or for whole continuations."""
    metric: Metric = METRICS.get(name)(sequence=sequence)
    return metric


class Accuracy(NamedTuple):
    """How often the right answer is given.

    Attributes:
        preferred: a right answer beats every wrong one (or every other option), (example,) bool.
        top1: a right answer beats the whole vocabulary (for continuations: at every token), (example,) bool; None
            where only some tokens' logits were given.
        chance: share of `preferred` that choosing blindly among the answers given would reach, averaged.
    """

    preferred: Tensor
    top1: Tensor | None
    chance: float


def accuracy(logits: Tensor, pairs: Pairs) -> Accuracy:
    """Whether each example is answered rightly; ties count as wrong.

    Args:
        logits: (row, read, vocabulary), or for single-token answers (row, read, len(LogitDiff().tokens(pairs))).
        pairs: what the logits were read for.

    Returns:
        preferred (example,), top1 (example,) or None, and the chance level of preferred.
    """
    n = pairs.n_examples
    if pairs.targets is not None:
        found = continuation_log_probs(logits, pairs)
        device = found.device
        right_row, example = pairs.row_right.to(device), pairs.row_example.to(device)
        low = torch.full((n,), -torch.inf, dtype=found.dtype, device=device)
        best = low.scatter_reduce(0, example[right_row], found[right_row], "amax")
        worst = low.scatter_reduce(0, example[~right_row], found[~right_row], "amax")
        greedy = (logits.argmax(-1) == pairs.targets.to(device)) | ~pairs.read_mask.to(device)  # (row, read)
        hit = greedy.all(-1) & right_row
        top1 = torch.zeros(n, dtype=torch.bool, device=device).index_fill(0, example[hit], True)
        counts = [(int((right_row & (example == e)).sum()), int((example == e).sum())) for e in range(n)]
        return Accuracy(best > worst, top1, _mean(r / t for r, t in counts))
    tokens = _asked(pairs)
    held = tokens if logits.shape[-1] == len(tokens) else None
    read = logits[:, 0]
    others = [
        [i for i in ids if i not in set(right)]
        for ids, right in zip(pairs.options or pairs.wrong, pairs.answers, strict=True)
    ]
    best = _gather(read, pairs.answers, held, -torch.inf).amax(-1)
    preferred = best > _gather(read, others, held, -torch.inf).amax(-1)
    chance = _mean(len(r) / (len(r) + len(o)) for r, o in zip(pairs.answers, others, strict=True))
    if held is not None:
        return Accuracy(preferred, None, chance)
    index, real = _columns(pairs.answers, None, read.device)
    return Accuracy(preferred, ((read.argmax(-1)[:, None] == index) & real).any(-1), chance)


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")
