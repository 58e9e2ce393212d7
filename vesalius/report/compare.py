"""The report of `vesalius compare`: how far the scores of several runs agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, Table, record, warnings, write
from vesalius.report.words import estimate, listed
from vesalius.runs import Run

_KINDS = {"all": "all parts", "head": "heads", "mlp": "MLPs", "edge": "edges"}


def compare_report(run: Run) -> Path:
    """Draws a comparison run as one offline HTML file in its folder; see `vesalius.report` for the tables it reads.

    Raises:
        RunError: if the run has no summary, a table is damaged or lacks a column, or the file cannot be written.
    """
    summary = tables.summary(run, ["runs"])
    names = [str(r["name"]) for r in summary["runs"]]
    matrix = tables.frame(run, "matrix", ["a", "b", "kind"])
    page = Page(
        kind="compare",
        title=str(summary.get("title") or f"{len(names)} runs compared"),
        subtitle=" · ".join(names),
        lead=_lead(matrix, names),
        warnings=warnings(run),
        sections=[
            _runs(summary["runs"]),
            _matrices(matrix, names, "spearman", "Do they rank the parts alike?", True),
            _matrices(matrix, names, "pearson", "Do they give the same numbers?", True),
            _matrices(matrix, names, "overlap", "Do they name the same parts?", False),
            _top(run, names),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _lead(matrix: pd.DataFrame | None, names: list[str]) -> str:
    text = f"The scores of {listed(names)}, part by part."
    if matrix is None or "spearman" not in matrix:
        return text
    kind = "head" if (matrix["kind"] == "head").any() else matrix["kind"].iloc[0]
    pairs = matrix[(matrix["kind"] == kind) & (matrix["a"] != matrix["b"])].dropna(subset=["spearman"])
    if pairs.empty:
        return text
    pairs = pairs.sort_values("spearman", kind="stable")
    worst, best = pairs.iloc[0], pairs.iloc[-1]
    noun = _KINDS.get(str(kind), str(kind))
    text = f"{best['a']} and {best['b']} agree most on the order of {noun} (Spearman {best['spearman']:.2f})"
    if worst["spearman"] < best["spearman"]:
        text += f", {worst['a']} and {worst['b']} least ({worst['spearman']:.2f})"
    return text.replace("(-", "(−").replace(" -", " −") + "."


def _runs(runs: list[dict[str, Any]]) -> Section:
    heads = ["run", "model", "task", "method", "level", "accuracy", "faithfulness", "heads", "MLPs", "edges", "folder"]
    rows = []
    for r in runs:
        size = r.get("size") or {}
        row: list[Any] = [r["name"], *(r.get(k) for k in ("model", "task", "method", "level", "accuracy"))]
        row += [estimate(r.get("faithfulness")).mean, *(size.get(k) for k in ("heads", "mlps", "edges")), r.get("run")]
        rows.append(row)
    kept = [i for i in range(len(heads)) if any(row[i] is not None for row in rows)]
    return Section("The runs", [Table.of([heads[i] for i in kept], [[row[i] for i in kept] for row in rows])])


def _matrices(matrix: pd.DataFrame | None, names: list[str], value: str, title: str, signed: bool) -> Section:
    words = {"pearson": "linear correlation", "spearman": "rank correlation", "overlap": "overlap of the largest parts"}
    if matrix is None or value not in matrix or matrix[value].notna().sum() == 0:
        return Section(title, missing=f"{words[value]} of the runs was not computed.")
    plots = []
    for kind in [k for k in _KINDS if (matrix["kind"] == k).any()]:
        part = matrix[matrix["kind"] == kind]
        if part[value].notna().any():
            plots.append(charts.matrix(part, names, value, _KINDS[kind], signed))
    if value == "overlap":
        k = sorted(set(matrix["k"].dropna())) if "k" in matrix else []
        largest = f"the {int(k[0])} largest" if len(k) == 1 else "the largest"
        read = f"the share of {largest} parts by |score| that two runs have in common; 1 means the same set."
    elif value == "spearman":
        read = "rank correlation of the scores over the parts both runs scored; 1 is the same order, 0 none."
    else:
        read = "linear correlation of the scores over the parts both runs scored; it is ruled by the few largest."
    n = len(names) ** 2 * len(plots)
    have = sum(int(matrix.loc[matrix["kind"] == k, value].notna().sum()) for k in _KINDS)
    remarks = ["Empty cells: the two runs have too few parts in common to be compared."] if have < n else []
    return Section(title, plots, read, layout="grid" if len(plots) > 2 else "even", remarks=remarks)


def _top(run: Run, names: list[str]) -> Section:
    title = "Their top parts"
    table = tables.frame(run, "top", ["name", "rank", "part", "score"])
    if table is None:
        return Section(title, missing="the largest parts were not listed.")
    columns = []
    for name in names:
        mine = table[table["name"] == name].sort_values("rank")
        columns.append((name, [(str(p), float(s)) for p, s in zip(mine["part"], mine["score"], strict=True)]))
    common = set.intersection(*[{p for p, _ in rows} for _, rows in columns]) if columns else set()
    read = (
        "each column is ranked by |score|; marked parts stand in every column. Blue helps the metric, orange hurts it."
    )
    return Section(title, [tables.side_by_side(columns, common)], read)
