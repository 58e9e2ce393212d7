"""The report of `vesalius tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, record, warnings, write
from vesalius.report.words import number, percent
from vesalius.runs import Run

NAMES = {"before": "as it was", "found": "found parts", "random": "random parts", "full": "whole model"}


def tuning_report(run: Run) -> Path:
    """Draws a tuning run as one offline HTML file in its folder.

    It reads `summary.json` (model, task, heads, mlps, lead, notes, checkpoint, controls) and the tables heads, mlps,
    knocked_out, tuned, log.
    """
    summary = tables.summary(run, ["model", "task", "heads", "mlps"])
    page = Page(
        kind="tune",
        title=f"What does {summary['task']} in {summary['model']}, trained alone",
        subtitle=f"{summary.get('asked', '?')} questions, {summary.get('test', '?')} prompts held out",
        lead=str(summary["lead"]),
        facts=_facts(run, summary),
        warnings=warnings(run),
        sections=[_tuned(run, summary), _knocked_out(run, summary), _parts(run, summary), _log(run)],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(run: Run, summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    facts = [
        ("heads", str(len(summary["heads"])), f"of {summary.get('of_heads', '?')}, and {len(summary['mlps'])} MLPs")
    ]
    out = tables.frame(run, "knocked_out", ["without", "accuracy"])
    if out is not None:
        mean = out.groupby("without")["accuracy"].mean()
        facts.append(("right without them", percent(mean["found"]), f"others {percent(mean['random'])}"))
    tuned = tables.frame(run, "tuned", ["tuned", "accuracy"])
    if tuned is not None:
        by = tuned.set_index("tuned")["accuracy"]
        facts.append(("right after training them", percent(by["found"]), f"before {percent(by['before'])}"))
    return facts


def _tuned(run: Run, summary: dict[str, Any]) -> Section:
    title = "What training changed"
    found = tables.frame(run, "tuned", ["tuned", "trained", "accuracy", "text_loss"])
    if found is None:
        return Section(title, missing="nothing was trained (--no-train).")
    found = found.assign(tuned=[NAMES.get(t, t) for t in found["tuned"]])
    first = found["text_loss"].iloc[0]
    found["text_loss_change"] = found["text_loss"] - first
    bars = found.assign(what=["control" if t != NAMES["found"] else "after" for t in found["tuned"]])
    chart = charts.bars(bars, "accuracy", "tuned", "Held-out questions answered rightly", (0, 1))
    columns = ["tuned", "trained", "accuracy", "train_accuracy", "text_loss", "text_loss_change", *summary["controls"]]
    read = (
        "each trained from the same weights for as many steps; trained: numbers that may change. Held-out questions "
        "are asked in no training prompt. text_loss: nats a token of plain text; the last columns are other tasks."
    )
    return Section(title, [chart, tables.frame_table(found, columns)], read)


def _knocked_out(run: Run, summary: dict[str, Any]) -> Section:
    title = "Without these heads"
    found = tables.frame(run, "knocked_out", ["without", "accuracy", "text_loss"])
    if found is None:
        return Section(title, missing="no head was knocked out.")
    columns = ["without", "accuracy", "text_loss", *summary["controls"], "heads"]
    read = "each head's output replaced by its mean over plain text; random: as many other heads, drawn by chance."
    return Section(title, [tables.frame_table(found, columns)], read)


def _parts(run: Run, summary: dict[str, Any]) -> Section:
    title = "How much each part gives the answer"
    blocks: list[Any] = []
    for name in ("heads", "mlps"):
        found = tables.frame(run, name, ["part", "score"])
        if found is not None:
            found = found.assign(taken=found["part"].isin(summary[name]))
            blocks.append(tables.frame_table(found, ["part", "score", "low", "high", "taken"], shown=12))
    read = (
        f"path patching to the logits on {number(summary.get('n_find', 0))} prompts answered rightly: how much the "
        "metric falls when this part alone is as on the counterfactual prompt, all other heads held."
    )
    return Section(title, blocks, read, missing="" if blocks else "no part was measured.", layout="pair")


def _log(run: Run) -> Section:
    title = "Loss while training"
    found = tables.frame(run, "log", ["tuned", "step", "loss"])
    if found is None:
        return Section(title, missing="nothing was trained.")
    data = found.assign(tuned=[NAMES.get(t, t) for t in found["tuned"]])
    chart = charts.lines(
        data, "step", "loss", ("step", "loss"), "Loss on training prompts", series="tuned", points=False
    )
    return Section(title, [chart], "of each update's prompts, before it.")
