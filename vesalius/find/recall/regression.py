"""What an MLP makes of what it is given: one number a head, and a vector of its own.

    m_l(s)  ~  sum_h alpha_h a_h(s)  +  alpha_r r(s)  +  b          s: prompts, all at END

a_h are the writes of the heads up to block l, r the rest of the stream (embedding and earlier MLPs). The scalars and b
are shared by all prompts, so each prompt gives d_model equations. alpha_h = -1 erases what the head wrote, alpha_h > 0
amplifies it; b is what the MLP adds whatever the topic. Inputs are centred over prompts (which takes b out), scaled to
one size and fitted by ridge regression, since heads are collinear.

Shares of variance are about the mean over prompts and of prompts left out. An MLP is not linear: where the share is
below `TRUSTED`, alpha and b describe little of it. Lv et al., arXiv 2403.19521, sec. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import VesaliusError

Floats = NDArray[np.float64]
NEEDED = 20  # prompts
FOLDS = 5
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean squared size of an input
TRUSTED = 0.5


@dataclass(frozen=True)
class Mixing:
    """One MLP's regression.

    Attributes:
        part: the MLP. inputs: heads, and `rest`. weights: alpha of each input. intercept: b, (d_model,).
        r2: share of the variance over prompts that is explained, of prompts left out. r2_fitted: of those fitted.
        null: as r2, with inputs of other prompts. ridge: the penalty chosen. n: prompts.
        spread: root of the variance over prompts as a share of the mean output's length.
    """

    part: str
    inputs: list[str]
    weights: Floats
    intercept: Floats
    r2: float
    r2_fitted: float
    null: float
    ridge: float
    n: int
    spread: float

    @property
    def warning(self) -> str:
        """What to know before reading alpha and b; empty where the regression holds."""
        if self.r2 >= TRUSTED:
            return ""
        return (
            f"the regression of {self.part} explains {max(self.r2, 0.0):.2f} of its variance over prompts left out "
            f"(below {TRUSTED:g}): it is not linear in its heads, and its weights and intercept say little"
        )

    def top(self, k: int) -> list[tuple[str, float]]:
        """The k heads with the largest weights by size, and their weights."""
        heads = [i for i, name in enumerate(self.inputs) if name != "rest"]
        order = sorted(heads, key=lambda i: -abs(self.weights[i]))[:k]
        return [(self.inputs[i], float(self.weights[i])) for i in order]


@dataclass(frozen=True)
class _Sums:
    """Sums over some prompts, from which a regression about their mean is solved."""

    n: int
    gram: Floats  # (input, input), of a . a'
    cross: Floats  # (input,), of a . m
    square: float  # of m . m
    a: Floats  # (input, d)
    m: Floats  # (d,)

    @classmethod
    def of(cls, inputs: Floats, outputs: Floats) -> _Sums:
        return cls(
            len(inputs),
            np.einsum("nid,njd->ij", inputs, inputs, optimize=True),
            np.einsum("nid,nd->i", inputs, outputs, optimize=True),
            float(np.square(outputs).sum()),
            inputs.sum(0),
            outputs.sum(0),
        )

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.n - other.n, self.gram - other.gram, self.cross - other.cross, self.square - other.square,
            self.a - other.a, self.m - other.m,
        )  # fmt: skip

    def about(self, a: Floats, m: Floats) -> tuple[Floats, Floats, float]:
        """Gram, cross and square of inputs less `a` and outputs less `m`."""
        gram = self.gram - a @ self.a.T - self.a @ a.T + self.n * a @ a.T
        cross = self.cross - a @ self.m - self.a @ m + self.n * a @ m
        return gram, cross, self.square - 2 * float(m @ self.m) + self.n * float(m @ m)

    @property
    def means(self) -> tuple[Floats, Floats]:
        return self.a / self.n, self.m / self.n


def mix(inputs: Floats, outputs: Floats, names: Sequence[str], part: str = "", seed: int = 0) -> Mixing:
    """Fits an MLP's output over prompts.

    Args:
        inputs: (prompt, input, d_model). outputs: (prompt, d_model). names: of the inputs. part: the MLP.
        seed: of the folds.

    Raises:
        VesaliusError: for fewer than `NEEDED` prompts.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a = rng.normal(size=(24, 2, 16))
        >>> mix(a, 2 * a[:, 0] - a[:, 1] + 3, ["L0.H0", "L0.H1"]).weights.round(2)
        array([ 2., -1.])
    """
    inputs, outputs = np.asarray(inputs, dtype=np.float64), np.asarray(outputs, dtype=np.float64)
    n = len(outputs)
    if n < NEEDED:
        raise VesaliusError(f"{n} prompts are too few for a regression of {part or 'an MLP'}: {NEEDED} are needed")
    rng = np.random.default_rng(seed)
    folds = [np.sort(f) for f in np.array_split(rng.permutation(n), FOLDS)]
    whole = _Sums.of(inputs, outputs)
    parts = [_Sums.of(inputs[f], outputs[f]) for f in folds]
    shares = [_left_out(whole, parts, ridge) for ridge in RIDGES]
    best = int(np.argmax(shares))
    weights = _solve(whole, RIDGES[best])
    a, m = whole.means
    gram, cross, square = whole.about(a, m)
    fitted = 1 - (square - 2 * weights @ cross + weights @ gram @ weights) / max(square, 1e-300)
    turned = inputs[(np.arange(n) + 1 + n // 2) % n]  # every prompt gets another's
    null = _left_out(_Sums.of(turned, outputs), [_Sums.of(turned[f], outputs[f]) for f in folds], RIDGES[best])
    return Mixing(
        part,
        list(names),
        weights,
        m - weights @ a,
        float(shares[best]),
        float(fitted),
        float(null),
        RIDGES[best],
        n,
        float(np.sqrt(square / n) / max(float(np.linalg.norm(m)), 1e-300)),
    )


def _solve(sums: _Sums, ridge: float) -> Floats:
    gram, cross, _ = sums.about(*sums.means)
    size = np.sqrt(np.maximum(np.diag(gram), 1e-12 * max(float(np.trace(gram)), 1e-300)))
    scaled = gram / np.outer(size, size) + ridge * np.eye(len(gram))
    found: Floats = np.linalg.solve(scaled, cross / size) / size
    return found


def _left_out(whole: _Sums, parts: Sequence[_Sums], ridge: float) -> float:
    """Share of the variance that is explained of prompts left out, about the mean of those fitted."""
    missed, there = 0.0, 0.0
    for part in parts:
        rest = whole - part
        weights = _solve(rest, ridge)
        gram, cross, square = part.about(*rest.means)
        missed += square - 2 * float(weights @ cross) + float(weights @ gram @ weights)
        there += square
    return 1 - missed / max(there, 1e-300)
