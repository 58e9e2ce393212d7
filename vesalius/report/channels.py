"""The reports of `vesalius channels` and `vesalius observe`.

What they read, beside `summary.json` (`model` *, `task` *, `lead`, `notes`, `command`):

- `channels`: `scores` (edges; columns component, z, p, whole, p_whole, share), `components.parquet` (`channel` *,
  `component` *, `score` *, `sigma`, `z`), `effects` (edges; `component`, `logit_effect`, `to_right`, `to_wrong`)?.
- `observe`: `scores` (heads: length of the feature), `tokens.parquet` (`row` *, `place` *, `token` *, `score` *)?,
  `pairs.parquet` (`first` *, `second` *: scores of two observables, a row a token)?, `words.parquet`?.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from markupsafe import Markup

from vesalius.parts import Edge, parse
from vesalius.report import charts, tables
from vesalius.report.page import Cell, Chart, Drawing, Page, Section, Table, cell, record, warnings, write
from vesalius.report.words import number, token
from vesalius.runs import Run

EFFECTS = 16  # components drawn
_SIDES = {"q": "queries", "k": "keys", "v": "values"}


def channels_report(run: Run) -> Path:
    """Draws a run of `vesalius channels` as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "task", "lead"])
    scores = tables.frame(run, "scores", ["part", "score", "z", "component"])
    components = tables.frame(run, "components", ["channel", "component", "score"])
    effects = tables.frame(run, "effects", ["part", "score", "component"])
    top = int(run.request.get("top") or 20)
    page = Page(
        kind="channels",
        title=f"Channels between heads of {summary['model']}",
        subtitle=f"{summary.get('edges', 0):,} possible channels · {summary['task']}",
        lead=str(summary["lead"]),
        warnings=warnings(run),
        sections=[
            _components(components),
            _table(scores, top),
            _effects(effects, summary),
            *_maps(scores),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _components(components: pd.DataFrame | None) -> Section:
    title = "What the receiver reads, component by component"
    if components is None:
        return Section(title, missing="no channel was scored.")
    order = list(dict.fromkeys(components["channel"]))
    data = components.assign(
        what=np.where(
            components["score"] >= components.groupby("channel")["score"].transform("max"), "largest", "other"
        )
    )
    color = alt.Color(
        "what:N", scale=alt.Scale(domain=["largest", "other"], range=[charts.NEGATIVE, charts.POSITIVE])
    ).legend(None)
    hover: list[Any] = ["channel", "component", *[alt.Tooltip(c, format=".3~g") for c in ("score", "z", "sigma")]]
    chart = (
        alt.Chart(data)
        .mark_circle(opacity=0.8)
        .encode(
            y=alt.Y("channel:N", sort=order, title=None).axis(ticks=False, domain=False, labelLimit=220, grid=True),
            x=alt.X("score:Q", title="composition score of one component").axis(grid=True, tickCount=6),
            size=alt.Size("sigma:Q", title="singular value", scale=alt.Scale(range=[12, 140])).legend(
                orient="top", tickCount=3
            ),
            color=color,
            tooltip=hover,
        )
        .properties(width="container", height=30 * len(order))
    )
    read = (
        "each dot is one component of the sender's output matrix, the largest in orange; right is what the receiver "
        "reads more of, size is how strongly the sender writes it. A channel of one dimension is a dot far to the "
        "right of its row; a row of many dots to the right is a head that is read as a whole."
    )
    return Section(
        title, [Chart(charts._spec(chart), f"Components of {len(order)} channels", "The strongest channels")], read
    )


def _table(scores: pd.DataFrame | None, top: int) -> Section:
    title = "The strongest channels"
    if scores is None:
        return Section(title, missing="no channel was scored.")
    rows = []
    for row in scores.nlargest(top, "score").to_dict("records"):
        edge = parse(str(row["part"]))
        assert isinstance(edge, Edge)
        names = [str(edge.sender), str(edge.receiver.output)]
        cells = [Cell(n, n, "part") for n in names] + [cell(_SIDES[edge.receiver.side or "q"])]
        cells += [cell(row["score"]), cell(int(row["component"])), cell(row["z"]), cell(row["p"])]
        rows.append([*cells, cell(row["whole"]), cell(row["p_whole"]), cell(row["share"])])
    heads = ["from", "to", "reads with its", "score", "component", "z", "p", "whole", "p of whole", "share"]
    read = (
        "score: of the sender's best component; z: against the sender's other components; p: share of all head pairs "
        "of the same two layers that score as high; whole: the composition score of the undecomposed matrices; share: "
        "the component's part of the sender's output matrix (squared)."
    )
    return Section(title, [Table(heads, rows)], read)


def _effects(effects: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "What happens without them"
    if effects is None:
        return Section(title, missing="no task was given (--task); the scores above are of weights alone.")
    right, wrong = summary.get("right", "right"), summary.get("wrong", "wrong")
    tried = len(effects)
    effects = effects.loc[effects["score"].abs().sort_values(ascending=False).index].head(EFFECTS)
    table = pd.DataFrame(
        {
            "channel": [f"{p} · {int(c)}" for p, c in zip(effects["part"], effects["component"], strict=True)],
            "value": effects["score"],
            "low": effects["low"],
            "high": effects["high"],
            "what": "after",
        }
    )
    name = f"attention to {right} less to {wrong} that the component brings"
    rows = [
        [Cell(str(r["part"]), str(r["part"]), "part"), cell(int(r["component"])), tables.signed(r["score"])]
        + [tables.signed(r["logit_effect"]), cell(r["to_right"]), cell(r["to_wrong"])]
        for r in effects.to_dict("records")
    ]
    heads = ["channel", "component", "inhibition", "logit effect", f"to {right}", f"to {wrong}"]
    read = (
        f"each component is taken out where the answer is read, on {summary.get('n')} prompts of {summary['task']}; of "
        f"{tried} those {len(effects)} that matter most are shown, so a few of their intervals miss 0 by chance. "
        f"Inhibition: the change of the receiver's attention to {right} less that to {wrong}; logit effect: what the "
        "metric loses; the last columns are the receiver's attention with everything in place."
    )
    return Section(title, [charts.bars(table, "value", "channel", name), Table(heads, rows)], read)


def _maps(scores: pd.DataFrame | None) -> list[Section]:
    """Sender layer by receiver layer: the best component between any two heads."""
    title = "Between which layers"
    if scores is None:
        return []
    edges = [parse(str(p)) for p in scores["part"]]
    frame = pd.DataFrame(
        {
            "from": [e.sender.layer for e in edges if isinstance(e, Edge)],
            "to": [e.receiver.layer for e in edges if isinstance(e, Edge)],
            "side": [_SIDES[e.receiver.side or "q"] for e in edges if isinstance(e, Edge)],
            "score": scores["score"],
            "part": scores["part"],
        }
    )
    if frame[["from", "to"]].drop_duplicates().shape[0] < 4:
        return []
    best = frame.loc[frame.groupby(["from", "to", "side"])["score"].idxmax()]
    limit = float(best["score"].max())
    blocks = []
    for side, group in best.groupby("side", sort=False):
        shades = alt.Scale(
            domain=list(np.linspace(0, limit, len(charts.SEQUENTIAL))), range=charts.SEQUENTIAL, interpolate="rgb"
        )
        axis: dict[str, Any] = {"ticks": False, "domain": False, "labelOverlap": "parity", "labelAngle": 0}
        chart = (
            alt.Chart(group)
            .mark_rect()
            .encode(
                x=alt.X("to:O", title="layer of the receiver").axis(**axis),
                y=alt.Y("from:O", title="layer of the sender", sort="descending").axis(**axis),
                color=alt.Color("score:Q", scale=shades).legend(None),
                tooltip=["part", alt.Tooltip("score", format=".3f")],
            )
            .properties(width="container", height=240)
        )
        blocks.append(Chart(charts._spec(chart), f"Best score by layers, {side}", f"read by {side}", wide=False))
    read = f"the largest component score between any two heads of two layers; the darkest is {number(limit)}."
    return [Section(title, blocks, read, layout="grid" if len(blocks) > 2 else "pair")]


# -- observe ---------------------------------------------------------------------------------------------------------


def observe_report(run: Run) -> Path:
    """Draws a run of `vesalius observe` as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "task", "lead"])
    scores = tables.frame(run, "scores", ["part", "score"])
    found = tables.frame(run, "tokens", ["row", "place", "token", "score"])
    both = tables.frame(run, "pairs", ["first", "second"])
    words = tables.frame(run, "words", ["raised", "lowered"])
    page = Page(
        kind="observe",
        title=f"What moves {summary['task']} in {summary['model']}",
        subtitle=f"{summary.get('path') or 'the direct path'} · read at {summary.get('at')}",
        lead=str(summary["lead"]),
        warnings=warnings(run),
        sections=[
            _heads(scores, summary),
            _texts(found, summary),
            _words(words, summary),
            _coupled(both, summary),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _heads(scores: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "Which heads could move it"
    if scores is None:
        return Section(title, missing="no head comes before the path.")
    unit = str(summary.get("unit") or "length")
    grid = charts.cells(scores, {})
    rows = [
        [Cell(str(r["part"]), str(r["part"]), "part"), cell(r["score"])]
        for r in scores.nlargest(min(25, len(scores)), "score").to_dict("records")
    ]
    read = (
        "the length of the observable's feature at each head's input: how far a state there could move it, wherever "
        f"the head looks ({unit})."
        + ("" if summary.get("scaled") else " No text was given, so lengths of different layers are not comparable.")
    )
    blocks: list[Chart | Drawing | Table] = [
        charts.heatmap(grid, unit, charts.scale_limit(grid), "Every head"),
        Table(["head", "length"], rows, shown=10),
    ]
    return Section(title, blocks, read)


def _texts(found: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "Where the feature is in a text"
    if found is None:
        return Section(title, missing="no text was given (--corpus).")
    limit = float(found["score"].abs().quantile(0.98)) or 1.0
    lines = []
    apart = not found["token"].astype(str).str.startswith((" ", "Ġ", "▁")).any()  # no token says where a word begins
    for _, row in found.groupby("row", sort=True):
        said = Markup("")
        for r in row.sort_values("place").to_dict("records"):
            strength = min(1.0, abs(float(r["score"])) / limit)
            ink = charts.POSITIVE if r["score"] > 0 else charts.NEGATIVE
            style = f"background: {ink}{round(strength * 165):02x}; padding: 1px 1px; border-radius: 3px"
            text = str(r["token"])
            gap = " " if apart or text.startswith((" ", "Ġ", "▁")) else Markup("<wbr>")
            said += gap + Markup('<span style="{}" title="{}">{}</span>').format(
                style, f"{float(r['score']):.3g}", token(text)
            )
        lines.append(Markup("<p>{}</p>").format(said))
    read = (
        f"each token shaded by its state's score at {summary.get('at')}: blue towards the observable's first side, "
        f"orange towards its second; full strength is {number(limit)}. The first token of a row is not scored."
    )
    extremes = found.assign(size=found["score"].abs())
    rows = [
        [cell(token(str(r["token"]))), tables.signed(r["score"]), cell(str(r.get("context", "")))]
        for r in extremes.nlargest(12, "size").to_dict("records")
    ]
    shown = Drawing(Markup("").join(lines[:6]), "", span=True)
    return Section(title, [shown, Table(["token", "score", "before it"], rows, shown=12)], read)


def _words(words: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "Words that carry it from the embedding on"
    if words is None:
        return Section(title, missing="the model has no tokenizer.")
    read = "tokens whose embeddings lie furthest along the feature, and furthest against it (cosine)."
    return Section(title, [tables.frame_table(words, shown=15)], read)


def _coupled(both: pd.DataFrame | None, summary: dict[str, Any]) -> Section:
    title = "Coupled with another observable"
    if both is None:
        return Section(title, missing="no second observable was given (--with), or no text on which both vary.")
    c = summary["coupling"]
    x = np.array([both["first"].min(), both["first"].max()])
    lines = {
        "predicted, isotropic (C)": c["coefficient"],
        "predicted, covariance": c.get("weighted"),
        "fitted": c["slope"],
    }
    middle = float(both["first"].mean()), float(both["second"].mean())
    drawn = pd.concat(
        [
            pd.DataFrame({"first": x, "second": middle[1] + slope * (x - middle[0]), "what": what})
            for what, slope in lines.items()
            if slope is not None
        ]
    )
    points = (
        alt.Chart(both.head(1500))
        .mark_circle(size=18, opacity=0.35, color=charts.CONTROL)
        .encode(
            x=alt.X("first:Q", title=f"score of {summary['task']}").axis(grid=True, tickCount=6),
            y=alt.Y("second:Q", title=f"score of {summary.get('with')}").axis(grid=True, tickCount=6),
        )
    )
    color = alt.Color("what:N", title=None, scale=alt.Scale(range=charts.LINES[: len(lines)])).legend(
        orient="top", labelLimit=260, symbolType="stroke"
    )
    rules = alt.Chart(drawn).mark_line(strokeWidth=2.2).encode(x="first:Q", y="second:Q", color=color)
    chart = alt.layer(points, rules).properties(width="container", height=320)
    table = Table.of(
        ["", "slope", "correlation"],
        [
            ["isotropic states (C, cosine)", c["coefficient"], c["cosine"]],
            ["this text's covariance", c.get("weighted"), c.get("r")],
            ["measured on this text", c["slope"], c["measured_r"]],
        ],
    )
    read = f"both features' scores of {len(both):,} tokens at {summary.get('at')}, with predicted and fitted slopes."
    return Section(title, [Chart(charts._spec(chart), "Scores of two observables", ""), table], read)
