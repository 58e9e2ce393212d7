"""Maps of all heads, layers upwards: one coloured by role, small ones shaded by score; and one head's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from vesalius.report.charts import CONTROL, INK, LINES, NEUTRAL, POSITIVE, SEQUENTIAL, _spec
from vesalius.report.page import Chart

NONE = "none"


def _axes(table: pd.DataFrame, labelled: bool) -> tuple[alt.X, alt.Y]:
    columns = list(range(int(table["index"].max()) + 1))
    layers = list(range(int(table["layer"].max()), -1, -1))
    gap = 0.06 if labelled else 0.04
    x = alt.X("index:O", scale=alt.Scale(domain=columns, paddingInner=gap), title="head" if labelled else None)
    y = alt.Y("layer:O", scale=alt.Scale(domain=layers, paddingInner=gap), title="layer" if labelled else None)
    size = 11 if labelled else 9
    x = x.axis(ticks=False, domain=False, labelAngle=0, labelOverlap="parity", labelFontSize=size)
    y = y.axis(ticks=False, domain=False, labelOverlap="parity", labelFontSize=size)
    return x, y


def roles(table: pd.DataFrame, order: Sequence[str], caption: str) -> Chart:
    """Every head coloured by its leading role, stronger where it exceeds its null by more.

    Args:
        table: part, layer, index, role ("" for none), score, excess. order: all roles, for their colours.
    """
    data = table.assign(role=table["role"].replace("", NONE), strength=table["excess"].fillna(1.0))
    present = [r for r in order if (data["role"] == r).any()]
    colors = [LINES[list(order).index(r) % len(LINES)] for r in present]
    x, y = _axes(data, True)
    color = alt.Color("role:N", title=None, scale=alt.Scale(domain=[*present, NONE], range=[*colors, NEUTRAL])).legend(
        orient="top", columns=5, symbolType="square", symbolOpacity=1, labelLimit=160, values=present
    )
    opacity = alt.Opacity("strength:Q", scale=alt.Scale(domain=[0, 0.6], range=[0.35, 1], clamp=True)).legend(None)
    hover = ["part", "role", *[alt.Tooltip(c, format=".3~g") for c in ("score", "excess")]]
    chart = alt.Chart(data).mark_rect().encode(x=x, y=y, color=color, opacity=opacity, tooltip=hover)
    layers = int(data["layer"].max()) + 1
    chart = chart.properties(width="container", height=max(120, min(20, max(11, 560 // layers)) * layers))
    return Chart(_spec(chart), f"Leading roles of {len(data)} heads", caption)


def small(table: pd.DataFrame, title: str) -> Chart:
    """Every head shaded by one detector's score from 0 to 1; heads it finds are outlined.

    Args:
        table: part, layer, index, score, null_high, q, found.
    """
    x, y = _axes(table, False)
    shades = alt.Scale(domain=list(np.linspace(0, 1, len(SEQUENTIAL))), range=SEQUENTIAL, clamp=True, interpolate="rgb")
    hover: list[Any] = ["part", *[alt.Tooltip(c, format=".3~g") for c in ("score", "null_high", "q")]]
    base = alt.Chart(table).encode(x=x, y=y, tooltip=hover)
    outline = base.transform_filter("datum.found").mark_rect(fillOpacity=0, stroke=INK, strokeWidth=1.2)
    layers = int(table["layer"].max()) + 1
    chart = alt.layer(base.mark_rect().encode(color=alt.Color("score:Q", scale=shades).legend(None)), outline)
    chart = chart.properties(width="container", height=max(90, min(22, max(7, 260 // layers)) * layers))
    return Chart(_spec(chart), f"Scores by {title}", title, wide=False)


def against_null(table: pd.DataFrame, title: str) -> Chart:
    """One head's score by each detector, and the stretch that chance reaches (to its 95 % point).

    Args:
        table: detector, score, null, null_high, q.
    """
    data = table.assign(
        what=np.where(table["q"] < 0.05, "more than chance (q < 0.05)", "not more than chance"), zero=0.0
    )
    y = alt.Y("detector:N", sort=list(data["detector"]), title=None).axis(ticks=False, domain=False, labelLimit=200)
    hover: list[Any] = ["detector", *[alt.Tooltip(c, format=".3~g") for c in ("score", "null", "null_high", "q")]]
    base = alt.Chart(data).encode(y=y, tooltip=hover)
    span = base.mark_bar(height=9, color=CONTROL, opacity=0.35).encode(x=alt.X("zero:Q"), x2="null_high:Q")
    names = ["more than chance (q < 0.05)", "not more than chance"]
    color = alt.Color("what:N", title=None, scale=alt.Scale(domain=names, range=[POSITIVE, CONTROL])).legend(
        orient="top", labelLimit=300
    )
    dots = base.mark_circle(size=70, opacity=1).encode(
        x=alt.X("score:Q", title="score; grey: what chance reaches").axis(grid=True, tickCount=6), color=color
    )
    chart = alt.layer(span, dots).properties(width="container", height=21 * len(data))
    return Chart(_spec(chart), title, title, wide=False)
