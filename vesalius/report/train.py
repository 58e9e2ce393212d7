"""The report of `vesalius train`: the curves as far as the run has come, and what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import yaml

from vesalius import checkpoints
from vesalius.report import charts, tables
from vesalius.report.page import Chart, Drawing, Page, Section, Table, record, warnings, write
from vesalius.report.words import number
from vesalius.runs import Run

REFRESH_SECONDS = 20  # of a page that is still being drawn
SHOWN = 400  # points of a curve; more are averaged in groups


def train_report(run: Run) -> Path:
    """Draws a training run, finished or not, as one offline HTML file in its folder."""
    recipe = run.request.get("recipe", {})
    log = tables.frame(run, "log", ["step", "loss", "lr"])
    evaluation = tables.frame(run, "evaluation", ["step", "loss"])
    found: dict[str, Any] = run.json("summary") if run.has("summary.json") else {}
    ledger = found.get("ledger") or {}
    steps = int(recipe.get("steps", 0))
    done = 0 if log is None else int(log["step"].max()) + 1
    page = Page(
        kind="train",
        title=str(recipe.get("name", run.name)),
        subtitle=_subtitle(recipe),
        lead=_lead(log, evaluation, done, steps),
        facts=_facts(found, ledger, log, evaluation),
        warnings=warnings(run),
        sections=[
            _loss(log, evaluation),
            _rate(log),
            *_norms(run, log, found),
            _kept(run),
        ],
        record=_record(run, found),
        notes=[str(n) for n in found.get("notes") or []],
        refresh=REFRESH_SECONDS if run.state == "running" else 0,
    )
    return write(run, page)


def _record(run: Run, found: dict[str, Any]) -> list[tuple[str, str]]:
    """As everywhere, with the recipe as it was written: what is as it is by default left out."""
    short = run.bytes("recipe.yaml").decode() if run.has("recipe.yaml") else ""
    flat = json.dumps(yaml.safe_load(short), ensure_ascii=False) if short else ""
    return [(k, flat if k == "recipe" and flat else v) for k, v in record(run, found)]


def _subtitle(recipe: dict[str, Any]) -> str:
    model, data = recipe.get("model", {}), recipe.get("data", {})
    name = model.get("preset") or model.get("source") or "a model of parts"
    corpus = data.get("synthetic") or data.get("corpus")
    text = corpus if isinstance(corpus, str) else ", ".join(corpus or [])
    optimizer = recipe.get("optimizer", {})
    return f"{name} · {text} · {recipe.get('objective', {}).get('name')} · {optimizer.get('name')}"


def _lead(log: pd.DataFrame | None, evaluation: pd.DataFrame | None, done: int, steps: int) -> str:
    if log is None:
        return "No step was made yet."
    loss = float(log["loss"].tail(20).mean())
    text = f"After {done:,} of {steps:,} steps the training loss is {number(loss)} nats a token"
    if evaluation is not None:
        last = evaluation.iloc[-1]
        text += f", and {number(float(last['loss']))} on held-out text (step {int(last['step']):,})"
        if "bits_per_byte" in evaluation and pd.notna(last["bits_per_byte"]):
            text += f", {number(float(last['bits_per_byte']))} bits a byte"
    return text + "."


def _facts(
    found: dict[str, Any], ledger: dict[str, Any], log: pd.DataFrame | None, evaluation: pd.DataFrame | None
) -> list[tuple[str, str, str]]:
    facts: list[tuple[str, str, str]] = []
    if found.get("parameters"):
        facts.append(("parameters", f"{found['parameters'] / 1e6:.2f} M", f"{found['trained'] / 1e6:.2f} M trained"))
    if log is not None:
        tokens = int(log["tokens"].sum())
        facts.append(("tokens", f"{tokens / 1e6:.2f} M", f"{int(log['tokens'].iloc[-1]):,} a step"))
        speed = float((log["tokens"] / log["seconds"]).iloc[-200:].median())
        facts.append(("tokens a second", f"{speed:,.0f}", f"{log['seconds'].sum() / 60:.1f} minutes of steps"))
    if ledger.get("flops"):
        ratio = found["flops_6nt"] / ledger["flops"] if found.get("flops_6nt") else None
        small = f"6 N T is {ratio:.2f} of it" if ratio else ""
        facts.append(("floating-point operations", f"{ledger['flops']:.2e}", small))
    if ledger.get("peak_memory_bytes"):
        small = f"optimizer {found.get('optimizer_bytes', 0) / 2**20:.0f} MiB"
        facts.append(("peak memory", f"{ledger['peak_memory_bytes'] / 2**20:.0f} MiB", small))
    return facts


def thinned(log: pd.DataFrame, column: str) -> pd.DataFrame:
    """A long curve as the means of equal groups of steps, at the last step of each."""
    group = np.arange(len(log)) // max(1, -(-len(log) // SHOWN))
    return log.groupby(group).agg({"step": "last", column: "mean"})


def _loss(log: pd.DataFrame | None, evaluation: pd.DataFrame | None) -> Section:
    if log is None:
        return Section("Loss", missing="no step was made yet.")
    pieces = [thinned(log, "loss").assign(what="training")]
    if evaluation is not None:
        pieces.append(evaluation[["step", "loss"]].assign(what="held out"))
    table = pd.concat(pieces, ignore_index=True)
    both = [
        charts.lines(table, "step", "loss", ("step", "loss (nats a target)"), "Loss by step", "what", points=False),
        charts.lines(
            table,
            "step",
            "loss",
            ("step (log scale)", "loss (nats a target)"),
            "Loss, steps on a log scale",
            "what",
            log_x=True,
            points=False,
        ),
    ]
    grouped = -(-len(log) // SHOWN)
    read = "the mean over targets, in nats." + (
        f" Training loss is averaged over {grouped} steps." if grouped > 1 else ""
    )
    return Section("Loss", both, read, layout="pair")


def _rate(log: pd.DataFrame | None) -> Section:
    if log is None:
        return Section("Learning rate and gradient", missing="no step was made yet.")
    plots = [
        charts.lines(thinned(log, c), "step", c, ("step", title), label, points=False, from_zero=True, height=200)
        for c, title, label in (
            ("lr", "learning rate", "Learning rate"),
            ("grad_norm", "gradient norm before clipping", "Gradient norm"),
        )
    ]
    return Section("Learning rate and gradient", plots, layout="pair")


def _norms(run: Run, log: pd.DataFrame | None, found: dict[str, Any]) -> list[Section]:
    """The loss around the steps at which norms went, and the constants they went for."""
    norms = tables.frame(run, "norms", ["norm", "step", "size"])
    if norms is None or log is None:
        return []
    kinds = {"MLP": "before an MLP", "attn": "before attention"}
    steps = norms.assign(what=norms["norm"].str.rpartition(".")[2].map(kinds).fillna("the last one"))
    later = steps.dropna(subset=["step_values"]).assign(what="before values")
    moves = pd.concat([steps, later.assign(step=later["step_values"].astype(float))], ignore_index=True)
    near = log[log["step"] <= 2 * float(moves["step"].max())]
    x = alt.X("step:Q", title="step", scale=alt.Scale(nice=False)).axis(grid=False)
    domain = [*kinds.values(), "before values", "the last one"]
    rules = alt.Chart(moves[["step", "what", "norm"]]).mark_rule(strokeWidth=1.5, opacity=0.7).encode(
        x=x,
        color=alt.Color("what:N", scale=alt.Scale(domain=domain, range=charts.LINES[1:5])).legend(
            orient="top", title=None, symbolType="stroke"
        ),
        tooltip=["norm", "what", "step"],
    )  # fmt: skip
    curve = alt.Chart(near[["step", "loss"]]).mark_line(stroke=charts.POSITIVE, strokeWidth=1.4).encode(
        x=x, y=alt.Y("loss:Q", title="training loss (nats)", scale=alt.Scale(zero=False)).axis(tickCount=6)
    )  # fmt: skip
    chart = alt.layer(rules, curve).properties(width="container", height=240)
    told = found.get("norms") or {}
    read = "each line is a norm that became a constant."
    if told.get("ordinary_checkpoint"):
        read += (
            " The last checkpoint holds the constants and opens in transformers; opened anew, its logits differ by at "
            f"most {number(float(told['largest_difference']))}."
        )
    elif told:
        read += " Other norms stayed: the constants lie beside the weights (norms.json), where Vesalius reads them."
    names = {
        "size": "constant",
        "size_first": "first position",
        "size_separator": "separators",
        "step_values": "values",
    }
    shown = norms.drop(columns=["name", "low", "high"], errors="ignore").rename(columns=names)
    blocks: list[Chart | Drawing | Table] = [
        Chart(charts._spec(chart), "Loss while norms go", ""),
        tables.frame_table(shown, shown=12),
    ]
    return [Section("Norms taken out", blocks, read)]


def _kept(run: Run) -> Section:
    steps = checkpoints.steps_in(run.folder / checkpoints.FOLDER)
    if not steps:
        return Section("Checkpoints", missing="none was saved yet.")
    rows = [[s, f"{run.name}@step{s}"] for s in steps]
    read = "any of them opens on the bench: `vesalius circuit --model RUN@step512`, or as an ordinary model folder."
    return Section("Checkpoints", [Table.of(["step", "opens as"], rows, shown=12)], read)
