"""Charts of readings of the residual stream: tokens layer by layer, terms of a logit, two influences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from vesalius.report.charts import CONTROL, INK, NEGATIVE, POSITIVE, SEQUENTIAL, _spec
from vesalius.report.page import Chart
from vesalius.report.words import token

PATCH = 74  # pixels of a cell, wide enough for most tokens
LETTERS = 9  # of a token in its cell


def tokens_by_layer(table: pd.DataFrame, value: str, title: str, label: str, limit: float | None = None) -> Chart:
    """Layers upwards by positions, the likeliest token written in each cell.

    Args:
        table: layer, name, position, token (of the prompt), top (the likeliest), and the column `value`, which shades.
        value: column. title: of the shades. label: of the chart. limit: where shades saturate; 1 if None.
    """
    data = table.copy()
    shown = data.drop_duplicates("position").sort_values("position")
    heads = [f"{token(t)}" for t in shown["token"]]
    data["shown"] = [_short(t) for t in data["top"]]
    top = 1.0 if limit is None else limit
    data["shade"] = (data[value] / top).clip(0, 1)
    data["ink"] = np.where(data["shade"] > 0.5, "light", np.where(data["shade"] > 0.12, "dark", "page"))
    names = list(dict.fromkeys(data.sort_values("layer", ascending=False)["name"]))
    places = [int(p) for p in shown["position"]]
    texts = f"({json.dumps(dict(zip(map(str, places), heads, strict=True)))})[datum.value]"
    x = alt.X("position:O", title=None, scale=alt.Scale(domain=places, paddingInner=0.03)).axis(
        orient="bottom", ticks=False, domain=False, labelAngle=-35, labelExpr=texts, labelLimit=110, labelOverlap=False
    )
    y = alt.Y("name:N", sort=names, title="layer", scale=alt.Scale(domain=names, paddingInner=0.05)).axis(
        ticks=False, domain=False, labelOverlap=False, labelFontSize=9
    )
    numbers = [c for c in ("p", "entropy", "kl", "nll") if c in data]
    hover: list[Any] = ["name", "position", "token", "top", *[alt.Tooltip(c, format=".3~g") for c in numbers]]
    base = alt.Chart(data).encode(x=x, y=y, tooltip=hover)
    shades = alt.Scale(
        domain=list(np.linspace(0, top, len(SEQUENTIAL))), range=SEQUENTIAL, clamp=True, interpolate="rgb"
    )
    rect = base.mark_rect().encode(
        color=alt.Color(f"{value}:Q", scale=shades, title=title).legend(orient="top", gradientLength=180)
    )
    inks = {"light": "#ffffff", "dark": "#1d1f21", "page": INK}
    words = [
        base.transform_filter(f"datum.ink == '{k}'").mark_text(fontSize=10, fill=ink).encode(text="shown:N")
        for k, ink in inks.items()
    ]
    width = min(max(PATCH * len(places), min(140 * len(places), 700)), 3000)
    chart = alt.layer(rect, *words).properties(width=width, height=max(80, 18 * len(names)))
    return Chart(_spec(chart), label)


def _short(text: str) -> str:
    shown = token(text)
    return shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…"


def waterfall(table: pd.DataFrame, total: str, unit: str) -> Chart:
    """Terms one after another, each bar from where the one before ended; the last one is the sum.

    Args:
        table: label, value, running (after it), in order. total: label of the sum. unit: of the axis.
    """
    data = table.assign(start=table["running"] - table["value"], end=table["running"])
    data["what"] = np.where(data["value"] >= 0, "adds", "takes away")
    last = float(data["running"].iloc[-1])
    ends = pd.DataFrame([{"label": total, "value": last, "running": last, "start": 0.0, "end": last, "what": "sum"}])
    data = pd.concat([data, ends], ignore_index=True)
    color = alt.Color(
        "what:N", title=None, scale=alt.Scale(domain=["adds", "takes away", "sum"], range=[POSITIVE, NEGATIVE, CONTROL])
    ).legend(orient="top", symbolType="square")
    y = alt.Y("label:N", sort=list(data["label"]), title=None).axis(
        ticks=False, domain=False, labelLimit=220, labelOverlap=False
    )
    hover: list[Any] = ["label", alt.Tooltip("value", format=".4~g")]
    hover.append(alt.Tooltip("running", format=".4~g", title="sum so far"))
    base = alt.Chart(data).encode(y=y, tooltip=hover)
    bar = base.mark_bar(height=11).encode(
        x=alt.X("start:Q", title=f"sum so far ({unit})").axis(grid=True, tickCount=7), x2="end:Q", color=color
    )
    zero = alt.Chart(pd.DataFrame({"start": [0.0]})).mark_rule(stroke=INK, strokeOpacity=0.5).encode(x="start:Q")
    chart = alt.layer(zero, bar).properties(width="container", height=17 * len(data))
    return Chart(_spec(chart), f"How the terms add up to {total}")


def terms(table: pd.DataFrame, unit: str) -> Chart:
    """Signed bars of parts: part, value."""
    data = table.assign(what=np.where(table["value"] >= 0, "for", "against"))
    y = alt.Y("part:N", sort=list(data["part"]), title=None).axis(
        ticks=False, domain=False, labelLimit=220, labelOverlap=False
    )
    color = alt.Color("what:N", scale=alt.Scale(domain=["for", "against"], range=[POSITIVE, NEGATIVE])).legend(None)
    bar = (
        alt.Chart(data)
        .mark_bar(height=11)
        .encode(
            x=alt.X("value:Q", title=unit).axis(grid=True, tickCount=7),
            y=y,
            color=color,
            tooltip=["part", alt.Tooltip("value", format=".4~g")],
        )
    )
    return Chart(_spec(bar.properties(width="container", height=17 * len(data))), "The largest terms", wide=False)


def two_influences(table: pd.DataFrame, titles: Sequence[str]) -> Chart:
    """Points on two logarithmic axes, coloured by kind: kind, direction, lens, model, alignment."""
    data = table[(table["lens"] > 0) & (table["model"] > 0)]
    kinds = list(dict.fromkeys(data["kind"]))
    color = alt.Color("kind:N", title=None, scale=alt.Scale(domain=kinds, range=[POSITIVE, CONTROL][: len(kinds)]))
    hover: list[Any] = ["kind", "direction", *[alt.Tooltip(c, format=".3~g") for c in ("lens", "model", "alignment")]]
    chart = (
        alt.Chart(data)
        .mark_circle(size=70, opacity=0.85)
        .encode(
            x=alt.X("lens:Q", scale=alt.Scale(type="log"), title=titles[0]).axis(grid=True, tickCount=5, format="~g"),
            y=alt.Y("model:Q", scale=alt.Scale(type="log"), title=titles[1]).axis(grid=True, tickCount=5, format="~g"),
            color=color.legend(orient="top", symbolType="circle", symbolOpacity=1, labelLimit=260),
            tooltip=hover,
        )
        .properties(width="container", height=320)
    )
    return Chart(_spec(chart), f"{titles[1]} against {titles[0]}", wide=False)


def histograms(table: pd.DataFrame, value: str, kind: str, title: str) -> Chart:
    """Two distributions over one axis, as steps."""
    kinds = list(dict.fromkeys(table[kind]))
    color = alt.Color(f"{kind}:N", title=None, scale=alt.Scale(domain=kinds, range=[CONTROL, NEGATIVE][: len(kinds)]))
    chart = (
        alt.Chart(table)
        .mark_bar(opacity=0.6)
        .encode(
            x=alt.X(f"{value}:Q", bin=alt.Bin(maxbins=40), title=title),
            y=alt.Y("count():Q", stack=None, title="prompts").axis(grid=True, tickCount=5),
            color=color.legend(orient="top", symbolType="square", symbolOpacity=1),
        )
        .properties(width="container", height=240)
    )
    return Chart(_spec(chart), title, wide=False)
