"""The report of `vesalius frequency`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, Table, record, warnings, write
from vesalius.report.words import number, percent
from vesalius.runs import Run

_NAMES = {
    "sentences": "the sentences",
    "shuffled": "words shuffled inside",
    "exchanged": "words exchanged between",
    "untrained": "before training",
}

_ONLY = {
    "sentence": "sentence only",
    "phrase": "phrase only",
    "raw sentence": "raw sentence only",
    "raw phrase": "raw phrase only",
}


def frequency_report(run: Run) -> Path:
    """Draws a frequency run as one offline HTML file in its folder.

    It reads `summary.json` (model, sentences, words, orders, lead, notes, and how sets repeat) and the tables
    conditions, profile, spectrum, places, similarity, channels.
    """
    summary = tables.summary(run, ["model", "sentences", "words", "orders"])
    conditions = tables.frame(run, "conditions", ["condition", "units", "sentence", "phrase", "both"])
    profile = tables.frame(run, "profile", ["layer", "share", "fitted"])
    page = Page(
        kind="frequency",
        title=f"What follows sentences in {summary['model']}",
        subtitle=f"{summary['sentences']} sentences of {summary['words']} words · {summary['orders']} random orders",
        lead=str(summary["lead"]),
        facts=_facts(summary, conditions),
        warnings=warnings(run),
        sections=[
            _conditions(conditions, summary),
            _spectra(tables.frame(run, "spectrum", ["frequency", "amplitude", "condition"]), summary),
            _profile(profile, conditions),
            _places(tables.frame(run, "places", ["part", "set", "share"])),
            *_similarity(run, summary),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(summary: dict[str, Any], conditions: pd.DataFrame | None) -> list[tuple[str, str, str]]:
    facts = []
    if conditions is not None:
        row = conditions[conditions["condition"] == "sentences"].iloc[0]
        for name in ("sentence", "phrase"):
            n = int(row[name] + row["both"])
            facts.append((f"follow {name}s", f"{n:,}", f"{percent(n / row['units'])} of all units"))
    split = summary["split_orders"]
    facts.append(
        ("again in the other half", number(split["jaccard"]), "Jaccard of the sentence sets, halves of the orders")
    )
    first, last = summary["peak_low"], summary["peak_high"]
    among = f"layer {first}" if first == last else f"layers {first} to {last}"
    facts.append(("most at", f"layer {summary['peak_layer']}", f"{among} with tenths of the sentences left out"))
    return facts


def _conditions(conditions: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "How many, and what else would give as many"
    if conditions is None:
        return Section(title, missing="nothing was measured.")
    named = conditions.assign(condition=[_NAMES.get(c, c) for c in conditions["condition"]])
    total = named["sentence"] + named["both"]
    bars = pd.DataFrame({"condition": named["condition"], "share": total / named["units"]})
    bars["what"] = ["after", *["control"] * (len(bars) - 1)]
    bars["low"] = bars["high"] = float("nan")
    chart = charts.bars(bars, "share", "condition", "Share of units at the sentence's rate")
    heads = ["condition", "units", "sentence", "phrase", "both", "raw sentence", "raw phrase", "raw both"]
    columns = [h.replace(" ", "_") for h in heads]
    rows = [[r[c] for c in columns] for r in named.to_dict("records")]
    read = (
        "counted are units with q < 0.05 over all units and z > 2 against the frequencies beside. Raw counts follow "
        "the paper: averages by time, p < 0.05 uncorrected, overtones counted as phrases; the untrained model shows "
        "what they are worth. A rhythm that stays when words are exchanged between sentences is one of parts of speech."
    )
    examples = Table.of(["sentences, as they were read"], [[s] for s in summary.get("example") or []])
    shown = [_ONLY.get(h, h) for h in heads]
    return Section(title, [chart, Table.of(shown, rows), examples], read)


def _spectra(found: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "Spectra"
    if found is None:
        return Section(title, missing="no spectrum was stored.")
    named = found.assign(condition=[_NAMES.get(c, c) for c in found["condition"]])
    grey = [n for n in named["condition"].unique() if n != _NAMES["sentences"]]
    chart = charts.lines(
        named, "frequency", "amplitude", ("frequency (Hz)", "amplitude over root mean square"), "Mean spectrum of the "
        "units that follow sentences", "condition", from_zero=True, points=False,
        nested=True,
    )  # fmt: skip
    rate = 4 / summary["words"]
    read = (
        f"a word lasts 0.25 s, so a sentence comes {number(rate)} times a second. A peak there and at its multiples "
        f"is the sentence's rhythm. The same units in the controls: {', '.join(grey) or 'none were asked for'}."
    )
    return Section(title, [chart], read)


def _profile(profile: pd.DataFrame | None, conditions: pd.DataFrame | None) -> Section:
    title = "By layer"
    if profile is None:
        return Section(title, missing="nothing was measured.")
    kept = {"share": _NAMES["sentences"]} | {k: v for k, v in _NAMES.items() if k in profile}
    kept |= {"fitted": "the sentences, smoothed", "fitted_low": "interval (low)", "fitted_high": "interval (high)"}
    table = profile[["layer", *kept]].rename(columns=kept).melt("layer", var_name="what", value_name="value")
    chart = charts.lines(
        table, "layer", "value", ("layer", "share of units"), "Share of units that follow sentences", "what",
        grey=[kept["fitted_low"], kept["fitted_high"]], from_zero=True,
    )  # fmt: skip
    columns = ["layer", "units", "sentence", "phrase", "both", "share", "low", "high", "fitted"]
    read = (
        "grey lines bound the smoothed curve's 95 % interval (jackknife over tenths of the sentences). It knows "
        "nothing of sentences of another kind."
    )
    return Section(title, [chart, tables.frame_table(profile, columns, shown=12, labels=_ONLY)], read)


def _places(found: pd.DataFrame | None) -> Section:
    title = "The clearest units"
    if found is None:
        return Section(title, missing="no unit follows sentences or phrases.")
    columns = [str(c) for c in found if c not in ("low", "high")]
    read = (
        "mean activation at each place of a sentence. The share is a unit's power at its rate over what shuffled time "
        "gives, 1 by chance."
    )
    return Section(title, [tables.frame_table(found, columns, shown=12)], read)


def _similarity(run: Run, summary: dict[str, Any]) -> list[Section]:
    layers = tables.frame(run, "similarity", ["layer", "score", "null_high", "p"])
    if layers is None:
        return []
    kept = {"score": "similarity", "null_high": "95 % of stimuli in another order"}
    table = layers[["layer", *kept]].rename(columns=kept).melt("layer", var_name="what", value_name="value")
    title = "Against the recordings"
    chart = charts.lines(
        table, "layer", "value", ("layer", "rank correlation of distances"), "Layers and channels", "what",
        grey=[kept["null_high"]],
    )  # fmt: skip
    columns = ["layer", "units", "score", "null_high", "p"]
    blocks: list[Any] = [chart, tables.frame_table(layers, columns, shown=12)]
    channels = tables.frame(run, "channels", ["layer", "channel", "rho"])
    if channels is not None:
        best = channels.loc[channels.groupby("channel")["rho"].idxmax()].sort_values("rho", ascending=False)
        blocks.append(tables.frame_table(best[["channel", "layer", "rho"]], shown=10))
    what = "all units" if summary.get("compared") == "all" else f"units that follow {summary.get('compared')}s"
    read = f"distances between sentences in {what} of a layer and in each channel, mean over the 100 nearest channels."
    return [Section(title, blocks, read)]
