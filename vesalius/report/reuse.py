"""The report of `vesalius reuse`: circuits side by side, what they share, and the transplant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.parts import Part, parse_part
from vesalius.report import charts, graph, tables
from vesalius.report.page import Drawing, Page, Section, Table, record, warnings, write
from vesalius.report.words import count, estimate, listed, number, percent
from vesalius.runs import Run

Members = dict[str, dict[str, Any]]


def reuse_report(run: Run) -> Path:
    """Draws a reuse run as one offline HTML file in its folder; see `vesalius.report` for the tables it reads.

    Raises:
        RunError: if the run has no summary, a table is damaged or lacks a column, or the file cannot be written.
    """
    summary = tables.summary(run, ["items"])
    items: list[dict[str, Any]] = summary["items"]
    names = [str(i["name"]) for i in items]
    circuits = [tables.circuit(run, f"circuit_{i}") or ([], []) for i in range(len(items))]
    members: list[Members] = [{str(m["part"]): m for m in found[0]} for found in circuits]
    overlap = tables.frame(run, "overlap", ["a", "b", "kind", "shared", "size_a", "size_b"])
    page = Page(
        kind="reuse",
        title=str(summary.get("title") or f"What {listed(names)} share"),
        subtitle=f"method {summary.get('method', 'not recorded')}",
        lead=_lead(names, overlap),
        facts=[(n, percent(i.get("accuracy")), _small(i)) for n, i in zip(names, items, strict=True)],
        warnings=warnings(run),
        sections=[
            _overlap(overlap),
            _side_by_side(run, names, circuits),
            _parts(names, members),
            _transplant(run, summary),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _small(item: dict[str, Any]) -> str:
    size, total = item.get("size") or {}, item.get("total") or {}
    nouns = (("heads", "head"), ("mlps", "MLP"))
    said = [count(size[k], noun, total.get(k)) for k, noun in nouns if size.get(k) is not None]
    faith = estimate(item.get("faithfulness"))
    said.append(f"faithfulness {number(faith.mean)}" if faith.mean is not None else "")
    return "accuracy; " + ", ".join(s for s in said if s)


def _lead(names: list[str], overlap: pd.DataFrame | None) -> str:
    if overlap is None:
        return f"The circuits of {listed(names)} side by side."
    row = overlap[overlap["kind"].isin(["all", "head"])].sort_values("kind").iloc[:1].to_dict("records")
    if not row:
        return f"The circuits of {listed(names)} side by side."
    r = row[0]
    noun = "parts" if r["kind"] == "all" else "heads"
    text = f"{r['a']} uses {r['size_a']} {noun} and {r['b']} uses {r['size_b']}; {r['shared']} are the same"
    if not pd.isna(r.get("chance_shared", float("nan"))):
        text += f", where chance would give {number(r['chance_shared'])}"
    return text + "."


def _overlap(table: pd.DataFrame | None) -> Section:
    title = "Shared parts against chance"
    if table is None:
        return Section(title, missing="the overlap of the circuits was not computed.")
    rows = []
    for r in table.to_dict("records"):
        label = {"all": "all parts", "head": "heads", "mlp": "MLPs", "edge": "edges"}.get(
            str(r["kind"]), str(r["kind"])
        )
        pair = f"{r['a']}, {r['b']}: " if table[["a", "b"]].drop_duplicates().shape[0] > 1 else ""
        rows.append({"what": "shared", "label": f"{pair}{label}", "value": r["shared"], "low": None, "high": None})
        if not pd.isna(r.get("chance_shared", float("nan"))):
            low, high = r.get("chance_low", r["chance_shared"]), r.get("chance_high")
            chance = {"what": "control", "label": f"{pair}{label}, by chance", "value": r["chance_shared"]}
            rows.append({**chance, "low": low, "high": high})
    shown = pd.DataFrame(rows).astype({"value": float, "low": float, "high": float})
    columns = [
        "a",
        "b",
        "kind",
        "shared",
        "size_a",
        "size_b",
        "jaccard",
        "chance_shared",
        "chance_low",
        "chance_high",
        "p",
    ]
    read = (
        "blue bars count the parts that both circuits contain; grey ones what random circuits of those sizes would "
        "share, with the upper end of what 95 % of them share. p is the chance of an overlap at least this large."
    )
    plot = charts.bars(shown, "value", "label", "parts in both circuits")
    return Section(title, [plot, tables.frame_table(table, columns)], read)


def _side_by_side(run: Run, names: list[str], circuits: list[tuple[list[Any], list[Any]]]) -> Section:
    title = "The circuits"
    blocks: list[Drawing] = []
    remarks: list[str] = []
    own = [{str(m["part"]) for m in parts} for parts, _ in circuits]
    for i, (name, (parts, edges)) in enumerate(zip(names, circuits, strict=True)):
        if not parts:
            remarks.append(f"No circuit of {name} was stored.")
            continue
        scores = tables.frame(run, f"scores_{i}", ["part", "score"])
        universe = [] if scores is None else [p for p in scores["part"].astype(str) if "->" not in p and ".N" not in p]
        universe = [p for p in universe if p not in ("embed", "unembed")]
        beside = set.intersection(*[s for s in own if s is not own[i]]) if len(circuits) > 1 else set()
        drawing, more = graph.draw(parts, edges, universe, width=620, beside=sorted(beside), caption=name)
        blocks.append(drawing)
        remarks += more
    if not blocks:
        return Section(title, missing="no circuit was stored.")
    read = "as in a circuit's own report: layers upwards, heads at their number, MLPs on the right."
    key = graph.key([m for parts, _ in circuits for m in parts], shared=len(blocks) > 1)
    return Section(title, [key, *blocks], read, layout="even", remarks=remarks)


def _parts(names: list[str], members: list[Members]) -> Section:
    title = "Shared and private parts"
    everything = sorted({p for m in members for p in m}, key=lambda p: _order(parse_part(p)))
    if not everything:
        return Section(title, missing="no circuit was stored.")
    rows = []
    for part in everything:
        own = [m.get(part) for m in members]
        users = [n for n, o in zip(names, own, strict=True) if o is not None]
        where = "shared by all" if len(users) == len(names) else listed(users) + " only"
        row: list[Any] = [part, where]
        for o in own:
            row += [None if o is None else o.get("score"), None if o is None else o.get("role")]
        rows.append(row)
    rows.sort(
        key=lambda r: (r[1] != "shared by all", r[1], -max((abs(v) for v in r[2::2] if v is not None), default=0))
    )
    heads = ["part", "in"] + [t for n in names for t in (f"{n}: score", "role")]
    table = Table.of(heads, rows, shown=30)
    roles = any(r[3 + 2 * i] for r in rows for i in range(len(names)))
    shared = [r for r in rows if r[1] == "shared by all"]
    same = [r for r in shared if r[3] and all(r[3] == r[3 + 2 * i] for i in range(len(names)))]
    remarks = [f"{count(len(shared), 'part')} shared by all; {len(same)} of them in the same role."] if roles else []
    read = "roles are measured in each task by itself, from attention patterns and direct effects."
    return Section(title, [table], read if roles else "Roles were not measured.", remarks=remarks)


def _order(part: Part) -> tuple[int, int, int, int]:
    return part.order


def _transplant(run: Run, summary: dict[str, Any]) -> Section:
    title = "The transplant"
    table = tables.frame(run, "transplant", ["condition", "metric", "value"])
    if table is None:
        return Section(title, missing="no transplant was tried.")
    told = summary.get("transplant") or {}
    heads = [str(h) for h in told.get("heads") or []]
    plots = []
    for metric, group in table.groupby("metric", sort=False):
        rows = []
        for condition, label, what in (
            ("before", "before", "before"), ("random", "after, random heads instead", "control"),
            ("after", "after the transplant", "after"),
        ):  # fmt: skip
            part = group[group["condition"] == condition]
            if part.empty:
                continue
            values = part["value"].to_numpy(float)
            many = len(values) > 1
            low, high = part["low"].iloc[0], part["high"].iloc[0]
            if many:
                low, high = pd.Series(values).quantile([0.025, 0.975])
            if many:
                label += f" ({len(values)} draws)"
            rows.append({"label": label, "what": what, "value": values.mean(), "low": low, "high": high})
        limits = (0.0, 1.0) if metric == "accuracy" else None
        frame = pd.DataFrame(rows).astype({"value": float, "low": float, "high": float})
        target = f" on {told['target']}" if told.get("target") else ""
        plots.append(charts.bars(frame, "value", "label", f"{metric}{target}", limits))
    remarks = []
    if heads:
        source = f" as {told['source']} uses them" if told.get("source") else ""
        remarks.append(f"Intervened on: {listed(heads)}{source}.")
    read = (
        "the named heads are made to behave in the second task as they do in the first, and the task is measured "
        "again. Grey is the same done to as many random heads, with the range of the draws; lines are 95 % intervals."
    )
    return Section(title, plots, read, layout="even" if len(plots) > 1 else "stack", remarks=remarks)
