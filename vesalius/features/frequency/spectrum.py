"""Which series rise and fall with sentences and phrases: amplitudes at their rates, against shuffled time.

A word lasts 0.25 s, so sentences of k words come at 4/k Hz and phrases of j words at 4/j Hz. For a series x of T words
and the bin f = T/j,

    X(f) = sum_t x(t) exp(-2 pi i t / j),        r = |X(f)|^2 (T - 1) / (T sum x^2),

with the mean taken out. Where the order of the T values means nothing, r has mean 1 and, for long series, an
exponential law (chi-squared with one degree of freedom at 2 Hz, the highest rate, where X is real). p is the share of
random orders of the same values with an amplitude as large; where none is, the law's own tail, so that a correction
over tens of thousands of units (Benjamini and Hochberg) has something to work with. z compares |X(f)| with the bins
around it.

A unit that fires at one place of a sentence of four words has the same amplitude at 1 and at 2 Hz: the latter is an
overtone and shows no phrase. So at rates that are overtones of the sentence's a phrase counts only if its amplitude is
above that at the sentence's rate, in 97.5 % of resamples of the sentences.

After Zhang et al. 2025 (arXiv 2510.13255), whose own rule, `raw`, is p < 0.05 uncorrected and z > 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.fft import rfft
from scipy.stats import chi2

Floats = NDArray[np.float64]
WORD_SECONDS = 0.25
WINDOW = 10  # bins to either side that z looks at
LEVEL = 0.05
Z = 2.0
ROWS = 4096  # units whose shuffles are in memory at once
RESAMPLES = 200  # of the sentences, for the rule about overtones


def phrase_periods(words: int) -> list[int]:
    """How many words a phrase may have: from two to half of the sentence."""
    return list(range(2, words // 2 + 1))


def whole(sentences: int, words: int) -> int:
    """The most sentences, of so many, after which every rate's bin is a whole number."""
    each = int(np.lcm.reduce([words, *phrase_periods(words)])) // words
    return sentences // each * each


def least(words: int) -> int:
    """The fewest sentences with `WINDOW` bins between zero and the sentence's rate, so that z has neighbours."""
    each = int(np.lcm.reduce([words, *phrase_periods(words)])) // words
    return -(-(WINDOW + 2) // each) * each


def corrected(p: Floats) -> Floats:
    """Benjamini and Hochberg over all of them."""
    from statsmodels.stats.multitest import multipletests

    found: Floats = np.asarray(multipletests(p.ravel(), method="fdr_bh")[1]).reshape(p.shape)
    return found


def amplitudes(x: NDArray[np.floating[Any]]) -> Floats:
    """|X| at every bin of the series (..., time), nothing at 0."""
    found: Floats = np.abs(rfft(np.asarray(x, dtype=np.float64), axis=-1))
    found[..., 0] = 0
    return found


def neighbours(spectrum: Floats, at: int, periods: list[int], length: int) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the bins around one, the rates' own bins left out."""
    rates = {length // j for j in periods}
    around = [b for b in range(at - WINDOW, at + WINDOW + 1) if 0 < b < spectrum.shape[-1] and b not in rates]
    near = spectrum[..., around]
    return near.mean(-1), np.maximum(near.std(-1, ddof=1), 1e-12)


def _phasor(period: int, length: int) -> NDArray[np.complex128]:
    return np.exp(-2j * np.pi * (np.arange(length) % period) / period)


def _law(r: Floats, period: int) -> Floats:
    """How often shuffled time gives a share of power as large."""
    return np.asarray(chi2.sf(r, 1) if period == 2 else np.exp(-r))


def _shares(x: Floats, period: int) -> Floats:
    length = x.shape[-1]
    power = np.abs(x @ _phasor(period, length)) ** 2
    return np.asarray(power * (length - 1) / np.maximum(length * (x**2).sum(-1), 1e-30))


def measured(
    x: NDArray[np.floating[Any]],
    words: int,
    permutations: int = 1000,
    seed: int = 0,
    around: NDArray[np.floating[Any]] | None = None,
) -> pd.DataFrame:
    """Tests every series at the sentence's rate and at the phrases'.

    Args:
        x: (unit, time), whole sentences one after another.
        words: in a sentence. permutations: of time; 0 for the law alone.
        around: the same units in a control, whose neighbouring bins z must exceed too.

    Returns:
        A row a unit: share_sentence, p_sentence, z_sentence, z_control_sentence (r is `share`), the same for phrase (of
        several lengths the one with the smallest p, corrected for their number), and period, that length.
    """
    y: Floats = np.asarray(x, dtype=np.float64)
    y = y - y.mean(-1, keepdims=True)
    n, length = y.shape
    periods = [words, *phrase_periods(words)]
    spectrum = amplitudes(y)
    other = None if around is None else amplitudes(around)
    rng = np.random.default_rng([seed, *b"time"])
    orders = np.argsort(rng.random((permutations, length)), axis=1)  # the same for all units: one product does it
    columns: dict[str, list[Floats]] = {"share": [], "p": [], "z": [], "z_control": []}
    for period in periods:
        share, at = _shares(y, period), length // period
        p = _law(share, period)
        if permutations:
            phase = _phasor(period, length)[orders].T  # (time, permutation)
            more = _as_large(y, phase, np.abs(y @ _phasor(period, length)) ** 2, period == 2)
            p = np.where(more > 0, (1 + more) / (1 + permutations), np.minimum(p, 1 / (1 + permutations)))
        mean, deviation = neighbours(spectrum, at, periods, length)
        columns["share"].append(share)
        columns["p"].append(p)
        columns["z"].append((spectrum[:, at] - mean) / deviation)
        if other is not None:
            mean, deviation = neighbours(other, at, periods, length)
        columns["z_control"].append((spectrum[:, at] - mean) / deviation)
    found = {f"{name}_sentence": values[0] for name, values in columns.items()}
    if len(periods) > 1:
        p = np.stack(columns["p"][1:])
        best = p.argmin(0)
        each = np.arange(n)
        found |= {f"{name}_phrase": np.stack(values[1:])[best, each] for name, values in columns.items()}
        found["p_phrase"] = np.minimum(1, found["p_phrase"] * (len(periods) - 1))
        found["period"] = np.asarray(periods[1:])[best]
    else:
        found |= {f"{name}_phrase": np.full(n, 1.0 if name == "p" else 0.0) for name in columns}
        found["period"] = np.zeros(n, dtype=int)
    return pd.DataFrame(found)


def _as_large(x: Floats, phase: NDArray[np.complex128], power: Floats, real: bool) -> NDArray[np.int_]:
    """How many shuffles have at least this power, (unit,)."""
    cos, sin = phase.real.astype(np.float32), phase.imag.astype(np.float32)
    found = []
    for begin in range(0, len(x), ROWS):
        mine = x[begin : begin + ROWS].astype(np.float32)
        null = (mine @ cos) ** 2
        if not real:
            null += (mine @ sin) ** 2
        found.append((null >= power[begin : begin + ROWS, None] * (1 - 1e-5)).sum(1))
    return np.concatenate(found)


def exceeds(x: NDArray[np.floating[Any]], words: int, period: int, seed: int = 0) -> NDArray[np.bool_]:
    """Whether the amplitude at the phrase's rate is above that at the sentence's, sentences resampled, (unit,)."""
    n, length = x.shape
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(-1, keepdims=True)
    count = length // words
    draws = np.random.default_rng([seed, *b"sentences"]).multinomial(count, np.full(count, 1 / count), RESAMPLES).T
    size = []
    for j in (words, period):
        parts = (x * _phasor(j, length)).reshape(n, count, words).sum(-1)  # (unit, sentence)
        size.append(np.abs(parts @ draws))
    above: NDArray[np.bool_] = (size[1] > size[0]).mean(1) >= 0.975
    return above


def sets(
    found: pd.DataFrame, x: NDArray[np.floating[Any]], words: int, raw: bool = False, seed: int = 0
) -> NDArray[np.str_]:
    """Each unit's set: "sentence", "phrase", "both" or "".

    Args:
        found: of `measured`, all units of the model. x: the same series.
        raw: the paper's rule: p uncorrected, overtones counted as phrases.
    """
    held = {}
    for name in ("sentence", "phrase"):
        p = found[f"p_{name}"].to_numpy(float)
        q = p if raw else corrected(p)
        held[name] = (q < LEVEL) & (found[f"z_{name}"] > Z).to_numpy() & (found[f"z_control_{name}"] > Z).to_numpy()
    if not raw:
        both = np.flatnonzero(held["sentence"] & held["phrase"])
        periods = found["period"].to_numpy()
        for period in np.unique(periods[both]):
            mine = both[periods[both] == period]
            if period and words % period == 0:
                held["phrase"][mine] = exceeds(x[mine], words, int(period), seed)
    return np.select(
        [held["sentence"] & held["phrase"], held["sentence"], held["phrase"]], ["both", "sentence", "phrase"], ""
    ).astype(str)


def sentence_shares(x: NDArray[np.floating[Any]], words: int, left_out: list[NDArray[np.int_]]) -> Floats:
    """R at the sentence's rate with some sentences left out, (left out, unit); the jackknife's raw material."""
    n, length = x.shape
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(-1, keepdims=True)
    count = length // words
    parts = (x * _phasor(words, length)).reshape(n, count, words).sum(-1)
    power = (x**2).reshape(n, count, words).sum(-1)
    rows = []
    for gone in left_out:
        kept = np.setdiff1d(np.arange(count), gone)
        t = len(kept) * words
        rows.append(np.abs(parts[:, kept].sum(1)) ** 2 * (t - 1) / np.maximum(t * power[:, kept].sum(1), 1e-30))
    return np.stack(rows)
