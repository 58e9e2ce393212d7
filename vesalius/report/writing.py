"""The report of `vesalius write` and `vesalius steer`: texts, what might have come at each step, what was barred.

`summary.json`: `model` *, `title` *, `lead`, `rules` (list), `notes`, `facts` (a list of [what, number, remark]).
`texts.parquet`: `prompt`, `text`, and columns of the command's own. `steps.parquet`?: `text` (its number), `step`,
`allowed` (tokens that might have come), `vocabulary`. `barred.parquet`?: `step`, `after`, `token`, `share` (of the
model's own distribution), `rule`, `reason`: the likeliest barred tokens of the first text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, record, warnings, write
from vesalius.runs import Run

DRAWN = 4  # texts on the chart


def writing_report(run: Run) -> Path:
    """Draws the run as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "title"])
    page = Page(
        kind=str(run.request.get("command", "write")),
        title=str(summary["title"]),
        subtitle=f"written by {summary['model']}",
        lead=str(summary["lead"]),
        facts=[(str(a), str(b), str(c)) for a, b, c in summary.get("facts") or []],
        warnings=warnings(run),
        sections=[_texts(run), *_steps(run), *_barred(run)],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _texts(run: Run) -> Section:
    found = tables.frame(run, "texts", ["prompt", "text"])
    if found is None:
        return Section("What was written", missing="nothing was written.")
    read = "perplexity: of the text under the model with no rule and no steering"
    if "unsteered" in found:
        columns = ["prompt", "text", "unsteered", "perplexity", "perplexity_unsteered"]
        return Section("What was written", [tables.frame_table(found, columns, 20, {"text": "steered"})], f"{read}.")
    read += (
        "; stop: why the writing ended (count: after --tokens, end: by the model's end-of-text token, whole: the lines "
        "are full); allowed: tokens that might have come, the median over steps; went back: words taken back at a dead "
        "end; cut: the unfinished word taken off the end."
    )
    return Section("What was written", [tables.frame_table(found, shown=20)], read)


def _steps(run: Run) -> list[Section]:
    found = tables.frame(run, "steps", ["text", "step", "allowed", "vocabulary"])
    if found is None:
        return []
    title = "How much was allowed"
    found = found[found["text"] < DRAWN]
    data: Any = found.assign(share=found["allowed"] / found["vocabulary"], text=found["text"].astype(str))
    chart = charts.lines(data, "step", "share", ("token", "share of the vocabulary"), title, "text", from_zero=True)
    read = "the share of the vocabulary that might have come at each token; small inside words that must be ended."
    return [Section(title, [chart], read)]


def _barred(run: Run) -> list[Section]:
    found = tables.frame(run, "barred", ["after", "token", "share", "rule", "reason"])
    if found is None:
        return []
    title = "What was barred, and why"
    if not len(found):
        return [Section(title, missing="no token that the model finds likely was barred.")]
    read = "the likeliest tokens that were barred while the first text was written; share: what the model alone gave."
    return [Section(title, [tables.frame_table(found, shown=40)], read)]
