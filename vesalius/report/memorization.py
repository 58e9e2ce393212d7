"""The report of `vesalius memorize`: what was memorized, by checkpoint and exposures, and who foretold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, Table, record, warnings, write
from vesalius.report.words import number
from vesalius.runs import Run

SHOWN = 4  # checkpoints in the histogram
EXAMPLES = 60  # sequences listed


def memorization_report(run: Run) -> Path:
    """Draws a memorization run as one offline HTML file in its folder.

    It reads `summary.json` (run, target, prompt, continuation, memorized, place, trajectory, lead, notes) and the
    tables scores, sequences, by_step, by_dose, by_exposures, histogram, places, forecasts, precision_recall.
    """
    summary = tables.summary(run, ["run", "target", "memorized"])
    steps = tables.frame(run, "by_step", ["step", "group", "among", "share"])
    target = int(summary["target"])
    count = steps["step"].nunique() if steps is not None else 0
    page = Page(
        kind="memorize",
        title=f"What {summary['run']} memorized",
        subtitle=f"{count} checkpoints · {summary['prompt']} tokens given, {summary['continuation']} to be recited",
        lead=str(summary.get("lead", "")),
        facts=_facts(summary),
        warnings=warnings(run),
        sections=[
            _by_exposures(run, target),
            _by_step(steps),
            _histogram(tables.frame(run, "histogram", ["step", "group", "low", "high", "share"])),
            _forecasts(run, summary),
            _place(tables.frame(run, "places", ["stretch", "memorized", "expected"]), summary),
            _examples(run, target),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    names = {"row": "training rows", "held-out": "held-out rows", "canary": "canaries"}
    return [
        (
            names.get(str(row["group"]), str(row["group"])),
            f"{float(row['share']):.1%}",
            f"{row['memorized']} of {row['n']} recited; 95 % interval {row['low']:.1%} to {row['high']:.1%}",
        )
        for row in summary["memorized"]
    ]


def _by_exposures(run: Run, target: int) -> Section:
    title = "By exposures"
    doses = tables.frame(run, "by_dose", ["step", "group", "dose", "share", "score"])
    every = tables.frame(run, "by_exposures", ["step", "group", "exposures", "share"])
    if doses is None or every is None:
        return Section(title, missing="no sequence was read.")
    last = doses[doses["step"] == target]
    every = every[every["step"] == target]
    chart = charts.lines(
        last,
        "dose",
        "share",
        ("times read (log scale)", "share memorized"),
        "Share memorized by exposures",
        "group",
        log_x=True,
        from_zero=True,
        wide=False,
    )
    scores = charts.lines(
        last,
        "dose",
        "score",
        ("times read (log scale)", "mean score"),
        "Mean share of tokens right by exposures",
        "group",
        log_x=True,
        from_zero=True,
        wide=False,
    )
    table = tables.frame_table(every, ["group", "exposures", "n", "memorized", "share", "low", "high", "score"])
    read = (
        f"each sequence counts at the number of times it had been read by step {target:,}; curves put together what "
        "was read 2 or 3 times, 4 to 7 times and so on. 95 % intervals (Wilson) in the table."
    )
    return Section(title, [chart, scores, table], read, layout="pair")


def _by_step(steps: pd.DataFrame | None) -> Section:
    title = "Over training"
    if steps is None:
        return Section(title, missing="no checkpoint was measured.")
    named = steps[steps["among"].isin(["all", "seen so far"])].copy()
    held_out = named["group"] == "held-out"
    named["what"] = named["group"] + ", " + named["among"]
    named.loc[held_out, "what"] = "held-out"
    named = named[~held_out | (named["among"] == "all")]
    chart = charts.lines(
        named,
        "step",
        "share",
        ("step (log scale)", "share memorized"),
        "Share memorized by checkpoint",
        "what",
        ["held-out"] if named["what"].nunique() > 1 else [],
        log_x=True,
        from_zero=True,
    )
    read = (
        "a checkpoint cannot recite what it has not read: 'all' counts everything asked about, 'seen so far' the rest."
    )
    return Section(title, [chart], read.replace("the rest", "what it had read; held-out rows are the control"))


def _histogram(bins: pd.DataFrame | None) -> Section:
    title = "How scores are distributed"
    if bins is None:
        return Section(title, missing="no checkpoint was measured.")
    steps = sorted(set(bins["step"]))
    chosen = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(SHOWN, len(steps)))})
    blocks = []
    for group in dict.fromkeys(bins["group"]):
        part = bins[(bins["group"] == group) & bins["step"].isin(chosen)].copy()
        part["middle"] = 50 * (part["low"] + part["high"])  # per cent
        part["checkpoint"] = [f"step {s}" for s in part["step"]]
        blocks.append(
            charts.lines(
                part,
                "middle",
                "share",
                ("score: tokens right, per cent", "share of sequences"),
                str(group),
                "checkpoint",
                from_zero=True,
                wide=False,
            )
        )
    read = "memorized sequences gather at 1, the others near 0; few lie between."
    return Section(title, blocks, read, layout="pair")


def _forecasts(run: Run, summary: dict[str, Any]) -> Section:
    title = "Was it foreseeable?"
    found = tables.frame(run, "forecasts", ["predictor", "among", "recall"])
    if found is None:
        return Section(title, missing="there is no earlier checkpoint to foretell it.")
    blocks: list[Any] = []
    curve = tables.frame(run, "precision_recall", ["threshold", "precision", "recall", "predictor"])
    if curve is not None:
        axes = ("recall", "precision")
        curve = curve.sort_values(["predictor", "recall", "precision"], ascending=[True, True, False], kind="stable")
        blocks.append(
            charts.lines(
                curve,
                "recall",
                "precision",
                axes,
                "Precision and recall over the score's threshold",
                "predictor",
                from_zero=True,
                wide=False,
            )
        )
    cost = found[found["among"] == "all"].copy()
    cost["kind"] = np.where(cost["predictor"].str.fullmatch(r"step \d+"), "checkpoints", "other models")
    cost = cost[cost["flops"] > 0]
    if len(cost):
        cost["tflop"] = cost["flops"] / 1e12
        blocks.append(
            charts.lines(
                cost,
                "tflop",
                "recall",
                ("training compute, 6NT (TFLOP)", "recall"),
                "Recall by compute",
                "kind",
                from_zero=True,
                wide=False,
            )
        )
    columns = ["predictor", "among", "flops", "n", "memorized", "foretold", "precision", "recall", "f1", "auroc"]
    blocks.append(tables.frame_table(found.sort_values(["among", "flops"], kind="stable"), columns))
    read = (
        f"a predictor foretells that step {int(summary['target']):,} memorizes a sequence when it recites it itself; "
        "recall is the share of what came to be memorized that it foretold."
    )
    remarks = []
    trajectory = summary.get("trajectory")
    if trajectory and trajectory.get("folds"):
        remarks.append(
            f"A regression on the scores of all checkpoints up to step {int(summary['early']):,} ranks sequences with "
            f"AUROC {number(trajectory['auroc'])}, that checkpoint alone {number(trajectory['single'])} "
            f"(gain {number(trajectory['gain'])}, 95 % {number(trajectory['low'])} to {number(trajectory['high'])})."
        )
    return Section(title, blocks, read, layout="pair", remarks=remarks)


def _place(counts: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "Place in training"
    place = summary.get("place") or {}
    if counts is None:
        few = f"{place.get('memorized', 0)} of {place.get('n', 0)} sequences are memorized: too few to tell."
        return Section(title, missing=few)
    shown = counts.melt("stretch", ["memorized", "expected"], "what", "count")
    chart = charts.lines(
        shown,
        "stretch",
        "count",
        ("stretch of the training order", "memorized sequences"),
        "Memorized by place in training",
        "what",
        ["expected"],
        from_zero=True,
    )
    verdict = "fit" if place.get("poisson") else "do not fit"
    read = (
        f"{place['n']:,} sequences read equally often, in {place['stretches']} equal stretches of the order. Counts "
        f"{verdict} a process without preference for place (dispersion {number(place['dispersion'])}, "
        f"p = {number(place['p_dispersion'])}; place, p = {number(place['p_place'])})."
    )
    return Section(title, [chart], read)


def _examples(run: Run, target: int) -> Section:
    title = "What it recites"
    texts = tables.frame(run, "sequences", ["sequence", "name", "group"])
    scores = tables.frame(run, "scores", ["step", "sequence", "score"])
    if texts is None or scores is None or "prompt" not in texts:
        return Section(title, missing="the texts are not known.")
    last = scores[scores["step"] == target].drop(columns="group").merge(texts, on="sequence")
    last = last[last["extractible"].astype(bool)].sort_values(["exposures", "sequence"], kind="stable").head(EXAMPLES)
    if not len(last):
        return Section(title, missing="nothing that was asked about is recited whole.")
    rows = [
        [r["name"], r["exposures"], r["first"], r["prompt"][-90:], r["continuation"][:160]]
        for r in last.to_dict("records")
    ]
    table = Table.of(["sequence", "times read", "first read", "end of the prompt", "recited"], rows, shown=12)
    return Section(title, [table], "memorized sequences, those that needed the fewest readings first.")
