"""Schedules against closed forms, and Pythia's checkpoints."""

from __future__ import annotations

import math

import pytest

from vesalius.errors import VesaliusError
from vesalius.train.schedules import SCHEDULES, checkpoint_steps, make_schedule, schedule_settings

TOTAL = 1000


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_is_a_pure_function_within_its_bounds(name: str) -> None:
    f = make_schedule(name, TOTAL, warmup=0.1)
    forward = [f(s) for s in range(TOTAL + 1)]
    backward = [make_schedule(name, TOTAL, warmup=0.1)(s) for s in reversed(range(TOTAL + 1))]
    assert forward == backward[::-1]
    assert forward[0] == pytest.approx(1 / 100) and forward[99] == pytest.approx(1.0, abs=1e-12)
    assert all(a < b for a, b in zip(forward[:99], forward[1:100], strict=True))
    assert all(0 <= v <= 1 for v in forward)
    assert all(a >= b - 1e-12 for a, b in zip(forward[100:], forward[101:], strict=False))
    assert make_schedule(name, TOTAL, warmup=0.0)(0) == 1.0
    assert f(TOTAL * 3) >= 0  # a run that goes past its end does not come back up
    if name != "inverse-sqrt":
        assert f(TOTAL * 3) == pytest.approx(f(TOTAL))


def test_closed_forms() -> None:
    cosine = make_schedule("cosine", TOTAL, warmup=0.2, final=0.1)
    for step in (200, 450, 600, 1000):
        assert cosine(step) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step - 200) / 800)), abs=1e-12)
    linear = make_schedule("linear", TOTAL, warmup=0.2, final=0.5)
    assert [linear(s) for s in (200, 600, 1000)] == pytest.approx([1.0, 0.75, 0.5])
    assert make_schedule("linear", TOTAL, warmup=0.0)(TOTAL) == 0
    wsd = make_schedule("wsd", TOTAL, warmup=0.1, decay=0.3, final=0.1)
    assert [wsd(s) for s in (100, 699, 700, 850, 1000)] == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1])
    assert make_schedule("constant", TOTAL)(777) == 1.0


def test_inverse_sqrt_is_the_papers_rate() -> None:
    f = make_schedule("inverse-sqrt", 100_000)
    assert 1e-2 * f(0) == 1e-2 == 1e-2 * f(10_000)
    for step in (10_001, 40_000, 99_999):
        assert 1e-2 * f(step) == pytest.approx(1 / math.sqrt(step), rel=1e-12)


def test_pythias_cosine_ends_at_a_tenth() -> None:
    f = make_schedule("cosine", 143_000)
    assert (
        f(1429) == 1.0
        and f(143_000) == pytest.approx(0.1)
        and schedule_settings("cosine") == {"warmup": 0.01, "final": 0.1}
    )


def test_checkpoints_are_pythias() -> None:
    assert len(checkpoint_steps(143_000)) == 154
    assert checkpoint_steps(2000) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]
    assert checkpoint_steps(2000, log=False) == [0, 1000, 2000]
    assert checkpoint_steps(2500, every=0, log=False) == [0, 2500]
    assert checkpoint_steps(2500)[-3:] == [1000, 2000, 2500]  # the last step is kept even off the grid
    assert checkpoint_steps(10, every=0) == [0, 1, 2, 4, 8, 10]
    assert checkpoint_steps(8, every=0) == [0, 1, 2, 4, 8] and checkpoint_steps(0) == [0]
    assert checkpoint_steps(3, every=1) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_schedule("cosin", 10), "did you mean 'cosine'"),
        (lambda: make_schedule("cosine", 10, warm=0.1), "did you mean 'warmup'"),
        (lambda: make_schedule("cosine", 10, warmup=1.5), "warmup = 1.5"),
        (lambda: make_schedule("linear", 10, final=-1), "final = -1"),
        (lambda: make_schedule("wsd", 10, warmup=0.6, decay=0.6), "together exceed"),
        (lambda: make_schedule("inverse-sqrt", 10, hold=0), "hold = 0"),
        (lambda: make_schedule("constant", 0), "0 steps"),
        (lambda: make_schedule("cosine", 10, warmup=float("nan")), "warmup = nan"),
        (lambda: checkpoint_steps(-1), "-1 steps"),
    ],
)
def test_nonsense_is_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(VesaliusError, match=message):
        call()  # type: ignore[operator]
