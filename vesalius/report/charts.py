"""The charts, as Vega-Lite specifications made with altair.

Colours: blue helps, orange hurts, on a scale that colour-blind readers tell apart; grey is the control. Lines and
letters take the page's own ink, so that the same chart is right on paper and on a dark screen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from vesalius.parts import Edge, parse
from vesalius.report.page import Chart
from vesalius.report.words import number, token

POSITIVE, NEGATIVE, NEUTRAL, CONTROL = "#2f6fb3", "#c8571c", "#f1f1ef", "#8d9297"
DIVERGING = ["#8f3205", NEGATIVE, "#eab08a", NEUTRAL, "#9cc0e4", POSITIVE, "#123f73"]
SEQUENTIAL = [NEUTRAL, "#9cc0e4", POSITIVE, "#123f73"]
INK = "currentColor"


def _spec(chart: Any) -> dict[str, Any]:
    with alt.data_transformers.enable("default", max_rows=None):
        spec: dict[str, Any] = chart.to_dict()
    spec.pop("$schema", None)  # nothing on the page names an address
    spec.pop("config", None)  # the page's own
    return spec


def cells(scores: pd.DataFrame, members: Mapping[str, Any]) -> pd.DataFrame:
    """One row a head or MLP, with its place on the map: stack, layer, column, score, and what hovering tells.

    Several positions of a part are represented by the one with the largest |score|; edges by the sum over the edges
    that leave the part (equal to the part's own score for attribution methods).
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in scores.to_dict("records"):
        address = parse(str(row["part"]))
        part = address.sender.output if isinstance(address, Edge) else address.output
        if part.kind not in ("head", "xhead", "mlp") or pd.isna(row["score"]):
            continue
        name, score = str(part), float(row["score"])
        old = rows.get(name)
        if isinstance(address, Edge):
            score += old["score"] if old else 0.0
        elif old and abs(old["score"]) >= abs(score):
            continue
        column = {"head": f"{part.index}", "xhead": f"X{part.index}", "mlp": "MLP"}[part.kind]
        known: dict[Any, Any] = {} if isinstance(address, Edge) else row
        rows[name] = {
            "part": name,
            "stack": part.stack,
            "layer": part.layer,
            "column": column,
            "order": (part.index or 0) + {"head": 0, "xhead": 10**4, "mlp": 10**6}[part.kind],
            "score": score,
            "interval": _interval(known),
            "sign kept": _share(known.get("sign_stability")),
            "place kept": _share(known.get("place_stability")),
            "measured": _measured(known.get("verified")),
            "role": str((members.get(name) or {}).get("role") or "–"),
            "member": "yes" if name in members else "no",
        }
    return pd.DataFrame(list(rows.values()))


def _interval(row: Mapping[Any, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return "–" if low is None or pd.isna(low) or pd.isna(high) else f"[{number(low)}, {number(high)}]"


def _share(value: Any) -> str:
    return "–" if value is None or pd.isna(value) else f"{100 * float(value):.0f} % of resamples"


def _measured(value: Any) -> str:
    return "–" if value is None or pd.isna(value) else "by intervention" if value else "estimated"


def scale_limit(table: pd.DataFrame) -> float:
    """Where the colours of a map saturate: the largest |score| of a head, so that one MLP does not bleach them all."""
    heads = table[table["column"] != "MLP"]
    largest = (heads if len(heads) else table)["score"].abs().max()
    return float(largest) or 1.0


def heatmap(table: pd.DataFrame, unit: str, limit: float, caption: str = "Every head and MLP") -> Chart:
    """Layers (upwards) by heads, MLPs in a column of their own; members of the circuit are outlined."""
    columns = list(dict.fromkeys(table.sort_values("order")["column"]))
    heads = [int(c) for c in columns if c.isdigit()]
    columns = [*map(str, range(max(heads, default=-1) + 1)), *[c for c in columns if not c.isdigit()]]
    if "MLP" in columns and len(columns) > 1:
        columns.insert(columns.index("MLP"), " ")  # a gap before the MLPs
    layers = list(range(int(table["layer"].max()), -1, -1))
    signed = bool((table["score"] < 0).any())  # lengths and shares need one half of the scale
    colors = DIVERGING if signed else SEQUENTIAL
    ends = [-limit, 0, limit] if signed else [0, limit / 2, limit]
    shades = alt.Scale(
        domain=list(np.linspace(ends[0], limit, len(colors))), range=colors, clamp=True, interpolate="rgb"
    )
    hover: list[Any] = [
        "part",
        alt.Tooltip("score", format=".3~g"),
        "interval",
        "sign kept",
        "place kept",
        "measured",
        "role",
    ]
    hover += [alt.Tooltip("member", title="in the circuit")]
    present = [h for h in hover if not isinstance(h, str) or h == "part" or (table[h] != "–").any()]
    step = max(13, min(30, 560 // len(layers)))
    few = 1 if len(columns) <= 26 else 5
    names = [c for c in columns if not c.isdigit() or int(c) % few == 0]
    base = alt.Chart(table).encode(
        x=alt.X("column:N", sort=columns, scale=alt.Scale(domain=columns, paddingInner=0.06), title="head").axis(
            labelAngle=0, ticks=False, domain=False, orient="bottom", values=names, labelOverlap=False
        ),
        y=alt.Y("layer:O", scale=alt.Scale(domain=layers, paddingInner=0.06), title="layer").axis(
            ticks=False, domain=False, labelOverlap="parity"
        ),
        tooltip=present,
    )
    color = alt.Color("score:Q", scale=shades, title=f"score ({unit})").legend(
        orient="top", gradientLength=200, gradientThickness=10, format=".2~g", values=ends
    )
    outline = base.transform_filter("datum.member == 'yes'").mark_rect(fillOpacity=0, stroke=INK, strokeWidth=1.6)
    chart = alt.layer(base.mark_rect().encode(color=color), outline)
    chart = chart.properties(width="container", height=step * len(layers))
    return Chart(_spec(chart), f"Scores of {len(table)} parts by layer and head", caption)


def top_parts(scores: pd.DataFrame, members: Mapping[str, Any], unit: str, k: int = 24) -> Chart:
    """The k largest by |score|, with their intervals."""
    frame = scores.dropna(subset=["score"])
    order = np.argsort(-frame["score"].abs().to_numpy(), kind="stable")[:k]
    frame = frame.iloc[order].reset_index(drop=True)
    names = [str(p) for p in frame["part"]]
    if "position" in frame:
        names = [f"{n} @ {p}" for n, p in zip(names, frame["position"], strict=True)]
    if not frame["kind"].eq("edge").any():
        names = [n + ("" if p in members else " ◦") for n, p in zip(names, frame["part"], strict=True)]
    table = pd.DataFrame({"part": names, "score": frame["score"].to_numpy(float)})
    table["sign"] = np.where(table["score"] >= 0, "helps", "hurts")
    for side in ("low", "high"):
        table[side] = frame[side].to_numpy(float) if side in frame else np.nan
    color = alt.Color("sign:N", scale=alt.Scale(domain=["helps", "hurts"], range=[POSITIVE, NEGATIVE]))
    y = alt.Y("part:N", sort=list(table["part"]), title=None).axis(
        ticks=False, domain=False, labelLimit=220, labelOverlap=False
    )
    base = alt.Chart(table).encode(
        y=y,
        color=color.legend(None),
        tooltip=["part", *[alt.Tooltip(c, format=".3~g") for c in ("score", "low", "high")]],
    )
    x = alt.X("score:Q", title=f"score ({unit})").axis(grid=True, tickCount=5)
    zero = alt.Chart(pd.DataFrame({"score": [0]})).mark_rule(stroke=INK, strokeOpacity=0.5).encode(x="score:Q")
    chart = alt.layer(
        zero, base.mark_rule(strokeWidth=2, strokeOpacity=0.55).encode(x=alt.X("low:Q"), x2="high:Q"),
        base.mark_circle(size=46, opacity=1).encode(x=x),
    ).properties(width="container", height=21 * len(table))  # fmt: skip
    return Chart(_spec(chart), f"The {len(table)} largest scores with intervals", f"The {len(table)} largest")


def curve(table: pd.DataFrame, ablation: str, size: int | None, unit: str) -> Chart:
    """Faithfulness against circuit size on a log axis, with its band, and random circuits of the same sizes in grey."""
    names = ["the circuit", "random circuits of that size"]
    data = table[(table["ablation"] == ablation) & (table["size"] > 0)]
    real = data[data["kind"] == "circuit"].sort_values("size")
    rows = [(names[0], r.size_, r.faithfulness, r.low, r.high) for r in _rows(real)]
    for n, group in data[data["kind"] == "random"].groupby("size"):
        draws = group["faithfulness"].dropna().to_numpy(float)
        if len(draws) > 1:
            rows.append((names[1], n, draws.mean(), np.quantile(draws, 0.05), np.quantile(draws, 0.95)))
        elif len(draws):
            one = next(_rows(group))
            rows.append((names[1], n, one.faithfulness, one.low, one.high))
    shown = pd.DataFrame(rows, columns=["what", "size", "faithfulness", "low", "high"])
    mine = shown[shown["what"] == names[0]]
    seen = shown[["faithfulness", "low", "high"]].to_numpy(float)
    low, high = (np.nanmin(seen), np.nanmax(seen)) if np.isfinite(seen).any() else (0.0, 1.0)
    span = [max(-1.0, min(-0.05, float(low))), min(2.0, max(1.1, float(high)))]
    present = [n for n in names if (shown["what"] == n).any()]
    color = alt.Color(
        "what:N", title=None, scale=alt.Scale(domain=present, range=[POSITIVE, CONTROL][: len(present)])
    ).legend(orient="top", symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1, labelLimit=300)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10**4, 10**5, 10**6)]
    top = float(shown["size"].max()) if len(shown) else 1.0
    x = alt.X("size:Q", scale=alt.Scale(type="log", nice=False), title=f"size of the circuit ({unit}, log scale)").axis(
        values=[t for t in ticks if t <= top], format="~s", grid=False
    )
    y = alt.Y("faithfulness:Q", scale=alt.Scale(domain=span, nice=False), title="faithfulness").axis(
        tickCount=6, grid=True
    )
    hover: list[Any] = ["what", "size", *[alt.Tooltip(c, format=".3~g") for c in ("faithfulness", "low", "high")]]
    base = alt.Chart(shown).encode(x=x, color=color, tooltip=hover)
    layers: list[Any] = [
        alt.Chart(pd.DataFrame({"faithfulness": [0, 1]}))
        .mark_rule(stroke=INK, strokeOpacity=0.45, strokeDash=[3, 3])
        .encode(y="faithfulness:Q"),
        base.mark_area(opacity=0.2, clip=True).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=2.2, clip=True).encode(y=y),
        base.mark_circle(size=34, opacity=1, clip=True).encode(y=y),
    ]
    if size is not None and len(mine) and mine["size"].min() <= size <= mine["size"].max():
        here = pd.DataFrame({"size": [size], "label": [f"chosen: {size}"]})
        mark = alt.Chart(here).encode(x="size:Q")
        layers.append(mark.mark_rule(stroke=INK, strokeWidth=1))
        layers.append(
            mark.mark_text(align="right", baseline="bottom", dx=-5, dy=-6, fill=INK).encode(
                text="label", y=alt.value(300)
            )
        )
    chart = alt.layer(*layers).properties(width="container", height=300)
    return Chart(_spec(chart), f"Faithfulness against size, {ablation} ablation", f"The rest {ablation}-ablated")


class _Point:
    def __init__(self, row: Mapping[Any, Any]) -> None:
        self.size_ = row["size"]
        self.faithfulness = row["faithfulness"]
        self.low, self.high = row.get("low"), row.get("high")


def _rows(frame: pd.DataFrame) -> Any:
    return (_Point(r) for r in frame.to_dict("records"))


def pattern(part: str, tokens: Sequence[str], matrix: Sequence[Sequence[float]], role: str = "") -> Chart:
    """Who attends to whom: rows are the reading tokens, columns the tokens read."""
    weights = np.asarray(matrix, dtype=float)  # (query, key)
    shown = [token(t) for t in tokens]
    q, k = np.nonzero(weights > 0)  # what a mask hides stays empty
    table = pd.DataFrame({"from": q, "to": k, "weight": weights[q, k].round(4)})
    table["reads"] = [f"{shown[i]} ({i})" for i in q]
    table["attends to"] = [f"{shown[j]} ({j})" for j in k]
    n = len(shown)
    names = f"{json.dumps(shown)}[datum.value]"
    size = 10 if n <= 24 else 8
    axis: dict[str, Any] = {
        "ticks": False,
        "domain": False,
        "labelFontSize": size,
        "labelExpr": names,
        "labelLimit": 70,
    }
    axis |= {"labelOverlap": n > 48, "labelPadding": 3}
    places = alt.Scale(domain=list(range(n)), paddingInner=0.04)
    shades = alt.Scale(domain=list(np.linspace(0, 1, len(SEQUENTIAL))), range=SEQUENTIAL, clamp=True, interpolate="rgb")
    chart = alt.Chart(table).mark_rect().encode(
        x=alt.X("to:O", scale=places, title=None).axis(labelAngle=-90, orient="bottom", **axis),
        y=alt.Y("from:O", scale=places, title=None).axis(**axis),
        color=alt.Color("weight:Q", scale=shades).legend(None),
        tooltip=["reads", "attends to", alt.Tooltip("weight", format=".2f")],
    )  # fmt: skip
    chart = chart.properties(width="container", height=max(180, min(420, 15 * n)))
    title = f"{part} · {role}" if role else part
    return Chart(_spec(chart), f"Attention pattern of {part}", title, wide=False)


def bars(
    table: pd.DataFrame,
    x: str,
    y: str,
    title: str,
    limits: tuple[float, float] | None = None,
    step: int = 30,
    chance: float | None = None,
) -> Chart:
    """Horizontal bars with intervals: columns `y` (label), `x`, `low`, `high`, `what` (blue or grey).

    `chance`: a dashed line there.
    """
    kinds = list(dict.fromkeys(table["what"]))
    palette = {"control": CONTROL, "before": "#9cc0e4", "after": POSITIVE}
    colors = [palette.get(k, POSITIVE) for k in kinds]
    base = alt.Chart(table).encode(
        y=alt.Y(f"{y}:N", sort=list(table[y]), title=None).axis(ticks=False, domain=False, labelLimit=340),
        tooltip=[y, *[alt.Tooltip(c, format=".3~g") for c in (x, "low", "high")]],
    )
    scale = alt.Scale(domain=list(limits)) if limits else alt.Scale()
    bar = base.mark_bar(height=step // 2).encode(
        x=alt.X(f"{x}:Q", title=None, scale=scale).axis(grid=True, tickCount=6),
        color=alt.Color("what:N", scale=alt.Scale(domain=kinds, range=colors)).legend(None),
    )
    whisker = base.mark_rule(stroke=INK, strokeWidth=1.6).encode(x="low:Q", x2="high:Q")
    layers = [bar, whisker]
    if chance is not None:
        line = alt.Chart(pd.DataFrame({x: [chance]})).encode(x=f"{x}:Q", tooltip=alt.value(f"chance: {chance:.3g}"))
        layers.append(line.mark_rule(stroke=INK, strokeOpacity=0.7, strokeDash=[4, 3]))
        title += f" (dashed: chance, {chance:.3g})"
    chart = alt.layer(*layers).properties(width="container", height=step * len(table))
    return Chart(_spec(chart), title, title)


def scatter(table: pd.DataFrame, x: str, y: str, titles: tuple[str, str], label: str) -> Chart:
    """Points about the diagonal, on equal axes."""
    values = table[[x, y]].to_numpy(float)
    pad = 0.05 * float(np.nanmax(values) - np.nanmin(values) or 1)
    span = [float(np.nanmin(values)) - pad, float(np.nanmax(values)) + pad]
    line = alt.Chart(pd.DataFrame({x: span, y: span})).mark_line(stroke=INK, strokeOpacity=0.5, strokeDash=[3, 3])
    scale = alt.Scale(domain=span, nice=False)
    points = alt.Chart(table).mark_circle(size=60, color=POSITIVE, opacity=0.75).encode(
        x=alt.X(f"{x}:Q", scale=scale, title=titles[0]).axis(grid=True, tickCount=6),
        y=alt.Y(f"{y}:Q", scale=scale, title=titles[1]).axis(grid=True, tickCount=6),
        tooltip=[alt.Tooltip(c) if table[c].dtype == object else alt.Tooltip(c, format=".3~g") for c in (label, x, y)],
    )  # fmt: skip
    chart = alt.layer(line.encode(x=f"{x}:Q", y=f"{y}:Q"), points).properties(width="container", height=330)
    return Chart(_spec(chart), f"{titles[1]} against {titles[0]}")


def shares(table: pd.DataFrame, x: str, y: str, titles: tuple[str, str], label: str) -> Chart:
    """A histogram over shares of anything, on a logarithmic axis in per cent: bins by their middles."""
    decades = [10.0**k for k in range(-7, 1)]
    base = alt.Chart(table).encode(
        x=alt.X(f"{x}:Q", title=titles[0], scale=alt.Scale(type="log", nice=False)).axis(
            grid=False, values=decades, format="~%"
        ),
        y=alt.Y(f"{y}:Q", title=titles[1]).axis(grid=True, tickCount=6),
        tooltip=[alt.Tooltip(x, format=".2~%"), y],
    )
    marks = (base.mark_line(strokeWidth=2, stroke=POSITIVE), base.mark_circle(size=26, color=POSITIVE, opacity=1))
    return Chart(_spec(alt.layer(*marks).properties(width="container", height=260)), label)


def dots(table: pd.DataFrame, x: str, y: str, titles: tuple[str, str], label: str) -> Chart:
    """Points on axes of their own, the name of each shown on hovering."""
    hover = [label, *[alt.Tooltip(c, format=".3~g") for c in (x, y)]]
    points = alt.Chart(table).mark_circle(size=60, color=POSITIVE, opacity=0.75).encode(
        x=alt.X(f"{x}:Q", title=titles[0], scale=alt.Scale(zero=False)).axis(grid=True, tickCount=6),
        y=alt.Y(f"{y}:Q", title=titles[1], scale=alt.Scale(zero=False)).axis(grid=True, tickCount=6),
        tooltip=hover,
    )  # fmt: skip
    return Chart(_spec(points.properties(width="container", height=300)), f"{titles[1]} against {titles[0]}")


def strip(
    table: pd.DataFrame, x: str, y: str, label: str, titles: tuple[str, str], title: str, order: Sequence[str] = ()
) -> Chart:
    """One row of points for each value of `y`, the name of each shown on hovering; 0 is marked."""
    rows = list(order) or list(dict.fromkeys(table[y]))
    data = table.reset_index(drop=True)
    data["spread"] = [(i * 0.618) % 1 for i in range(len(data))]  # evenly, so that near points do not hide each other
    zero = alt.Chart(pd.DataFrame({x: [0]})).mark_rule(stroke=INK, strokeOpacity=0.5).encode(x=f"{x}:Q")
    points = alt.Chart(data).mark_circle(size=42, opacity=0.7, color=POSITIVE).encode(
        x=alt.X(f"{x}:Q", title=titles[0]).axis(grid=True, tickCount=7),
        y=alt.Y(f"{y}:N", sort=rows, title=titles[1] or None).axis(ticks=False, domain=False, labelLimit=200),
        yOffset=alt.YOffset("spread:Q", scale=alt.Scale(domain=[-0.2, 1.2])),
        tooltip=[label, y, alt.Tooltip(x, format=".3~g")],
    )  # fmt: skip
    chart = alt.layer(zero, points).properties(width="container", height=max(60, 44 * len(rows)))
    return Chart(_spec(chart), title, title)


def matrix(table: pd.DataFrame, names: Sequence[str], value: str, title: str, signed: bool) -> Chart:
    """A square of runs by runs, the number written in each cell; cells that cannot be compared stay empty."""
    frame = table.dropna(subset=[value]).copy()
    frame["text"] = [f"{v:.2f}".replace("-", "−") for v in frame[value]]
    strength = frame[value].abs()
    frame["shade"] = np.where(strength >= 0.58, "strong", np.where(strength > 0.12, "middling", "weak"))
    colors = DIVERGING if signed else SEQUENTIAL
    shades = alt.Scale(
        domain=list(np.linspace(-1 if signed else 0, 1, len(colors))), range=colors, clamp=True, interpolate="rgb"
    )
    base = alt.Chart(frame).encode(
        x=alt.X("b:N", sort=list(names), scale=alt.Scale(domain=list(names), paddingInner=0.04), title=None).axis(
            ticks=False, domain=False, labelAngle=-35 if len(names) > 2 else 0, labelLimit=190, labelOverlap=False
        ),
        y=alt.Y("a:N", sort=list(names), scale=alt.Scale(domain=list(names), paddingInner=0.04), title=None).axis(
            ticks=False, domain=False, labelLimit=190
        ),
        tooltip=["a", "b", alt.Tooltip(value, format=".3f")],
    )
    rect = base.mark_rect().encode(color=alt.Color(f"{value}:Q", scale=shades).legend(None))
    inks = {"strong": "#ffffff", "middling": "#1d1f21", "weak": INK}
    words = [
        base.transform_filter(f"datum.shade == '{shade}'").mark_text(fontSize=12, fill=ink).encode(text="text")
        for shade, ink in inks.items()
    ]
    chart = alt.layer(rect, *words).properties(width="container", height=max(110, 46 * len(names)))
    return Chart(_spec(chart), title, title, wide=False)


FEW_PLACES = 6  # whole numbers on an axis that are all written out
NAMED = 6  # grey series that a caption names
LINES = [POSITIVE, NEGATIVE, "#3f8f6b", "#8a5ba8", "#b8860b", "#5b6b7a", "#c04a7a", "#2a8fa8", "#7a7a2a", "#a85b3f"]


def lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    titles: tuple[str, str],
    label: str,
    series: str | None = None,
    grey: Sequence[str] = (),
    log_x: bool = False,
    from_zero: bool = False,
    points: bool = True,
    height: int = 260,
    wide: bool = True,
    captioned: bool = True,
    nested: bool = False,
) -> Chart:
    """Curves over a common axis, one colour a series; those in `grey` stay behind, named in the caption if few.

    `nested`: the first series is the thickest, so that curves which coincide are all seen.
    """
    data = table.dropna(subset=[y]).copy()
    if log_x:  # step 0 stands one place before step 1
        data["shown"] = data[x].astype(float).clip(lower=0.5)
        scale: dict[str, Any] = {"type": "log", "nice": False, "domain": _span(data["shown"])}
        axis: dict[str, Any] = {
            "values": [0.5, *[10**k * d for k in range(7) for d in (1, 3)]],
            "format": "~s",
            "grid": False,
        }
        axis["labelExpr"] = "datum.value == 0.5 ? '0' : datum.label"
    else:
        data["shown"] = data[x].astype(float)
        scale, axis = {"nice": False, "zero": False, "domain": _span(data["shown"])}, {"grid": False, "format": "~s"}
        places = sorted(set(data["shown"]))
        if len(places) <= FEW_PLACES and all(x % 1 == 0 for x in places):
            axis["values"] = places
    hover: list[Any] = [alt.Tooltip(x), alt.Tooltip(y, format=".4~g")]
    base = alt.Chart(data).encode(
        x=alt.X("shown:Q", title=titles[0], scale=alt.Scale(**scale)).axis(**axis),
        y=alt.Y(f"{y}:Q", title=titles[1], scale=alt.Scale(zero=from_zero)).axis(grid=True, tickCount=6),
    )
    if series is None:
        layers = [base.mark_line(strokeWidth=2, stroke=POSITIVE).encode(tooltip=hover)]
        if points:
            layers.append(base.mark_circle(size=26, color=POSITIVE, opacity=1).encode(tooltip=hover))
    else:
        names = list(dict.fromkeys(data[series].astype(str)))
        bold = [n for n in names if n not in set(grey)]
        colors = {n: LINES[i % len(LINES)] for i, n in enumerate(bold)}
        hover.insert(0, alt.Tooltip(series))
        color = alt.Color(
            f"{series}:N", title=None, scale=alt.Scale(domain=bold, range=[colors[n] for n in bold])
        ).legend(orient="top", symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1, labelLimit=260, columns=6)
        front = base.transform_filter(alt.FieldOneOfPredicate(field=series, oneOf=bold)).encode(
            color=color, tooltip=hover
        )
        layers = []
        if len(bold) < len(names):
            if few := len(names) - len(bold) <= NAMED:
                label += f"; grey: {', '.join(n for n in names if n not in bold)}"
            behind = base.transform_filter(
                alt.FieldOneOfPredicate(field=series, oneOf=[n for n in names if n in set(grey)])
            )
            layers.append(
                behind.mark_line(strokeWidth=1, stroke=CONTROL, opacity=0.8 if few else 0.35).encode(
                    detail=f"{series}:N", tooltip=hover
                )
            )
        if nested:
            widths = alt.Scale(domain=bold, range=[5.0, 1.4])
            layers.append(
                front.mark_line().encode(strokeWidth=alt.StrokeWidth(f"{series}:N", scale=widths, legend=None))
            )
        else:
            layers.append(front.mark_line(strokeWidth=2.2))
        if points:
            layers.append(front.mark_circle(size=26, opacity=1))
    chart = alt.layer(*layers).properties(width="container", height=height)
    return Chart(_spec(chart), label, label if captioned else "", wide=wide)


def _span(values: Any) -> list[float]:
    low, high = float(values.min()), float(values.max())
    return [low, high if high > low else low + 1]
