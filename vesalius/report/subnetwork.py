"""The report of `vesalius subnetwork`.

It reads `summary.json` (`model` *, `corpus` *, `lead` *, `kept`, `weights`, `share`, `steps`, `seconds`, `notes`,
`command`), `log.parquet` (`step` *, `loss` *, `size`, `divergence`?), `variants.parquet` (`variant` *, `kept`, `r`,
`kl`, `nll`), `density.parquet` (`part` *, `layer` *, `kind` *, `matrix`, `weights`, `kept`, `density`) and
`turn.parquet` (`variant` *, `place` *, `order` *, `this_token`, `next_token`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from vesalius.features.subnetwork_measures import means
from vesalius.report import charts, tables
from vesalius.report.page import Chart, Page, Section, Table, record, warnings, write
from vesalius.report.train import thinned
from vesalius.runs import Run

ORDER = ("subnetwork", "random", "no matrices", "model", "without it", "without random")
MEANS = {
    "subnetwork": "the kept weights alone",
    "random": "as many random weights of each matrix alone",
    "no matrices": "attention and MLPs empty",
    "model": "the whole model",
    "without it": "the model without the kept weights",
    "without random": "the model without as many random ones",
}


def subnetwork_report(run: Run) -> Path:
    """Draws a run of `vesalius subnetwork` as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "corpus", "lead"])
    log = tables.frame(run, "log", ["step", "loss"])
    found = tables.frame(run, "variants", ["variant", "r", "kl", "nll", "kept"])
    density = tables.frame(run, "density", ["part", "layer", "kind", "weights", "kept"])
    turned = tables.frame(run, "turn", ["variant", "place", "order"])
    page = Page(
        kind="subnetwork",
        title=f"A subnetwork of {summary['model']}",
        subtitle=f"{summary['corpus']} · {summary.get('target', 'bigram')} · {summary.get('steps', 0):,} steps",
        lead=str(summary["lead"]),
        facts=_facts(summary, found),
        warnings=warnings(run),
        sections=[_variants(found), _density(density), _turn(turned), _log(log)],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(summary: dict[str, Any], found: pd.DataFrame | None) -> list[tuple[str, str, str]]:
    facts = [("weights kept", f"{summary['share']:.1%}", f"{summary['kept']:,} of {summary['weights']:,}")]
    if found is not None:
        told = means(found)
        facts.append(("correlation with the table", f"{told['subnetwork']['r']:.2f}", "of surprisals, held out"))
        cost = {k: told[k]["nll"] - told["model"]["nll"] for k in ("without it", "without random")}
        small = f"random: {cost['without random']:+.2f}"
        facts.append(("the model without them", f"{cost['without it']:+.2f} nats", small))
    facts.append(("trained for", f"{summary['seconds'] / 60:.1f} min", f"{summary['pairs']:,} pairs in the table"))
    return facts


def _variants(found: pd.DataFrame | None) -> Section:
    title = "What the weights do, alone and taken out"
    if found is None:
        return Section(title, missing="held-out text was not read.")
    told, rows = means(found), []
    for name in (n for n in ORDER if n in told):
        mine = found[found["variant"] == name]
        low, high = float(mine["nll"].min()), float(mine["nll"].max())
        between = "" if high - low < 1e-9 else f"{low:.3f} to {high:.3f}"
        numbers = [told[name][k] for k in ("r", "kl", "nll")]
        rows.append([name, MEANS[name], int(mine["kept"].iloc[0]), *numbers, between])
    heads = ["variant", "what it is", "weights", "r", "KL from the table", "nats a token", "over controls"]
    read = (
        "the correlation r is that of surprisals with the bigram table's over held-out tokens, KL the mean divergence "
        "of the table's row from what the variant says. The subnetwork is sufficient for bigrams if r is near 1 where "
        "that of random weights is not, and necessary if the model loses more without it than without random weights."
    )
    return Section(title, [Table.of(heads, rows)], read)


def _density(density: pd.DataFrame | None) -> Section:
    title = "Where the weights are"
    if density is None:
        return Section(title, missing="no mask was kept.")
    grouped = density.groupby(["part", "layer", "kind"], sort=False)[["weights", "kept"]].sum().reset_index()
    grouped["density"] = grouped["kept"] / grouped["weights"]
    names = {"attn": "attention", "mlp": "MLP"}
    data = grouped.assign(what=grouped["kind"].map(names), block=[f"L{n}" for n in grouped["layer"]])
    order = list(dict.fromkeys(data["block"]))
    chart = (
        alt.Chart(data)
        .mark_bar()
        .encode(
            x=alt.X("block:N", sort=order, title=None).axis(labelAngle=0, ticks=False),
            xOffset=alt.XOffset("what:N", sort=list(names.values())),
            y=alt.Y("density:Q", title="share of weights kept").axis(format="%", tickCount=5),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=list(names.values()), range=[charts.NEGATIVE, charts.POSITIVE]),
            ).legend(orient="top", title=None),
            tooltip=["part", alt.Tooltip("density:Q", format=".2%"), "kept", "weights"],
        )
        .properties(width="container", height=220)
    )
    columns = [c for c in ("part", "matrix", "weights", "kept", "density") if c in density]
    table = tables.frame_table(density.sort_values("density", ascending=False), columns, shown=8)
    read = "the share of each block's weights that the subnetwork keeps; below, matrix by matrix."
    return Section(title, [Chart(charts._spec(chart), "Density by block", ""), table], read)


def _turn(turned: pd.DataFrame | None) -> Section:
    title = "Where states turn from this token to the next"
    if turned is None:
        return Section(title, missing="states were not read.")
    names = {"this_token": "alike the token just read", "next_token": "alike the last state"}
    long = turned.melt(["variant", "place", "order"], list(names), var_name="of", value_name="alike")
    long["of"] = long["of"].map(names)
    places = turned.sort_values("order")["place"].drop_duplicates().tolist()
    plots = []
    for variant in ("subnetwork", "model"):
        base = alt.Chart(long[long["variant"] == variant]).encode(
            x=alt.X("place:N", sort=places, title=None).axis(labelAngle=-60, ticks=False, labelOverlap=True),
            y=alt.Y("alike:Q", title="linear CKA", scale=alt.Scale(domain=[0, 1])).axis(tickCount=5),
            color=alt.Color(
                "of:N", scale=alt.Scale(domain=list(names.values()), range=[charts.NEGATIVE, charts.POSITIVE])
            ).legend(orient="top", title=None),
            tooltip=["place", "of", alt.Tooltip("alike:Q", format=".3f")],
        )
        chart = alt.layer(base.mark_line(strokeWidth=2), base.mark_circle(size=28, opacity=1))
        label = "The subnetwork" if variant == "subnetwork" else "The whole model"
        plots.append(Chart(charts._spec(chart.properties(width="container", height=220)), label, label))
    read = "where the falling line crosses the rising one, a state stops saying which token was read and says the next."
    return Section(title, plots, read, layout="pair")


def _log(log: pd.DataFrame | None) -> Section:
    if log is None:
        return Section("Learning", missing="no step was made.")
    pairs = [("loss", "loss (nats)"), ("size", "mean mask")]
    pairs += [("divergence", "KL from the table (nats)")] if "divergence" in log else []
    plots = [
        charts.lines(thinned(log, c), "step", c, ("step", title), title, points=False, from_zero=True, height=200)
        for c, title in pairs
    ]
    return Section("Learning", plots, layout="grid")
