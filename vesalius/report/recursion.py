"""The report of `vesalius recursion`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from vesalius.report import charts, tables
from vesalius.report.page import Drawing, Page, Section, Table, record, warnings, write
from vesalius.report.words import number, percent
from vesalius.runs import Run


def recursion_report(run: Run) -> Path:
    """Draws a recursion run as one offline HTML file in its folder.

    It reads `summary.json` (model, task, step, size, depth, lead, notes, program, lines, cutoff, mechanism) and the
    tables grid, kinds, score, candidates, failures, heads, modes.
    """
    summary = tables.summary(run, ["model", "task", "step", "size", "depth"])
    page = Page(
        kind="recursion",
        title=f"What {summary['model']} learnt of {str(summary['task']).replace('_', ' ')}",
        subtitle=f"step {summary['step']} · trained to size {summary['size']} and depth {summary['depth']}",
        lead=str(summary["lead"]),
        facts=_facts(run, summary),
        warnings=warnings(run),
        sections=[
            _grid(run, summary),
            _program(run, summary),
            _failures(run),
            _heads(run, summary),
            _modes(run),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(run: Run, summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    facts = []
    kinds = tables.frame(run, "kinds", ["where", "n", "right"])
    if kinds is not None:
        for row in kinds.head(2).to_dict("records"):
            facts.append((f"right, {row['where']}", percent(row["right"]), f"of {row['n']} inputs, running freely"))
    if "program" in summary:
        limit = "none" if summary["cutoff"] is None else str(summary["cutoff"])
        facts.append(
            ("cut-off", limit, f"deepest recursion that its program gets right; trained to {summary['depth']}")
        )
    score = tables.frame(run, "score", ["program", "recall", "precision", "exact"])
    if score is not None:
        kept = score.iloc[0]
        small = f"precision {percent(kept['precision'])}, exact output {percent(kept['exact'])}"
        facts.append(("failures foretold", percent(kept["recall"]), small))
    return facts


def _grid(run: Run, summary: dict[str, Any]) -> Section:
    title = "What it gets right"
    found = tables.frame(run, "grid", ["size", "depth", "n", "right", "where"])
    if found is None:
        return Section(title, missing="nothing was asked.")
    sizes, depths = sorted(found["size"].unique()), sorted(found["depth"].unique())
    wide = {(r["size"], r["depth"]): r for r in found.to_dict("records")}
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(s) for s in sizes)
    body = []
    for depth in depths:
        line = Markup('<th scope="row">{}</th>').format(depth)
        for size in sizes:
            row = wide.get((size, depth))
            if row is None:
                line += Markup("<td></td>")
                continue
            share = 100 * float(row["right"])
            ink = "#fff" if share > 60 else "inherit"
            edge = "outline:1.5px solid currentColor;outline-offset:-2px;" if row["where"] == "trained" else ""
            style = f"background:color-mix(in srgb,#2f6fb3 {share:.0f}%,transparent);color:{ink};{edge}"
            line += Markup('<td class="num" style="{}" title="{} inputs">{}</td>').format(
                style + "text-align:center", row["n"], f"{share:.0f}"
            )
        body.append(Markup("<tr>{}</tr>").format(line))
    drawn = Markup(
        '<div class="scroll"><table><thead><tr><th>depth \\ size</th>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(head, Markup("").join(body))
    kinds = tables.frame(run, "kinds", ["where", "n", "right"])
    blocks: list[Any] = [Drawing(drawn, "Exact match in per cent, by size (across) and depth (down)")]
    if kinds is not None:
        blocks.append(tables.frame_table(kinds, ["where", "n", "right", "low", "high"]))
    read = (
        "answers are decoded freely from the model's own output; none of these inputs was trained on. Outlined cells "
        "are in the range that was. Small sizes are missing where training had all of their inputs."
    )
    return Section(title, blocks, read)


def _program(run: Run, summary: dict[str, Any]) -> Section:
    title = "The program that fails alike"
    score = tables.frame(run, "score", ["program", "recall", "precision", "exact"])
    if score is None:
        return Section(title, missing="there are too few failures to fit one to.")
    lines = Table.of([f"{summary['program']}: the definition, but"], [[line] for line in summary["lines"]])
    columns = ["program", "cases", "failures", "foretold", "recall", "precision", "exact"]
    blocks: list[Any] = [lines, tables.frame_table(score, columns)]
    tried = tables.frame(run, "candidates", ["program", "exact"])
    if tried is not None:
        tried = tried[["program", "exact", "fitted"]].drop_duplicates()
        blocks.append(
            tables.frame_table(tried.rename(columns={"exact": "exact, left out", "fitted": "numbers fitted"}))
        )
    read = (
        f"fitted to half of the cases ({summary['fitted_on']}) and scored on the other half: recall is the share of "
        "failures it foretells, precision the share of foretold failures that are real, exact the share of failures "
        "whose very output it gives. Below it, what one would say knowing the training range alone."
    )
    return Section(title, blocks, read)


def _failures(run: Run) -> Section:
    title = "Failures"
    found = tables.frame(run, "failures", ["input", "right", "said"])
    if found is None:
        return Section(title, missing="it made none.")
    columns = [c for c in ("size", "depth", "input", "right", "said", "foretold") if c in found]
    return Section(title, [tables.frame_table(found, columns, shown=6)], "drawn at random from all failures.")


def _heads(run: Run, summary: dict[str, Any]) -> Section:
    title = "Which head decides"
    found = tables.frame(run, "heads", ["part", "marker", "moved"])
    if found is None:
        return Section(title, missing="no head was forced.")
    bars = found[["part", "moved", "low", "high"]].assign(
        what=["after" if p == summary["mechanism"]["decides"] else "control" for p in found["part"]]
    )
    chart = charts.bars(bars, "moved", "part", "Share of inputs whose switch moves with the head", (0, 1), step=24)
    columns = ["part", "marker", "attention", "moved", "low", "high", "unchanged"]
    read = (
        "while the model answers, a head is made to look at one other symbol of the input; the bar is how often the "
        "answer is then the definition's for a recursion that ends there. marker: its own attention to the recursion's "
        f"end, beyond that to other symbols ({summary['mechanism']['marks']} marks it most, "
        f"{number(summary['mechanism']['marker'])}). The head in blue was chosen on other inputs."
    )
    return Section(title, [chart, tables.frame_table(found, columns, shown=12)], read)


def _modes(run: Run) -> Section:
    title = "Rewrite or copy, as the stream says it"
    found = tables.frame(run, "modes", ["layer", "accuracy"])
    if found is None:
        return Section(title, missing="no probe was fitted.")
    columns = ["part", "accuracy", "low", "high", "baseline", "control"]
    shown = pd.DataFrame(found)
    read = "a linear probe at the last symbol before a step, inputs held out whole; both modes occur at these steps."
    return Section(title, [tables.frame_table(shown, columns)], read)
