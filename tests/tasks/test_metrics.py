"""Metrics against plain loops, their gradients, and accuracy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vesalius.errors import TaskError, UnknownName
from vesalius.model.pairs import Pairs
from vesalius.tasks import METRICS, accuracy, make_metric

VOCABULARY = 23


def single(metric: str = "logit-diff") -> Pairs:
    """Three examples with uneven sets of right and wrong answers."""
    rows = torch.arange(3)
    ids = torch.zeros(3, 4, dtype=torch.long)
    return Pairs(
        clean=ids,
        corrupted=ids,
        mask=ids + 1,
        reads=torch.full((3, 1), 3),
        read_mask=torch.ones(3, 1, dtype=torch.bool),
        row_example=rows,
        row_right=torch.ones(3, dtype=torch.bool),
        answers=[[3], [5, 1], [22]],
        wrong=[[4], [0], [7, 9, 11]],
        metric=make_metric(metric),
    )


def sequence(metric: str = "logit-diff") -> Pairs:
    """Two examples: right rows 0, 1, 4 and wrong rows 2, 3, 5; continuations of one to three tokens."""
    torch.manual_seed(0)
    ids = torch.zeros(6, 5, dtype=torch.long)
    lengths = torch.tensor([1, 3, 2, 2, 2, 3])
    return Pairs(
        clean=ids,
        corrupted=ids,
        mask=ids + 1,
        reads=torch.tensor([[1, 2, 3]] * 6),
        read_mask=torch.arange(3)[None] < lengths[:, None],
        row_example=torch.tensor([0, 0, 0, 0, 1, 1]),
        row_right=torch.tensor([True, True, False, False, True, False]),
        answers=[[0, 1], [2]],
        wrong=[[3], [4]],
        metric=make_metric(metric, sequence=True),
        targets=torch.randint(VOCABULARY, (6, 3)),
    )


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in logits)
    return [math.exp(v) / total for v in logits]


def slow(name: str, logits: Tensor, pairs: Pairs) -> list[float]:
    """The metric of every example in plain Python."""
    values = []
    for e in range(pairs.n_examples):
        right, wrong, level = [], [], []
        if pairs.targets is None:
            row = logits[e, 0].tolist()
            p = softmax(row)
            right, wrong = [p[i] for i in pairs.answers[e]], [p[i] for i in pairs.wrong[e]]
            level = [sum(math.exp(row[i]) for i in ids) for ids in (pairs.answers[e], pairs.wrong[e])]
        else:
            for r in range(pairs.n_rows):
                if int(pairs.row_example[r]) == e:
                    p = 1.0
                    for k in range(pairs.targets.shape[1]):
                        if pairs.read_mask[r, k]:
                            p *= softmax(logits[r, k].tolist())[int(pairs.targets[r, k])]
                    (right if pairs.row_right[r] else wrong).append(p)
            level = [sum(right), sum(wrong)]
        values.append(
            {
                "logit-diff": lambda a=level: math.log(a[0] / a[1]),
                "prob-diff": lambda r=right, w=wrong: sum(r) - sum(w),
                "log-prob": lambda r=right: math.log(sum(r)),
            }[name]()
        )
    return values


@pytest.mark.parametrize("name", METRICS.names())
@pytest.mark.parametrize("build", [single, sequence])
def test_metrics_equal_plain_loops(name: str, build: Any) -> None:
    pairs = build(name)
    logits = 3 * torch.randn(pairs.n_rows, pairs.reads.shape[1], VOCABULARY, dtype=torch.float64)
    assert pairs.value(logits).tolist() == pytest.approx(slow(name, logits, pairs), abs=1e-9)


@pytest.mark.parametrize("name", METRICS.names())
@pytest.mark.parametrize("build", [single, sequence])
def test_gradients_equal_finite_differences(name: str, build: Any) -> None:
    pairs = build(name)
    torch.manual_seed(1)
    logits = torch.randn(pairs.n_rows, pairs.reads.shape[1], VOCABULARY, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pairs.value, (logits,))


def test_only_the_tokens_asked_for_are_needed() -> None:
    pairs = single()
    tokens = pairs.metric.tokens(pairs)
    assert tokens is not None and tokens.tolist() == [0, 1, 3, 4, 5, 7, 9, 11, 22]
    logits = torch.randn(3, 1, VOCABULARY)
    assert torch.equal(pairs.value(logits[..., tokens]), pairs.value(logits))
    part = pairs.take([2])
    some = part.metric.tokens(part)
    assert some is not None and some.tolist() == [7, 9, 11, 22]
    assert torch.equal(part.value(logits[2:, :, some]), pairs.value(logits)[2:])
    assert sequence().metric.tokens(sequence()) is None and single("log-prob").metric.tokens(single()) is None


def test_one_right_and_one_wrong_is_the_plain_difference() -> None:
    pairs = single().take([0])
    logits = torch.randn(1, 1, VOCABULARY)
    assert pairs.value(logits).item() == pytest.approx((logits[0, 0, 3] - logits[0, 0, 4]).item(), abs=1e-6)


@pytest.mark.parametrize("name", METRICS.names())
def test_half_precision_logits_are_summed_in_single(name: str) -> None:
    logits = torch.randn(3, 1, VOCABULARY).bfloat16()
    found = single(name).value(logits)
    assert found.dtype == torch.float32 and torch.equal(found, single(name).value(logits.float()))


def test_units() -> None:
    assert [make_metric("logit-diff", s).unit for s in (False, True)] == ["logit", "nat"]
    with pytest.raises(UnknownName, match="prob-diff"):
        make_metric("probdiff")


def test_accuracy_of_single_tokens() -> None:
    logits = torch.zeros(3, 1, VOCABULARY)
    logits[0, 0, 3], logits[0, 0, 8] = 1, 2  # right beats wrong, but another token beats both
    logits[1, 0, 1] = 1  # the second acceptable answer is on top
    logits[2, 0, [22, 9]] = 1  # a tie with one of the wrong ones
    found = accuracy(logits, single())
    assert found.preferred.tolist() == [True, True, False]
    assert found.top1 is not None and found.top1.tolist() == [False, True, False]
    assert found.chance == pytest.approx((1 / 2 + 2 / 3 + 1 / 4) / 3)
    tokens = single().metric.tokens(single())
    few = accuracy(logits[..., tokens], single())
    assert few.top1 is None and few.preferred.tolist() == [True, True, False]


def test_accuracy_over_options_needs_the_right_one_first_of_all() -> None:
    pairs = replace(single(), options=[[3, 4, 20], [5, 1, 0], [22, 7, 9]])
    logits = torch.zeros(3, 1, VOCABULARY)
    logits[0, 0, [3, 20]] = torch.tensor([1.0, 2.0])  # beats the wrong one, not the third option
    logits[1, 0, 5] = logits[2, 0, 22] = 1
    found = accuracy(logits, pairs)
    assert found.preferred.tolist() == [False, True, True]
    assert found.chance == pytest.approx((1 / 3 + 2 / 3 + 1 / 3) / 3)
    tokens = pairs.metric.tokens(pairs)  # the third options are among what is asked of the model
    assert accuracy(logits[..., tokens], pairs).preferred.tolist() == [False, True, True]


def test_accuracy_of_continuations() -> None:
    pairs = sequence()
    assert pairs.targets is not None
    logits = torch.zeros(6, 3, VOCABULARY)
    for k in range(3):
        logits[1, k, pairs.targets[1, k]] = 9  # a right row of the first example, token by token on top
    for k in range(3):
        logits[5, k, pairs.targets[5, k]] = 9  # the wrong row of the second
    found = accuracy(logits, pairs)
    assert found.preferred.tolist() == [True, False]
    assert found.top1 is not None and not found.top1[1] and found.top1[0]
    assert found.chance == pytest.approx((2 / 4 + 1 / 2) / 2)


def test_continuations_cannot_be_asked_of_single_tokens() -> None:
    with pytest.raises(TaskError, match="scoring='sequence'"):
        make_metric("logit-diff", sequence=True)(torch.zeros(3, 1, VOCABULARY), single())
