"""Is a head's score more than chance? Permutation tests within prompts, and the correction for looking at every head.

In each prompt a head has one real value and D values of what chance would have given there (other keys, other prompts,
shuffled labels). If the head did not care for the real one, the D + 1 would be exchangeable. So the real one is chosen
anew in every prompt, `DRAWS` times, and p is the share of draws whose mean over prompts is at least the real mean, the
real one counted: p = (1 + #{T* >= T}) / (1 + DRAWS). With D = 1 this is the paired permutation test.

q is p after Benjamini and Hochberg (1995) over all heads of a detector.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vesalius.scores import Array

Floats = NDArray[np.float64]

DRAWS = 9999  # the smallest p, 1e-4, still passes the correction over several hundred heads
CHUNK = 1000  # draws at once
ALPHA = 0.05
TIE = 1e-9


def exchange(values: Array, chance: Array, seed: int, draws: int = DRAWS) -> dict[str, Floats]:
    """Tests every head's mean over prompts against exchange with its chance values.

    Args:
        values: (head, prompt), NaN where a prompt says nothing (for all heads alike).
        chance: (head, prompt, draw).

    Returns:
        Columns (head,): `null` (mean of the chance values), `null_high` (95 % point of the mean over so many prompts of
        chance values), `p` and `q`.
    """
    there = ~np.isnan(values).any(axis=0)
    real = np.asarray(values[:, there], dtype=np.float64)
    other = np.asarray(chance[:, there], dtype=np.float64)  # (head, prompt, draw)
    heads, prompts, kinds = other.shape
    if not prompts:
        nothing = np.full(heads, np.nan)
        return {"null": nothing, "null_high": nothing.copy(), "p": nothing.copy(), "q": nothing.copy()}
    rng = np.random.default_rng([seed, prompts, kinds])
    shift = np.concatenate([np.zeros((heads, prompts, 1)), other - real[..., None]], axis=-1)
    flat = shift.reshape(heads, -1)  # what choosing a draw instead of the real value adds, (head, prompt * (1 + draw))
    least = -TIE * np.maximum(1.0, np.abs(real).mean(1, keepdims=True))
    above = np.zeros(heads)
    for first in range(0, draws, CHUNK):
        n = min(CHUNK, draws - first)
        chosen = rng.integers(0, kinds + 1, (n, prompts)) + (kinds + 1) * np.arange(prompts)
        pick = np.zeros((n, flat.shape[1]))
        np.put_along_axis(pick, chosen, 1.0 / prompts, axis=1)
        above += (flat @ pick.T >= least).sum(1)
    pool = other.reshape(heads, -1)
    weights = rng.multinomial(prompts, np.full(pool.shape[1], 1 / pool.shape[1]), size=CHUNK) / prompts
    high = np.quantile(pool @ weights.T, 0.95, axis=1)
    p = (1 + above) / (1 + draws)
    return {"null": pool.mean(1), "null_high": high, "p": p, "q": corrected(p)}


def against(scores: Array, draws: Array) -> dict[str, Floats]:
    """The same columns where the null gives whole scores, (head, draw), of labels shuffled over all items at once."""
    above = (draws >= scores[:, None] - TIE).sum(1)
    p = (1 + above) / (1 + draws.shape[1])
    return {"null": draws.mean(1), "null_high": np.quantile(draws, 0.95, axis=1), "p": p, "q": corrected(p)}


def both(first: Mapping[str, Floats], p: Floats) -> dict[str, Floats]:
    """Columns of a score that must pass a second test too: its p is the larger of the two (intersection-union)."""
    larger = np.fmax(first["p"], p)
    return {**first, "p": larger, "q": corrected(larger)}


def positive(values: Array, seed: int, draws: int = DRAWS) -> Floats:
    """P of a mean over prompts above 0, by random signs, (head,) from (head, prompt)."""
    return exchange(values, -values[..., None], seed, draws)["p"]


def corrected(p: Floats) -> Floats:
    """Benjamini and Hochberg's adjusted p-values; NaN stays NaN."""
    out = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    if known.any():
        out[known] = stats.false_discovery_control(p[known])
    return out
