"""The report of every change: the card, beside its controls, and what the method tells of its own work.

`summary.json`: `model`, `change`, `title`, `lead`, `notes`, `command`, `facts` (a list of [what, number, remark]),
`tables` (a list of {"name", "title", "read"}, tables of the run). `card.parquet`: `model`, and the columns of
`vesalius.evaluate.card`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, record, warnings, write
from vesalius.report.words import amount
from vesalius.runs import Run

QUALITY = ("perplexity", "divergence")
READ = (
    "change: after minus before; of perplexity, sizes and times the ratio. low, high: 95 % interval of the change over "
    "the same rows of text and the same prompts (bootstrap). Times are medians of seven turns on this machine."
)


def change_report(run: Run) -> Path:
    """Draws a change's run as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "change", "title"])
    found = tables.frame(run, "card", ["model", "metric", "before", "after"])
    page = Page(
        kind=str(summary["change"]),
        title=str(summary["title"]),
        subtitle=f"made of {summary['model']}",
        lead=str(summary["lead"]),
        facts=[(str(a), str(b), str(c)) for a, b, c in summary.get("facts") or []],
        warnings=warnings(run),
        sections=[_quality(found), _card(found), *_own(run, summary)],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _quality(found: pd.DataFrame | None) -> Section:
    title = "What it cost"
    if found is None:
        return Section(title, missing="nothing was measured.")
    rows = found[found["metric"] == "perplexity"]
    first = {"model": "before", "perplexity": rows["before"].iloc[0], "what": "control"}
    after = [
        {
            "model": r["model"], "perplexity": r["after"], "what": "after" if i == 0 else "control",
            "low": r["before"] * r["low"], "high": r["before"] * r["high"],
        }
        for i, r in enumerate(rows.to_dict("records"))
    ]  # fmt: skip
    data = pd.DataFrame([first, *after])
    top = float(data[["perplexity", "high"]].max().max())
    chart = charts.bars(data, "perplexity", "model", "Perplexity of plain text", (0, top * 1.05))
    return Section(title, [chart], "the first is the model as it was, the second the changed one; others are controls.")


def _card(found: pd.DataFrame | None) -> Section:
    title = "The card"
    if found is None:
        return Section(title, missing="nothing was measured.")
    shown = tables.frame_table(found.assign(n=found["n"].where(found["n"] > 0)), shown=len(found))
    rows = [
        [
            replace(c, text=amount(row[head])) if head in ("before", "after") else c
            for head, c in zip(shown.heads, cells, strict=True)
        ]
        for cells, row in zip(shown.rows, found.to_dict("records"), strict=True)
    ]
    return Section(title, [replace(shown, rows=rows)], READ)


def _own(run: Run, summary: dict[str, Any]) -> list[Section]:
    sections = []
    for item in summary.get("tables") or []:
        found = tables.frame(run, str(item["name"]), [])
        title, read = str(item["title"]), str(item.get("read", ""))
        if found is None:
            sections.append(Section(title, missing="it was not recorded."))
        else:
            sections.append(Section(title, [tables.frame_table(found, shown=40)], read))
    return sections
