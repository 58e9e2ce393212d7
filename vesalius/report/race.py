"""The report of `vesalius race`: the standings, every run, and the curves."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, record, warnings, write
from vesalius.report.words import number
from vesalius.runs import Run


def race_report(run: Run) -> Path:
    """Draws a race as one offline HTML file in its folder."""
    summary = tables.summary(run, ["winner"])
    table = tables.frame(run, "standings", ["arm", "loss"])
    laps = tables.frame(run, "laps_table", ["arm", "seed", "lr"])
    curves = tables.frame(run, "curves", ["lap", "step", "loss"])
    page = Page(
        kind="race",
        title=f"{run.request.get('model')}: " + " against ".join(run.request.get("arms", {})),
        subtitle=_cost(summary),
        lead=_lead(table),
        warnings=warnings(run),
        sections=[_standings(table), _curves(curves), _laps(laps)],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _cost(summary: dict[str, object]) -> str:
    seconds = summary.get("seconds")
    return f"compute class {seconds:g} s a run" if isinstance(seconds, (int, float)) else "equal steps"


def _lead(table: pd.DataFrame | None) -> str:
    if table is None or len(table) < 2:
        return "Nothing was raced."
    first, second = table.iloc[0], table.iloc[1]
    text = f"{first['arm']} ends lowest, at {number(first['loss'])} nats (seeds {number(first['low'])} to "
    text += f"{number(first['high'])}), before {second['arm']} at {number(second['loss'])} "
    text += f"({number(second['low'])} to {number(second['high'])})."
    if first["high"] >= second["low"]:
        text += " Their seeds overlap."
    return text


def _standings(table: pd.DataFrame | None) -> Section:
    if table is None:
        return Section("Standings", missing="no run was finished.")
    shown = table.drop(columns=["edge", "low.1", "high.1"], errors="ignore")
    read = (
        "each competitor at its best learning rate, mean over seeds of the loss on held-out text (nats), with the "
        "range; grid: the losses of the first seed by rising learning rate."
    )
    return Section("Standings", [tables.frame_table(shown)], read)


def _curves(curves: pd.DataFrame | None) -> Section:
    if curves is None:
        return Section("Every run", missing="no run was finished.")
    plot = charts.lines(curves, "step", "loss", ("step", "training loss (nats)"), "Training loss", "lap", points=False)
    return Section("Every run", [plot], "training loss, averaged between the points.")


def _laps(laps: pd.DataFrame | None) -> Section:
    if laps is None:
        return Section("All numbers", missing="no run was finished.")
    columns = ["arm", "lr", "seed", "steps", "seconds", "train_loss", "held_out", "bits_per_byte", "error"]
    return Section("All numbers", [tables.frame_table(laps, [c for c in columns if c in laps])])
