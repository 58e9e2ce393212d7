"""How two features go together, before anything is run: coupling coefficients.

    C(y1, y2) = y1 . y2 / |y1|^2        E[y2 . x | y1 . x = k] = k C   for x uniform on a sphere
    C_cov     = y1' S y2 / y1' S y1     the slope of y2 . x regressed on y1 . x, S the covariance of actual states

(Dunefsky and Cohan 2024, arXiv 2312.16291, sec. 3.4: C, with r^2 = cos^2; states of a real stream are far from
isotropic, so the covariance of a text stands beside it: `texts.moments`.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from vesalius.errors import VesaliusError
from vesalius.lens.paths import Feature
from vesalius.lens.texts import Moments


class Coupling(NamedTuple):
    """How far one feature's score tells the other's.

    Attributes:
        coefficient: slope of the second score on the first. r: correlation, so that r^2 is the share explained.
    """

    coefficient: float
    r: float


def coupling(first: Feature | Tensor, second: Feature | Tensor, moments: Moments | None = None) -> Coupling:
    """The coupling of two features read at the same place; isotropic states without `moments`.

    Raises:
        VesaliusError: if they are read at different places, or one of them is zero.

    Example:
        >>> coupling(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])).coefficient
        0.5
    """
    if isinstance(first, Feature) and isinstance(second, Feature) and first.at != second.at:
        raise VesaliusError(
            f"the features are read at {first.at} and {second.at}; pull both back to one place (at=) to compare them"
        )
    if moments is not None:
        for one in (first, second):
            if isinstance(one, Feature) and one.at != moments.at:
                raise VesaliusError(f"the covariance is that of {moments.at}, the feature is read at {one.at}")
    a, b = ((f.vector if isinstance(f, Feature) else f).double().cpu().numpy() for f in (first, second))
    s = None if moments is None else moments.covariance
    aa, ab, bb = (float(x @ y) if s is None else float(x @ s @ y) for x, y in ((a, a), (a, b), (b, b)))
    if aa <= 0 or bb <= 0:
        raise VesaliusError("a feature is zero, so it is coupled to nothing; is its head's output zero?")
    return Coupling(ab / aa, ab / float(np.sqrt(aa * bb)))
