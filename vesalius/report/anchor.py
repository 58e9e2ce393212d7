"""The report of `vesalius anchor`.

It reads `summary.json` (`Examined.summary`, with `model`, `letters`, `lead`, `notes`, `command`), `repairs` (a table)
and the scores `direct`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, readings, tables
from vesalius.report.page import Page, Section, record, warnings, write
from vesalius.report.words import number, percent
from vesalius.runs import Run

_WHAT = {"plain": "before", "repair": "after", "baseline": "before", "control": "control"}


def anchor_report(run: Run) -> Path:
    """Draws a run of `vesalius anchor` as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "bias", "letters", "lead"])
    page = Page(
        kind="anchor",
        title=f"Does {summary['model']} choose the option, or the letter?",
        subtitle=f"{summary['bias']['n']} questions of {summary['bias']['choices']} options",
        lead=str(summary["lead"]),
        facts=_facts(summary),
        warnings=warnings(run),
        sections=[_chosen(summary), _writers(run, summary), _repairs(run, summary)],
        record=_record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    it = summary["bias"]
    return [
        ("from an even choice", number(it["variation"], pad=True), f"total variation; chi-square p {number(it['p'])}"),
        ("right by letter", percent(it["accuracy"]), f"[{percent(it['low'])}, {percent(it['high'])}]"),
        ("right by words", percent(it["knows"]), "what it knows"),
        ("after calibration", percent(it["calibrated"]), f"variation {number(it['calibrated_variation'], pad=True)}"),
    ]


def _chosen(summary: dict[str, Any]) -> Section:
    it = summary["bias"]
    data = pd.DataFrame({"letter": list(summary["letters"]), "share": it["chosen"], "what": "after"})
    data = data.assign(low=float("nan"), high=float("nan"))
    chart = charts.bars(
        data, "share", "letter", "Share of questions with each letter chosen", (0.0, 1.0), 26, 1 / it["choices"]
    )
    read = (
        f"the right option stands at each place equally often, so an even choice is {number(1 / it['choices'])} each. "
        f"Of the questions whose right option is not at A, {percent(it['anchored'])} get A."
    )
    return Section("What is chosen", [chart], read)


def _writers(run: Run, summary: dict[str, Any]) -> Section:
    frame = run.scores("direct").to_frame()
    order = frame["score"].abs().sort_values(ascending=False, kind="stable").index
    shown = frame.loc[order[:20], ["part", "score"]].rename(columns={"score": "value"})
    table = tables.frame_table(frame.loc[order[:60], ["part", "score", "low", "high"]], shown=20)
    read = (
        f"each part's own contribution to logit(A) less the other letters' mean, final norm at its actual scale; all "
        f"terms sum to {number(summary['difference'])} (what the model says is {number(summary['residue'])} away). "
        f"The last three layers write {percent(summary['top_share'])} of it."
    )
    return Section("Who writes A", [readings.terms(shown, "logits"), table], read, layout="pair")


def _repairs(run: Run, summary: dict[str, Any]) -> Section:
    found = tables.frame(run, "repairs", ["condition", "variation", "accuracy", "text"])
    if found is None:
        return Section("Repairs", missing="none was tried.")
    data = found.assign(what=[_WHAT.get(h, "control") for h in found["how"]])
    none = data.assign(low=float("nan"), high=float("nan"))
    blocks: list[Any] = [
        charts.bars(none, "variation", "condition", "Total variation from an even choice", (0.0, 1.0), step=24),
        charts.bars(
            data,
            "accuracy",
            "condition",
            "Share answered rightly by letter",
            (0.0, 1.0),
            24,
            1 / summary["bias"]["choices"],
        ),
        tables.frame_table(found[["condition", "variation", "accuracy", "low", "high", "text"]], shown=20),
    ]
    read = (
        f"chosen on {summary['dev']} questions without their labels, measured on {summary['test']} others. Value "
        f"vectors: {', '.join(summary['neurons'])}; text is the growth of the loss on plain text (nats). Even look: "
        f"attention of {', '.join(summary['heads'])} spread evenly over the letters, an intervention that no "
        f"weight does. Grey: as many random neurons or heads. The paper's own edit is given the right letter and turns "
        f"{percent(summary['upper'])} of anchored questions: an upper bound, no repair."
    )
    return Section("Repairs, on other questions", blocks, read)


def _record(run: Run, summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [(k, v) for k, v in record(run, summary) if k not in ("text", "questions")]
