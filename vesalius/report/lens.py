"""Reports of `vesalius lens`: what a lens reads, what the parts write, how a lens was trained and what it is good for.

What is read of a run, beside `summary.json` (with `model`, `lead`, `notes`, `command`):

- `lens-logit`, `lens-tuned`: `trajectory.parquet` (`Trajectory.to_frame`); `plain.parquet`, the same by the logit lens,
  beside a tuned one; `likeliest.json`. Summary: `prompt`, `lens`, `position`, `tokens`.
- `lens-direct`: `terms.parquet` (`Attribution.to_frame`), `by_layer.parquet`. Summary: `prompt`, `answer`, `against`,
  `logit`, `total`, `unit`.
- `lens-train`: `quality.parquet` (`vesalius.lens.quality.judge`), `log.parquet`. Summary: `corpus`, `spent`.
- `lens-basis`: `directions.parquet` (kind, direction, lens, model, alignment). Summary: `layer`, `agreement`.
- `lens-anomaly`: `prompts.parquet` (prompt, kind, score, entropy, perplexity). Summary: `auroc`, `detector`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, readings, tables
from vesalius.report.page import Page, Section, Table, record, warnings, write
from vesalius.report.words import number, token
from vesalius.runs import Run

AXIS = "layer"  # from L0 on: what an embedding foretells is too far off for one scale with the rest
WIDEST = 40  # positions in one map; the last ones of a longer prompt


def lens_report(run: Run) -> Path:
    """Draws a run of any `vesalius lens` command as one offline HTML file in its folder."""
    command = str(run.request["command"])
    needed = {"lens-direct": ["answer"], "lens-anomaly": ["auroc"], "lens-basis": ["layer"]}.get(command, [])
    summary = tables.summary(run, ["model", "lead", *needed])
    draw = {
        "lens-direct": _direct,
        "lens-train": _train,
        "lens-basis": _basis,
        "lens-anomaly": _anomaly,
    }.get(command, _trajectory)
    title, subtitle, sections = draw(run, summary)
    page = Page(
        kind=command.replace("-", " "),
        title=title,
        subtitle=subtitle,
        lead=str(summary.get("lead") or ""),
        warnings=warnings(run),
        sections=sections,
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


Drawn = tuple[str, str, list[Section]]


# -- a prompt


def _trajectory(run: Run, summary: dict[str, Any]) -> Drawn:
    found = tables.frame(run, "trajectory", ["layer", "name", "position", "token", "top", "p", "entropy", "kl"])
    lens = str(summary.get("lens", ""))
    title = f"What the {lens} lens reads"
    subtitle = f"{summary['model']} · “{summary.get('prompt', '')}”"
    if found is None:
        return title, subtitle, [Section("The trajectory", missing="the prompt was not read.")]
    places = sorted(found["position"].unique())[-WIDEST:]
    shown = found[found["position"].isin(places)]
    read = (
        "each cell holds the token that is likeliest at that layer, shaded by its probability; the top row is the "
        "model itself. Tokens are written without their leading space."
    )
    if lens != "logit":
        read += " The first position is not trained on (models park attention there): its column says nothing."
    sections = [
        Section("Likeliest tokens", [readings.tokens_by_layer(shown, "p", "probability", "Likeliest token")], read)
    ]
    said = shown if lens == "logit" or len(places) == 1 else shown[shown["position"] > 0]
    limit = min(float((said if len(said) else shown)["kl"].quantile(0.9)), 20.0) or 1.0
    far = readings.tokens_by_layer(shown, "kl", "KL to the end (nats)", "Distance from the final prediction", limit)
    sections.append(
        Section(
            "Distance from the final prediction",
            [far],
            f"KL from the final distribution to the lens's, in nats; the darkest cells have {number(limit)} or more.",
        )
    )
    place = int(summary.get("position", places[-1]))
    sections.append(_at(run, found, place, [str(t) for t in summary.get("tokens") or []]))
    if run.has("plain.parquet"):
        sections.append(_two(found, run.table("plain"), lens))
    return title, subtitle, sections


def _at(run: Run, found: pd.DataFrame, place: int, chosen: list[str]) -> Section:
    """One position: tokens asked about, entropy, and the likeliest tokens of each layer."""
    here = found[found["position"] == place]
    told = token(str(here["token"].iloc[0]))
    blocks: list[Any] = []
    axes = (AXIS, "probability")
    here = here[here["layer"] >= 0]
    kept = {f"p {t}": f"“{token(t)}”" for t in chosen if f"p {t}" in here}
    if kept:
        table = here[["layer", *kept]].rename(columns=kept).melt("layer", var_name="token", value_name="p")
        blocks.append(
            charts.lines(table, "layer", "p", axes, "Tokens asked about", "token", from_zero=True, wide=False)
        )
    nats = here[["layer", "entropy", "kl"]].rename(columns={"kl": "KL to the end"})
    nats = nats.melt("layer", var_name="what", value_name="nats")
    blocks.append(
        charts.lines(
            nats, "layer", "nats", (axes[0], "nats"), "Entropy and distance", "what", from_zero=True, wide=False
        )
    )
    if run.has("likeliest.json"):
        rows = [[r["name"], ", ".join(f"{t!r} {p:.3f}" for t, p in r["top"])] for r in reversed(run.json("likeliest"))]
        blocks.append(Table.of(["layer", "likeliest tokens"], rows, shown=40))
    return Section(f"After “{told}” (position {place})", blocks, layout="pair")


def _two(found: pd.DataFrame, plain: pd.DataFrame, lens: str) -> Section:
    means = [
        t[t["layer"] >= 0].groupby("layer", as_index=False)["kl"].mean().assign(lens=name)
        for name, t in ((lens, found), ("logit", plain))
    ]
    curve = charts.lines(
        pd.concat(means), "layer", "kl", (AXIS, "mean KL to the end (nats)"),
        f"{lens} and logit lens on this prompt", "lens", from_zero=True,
    )  # fmt: skip
    return Section("Beside the logit lens", [curve], "mean over the prompt's positions; lower is nearer to the model.")


# -- its parts


def _direct(run: Run, summary: dict[str, Any]) -> Drawn:
    found = tables.frame(run, "terms", ["part", "value", "running"])
    answer, against = summary["answer"], summary.get("against")
    what = f"“{token(answer)}”" + (f" over “{token(against)}”" if against is not None else "")
    title, subtitle = f"Who writes {what}", f"{summary['model']} · “{summary.get('prompt', '')}”"
    if found is None:
        return title, subtitle, [Section("Terms", missing="nothing was attributed.")]
    layers = run.table("by_layer")
    layers["label"] = [
        w if pd.isna(n) else f"L{int(n)} {w}" for n, w in zip(layers["layer"], layers["what"], strict=True)
    ]
    steps = pd.DataFrame(layers.groupby("label", sort=False)["value"].sum()).reset_index()
    steps["running"] = steps["value"].cumsum()
    order = found["value"].abs().sort_values(ascending=False, kind="stable").index
    total = f"logit of {what}" if against is None else f"logit difference {what}"
    read = (
        f"each part's own write, through the final norm at its actual scale. They sum to {number(summary['total'])}; "
        f"the model says {number(summary['logit'])}."
    )
    return title, subtitle, [
        Section("From the embedding to the answer", [readings.waterfall(steps, total, "logits")], read),
        Section("The largest terms", [
            readings.terms(found.loc[order[:24], ["part", "value"]], "logits"),
            tables.frame_table(found.loc[order, ["part", "kind", "value"]], shown=24),
        ], layout="pair"),
    ]  # fmt: skip


# -- a trained lens


def _train(run: Run, summary: dict[str, Any]) -> Drawn:
    quality = tables.frame(run, "quality", ["lens", "layer", "kl", "perplexity", "bias", "agree"])
    log = tables.frame(run, "log", ["step", "kl"])
    title = f"A tuned lens of {summary['model']}"
    sections: list[Section] = []
    if quality is None:
        sections.append(Section("On held-out text", missing="the lens was not judged."))
    else:
        inner = quality[quality["layer"] >= 0]
        pairs = [
            ("kl", "mean KL to the final distribution (nats)", "Distance", False),
            ("bias", "KL of the means (nats)", "Bias", False),
            ("nll", "surprisal of the next token (nats)", "Surprisal", False),
            ("agree", "share with the final token on top", "Agreement", True),
        ]
        blocks: list[Any] = [
            charts.lines(inner, "layer", c, (AXIS, t), name, "lens", from_zero=True, wide=False)
            for c, t, name, _ in pairs
        ]
        blocks.append(
            tables.frame_table(quality[["lens", "name", "kl", "low", "high", "perplexity", "bias", "agree"]], shown=70)
        )
        states = int(quality["n"].iloc[0]) if "n" in quality else 0
        read = (
            f"{states:,} held-out states. Distance is the mean divergence, with a 95 % interval in the table; bias is "
            "what is left of it when both distributions are averaged over states first."
        )
        sections.append(Section("On held-out text", blocks, read, layout="pair"))
    if log is None:
        sections.append(Section("Training", missing="no gradient steps were made."))
    else:
        names = [c for c in map(str, log.columns) if c == "embed" or (c.startswith("L") and c[1:].isdigit())]
        few = [names[i] for i in sorted({round(j * (len(names) - 1) / 4) for j in range(5)})] if names else []
        table = log[["step", *few]].melt("step", var_name="layer", value_name="kl")
        table["kl"] = table.groupby("layer")["kl"].transform(lambda x: x.rolling(max(1, len(x) // 25), 1).mean())
        curve = charts.lines(
            table, "step", "kl", ("step", "KL (nats, smoothed)"), "Training by layer", "layer", points=False
        )
        sections.append(Section("Training", [curve], "five of the layers, from the embedding to the last but one."))
    return title, f"{summary.get('corpus', '')}", sections


def _basis(run: Run, summary: dict[str, Any]) -> Drawn:
    found = tables.frame(run, "directions", ["kind", "direction", "lens", "model", "alignment"])
    title = f"What {summary['layer']} of {summary['model']} depends on"
    subtitle = f"{summary.get('lens', '')} lens · {summary.get('ablation', '')} ablation"
    if found is None:
        return title, subtitle, [Section("Directions", missing="no directions were extracted.")]
    both = readings.two_influences(found, ("influence in the lens (nats)", "influence in the model (nats)"))
    table = tables.frame_table(found[["kind", "direction", "lens", "model", "alignment"]], shown=40)
    read = (
        "mean KL when the direction is ablated at this layer, in the lens and in the model's own forward pass; "
        "alignment is the cosine of the two changes of log probabilities."
    )
    return title, subtitle, [Section("Two influences", [both, table], read, layout="pair")]


def _anomaly(run: Run, summary: dict[str, Any]) -> Drawn:
    found = tables.frame(run, "prompts", ["prompt", "kind", "score"])
    title = f"Odd prompts to {summary['model']}"
    subtitle = f"{summary.get('lens', '')} lens · {summary.get('detector', '')}"
    if found is None:
        return title, subtitle, [Section("Prompts", missing="no prompts were judged.")]
    rows = [
        {"how": name, "auroc": e["auroc"], "low": e["low"], "high": e["high"],
         "what": "after" if name == "trajectory" else "control"}
        for name, e in summary["auroc"].items()
    ]  # fmt: skip
    named = {"trajectory": f"{summary.get('lens', '')}-lens trajectory", "logit": "logit-lens trajectory"}
    named |= {"entropy": "final entropy", "perplexity": "prompt's perplexity"}
    bars = pd.DataFrame(rows).assign(how=lambda t: t["how"].map(named).fillna(t["how"]))
    order = found["score"].sort_values(ascending=False, kind="stable").index
    shown = found.loc[order, [c for c in ("prompt", "kind", "score", "entropy", "perplexity") if c in found]]
    return title, subtitle, [
        Section("How well test prompts are told from normal ones", [
            charts.bars(bars, "auroc", "how", "Area under the ROC curve", (0.4, 1.0)),
            readings.histograms(found, "score", "kind", "anomaly score"),
        ], "0.5 is chance. Final entropy and the prompt's perplexity need no lens, and are taken in whichever "
            "direction "
            "tells more.",
            layout="pair"),
        Section("Prompts, the oddest first", [tables.frame_table(shown, shown=20)]),
    ]  # fmt: skip
