"""Faithfulness against circuit size, and the two areas MIB scores it by (arXiv 2504.13151).

    f(C) = (mean m(C) - mean m(empty)) / (mean m(full) - mean m(empty))      ratio of means over the prompts
    CPR  = sum_i (x[i+1] - x[i]) (f[i] + f[i+1]) / 2                         circuit performance ratio, high is good
    CMD  = sum_i (x[i+1] - x[i]) (|1 - f[i]| + |1 - f[i+1]|) / 2             circuit-model distance, 0 is best

x is the *nominal* share of the parts or edges (`MIB_FRACTIONS`), also where pruning left fewer; the log axis takes
ln x; |1 - f| is taken at the endpoints and joined by straight lines, also where f crosses 1. Nothing is added at x = 0
and the point at x = 1 is measured like the others (only for submissions of nine ready-made circuits does MIB append a
last point of exactly 1). MIB reports CPR for circuits ranked by signed score and CMD for circuits ranked by absolute
score: two curves. So f = 1 everywhere gives CPR 0.999, and the stretch from 20 % to 100 % carries four fifths of either
score; hence the log axis here, and every area also divided by the length of its axis.

Source: `evaluate_area_under_curve` in MIB-circuit-track's MIB_circuit_track/evaluation.py. (Earlier versions took the
logarithm and then integrated over the plain fraction; the leaderboard's own script is linear.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vesalius.errors import VesaliusError

Floats = NDArray[np.floating[Any]]

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TINY = 1e-6  # a gap between full and empty model below this share of their size is rounding, not an effect


def mib_sizes(n: int, fractions: Sequence[float] = MIB_FRACTIONS) -> list[int]:
    """Numbers of parts or edges at MIB's fractions, rounded down as MIB does: int(fraction * n).

    Example:
        >>> mib_sizes(32491)[:3]
        [32, 64, 162]
    """
    return [int(f * n) for f in fractions]


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Faithfulness of circuits of growing size.

    Attributes:
        sizes: parts or edges asked for, (point,).
        fractions: the same as a share of the model's, (point,): the horizontal axis.
        values: faithfulness, (point,); NaN where it cannot be computed.
        low, high: bootstrap interval over prompts, (point,).
        ablation: what replaced everything outside the circuit.
        notes: why a value or its interval is missing, one a point, empty where nothing is.
        draws: faithfulness in each bootstrap resample of the prompts, (draw, point), or None.
        level: coverage of the intervals.
        n: number of prompts.
    """

    sizes: Sequence[int]
    fractions: Sequence[float]
    values: Floats
    low: Floats
    high: Floats
    ablation: str
    notes: tuple[str, ...] = ()
    draws: Floats | None = None
    level: float = 0.95
    n: int = 0

    def to_frame(self) -> pd.DataFrame:
        """A row a point: size, fraction, faithfulness, low, high, ablation, note."""
        return pd.DataFrame(
            {
                "size": list(self.sizes),
                "fraction": list(self.fractions),
                "faithfulness": self.values,
                "low": self.low,
                "high": self.high,
                "ablation": self.ablation,
                "note": list(self.notes) or [""] * len(self.sizes),
            }
        )

    def __repr__(self) -> str:
        head = f"FaithfulnessCurve({self.ablation} ablation, {self.n} prompts, {self.level:.0%} intervals)"
        return f"{head}\n{self.to_frame().to_string(index=False)}"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format=lambda v: f"{v:.4g}")
        return f"<p><b>Faithfulness</b>: {self.ablation} ablation, {self.n} prompts</p>{table}"


def faithfulness_curve(
    per_example: Floats,
    full: Floats,
    empty: Floats,
    sizes: Sequence[int],
    fractions: Sequence[float],
    ablation: str,
    *,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> FaithfulnessCurve:
    """Faithfulness with intervals from resampling the prompts, the same resample for circuit, full and empty model.

    Args:
        per_example: metric of each circuit on each prompt, (point, example).
        full: metric of the whole model, (example,).
        empty: metric with everything ablated, (example,).
        sizes: size of each circuit, (point,).
        fractions: the same as a share, (point,).
        ablation: name of the ablation.
        seed: of the resampling.
        draws: number of resamples.
        level: coverage of the intervals.

    Returns:
        The curve. Where the full and the empty model do not differ, or a metric is not finite, the value is NaN and
        the note says why; where the sign of their difference is not settled by these prompts, the interval is NaN
        (it has no bounds).
    """
    per_example, full, empty = (np.asarray(a, dtype=float) for a in (per_example, full, empty))
    points, n = per_example.shape if per_example.ndim == 2 else (-1, -1)
    if n < 1 or full.shape != (n,) or empty.shape != (n,) or points != len(sizes) or points != len(fractions):
        shapes = f"circuits {per_example.shape}, full {full.shape}, empty {empty.shape}"
        raise VesaliusError(
            f"metric arrays do not fit: {shapes}, {len(sizes)} sizes, {len(fractions)} fractions; "
            "want (point, example), (example,), (example,) with at least one example"
        )
    missing = np.full(points, np.nan)
    bad = int((~np.isfinite(full) | ~np.isfinite(empty)).sum())
    if bad:
        why = f"the metric of the full or ablated model is not finite on {bad} of {n} prompts"
        return FaithfulnessCurve(sizes, fractions, missing, missing, missing, ablation, (why,) * points, None, level, n)
    gap = full.mean() - empty.mean()
    scale = max(np.abs(full).mean(), np.abs(empty).mean())
    if abs(gap) <= TINY * scale or scale == 0:
        why = f"full and ablated model score alike ({full.mean():.4g}, {empty.mean():.4g}): nothing to be faithful to"
        return FaithfulnessCurve(sizes, fractions, missing, missing, missing, ablation, (why,) * points, None, level, n)
    lost = (~np.isfinite(per_example)).sum(axis=1)  # (point,)
    clean = np.where(np.isfinite(per_example), per_example, 0.0)
    values = np.where(lost > 0, np.nan, (clean.mean(axis=1) - empty.mean()) / gap)
    notes = [f"the metric is not finite on {k} of {n} prompts" if k else "" for k in lost]
    if n < 2:
        notes = [note or "one prompt: no interval" for note in notes]
        return FaithfulnessCurve(sizes, fractions, values, missing, missing, ablation, tuple(notes), None, level, n)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n  # (draw, example)
    lower = weights @ empty  # (draw,)
    gaps = weights @ full - lower
    tail = (1 - level) / 2
    settled = np.quantile(gaps * np.sign(gap), tail) > TINY * scale
    gaps = np.where(np.abs(gaps) <= TINY * scale, np.nan, gaps)
    samples = (weights @ clean.T - lower[:, None]) / gaps[:, None]  # (draw, point)
    samples[:, lost > 0] = np.nan
    low, high = missing.copy(), missing.copy()
    if settled:
        good = lost == 0
        low[good], high[good] = np.nanquantile(samples[:, good], [tail, 1 - tail], axis=0)
    else:
        why = f"the model's own effect ({gap:.4g}) is not told from zero by {n} prompts: no interval"
        notes = [note or why for note in notes]
    return FaithfulnessCurve(
        sizes, fractions, values, low, high, ablation, tuple(notes), samples if settled else None, level, n
    )


@dataclass(frozen=True)
class Area:
    """One area, with its bootstrap interval over prompts; NaN where it is missing, and the note says why."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    note: str = ""

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Areas:
    """CPR and CMD of one curve on both axes, and each divided by the length of its axis.

    Divided, a circuit as good as the model at every size has CPR 1 and CMD 0 on either axis.

    Attributes:
        cpr, cmd: as MIB computes them.
        cpr_log, cmd_log: the same over ln(fraction), as MIB's log option.
        cpr_share, cmd_share: cpr and cmd over the axis length (0.999 for MIB's fractions).
        cpr_log_share, cmd_log_share: cpr_log and cmd_log over the axis length (ln 1000).
    """

    cpr: Area
    cmd: Area
    cpr_log: Area
    cmd_log: Area
    cpr_share: Area
    cmd_share: Area
    cpr_log_share: Area
    cmd_log_share: Area

    def to_frame(self) -> pd.DataFrame:
        """A row an area: area, value, low, high, note."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return pd.DataFrame(
            [{"area": k, "value": a.value, "low": a.low, "high": a.high, "note": a.note} for k, a in found.items()]
        )


def cpr(fractions: Sequence[float] | Floats, values: Sequence[float] | Floats, log: bool = False) -> Floats:
    """Circuit performance ratio: area under faithfulness by trapezoids.

    Args:
        fractions: horizontal axis, (point,), not decreasing.
        values: faithfulness, (..., point).
        log: integrate over ln(fraction).

    Returns:
        (...,); NaN where a value is missing or the log axis holds a zero.

    Example:
        >>> round(float(cpr(MIB_FRACTIONS, [1.0] * 10)), 3)
        0.999
    """
    y = np.asarray(values, dtype=float)
    area: Floats = (np.diff(_axis(fractions, log)) * (y[..., 1:] + y[..., :-1]) / 2).sum(axis=-1)
    return area


def cmd(fractions: Sequence[float] | Floats, values: Sequence[float] | Floats, log: bool = False) -> Floats:
    """Circuit-model distance: area of |1 - faithfulness| by trapezoids; parameters as for `cpr`.

    Example:
        >>> float(cmd(MIB_FRACTIONS, [1.0] * 10))
        0.0
    """
    return cpr(fractions, np.abs(1 - np.asarray(values, dtype=float)), log)


def _axis(fractions: Sequence[float] | Floats, log: bool) -> Floats:
    x = np.asarray(fractions, dtype=float)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all() or (np.diff(x) < 0).any() or (x < 0).any():
        raise VesaliusError(f"an area needs two or more growing fractions from 0 to 1, not {x.tolist()}")
    if log and x[0] <= 0:
        return np.full(len(x), np.nan)
    axis: Floats = np.log(x) if log else x
    return axis


def areas(curve: FaithfulnessCurve) -> Areas:
    """CPR and CMD of a curve, linear and log, plain and as a share of the axis, with intervals where the curve has any.

    MIB takes CPR from the curve ranked by signed score and CMD from the one ranked by magnitude: call this on both.
    """
    found: dict[str, Area] = {}
    reasons = sorted({note for note, v in zip(curve.notes, curve.values, strict=False) if note and np.isnan(v)})
    tail = (1 - curve.level) / 2
    for log in (False, True):
        axis = _axis(curve.fractions, log)
        length = float(axis[-1] - axis[0])
        reason = "; ".join(reasons)
        if log and np.isnan(length):
            reason = "a circuit of fraction 0 has no place on a log axis"
        for name, area in (("cpr", cpr), ("cmd", cmd)):
            value, low, high = float(area(curve.fractions, curve.values, log)), float("nan"), float("nan")
            if curve.draws is not None and not np.isnan(value):
                sampled = area(curve.fractions, curve.draws, log)
                low, high = (float(v) for v in np.nanquantile(sampled, [tail, 1 - tail]))
            note = reason if np.isnan(value) else ""
            name = name + ("_log" if log else "")
            found[name] = Area(value, low, high, note)
            if length > 0:
                found[name + "_share"] = Area(value / length, low / length, high / length, note)
            else:
                found[name + "_share"] = Area(float("nan"), note=note or "the axis has no length")
    return Areas(**found)
