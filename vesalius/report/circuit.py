"""The report of `vesalius circuit`: the task, the scores, the circuit, and the proof."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, graph, tables
from vesalius.report.page import Page, Section, record, warnings, write
from vesalius.report.words import Estimate, count, estimate, listed, metric_name, number, percent, share
from vesalius.runs import Run

MOST_ROWS = 2000  # of a page's table of scores; edges can be a hundred thousand


def circuit_report(run: Run) -> Path:
    """Draws a circuit run as one offline HTML file in its folder; see `vesalius.report` for the tables it reads.

    Raises:
        RunError: if the run has no summary, a table is damaged or lacks a column, or the file cannot be written.
    """
    summary = tables.summary(run, ["model", "task", "method"])
    scores = tables.frame(run, "scores", ["part", "score"])
    found = tables.circuit(run)
    members = {str(m["part"]): m for m in found[0]} if found else {}
    unit = str(summary.get("unit") or "logit difference")
    metric = metric_name(str(summary.get("metric") or unit))
    page = Page(
        kind="circuit",
        title=str(summary.get("title") or f"{summary['task']} in {summary['model']}"),
        subtitle=" · ".join(
            f"{name} {summary[key]}"
            for name, key in (("model", "model"), ("task", "task"), ("method", "method"), ("level", "level"))
            if summary.get(key)
        ),
        lead=_lead(summary, metric),
        facts=_facts(summary, metric),
        warnings=warnings(run),
        sections=[
            _task(run, summary, metric),
            _map(scores, members, unit),
            _graph(found, scores),
            _proof(run, summary),
            _patterns(run),
            _agreement(run, str(summary["method"])),
            _completeness(run, unit),
            _numbers(scores, found),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _size(summary: dict[str, Any]) -> list[str]:
    size, total = summary.get("size") or {}, summary.get("total") or {}
    nouns = (("heads", "head"), ("mlps", "MLP"), ("edges", "edge"))
    return [count(size[k], noun, total.get(k)) for k, noun in nouns if size.get(k) is not None]


def _lead(summary: dict[str, Any], metric: str) -> str:
    accuracy, difference = summary.get("accuracy"), estimate(summary.get("logit_diff"))
    faith, random = estimate(summary.get("faithfulness")), estimate(summary.get("random"))
    text = []
    if accuracy is not None:
        how = f", by a {metric} of {number(difference.mean)}" if difference.mean is not None else ""
        text.append(f"The model prefers the right answer on {percent(accuracy)} of the prompts{how}.")
    if faith.mean is not None and (size := _size(summary)):
        rest = f"{summary['ablation']}-ablated" if summary.get("ablation") else "ablated"
        held = " on prompts not used to find them" if summary.get("n_prove") else ""
        kept = share(faith.mean)
        text.append(f"With {listed(size)} left in place and the rest {rest}, {kept} of that remains{held}.")
        if random.mean is not None:
            text.append(f"Random circuits of the same size keep {share(random.mean)}.")
    return " ".join(text) or "No headline number was measured."


def _facts(summary: dict[str, Any], metric: str) -> list[tuple[str, str, str]]:
    def with_interval(value: Estimate, small: str, show: Callable[[float | None], str]) -> tuple[str, str]:
        interval = "" if value.low is None or value.high is None else f"[{show(value.low)}, {show(value.high)}]"
        return show(value.mean), " ".join(t for t in (interval, small) if t)

    facts = []
    if summary.get("accuracy") is not None:
        top = summary.get("top1")
        likeliest = f"likeliest token on {percent(top)}" if top is not None else ""
        facts.append(("accuracy", percent(summary["accuracy"]), likeliest))
    rows = ((metric, "logit_diff"), ("faithfulness", "faithfulness"), ("random circuits", "random"))
    for label, key in rows:
        if (value := estimate(summary.get(key))).mean is not None:
            draws = f"{summary['random_draws']} draws" if key == "random" and summary.get("random_draws") else ""
            facts.append((label, *with_interval(value, draws, number if key == "logit_diff" else share)))
    size, total = summary.get("size") or {}, summary.get("total") or {}
    part_of_heads = summary.get("fraction_of_heads")
    for key, label in (("heads", "heads"), ("mlps", "MLPs"), ("edges", "edges")):
        if size.get(key) is not None:
            of = f"of {total[key]}" if total.get(key) else ""
            part = f"{percent(part_of_heads)} of them" if key == "heads" and part_of_heads is not None else ""
            facts.append((label, str(size[key]), ", ".join(t for t in (of, part) if t)))
    return facts


def _task(run: Run, summary: dict[str, Any], metric: str) -> Section:
    examples = run.json("examples") if run.has("examples.json") else []
    uses = (("n_find", "find"), ("n_prove", "prove"))
    n = [f"{summary[key]} prompts to {verb} the circuit" for key, verb in uses if summary.get(key)]
    clean, corrupted = estimate(summary.get("logit_diff")), estimate(summary.get("corrupted_logit_diff"))
    remarks = [f"{listed(n)}, none in common." if len(n) == 2 else f"{n[0]}."] if n else []
    if clean.mean is not None and corrupted.mean is not None:
        remarks.append(f"Mean {metric}: {clean} on the clean prompts, {corrupted} on the corrupted ones.")
    if not examples:
        return Section(f"The task: {summary['task']}", missing="no example prompts were stored.", remarks=remarks)
    return Section(
        f"The task: {summary['task']}",
        [tables.example_table(examples)],
        "each corrupted prompt is the clean one with the marked words changed, so that the right answer no longer "
        f"follows. The {metric} compares the right answer with the wrong one; above zero, the right one wins.",
        remarks=remarks,
    )


def _map(scores: pd.DataFrame | None, members: dict[str, Any], unit: str) -> Section:
    title = "Which parts matter"
    if scores is None:
        return Section(title, missing="no scores were stored.")
    grid = charts.cells(scores, members)
    if grid.empty:
        return Section(title, [charts.top_parts(scores, members, unit)], "the largest scores, with 95 % intervals.")
    remarks = []
    limit = charts.scale_limit(grid)
    beyond = grid[grid["score"].abs() > limit * 1.0001].sort_values("score", key=abs, ascending=False)
    if len(beyond):
        names = [f"{p} ({number(float(s))})" for p, s in zip(beyond["part"][:6], beyond["score"][:6], strict=True)]
        more = f" and {len(beyond) - 6} more" if len(beyond) > 6 else ""
        remarks.append(f"Colours end at ±{number(limit)}, the largest head; beyond it: {', '.join(names)}{more}.")
    missing = int(scores["score"].isna().sum())
    if missing:
        remarks.append(f"{count(missing, 'part')} without a score.")
    stacks = {"enc": "Encoder", "dec": "Decoder (X: cross-attention)", "": "Every head and MLP"}
    maps = [
        charts.heatmap(grid[grid["stack"] == s], unit, limit, c) for s, c in stacks.items() if s in set(grid["stack"])
    ]
    blocks = [*maps, charts.top_parts(scores, members, unit)]
    layout = "pair" if len(maps) == 1 else "even"
    return Section(title, blocks, _read_map(scores, members), layout=layout, remarks=remarks)


def _read_map(scores: pd.DataFrame, members: dict[str, Any]) -> str:
    text = "each cell is a part; layers count upwards. Blue parts help the metric, orange ones hurt it"
    text += "; outlined ones are in the circuit" if members else ""
    edges = scores["part"].astype(str).str.contains("->", regex=False)
    if edges.all():
        text += ". Edges were scored: a cell is the sum over the edges that leave its part; the list ranks edges"
    if scores[["low", "high"]].notna().any().any():
        text += ". Bars are 95 % intervals over prompts"
    if members and not edges.any():
        text += "; ◦ marks parts outside the circuit"
    return text + ". Point at a cell for its numbers."


def _graph(found: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None, scores: pd.DataFrame | None) -> Section:
    title = "The circuit"
    if not found or not (found[0] or found[1]):
        return Section(title, missing="no circuit was stored.")
    members, edges = found
    universe: list[str] = []
    if scores is not None:
        kinds = scores["part"].astype(str)
        universe = [p for p in kinds if "->" not in p and (".H" in p or ".X" in p or p.endswith(".MLP"))]
    drawing, remarks = graph.draw(members, edges, universe)
    read = "information flows upwards, from the embedding to the logits. Each disc is a head, each box an MLP"
    read += "; dots are the model's other parts" if universe else ""
    if edges:
        read += ". An edge is wider the more it matters; point at a part to see its edges alone, click to keep them"
    else:
        read += ". The circuit is one of parts, so no edges are drawn: what a part writes, all later parts may read"
    return Section(title, [graph.key(members), drawing], read + ".", remarks=remarks)


def _proof(run: Run, summary: dict[str, Any]) -> Section:
    title = "Is it enough? Faithfulness against size"
    table = tables.frame(run, "curve", ["ablation", "size", "faithfulness", "kind"])
    if table is None:
        return Section(title, missing="the circuit was not proved on held-out prompts.")
    size = summary.get("size") or {}
    edge = summary.get("level") == "edge"
    chosen = size.get("edges") if edge else sum(size.get(k) or 0 for k in ("heads", "mlps")) or None
    kinds = list(dict.fromkeys(table["ablation"]))
    plots = [charts.curve(table, a, chosen, "edges" if edge else "heads and MLPs") for a in kinds]
    remarks = []
    areas = [
        ("circuit-performance ratio", "cpr"), ("circuit-model distance", "cmd"),
        ("the same ratio on a log axis", "cpr_log"), ("the same distance on a log axis", "cmd_log"),
    ]  # fmt: skip
    said = [
        f"{label} {number(value)}" for label, key in areas if (value := estimate(summary.get(key)).mean) is not None
    ]
    if said:
        text = "; ".join(said)
        remarks.append(
            f"{text[0].upper()}{text[1:]}. The ratio is the area under such a curve with parts ranked by signed score, "
            "as MIB defines it; the distance, like the curves drawn here, ranks them by size."
        )
    if not (table["kind"] == "random").any():
        remarks.append("Random circuits of the same sizes were not measured.")
    read = (
        "1 is the whole model, 0 the model with everything ablated. A good circuit is near 1 while it is small, and "
        "far above random circuits of the same size (grey; dots are their mean, the band holds nine in ten). The blue "
        "band is a 95 % interval over prompts."
    )
    return Section(title, plots, read, layout="even" if len(plots) > 1 else "stack", remarks=remarks)


def _patterns(run: Run) -> Section:
    title = "What the top heads look at"
    found = run.json("patterns") if run.has("patterns.json") else []
    if not found:
        return Section(title, missing="attention patterns of the top heads were not recorded.")
    plots = [charts.pattern(str(p["part"]), p["tokens"], p["pattern"], str(p.get("role") or "")) for p in found[:12]]
    remarks = [f"{len(found) - 12} more are in patterns.json."] if len(found) > 12 else []
    read = "each row is a token that reads, each column a token that is read; the stronger the colour, the more."
    return Section(title, plots, read, layout="grid", remarks=remarks)


def _agreement(run: Run, method: str) -> Section:
    title = "Does the method agree with exact patching?"
    table = tables.frame(run, "correlations", ["method", "kind", "pearson"])
    if table is None:
        exact = method == "activation-patching"
        why = "this method is exact patching itself." if exact else "exact patching was not run beside it."
        return Section(title, missing=why)
    columns = ["method", "kind", "pearson", "spearman", "top10_overlap", "n"]
    read = (
        "correlation, over parts of one kind, between a method's scores and the effect of patching each part "
        "by itself; 1 is perfect."
    )
    return Section(title, [tables.frame_table(table, columns)], read)


def _completeness(run: Run, unit: str) -> Section:
    title = "Is it all? Completeness"
    table = tables.frame(run, "completeness", ["subset", "circuit", "model"])
    if table is None:
        return Section(
            title, missing="knocking parts out of the circuit was not compared with knocking them out of the model."
        )
    titles = (f"model without them ({unit})", f"circuit without them ({unit})")
    plot = charts.scatter(table, "model", "circuit", titles, "subset")
    columns = ["subset", "removed", "circuit", "model", "gap", "low", "high"]
    read = (
        "each dot is a set of the circuit's parts, knocked out of the circuit and out of the whole model. Near the "
        "diagonal, the circuit contains what the model falls back on; below it, the model has spare parts that the "
        "circuit lacks."
    )
    return Section(title, [plot, tables.frame_table(table, columns, shown=10)], read, layout="even")


def _numbers(scores: pd.DataFrame | None, found: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None) -> Section:
    title = "The numbers"
    if scores is None:
        return Section(title, missing="no scores were stored.")
    members = {str(m["part"]): m for m in found[0]} if found else None
    edges = found[1] if found else []
    if members is not None and edges:
        members |= {f"{e['sender']}->{e['receiver']}": {} for e in edges}
    largest = scores.loc[scores["score"].abs().sort_values(ascending=False, kind="stable").index[:MOST_ROWS]]
    remarks = []
    if len(scores) > MOST_ROWS:
        remarks.append(f"These are the {MOST_ROWS} largest of {len(scores)}; scores.parquet has them all.")
    blocks = [tables.scores_table(largest, members)]
    if edges and not (scores["part"].astype(str).str.contains("->", regex=False)).any():
        blocks.append(tables.edges_table(edges))
    read = "click a column's head to sort. “Sign kept” is the share of resamplings of the prompts in which a score "
    read += "keeps its sign"
    read += ", “place kept” that in which it stays among the largest." if "place_stability" in scores else "."
    return Section(title, blocks, read, remarks=remarks)
