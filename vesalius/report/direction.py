"""The reports of `vesalius direction` and `vesalius probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vesalius.parts import parse
from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, Table, record, warnings, write
from vesalius.report.words import number, percent
from vesalius.runs import Run

INTERVALS = {
    "accuracy": "95 % intervals (Wilson), counting groups of examples as one.",
    "r2": "95 % intervals by bootstrap over groups of examples.",
}


def direction_report(run: Run) -> Path:
    """Draws a direction run as one offline HTML file in its folder.

    It reads `summary.json` (concept, method, model, reading, poles, quality, lead, notes) and the tables phrases, axes,
    cosines, scored, steered.
    """
    summary = tables.summary(run, ["concept", "method", "model", "quality"])
    phrases = tables.frame(run, "phrases", ["phrase", "use", "score"])
    page = Page(
        kind="direction",
        title=f"The direction of {summary['concept']}",
        subtitle=f"{summary['model']} · {summary['method']} · read at {summary['reading']}",
        lead=str(summary["lead"]),
        facts=_facts(summary["quality"]),
        warnings=warnings(run),
        sections=[
            _phrases(phrases, summary),
            _methods(run, summary),
            _graded(phrases),
            _pairs(phrases),
            *_used(run),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(q: dict[str, Any]) -> list[tuple[str, str, str]]:
    facts = [
        (
            "left out, right side",
            percent(q["sign_accuracy"]),
            f"of {q['n']}; 95 % {percent(q['low'])} to {percent(q['high'])}",
        ),
        ("of the variance", percent(q["explained"]), f"correlation with the label {number(q['label_correlation'])}"),
    ]
    if q.get("p") is not None:
        facts.append(("shuffled labels", percent(q["null_mean"]), f"p = {number(q['p'])}"))
    if q.get("stability"):
        low = number(q["stability"]["low"])
        facts.append(("stability", number(q["stability"]["median"]), f"cosine after resampling; 2.5 % below {low}"))
    return facts


def _phrases(phrases: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "The phrases it was found from"
    if phrases is None:
        return Section(title, missing="no phrase was read.")
    mine = phrases[phrases["use"].isin(summary["poles"])].copy()
    chart = charts.strip(mine, "left_out", "use", "phrase", ("score when left out", ""), "Scores by pole")
    table = tables.frame_table(
        mine.sort_values("left_out", ascending=False), ["phrase", "use", "left_out", "score"], 12
    )
    read = (
        f"each dot is a phrase, scored on the axis found without it; right of 0 counts as {summary['poles'][0]}, "
        f"left of it as {summary['poles'][1]}."
    )
    return Section(title, [chart, table], read)


def _methods(run: Run, summary: dict[str, Any]) -> Section:
    title = "Against other ways to find it"
    axes = tables.frame(run, "axes", ["method", "sign_accuracy"])
    if axes is None:
        return Section(title, missing="only one method was tried.")
    blocks: list[Any] = [tables.frame_table(axes.drop(columns=["null_mean", "cross_validated"]))]
    found = tables.frame(run, "cosines", ["a", "b", "cosine"])
    if found is not None:
        found = found.assign(**{k: found[k].str.rpartition(", ")[2] for k in ("a", "b")})
        blocks.append(charts.matrix(found, list(dict.fromkeys(found["a"])), "cosine", "Cosines among the axes", True))
    shares = summary["quality"].get("components") or []
    follow = summary["quality"].get("component_correlations") or []
    if shares:
        rows = [[i + 1, s, c] for i, (s, c) in enumerate(zip(shares, follow, strict=False))]
        heads = ["component", "share of variance", "correlation with the label"]
        blocks.append(Table.of(heads, rows, caption="Principal components of the phrases"))
    read = (
        "principal components see no labels but for their sign: agreement with the supervised axes means that the "
        "concept is the largest difference among these phrases. A random direction is the baseline."
    )
    return Section(title, blocks, read)


def _graded(phrases: pd.DataFrame | None) -> Section:
    title = "Phrases it never saw, rated"
    mine = None if phrases is None else phrases[phrases["use"] == "graded"]
    if mine is None or not len(mine):
        return Section(title, missing="the concept has no rated phrases.")
    chart = charts.strip(
        mine.assign(rating=mine["rating"].map(number)).sort_values("score"),
        "score",
        "rating",
        "phrase",
        ("score", "rating"),
        "Scores by rating",
        order=[number(v) for v in sorted(set(mine["rating"]), reverse=True)],
    )
    table = tables.frame_table(mine.sort_values("score", ascending=False), ["phrase", "rating", "score"], shown=12)
    return Section(
        title, [chart, table], "ratings were given before any model was asked; higher should lie further right."
    )


def _pairs(phrases: pd.DataFrame | None) -> Section:
    title = "Held-out pairs"
    more = None if phrases is None else phrases[phrases["use"] == "more"].reset_index(drop=True)
    if phrases is None or more is None or not len(more):
        return Section(title, missing="the concept has no held-out pairs.")
    less = phrases[phrases["use"] == "less"].reset_index(drop=True)
    difference = more["score"] - less["score"]
    rows = [[a, b, d, bool(d > 0)] for a, b, d in zip(more["phrase"], less["phrase"], difference, strict=True)]
    rows.sort(key=lambda r: -float(r[2]))
    table = Table.of(["should score higher", "should score lower", "difference", "does"], rows, shown=20)
    return Section(title, [table], f"{int((difference > 0).sum())} of {len(rows)} the right way round; chance is half.")


def _used(run: Run) -> list[Section]:
    sections = []
    scored = tables.frame(run, "scored", ["phrase", "score"])
    if scored is not None:
        table = tables.frame_table(scored.sort_values("score", ascending=False), ["phrase", "score"])
        sections.append(Section("Your phrases", [table], "1 is as much as the clearest labelled phrase."))
    steered = tables.frame(run, "steered", ["prompt", "unsteered", "steered"])
    if steered is not None:
        count = run.json("steering")
        rows = steered[["prompt", "score_unsteered", "score_steered"]].to_numpy().tolist()
        remarks = []
        if count.get("candidates"):
            remarks.append(
                f"{count['dropped']} of {count['candidates']} candidates that were judged were ruled out; on "
                f"{count['rescued']} steps none was above the threshold, and the best was taken."
            )
        read = (
            f"written by {count['with']} with the same seed, steered by {count['by']}; scores are of prompt and text. "
            "The texts themselves are not shown here: steered.parquet in the run's folder holds them."
        )
        table = Table.of(["prompt", "score as it is", "score steered"], rows)
        sections.append(Section("Steering", [table], read, remarks=remarks))
    return sections


def probe_report(run: Run) -> Path:
    """Draws a probe run as one offline HTML file in its folder.

    It reads `summary.json` (what, model, site, measure, labels, lead, notes) and the table probes.
    """
    summary = tables.summary(run, ["what", "model", "site", "measure"])
    found = tables.frame(run, "probes", ["part", "layer", summary["measure"]])
    labels = " / ".join(summary.get("labels") or []) or "numbers"
    page = Page(
        kind="probe",
        title=f"Probes of {summary['what']}",
        subtitle=f"{summary['model']} · {summary['site']}, {summary['pool']} · {summary['n']} examples · {labels}",
        lead=str(summary["lead"]),
        warnings=warnings(run),
        sections=[_profile(found, summary), _places(found, summary)],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _profile(found: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "By head" if summary["site"] == "head" else "By layer"
    measure = summary["measure"]
    if found is None:
        return Section(title, missing="no place was probed.")
    if summary["site"] == "head":
        heads = [getattr(parse(p), "index", 0) or 0 for p in found["part"]]
        shown = found.assign(
            column=[str(i) for i in heads],
            score=found[measure] - found["baseline"],
            stack="",
            order=heads,
            member="no",
            role="–",
            measured="–",
            interval=[f"[{number(a)}, {number(b)}]" for a, b in zip(found["low"], found["high"], strict=True)],
        ).assign(**{"sign kept": "–", "place kept": "–"})
        limit = float(np.abs(shown["score"]).max()) or 1.0
        chart = charts.heatmap(shown, f"{measure} above the baseline", limit, "Every head")
        return Section(title, [chart], f"{measure} on examples left out, minus that of always guessing the same.")
    names = {measure: "probe", "control": "control labels", "baseline": "commonest label"}
    if measure == "r2":
        names.pop("baseline")
    table = found[["layer", *names]].rename(columns=names).melt("layer", var_name="what", value_name="value")
    grey = [n for n in names.values() if n != "probe"]
    chart = charts.lines(
        table, "layer", "value", ("layer", measure), f"{measure} after each block", "what", points=True, grey=grey
    )
    read = (
        "the probe on examples that were left out, and in grey the same probe on labels drawn for each word or text, "
        "and always guessing the commonest label. What lies between is what the layer holds."
    )
    return Section(title, [chart], read)


def _places(found: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "All numbers"
    if found is None:
        return Section(title, missing="no place was probed.")
    shown = tables.frame_table(found, [str(c) for c in found if c != "layer"])
    return Section(title, [shown], INTERVALS[summary["measure"]])
