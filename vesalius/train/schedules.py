"""What the learning rate is multiplied by at each step, and the steps at which a checkpoint is kept.

A schedule is a pure function of the step (from 0, the first update), so that it needs no state and a resumed run cannot
be out of place.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from vesalius.errors import UnknownName, VesaliusError
from vesalius.registry import Registry

Factor = Callable[[int], float]
SCHEDULES: Registry[Callable[..., Factor]] = Registry("schedule")


def schedule_settings(name: str) -> dict[str, Any]:
    """The settings a schedule takes, with their defaults (`total` has none: the run's steps)."""
    parameters = inspect.signature(SCHEDULES.get(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "total"}


def make_schedule(name: str, total: int, **chosen: Any) -> Factor:
    """A schedule by name.

    Args:
        name: one of `SCHEDULES.names()`.
        total: steps of the whole run.
        **chosen: its settings, see `schedule_settings(name)`.

    Raises:
        VesaliusError: for an unknown name or setting (with the nearest), or a value that makes no sense.

    Example:
        >>> f = make_schedule("linear", 100, warmup=0.1, final=0.0)
        >>> f(0), f(9), f(55), f(100)
        (0.1, 1.0, 0.5, 0.0)
    """
    make, known = SCHEDULES.get(name), schedule_settings(name)
    for key in chosen:
        if key not in known:
            raise UnknownName(f"setting of schedule {name}", key, known)
    if total < 1:
        raise VesaliusError(f"a schedule over {total} steps: give 1 or more")
    return make(total, **chosen)


def _share(what: str, value: float, top: float = 1.0) -> float:
    if not 0 <= value <= top:
        raise VesaliusError(f"{what} = {value}: give a share from 0 to {top:g}")
    return float(value)


def _warm(step: int, steps: float) -> float:
    """Rises to 1 at the last step of the warm-up; no step of a warm-up has rate 0."""
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


def _past(step: int, start: float, end: float) -> float:
    """How much of the way from `start` to `end` lies behind, 0 to 1."""
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else float(step >= end)


@SCHEDULES.register("constant", "warm-up, then 1")
def constant(total: int, warmup: float = 0.0) -> Factor:
    """Rises over the first `warmup` share of the run, then stays."""
    rise = _share("warmup", warmup) * total
    return lambda step: _warm(step, rise)


@SCHEDULES.register("linear", "warm-up, then a straight line to the final share")
def linear(total: int, warmup: float = 0.01, final: float = 0.0) -> Factor:
    """Rises over the first `warmup` share of the run, then falls to `final` of the peak at step `total`."""
    rise, last = _share("warmup", warmup) * total, _share("final", final)
    return lambda step: _warm(step, rise) * (1 + (last - 1) * _past(step, rise, total))


@SCHEDULES.register("cosine", "warm-up, then half a cosine to the final share", paper="arXiv 1608.03983; 2304.01373")
def cosine(total: int, warmup: float = 0.01, final: float = 0.1) -> Factor:
    """Rises over the first `warmup` share, then half a cosine to `final` of the peak; the defaults are Pythia's."""
    rise, last = _share("warmup", warmup) * total, _share("final", final)
    return lambda step: _warm(step, rise) * (last + (1 - last) * (1 + math.cos(math.pi * _past(step, rise, total))) / 2)


@SCHEDULES.register("inverse-sqrt", "constant, then 1 over the root of the step", paper="arXiv 1910.10683; 2204.02311")
def inverse_sqrt(total: int, hold: int = 10_000, warmup: float = 0.0) -> Factor:
    """1 up to step `hold`, then sqrt(hold / step), as T5 and PaLM: a rate of .01 with hold 10,000 is 1/sqrt(step)."""
    if hold < 1:
        raise VesaliusError(f"hold = {hold}: give the steps at the full rate, 1 or more")
    rise = _share("warmup", warmup) * total
    return lambda step: _warm(step, rise) * math.sqrt(hold / max(step, hold))


@SCHEDULES.register("wsd", "warm-up, stable, then decay at the end", paper="arXiv 2404.06395")
def wsd(total: int, warmup: float = 0.01, decay: float = 0.1, final: float = 0.0) -> Factor:
    """Rises over the first `warmup` share, stays, and falls straight to `final` over the last `decay` share."""
    rise, last = _share("warmup", warmup) * total, _share("final", final)
    fall = _share("decay", decay) * total
    if rise + fall > total:
        raise VesaliusError(f"warmup {warmup} and decay {decay} together exceed the run; make their sum at most 1")
    return lambda step: _warm(step, rise) * (1 + (last - 1) * _past(step, total - fall, total))


def checkpoint_steps(total: int, every: int = 1000, log: bool = True) -> list[int]:
    """The steps after which a checkpoint is kept: 0, the powers of 2 below `every`, its multiples, and the last.

    Args:
        total: steps of the run.
        every: distance of the regular checkpoints; 0 for none.
        log: whether to keep powers of 2 as well (all of them if `every` is 0).

    Example:
        >>> checkpoint_steps(2000)
        [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]
        >>> len(checkpoint_steps(143_000))  # Pythia's, arXiv 2304.01373
        154
    """
    if total < 0 or every < 0:
        raise VesaliusError(f"checkpoints every {every} of {total} steps: give numbers of 0 or more")
    steps = {0, total}
    if every:
        steps |= set(range(every, total + 1, every))
    if log:
        limit = min(total + 1, every or total + 1)
        steps |= {2**k for k in range(limit.bit_length()) if 2**k < limit}
    return sorted(steps)


__all__ = ["SCHEDULES", "Factor", "checkpoint_steps", "make_schedule", "schedule_settings"]
