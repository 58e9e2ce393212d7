"""The report of `vesalius icll`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, record, warnings, write
from vesalius.report.words import number, percent
from vesalius.runs import Run

GREY = ("1-gram", "4-gram", "uniform")


def icll_report(run: Run) -> Path:
    """Draws an ICLL run as one offline HTML file in its folder.

    It reads `summary.json` (model, step, nearest, lead, notes) and the tables readers, strings, heads.
    """
    summary = tables.summary(run, ["model", "step", "nearest"])
    page = Page(
        kind="icll",
        title=f"How {summary['model']} learns languages in its context",
        subtitle=f"step {summary['step']} · {summary.get('length', '?')} tokens a prompt, a language each",
        lead=str(summary["lead"]),
        facts=_facts(run, summary),
        warnings=warnings(run),
        sections=[_readers(run), _strings(run), _heads(run)],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(run: Run, summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    readers = tables.frame(run, "readers", ["reader", "tvd", "valid", "away"])
    if readers is None:
        return []
    by: dict[str, dict[Any, Any]] = {str(r["reader"]): r for r in readers.to_dict("records")}
    mine, like = by["model"], str(summary["nearest"])
    return [
        ("distance to the truth", number(mine["tvd"]), f"bigram learner {number(by['2-gram']['tvd'])}"),
        ("best guess possible", percent(mine["valid"]), "of next symbols"),
        ("guesses like", f"{like} learner", f"{number(by[like]['away'])} away from it"),
    ]


def _readers(run: Run) -> Section:
    title = "Who is how far from the truth"
    found = tables.frame(run, "readers", ["reader", "tvd", "valid", "away"])
    if found is None:
        return Section(title, missing="nothing was measured.")
    what = ["after" if r == "model" else "control" for r in found["reader"]]
    bars = found.assign(low=found["tvd_low"], high=found["tvd_high"], what=what)
    chart = charts.bars(bars, "tvd", "reader", "Total variation distance to the true next-symbol distribution", (0, 1))
    columns = ["reader", "tvd", "tvd_low", "tvd_high", "valid", "right", "away"]
    read = (
        "n-gram learners count in the same prompt and back off (Witten and Bell). valid: the likeliest symbol is an "
        "edge of the automaton's state; right: it is the one that came; away: mean distance between the reader's "
        "guesses and the model's."
    )
    return Section(title, [chart, tables.frame_table(found, columns)], read)


def _strings(run: Run) -> Section:
    title = "With every string it has seen"
    found = tables.frame(run, "strings", ["reader", "strings", "tvd"])
    if found is None:
        return Section(title, missing="nothing was measured.")
    order = list(dict.fromkeys(found["strings"]))
    data = found.assign(place=[int(str(s).split()[0]) for s in found["strings"]])
    chart = charts.lines(
        data, "place", "tvd", ("strings seen, at least", "distance to the truth"),
        "Distance to the truth by strings seen before", series="reader", grey=GREY, from_zero=True,
    )  # fmt: skip
    wide = pd.DataFrame(found.pivot(index="strings", columns="reader", values="tvd").loc[order].reset_index())
    return Section(title, [chart, tables.frame_table(wide)], "complete strings of the language before the symbol.")


def _heads(run: Run) -> Section:
    title = "Which heads read n-grams"
    found = tables.frame(run, "heads", ["part", "2-gram", "rise"])
    if found is None:
        return Section(title, missing="no head was looked at.")
    columns = ["part", "1-gram", "2-gram", "3-gram", "q", "tvd_without", "rise"]
    read = (
        "attention on tokens that stood after an earlier occurrence of the last 1, 2, 3 tokens, less attention on the "
        "same places in other prompts; q of the second. They count the tokens that match, so that "
        "1-gram looks up what a 2-gram learner counts. rise: of the distance to the truth when the head's output is "
        "its mean. A head that matches one token also covers the matches of two and three, which lie among them."
    )
    return Section(title, [tables.frame_table(found, columns)], read)
