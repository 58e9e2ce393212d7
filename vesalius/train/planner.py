"""How large, how long: model size and tokens for a budget, by rule of thumb or by a loss surface fitted to runs.

Komatsuzaki 2019 (One Epoch Is All You Need), arXiv 1906.06669; Hoffmann et al. 2022, arXiv 2203.15556.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vesalius.errors import VesaliusError
from vesalius.train.curves import Array, positive

RATIOS = {"one-epoch": 5.0, "chinchilla": 20.0}  # tokens a parameter: arXiv 1906.06669; 2203.15556


class Plan(NamedTuple):
    """Model size and tokens for a budget parameters x tokens; the loss expected, where a surface foretold it."""

    parameters: float
    tokens: float
    loss: float | None
    why: str

    @property
    def ratio(self) -> float:
        """Tokens a parameter."""
        return self.tokens / self.parameters


class Surface(NamedTuple):
    """loss = floor + a parameters^-alpha + b tokens^-beta."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    r2: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """The loss expected."""
        return self.floor + self.a * parameters**-self.alpha + self.b * tokens**-self.beta


def fit_surface(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> Surface:
    """The loss surface nearest to measured runs, in relative error.

    Args:
        parameters: (run,).
        tokens: (run,) processed, each once.
        losses: (run,).
    """
    from scipy.optimize import least_squares

    p, t, y = positive("a loss surface", parameters, tokens, losses, least=6)
    if min(len(np.unique(p)), len(np.unique(t))) < 3:
        raise VesaliusError("a loss surface needs three or more sizes and three or more token counts")
    u, w, log_y = np.log(p) - np.log(p).mean(), np.log(t) - np.log(t).mean(), np.log(y)

    def residual(q: Array) -> Array:
        a, alpha, b, beta, floor = np.exp(np.clip(q, -60, 60))
        return np.log(floor + a * np.exp(-alpha * u) + b * np.exp(-beta * w)) - log_y

    best: Any = None
    low = float(y.min())
    for share in (0.1, 0.5, 0.9):
        for alpha in (0.2, 0.6):
            rest = (float(np.median(y)) - share * low) / 2
            start = np.log([rest, alpha, rest, alpha, share * low])
            found = least_squares(residual, start, max_nfev=4000, xtol=1e-12, ftol=1e-12)
            if best is None or found.cost < best.cost:
                best = found
    a, alpha, b, beta, floor = (float(v) for v in np.exp(best.x))
    r2 = 1 - 2 * float(best.cost) / float(((log_y - log_y.mean()) ** 2).sum())
    a, b = a * math.exp(alpha * float(np.log(p).mean())), b * math.exp(beta * float(np.log(t).mean()))
    return Surface(floor, a, alpha, b, beta, r2)


def plan(
    budget: float,
    loss: Callable[[float, float], float] | None = None,
    *,
    ratio: float | str = "one-epoch",
    smallest: float = 1e3,
) -> Plan:
    """How to spend parameters x tokens = `budget` (about FLOPs / 6): the least loss, or a rule of thumb.

    Args:
        budget: the product that is kept.
        loss: of (parameters, tokens), such as a `Surface`; without it the rule decides.
        ratio: tokens a parameter: a number, "one-epoch" (5) or "chinchilla" (20).
        smallest: least parameters, and least tokens, considered.

    Example:
        >>> p = plan(5e12)
        >>> round(p.parameters), round(p.tokens)
        (1000000, 5000000)
    """
    if not budget > smallest**2:
        raise VesaliusError(f"a budget of {budget:g} is below {smallest:g} parameters on as many tokens; give more")
    if loss is None:
        if isinstance(ratio, str) and ratio not in RATIOS:
            raise VesaliusError(f"unknown ratio '{ratio}'; give a number, or one of {', '.join(RATIOS)}")
        value = RATIOS[ratio] if isinstance(ratio, str) else float(ratio)
        if not value > 0:
            raise VesaliusError(f"ratio = {ratio}: give tokens a parameter, above 0")
        return Plan(math.sqrt(budget / value), math.sqrt(budget * value), None, f"{value:g} tokens a parameter")
    from scipy.optimize import minimize_scalar

    def at(log_p: float) -> float:
        return float(loss(math.exp(log_p), budget / math.exp(log_p)))

    grid = np.linspace(math.log(smallest), math.log(budget / smallest), 201)
    values = np.array([at(float(g)) for g in grid])
    i = int(np.argmin(values))
    if i in (0, len(grid) - 1):
        p = math.exp(float(grid[i]))
        return Plan(p, budget / p, float(values[i]), "at the edge of the range: the surface has no best point inside")
    found = minimize_scalar(at, bounds=(grid[i - 1], grid[i + 1]), method="bounded", options={"xatol": 1e-6})
    p = math.exp(float(found.x))
    return Plan(p, budget / p, float(found.fun), "least loss at this budget")
