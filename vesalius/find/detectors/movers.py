"""Movers, negative movers and inhibition heads of a task, each with its p.

Where heads look and what their outputs do is measured by `roles.measure`; this module asks whether it is more than
chance. Both halves of a role must be: attention, against random tokens of the same prompts; and the effect, against
random signs over prompts. So p is the larger of the two (intersection-union), and the score is 0 without the effect.

Wang et al., "Interpretability in the Wild", arXiv 2211.00593, sec. 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import VesaliusError
from vesalius.find.detectors.base import HeadContext, NotHere, head_scores
from vesalius.find.detectors.roles import Floats, Measured, measure
from vesalius.find.detectors.significance import both, exchange, positive
from vesalius.model import Model
from vesalius.scores import Scores


def measured(model: Model, context: HeadContext) -> Measured:
    """The passes that all three share."""
    task = context.task
    if task is None:
        raise VesaliusError("movers are found in a task; give one")
    return context.once("roles", lambda: measure(model, task, seed=context.seed, progress=context.progress))


def mover(model: Model, context: HeadContext) -> Scores:
    """Attention from END to the right answer, of heads whose own write raises the answer."""
    it = measured(model, context)
    return _scores(it, "right", it.helps, positive(it.effects, context.seed), context.seed)


def negative_mover(model: Model, context: HeadContext) -> Scores:
    """Attention from END to the right answer, of heads whose own write lowers the answer."""
    it = measured(model, context)
    return _scores(it, "right", it.harms, positive(-it.effects, context.seed), context.seed)


def inhibition(model: Model, context: HeadContext) -> Scores:
    """Attention from END to wrong answers and what is asked about, of heads that turn the movers away from them."""
    it = measured(model, context)
    each = it.shifts.each  # (head, row), NaN for heads that were not knocked out
    tried = ~np.isnan(each).any(1)
    p = np.ones(len(it.heads))
    if tried.any():
        p[tried] = positive(each[tried], context.seed)
    return _scores(it, "asked_or_wrong", it.inhibits, p, context.seed)


def _scores(it: Measured, look: str, on: NDArray[np.bool_], p: Floats, seed: int) -> Scores:
    if not it.found.rows[look]:
        what = "right answer does not stand" if look == "right" else "wrong answers do not stand"
        raise NotHere(f"the {what} in this task's prompts, so no head can look there; choose a task like ioi")
    each, chance = it.found.each[look], it.found.chance[look]
    columns = both(exchange(each, chance, seed), p)
    gated = np.where(on[:, None] | np.isnan(each), each, 0.0)
    return head_scores(
        it.heads,
        gated,
        {**columns, "direct": it.effects.mean(1), "attention": np.nanmean(each, axis=1)},
        null_is="other tokens of the prompt",
    )
