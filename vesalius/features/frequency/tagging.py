"""Frequency tagging: units that follow sentences and phrases in a steady stream of words, without any label.

    tagged = frequency_tagging(model, made_sentences())
    tagged.conditions        counts here, in shuffled sentences, with exchanged words, in the untrained model

Each sentence's activations are averaged over random orders and laid one after another; their spectrum is tested against
shuffled time (see `spectrum`). What is exchanged under that null are words: where no word stands in two sentences, a
model that knows words and no structure has as many units as the level says, whatever the words. The paper averages what
stands at the same time in different orders instead (`raw` in the table of conditions). That has the same amplitude at
the tagged rates and less noise beside them, the more orders the less, so that any difference between the word lists of
two places becomes a rhythm: on random weights too.

After the Hierarchical Frequency Tagging Probe, Zhang et al. 2025 (arXiv 2510.13255).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vesalius.errors import UnknownName, VesaliusError
from vesalius.features.frequency import spectrum
from vesalius.features.frequency.series import Series, unit_series, untrained
from vesalius.features.frequency.stimuli import CONTROLS, Sentence
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.scores import Scores

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]
CONDITIONS = (*CONTROLS, "untrained")
BLOCKS = 10  # of sentences, each left out once for the intervals
SMOOTH = 0.4  # of the layers, under each point of the fitted profile


@dataclass(frozen=True)
class Tagged:
    """What follows what.

    Attributes:
        units: a row a unit: layer, unit, set ("sentence", "phrase", "both" or ""), share, p, q and z at both rates.
        conditions: a row a condition: units, sentence, phrase, both (counts), and `raw_`, by the paper's rule.
        profile: a row a layer: units, sentence, phrase, both, share (of units at the sentence's rate) with low and
            high, fitted with fitted_low and fitted_high, and a column for each control's share.
        spectrum: frequency (Hz), amplitude (mean over the sentence set of |X| over that of shuffled time), condition.
        places: (layer, unit, word), each unit's mean activation at the places of a sentence.
        series: the activations themselves. info: everything the numbers depend on, and how the sets repeat.
    """

    units: pd.DataFrame
    conditions: pd.DataFrame
    profile: pd.DataFrame
    spectrum: pd.DataFrame
    places: NDArray[np.float32]
    series: Series
    info: dict[str, Any] = field(default_factory=dict)

    def members(self, name: str = "sentence") -> NDArray[np.bool_]:
        """Units that follow sentences (or phrases), those that follow both among them."""
        if name not in ("sentence", "phrase"):
            raise UnknownName("set", name, ("sentence", "phrase"))
        return self.units["set"].isin([name, "both"]).to_numpy()

    def scores(self) -> Scores:
        """The share of each unit's power at the sentence's rate, as the one table for findings."""
        stack = str(self.info["stack"])
        parts = [
            Part("neuron", int(n), int(i), stack=stack)
            for n, i in self.units[["layer", "unit"]].itertuples(index=False, name=None)
        ]
        keys = ("model", "fingerprint", "seed", "orders", "permutations")
        info = {k: self.info[k] for k in keys} | {"method": "frequency", "unit": "power over that of shuffled time"}
        columns = {k: self.units[k].to_numpy(float) for k in ("p_sentence", "q_sentence", "share_phrase", "q_phrase")}
        return Scores(parts, self.units["share_sentence"].to_numpy(float), info=info, columns=columns)


def frequency_tagging(
    model: Model,
    sentences: Sequence[Sentence],
    *,
    orders: int = 20,
    controls: Sequence[str] = CONDITIONS,
    permutations: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tagged:
    """Finds the units that follow sentences and phrases.

    Args:
        model: from `vesalius.open`, with a fast tokenizer.
        sentences: of one length; words that stand in several weaken the null.
        orders: random orders in which they are read. controls: of `CONDITIONS`; an empty tuple for none.
        permutations: of time, the same for all units.

    Raises:
        VesaliusError: too few sentences, or of different lengths.

    Example:
        >>> tagged = frequency_tagging(model, made_sentences(64))            # doctest: +SKIP
        >>> tagged.profile[["layer", "share", "low", "high"]]                # doctest: +SKIP
    """
    kept = fitting(sentences)
    words = len(kept[0])
    for name in controls:
        if name not in CONDITIONS:
            raise UnknownName("control", name, CONDITIONS)
    turns, done = (1 + len(controls)) * orders, 0

    def read(at: Model, kind: str) -> Series:
        nonlocal done

        def tell(i: int, total: int) -> None:
            if progress is not None:
                progress(done + i, turns)

        found = unit_series(at, kept, orders, seed, kind, tell)
        done += orders
        return found

    series = read(model, "")
    flat = _flat(series)
    around, rows, shares, drawn = None, [], {}, []
    others: dict[str, pd.DataFrame] = {}
    for name in controls:
        it = read(untrained(model, seed), "") if name == "untrained" else read(model, name)
        x = _flat(it)
        if name == "shuffled":
            around = x
        found = spectrum.measured(x, words, permutations, seed)
        found["set"] = spectrum.sets(found, x, words, seed=seed)
        others[name] = found.assign(layer=_layers(it))
        rows.append(_row(name, found["set"], it, words, permutations, seed))
        drawn.append((name, x))
        del it
    units = spectrum.measured(flat, words, permutations, seed, around)
    units["set"] = spectrum.sets(units, flat, words, seed=seed)
    for name in ("sentence", "phrase"):
        units[f"q_{name}"] = spectrum.corrected(units[f"p_{name}"].to_numpy(float))
    units.insert(0, "layer", _layers(series))
    units.insert(1, "unit", np.tile(np.arange(series.by_sentence.shape[1]), len(series.layers)))
    conditions = pd.DataFrame([_row("sentences", units["set"], series, words, permutations, seed), *rows])
    for name, found in others.items():
        shares[name] = found["set"].isin(["sentence", "both"]).groupby(found["layer"]).mean().to_numpy(float)
    member = units["set"].isin(["sentence", "both"]).to_numpy()
    repeated = len({w.lower() for s in kept for w in s}) < len(kept) * words
    info: dict[str, Any] = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "stack": "enc" if "enc" in model.anatomy.stacks else model.anatomy.main.prefix,
        "sentences": len(kept),
        "left_out": len(sentences) - len(kept),
        "words": words,
        "orders": orders,
        "tokens": series.tokens,
        "permutations": permutations,
        "controls": list(controls),
        "repeated_words": repeated,
        "seed": seed,
        **_repeats(series, words),
        **_between_layers(units),
    }
    profile, more = _profile(units, flat, words)
    for name, values in shares.items():
        profile[name] = values
    return Tagged(
        units,
        conditions,
        profile,
        _mean_spectra([("sentences", flat), *drawn], member, words),
        series.by_sentence.mean(axis=2),
        series,
        info | more,
    )


def fitting(sentences: Sequence[Sentence]) -> list[Sentence]:
    """As many of the sentences as every rate's bin needs.

    Raises:
        VesaliusError: for too few of them, or of different lengths.
    """
    lengths = {len(s) for s in sentences}
    if len(lengths) > 1:
        raise VesaliusError(f"the sentences have {min(lengths)} to {max(lengths)} words; all need the same number")
    words = lengths.pop() if lengths else 0
    if words < 2:
        raise VesaliusError(f"sentences of {words} words have no rate of their own; use 3 words or more")
    kept, need = list(sentences)[: spectrum.whole(len(sentences), words)], spectrum.least(words)
    if len(kept) < need:
        raise VesaliusError(
            f"{len(sentences)} sentences of {words} words are too few: the {spectrum.WINDOW} bins beside the "
            f"sentence's rate need {need} or more (60 are advised)"
        )
    return kept


def _flat(series: Series) -> Floats:
    """(layer x unit, time), the sentences one after another."""
    x = series.by_sentence
    return x.reshape(x.shape[0] * x.shape[1], -1)  # type: ignore[return-value]


def _layers(series: Series) -> NDArray[np.int_]:
    return np.repeat(np.asarray(series.layers), series.by_sentence.shape[1])


def _row(name: str, held: pd.Series[str], series: Series, words: int, permutations: int, seed: int) -> dict[str, Any]:
    """Counts of a condition, by our rule and by the paper's."""
    time = series.by_time.reshape(-1, series.by_time.shape[-1])
    found = spectrum.measured(time, words, permutations, seed)
    raw = spectrum.sets(found, time, words, raw=True, seed=seed)
    row: dict[str, Any] = {"condition": name, "units": len(held)}
    for key in ("sentence", "phrase", "both"):
        row[key] = int((held == key).sum())
    return row | {f"raw_{key}": int((raw == key).sum()) for key in ("sentence", "phrase", "both")}


def _found(x: NDArray[Any], words: int) -> NDArray[np.bool_]:
    found = spectrum.measured(x, words, 0)
    held: NDArray[np.bool_] = (spectrum.corrected(found["p_sentence"].to_numpy(float)) < spectrum.LEVEL) & (
        found["z_sentence"] > spectrum.Z
    ).to_numpy()
    return held


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> dict[str, float]:
    """Jaccard and Dice of two sets of the same units, and the Dice that sets of these sizes have by chance."""
    both, either, sizes = int((a & b).sum()), int((a | b).sum()), int(a.sum() + b.sum())
    chance = 2 * a.mean() * b.sum() / sizes if sizes else float("nan")
    return {
        "jaccard": both / either if either else float("nan"),
        "dice": 2 * both / sizes if sizes else float("nan"),
        "dice_chance": float(chance),
    }


def _repeats(series: Series, words: int) -> dict[str, Any]:
    """Do the sets come out again in the other half of the orders, and of the sentences?"""
    halves = [h.reshape(h.shape[0] * h.shape[1], -1) for h in series.halves]
    by_order = overlap(*(_found(h, words) for h in halves))
    x = series.by_sentence
    n = spectrum.whole(x.shape[2] // 2, words)
    if n < spectrum.least(words):
        return {"split_orders": by_order, "split_sentences": None}
    parts = [x[:, :, i::2][:, :, :n].reshape(x.shape[0] * x.shape[1], -1) for i in (0, 1)]
    return {"split_orders": by_order, "split_sentences": overlap(*(_found(p, words) for p in parts))}


def _between_layers(units: pd.DataFrame) -> dict[str, float]:
    """Dice of the sentence sets of different layers by the units' numbers (which mean nothing), and by chance."""
    wide = units.assign(held=units["set"].isin(["sentence", "both"])).pivot(
        index="unit", columns="layer", values="held"
    )
    x = wide.to_numpy(bool)
    pairs = [overlap(x[:, i], x[:, j]) for i in range(x.shape[1]) for j in range(i)]
    kept = [p for p in pairs if np.isfinite(p["dice"])]
    if not kept:
        return {}
    means = {f"layers_{k}": float(np.mean([p[k] for p in kept])) for k in ("dice", "dice_chance")}
    return means


def _profile(units: pd.DataFrame, x: Floats, words: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Shares by layer, and a smooth curve through them; intervals by leaving out tenths of the sentences."""
    from statsmodels.nonparametric.smoothers_lowess import lowess

    held = units.assign(n=1, **{k: units["set"] == k for k in ("sentence", "phrase", "both")})
    table = held.groupby("layer")[["n", "sentence", "phrase", "both"]].sum().reset_index()
    table = table.rename(columns={"n": "units"})
    depth = table["layer"].to_numpy(float)
    table["share"] = (table["sentence"] + table["both"]) / table["units"]

    def fit(shares: Floats) -> Floats:
        if len(depth) < 5:
            return shares
        curve = lowess(shares, depth, frac=max(SMOOTH, 4 / len(depth)), it=0, return_sorted=False)
        return np.clip(np.asarray(curve), 0, 1)

    count = x.shape[1] // words
    blocks = np.array_split(np.arange(count), min(BLOCKS, count))
    layers = units["layer"].to_numpy()
    draws = []
    for r in spectrum.sentence_shares(x, words, [np.array([], dtype=int), *blocks]):
        p = np.exp(-r)
        found = (spectrum.corrected(p) < spectrum.LEVEL).astype(float)
        draws.append(pd.Series(found).groupby(layers).mean().to_numpy())
    jackknife = np.stack(draws[1:])  # (block, layer)
    fitted = fit(table["share"].to_numpy(float))
    curves = np.stack([fit(d) for d in jackknife])
    for name, value, parts in (("", table["share"].to_numpy(float), jackknife), ("fitted_", fitted, curves)):
        half = 1.96 * (len(parts) - 1) / np.sqrt(len(parts)) * parts.std(0, ddof=1)  # the jackknife's
        table[f"{name}low"], table[f"{name}high"] = np.clip(value - half, 0, 1), np.clip(value + half, 0, 1)
    table["fitted"] = fitted
    peaks = depth[curves.argmax(1)]
    return table, {
        "peak_layer": int(depth[fitted.argmax()]),
        "peak_low": int(peaks.min()),
        "peak_high": int(peaks.max()),
    }


def _mean_spectra(conditions: Sequence[tuple[str, Floats]], member: NDArray[np.bool_], words: int) -> pd.DataFrame:
    rows = []
    for name, x in conditions:
        mine = x[member] if member.any() else x
        mine = mine - mine.mean(-1, keepdims=True)
        scale = np.sqrt(np.maximum((mine**2).sum(-1, keepdims=True), 1e-30))
        mean = (spectrum.amplitudes(mine) / scale).mean(0)
        length = x.shape[1]
        rate = np.arange(len(mean)) / (length * spectrum.WORD_SECONDS)
        rows.append(pd.DataFrame({"frequency": rate, "amplitude": mean, "condition": name}).iloc[1:])
    return pd.concat(rows, ignore_index=True)
