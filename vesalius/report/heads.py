"""The report of `vesalius heads`: what every head is by each detector, and some heads closely."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from vesalius.find.detectors.base import MARGIN, of_head
from vesalius.find.detectors.significance import ALPHA
from vesalius.report import grids, tables
from vesalius.report.page import Cell, Drawing, Page, Section, Table, cell, record, warnings, write
from vesalius.report.words import count, listed, token
from vesalius.runs import Run

SCORES = ["detector", "part", "layer", "index", "score", "null", "null_high", "p", "q", "found"]
BEST = 5  # heads named for each detector
FAINT = 0.02  # attention that is not drawn
READ_EXAMPLES = (
    "in each prompt the boxed token is where the head writes most into the residual stream, its rest on the first "
    "token left out; the darker a token, the more it is attended from there. Below it, the tokens whose logits that "
    "write raises most."
)


def page_of(head: str) -> str:
    """The name of one head's page."""
    return f"head-{head}.html"


def heads_report(run: Run) -> Path:
    """Draws a run of `vesalius heads`: report.html of all heads, and a page for each head that was named."""
    summary = tables.summary(run, ["model", "detectors", "roles"])
    scores = tables.frame(run, "heads", SCORES)
    leading = tables.frame(run, "leading", ["part", "layer", "index", "role", "score", "excess"])
    portraits = run.json("portraits") if run.has("portraits.json") else []
    task = f" · task {summary['task']}" if summary.get("task") else ""
    n = 0 if leading is None else len(leading)
    named = [run.json(name) for name in run.files if name.startswith("portrait-")]
    if scores is not None:
        for one in named:
            write(run, _page(run, summary, one, scores, n), page_of(str(one["head"])))
    links = [Markup('{0} closely: <a href="{1}">{1}</a>').format(o["head"], page_of(o["head"])) for o in named]
    page = Page(
        kind="heads",
        title=f"The heads of {summary['model']}",
        subtitle=f"{count(n, 'head')} · {count(len(summary['detectors']), 'detector')}{task}",
        lead=str(summary.get("lead", "")),
        facts=_facts(summary),
        warnings=warnings(run),
        sections=[
            _leading(leading, [str(r) for r in summary["roles"]]),
            _detectors(scores, summary["detectors"]),
            _found(scores, summary["detectors"]),
            _table(scores, leading, summary["detectors"]),
            *[_portrait(one, scores) for one in portraits],
        ],
        record=record(run, summary),
        notes=[*links, *[str(n) for n in summary.get("notes") or []]],
    )
    return write(run, page)


def described(mine: pd.DataFrame, heads: int) -> str:
    """What the detectors find one head to be, in a sentence.

    Args:
        mine: its rows, from `of_head`. heads: how many there are in all.
    """
    head = str(mine["part"].iloc[0])
    found = mine[mine["found"]].assign(excess=mine["score"] - mine["null"]).sort_values("excess", ascending=False)
    if found.empty:
        return f"None of {count(len(mine), 'detector')} finds {head} by more than chance and {MARGIN:g}."
    said = [
        f"{r['detector']} {r['score']:.2f} ({'first' if r['place'] == 1 else 'no. ' + str(r['place'])})"
        for r in found.to_dict("records")
    ]
    return f"{head} is more than chance, and by {MARGIN:g}, in {listed(said)}, of {heads} heads."


def _page(run: Run, summary: Mapping[str, Any], one: Mapping[str, Any], scores: pd.DataFrame, heads: int) -> Page:
    """One head's own page."""
    head = str(one["head"])
    mine = of_head(scores, head)
    rows = [
        [
            Cell(r["detector"], r["detector"], "part"),
            *[_score(r[k]) for k in ("score", "low", "high", "null", "null_high")],
            *[cell(r[k]) for k in ("q", "place", "found")],
            cell(summary["detectors"][r["detector"]]["what"]),
        ]
        for r in mine.to_dict("records")
    ]
    columns = ["detector", "score", "low", "high", "chance", "95 % of chance", "q", "place", "found", "what it asks"]
    read = (
        f"place: by its score, among {heads} heads. Found: more than chance over all heads (q < {ALPHA:g}) and by "
        f"{MARGIN:g}."
    )
    return Page(
        kind="heads",
        title=f"{head} of {summary['model']}",
        subtitle=f"head {int(mine['index'].iloc[0])} of block {int(mine['layer'].iloc[0])}",
        lead=described(mine, heads),
        warnings=warnings(run),
        sections=[
            Section("What the detectors make of it", [Table(columns, rows)], read),
            _portrait(one, scores),
        ],
        record=record(run, dict(summary)),
        notes=[Markup('All heads: <a href="report.html">report.html</a>')],
    )


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = summary.get("found") or {}
    return [
        (name, str(len(found[name])), listed([str(p) for p in found[name][:3]]) or "no head")
        for name in summary["roles"]
        if name in found
    ]


def _leading(leading: pd.DataFrame | None, roles: Sequence[str]) -> Section:
    title = "What each head is first of all"
    if leading is None:
        return Section(title, missing="no head was measured.")
    there = leading[leading["role"] != ""]
    caption = f"{count(len(there), 'head', len(leading))} with a leading role"
    read = (
        "a head's colour is the role whose score exceeds what chance gives by most, among those that are more than "
        f"chance (q < {ALPHA:g} over all heads) and exceed it by {MARGIN:g}; the fainter, the less. Grey heads have "
        "none of these roles on these prompts, which does not mean that they do nothing."
    )
    return Section(title, [grids.roles(leading, roles, caption)], read)


def _detectors(scores: pd.DataFrame | None, names: Mapping[str, Any]) -> Section:
    title = "Each detector by itself"
    if scores is None:
        return Section(title, missing="no head was measured.")
    columns = ["part", "layer", "index", "score", "null_high", "q", "found"]
    blocks = [grids.small(scores.loc[scores["detector"] == name, columns], name) for name in names]
    read = (
        "layers upwards, heads to the right, from 0 (pale) to 1 (dark). Outlined heads score more than chance "
        f"(q < {ALPHA:g}) by at least {MARGIN:g}."
    )
    return Section(title, blocks, read, layout="grid")


def _found(scores: pd.DataFrame | None, names: Mapping[str, Any]) -> Section:
    title = "Whom each detector finds"
    if scores is None:
        return Section(title, missing="no head was measured.")
    rows = []
    for name, about in names.items():
        mine = scores[scores["detector"] == name].sort_values("score", ascending=False, kind="stable")
        found = mine[mine["found"]]
        best = ", ".join(f"{r['part']} {r['score']:.2f}" for r in mine.head(BEST).to_dict("records"))
        rows.append(
            [
                Cell(name, name, "part"),
                cell(len(found)),
                Cell(best, best, "text"),
                _score(float(mine["null"].mean())),
                cell(about.get("unit")),
                cell(about.get("null_is")),
                cell(about.get("paper")),
            ]
        )
    heads = ["detector", "heads found", "largest scores", "mean of chance", "unit", "chance is", "paper"]
    return Section(title, [Table(heads, rows)])


def _table(scores: pd.DataFrame | None, leading: pd.DataFrame | None, names: Mapping[str, Any]) -> Section:
    title = "Every head by every detector"
    if scores is None or leading is None:
        return Section(title, missing="no head was measured.")
    wide = {(r["part"], r["detector"]): (r["score"], r["q"]) for r in scores.to_dict("records")}
    order = leading.sort_values("excess", ascending=False, kind="stable", na_position="last")
    rows = []
    for head in order.to_dict("records"):
        part = str(head["part"])
        cells = [Cell(part, part, "part"), cell(head["role"])]
        for name in names:
            score, q = wide[part, name]
            cells.append(_score(score, q < ALPHA))
        rows.append(cells)
    read = (
        f"bold scores are more than chance over all heads (q < {ALPHA:g}), however small; click a column to sort by it."
    )
    return Section(title, [Table(["head", "leading role", *names], rows, shown=20)], read)


def _score(value: float, bold: bool = False) -> Cell:
    """A score from 0 to 1, to two digits."""
    if not math.isfinite(value):
        return cell(None)
    text: str | Markup = f"{value + 0.0:.2f}".replace("-0.00", "0.00")
    return Cell(Markup("<b>{}</b>").format(text) if bold else text, value, "num")


def _portrait(one: Mapping[str, Any], scores: pd.DataFrame | None) -> Section:
    head = str(one["head"])
    blocks: list[Any] = []
    if scores is not None:
        mine = scores[scores["part"] == head]
        if len(mine):
            blocks.append(grids.against_null(mine, f"{head} against chance"))
    rows = [
        [
            Cell(token(r["token"]), str(r["token"]), "part"),
            cell(", ".join(token(t) for t in r["raised"])),
            cell(r["own_rank"]),
        ]
        for r in one.get("readings") or []
    ]
    if rows:
        caption = "What it writes when it attends to one token alone"
        blocks.append(Table(["attends to", "raises most", "own rank"], rows, caption=caption))
    drawn = [_example(e) for e in one.get("examples") or []]
    if drawn:
        blocks.append(
            Drawing(Markup("").join(drawn), f"Where {head} writes most, and what it looks at there", span=True)
        )
    return Section(f"{head}, closely", blocks, READ_EXAMPLES, layout="pair")


def _example(one: Mapping[str, Any]) -> Markup:
    words = []
    for i, (text, weight) in enumerate(zip(one["tokens"], one["attention"], strict=True)):
        shown = escape(str(text)).replace("\n", Markup("⏎<br>"))
        style = "" if weight < FAINT else f' style="--w: {100 * min(1.0, float(weight)):.0f}%"'
        kind = ' class="here"' if i == one["query"] else ' class="on"' if style else ""
        words.append(Markup(f'<span{kind}{style} title="{float(weight):.2f}">{{}}</span>').format(shown))
    raised = ", ".join(token(str(t)) for t in one["raised"])
    return Markup('<div class="seen"><p>{}</p><p class="aside">{} · raises {}</p></div>').format(
        Markup("").join(words), str(one["source"]), raised
    )
