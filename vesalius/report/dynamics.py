"""The report of `vesalius dynamics`: loss, in-context learning and every head over the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, tables
from vesalius.report.page import Chart, Page, Section, record, warnings, write
from vesalius.report.words import number
from vesalius.runs import Run

BOLD = 5  # heads drawn in colour

_LOOKS = {
    "induction": "Attention to what followed the token's first occurrence",
    "previous-token": "Attention to the token before",
    "duplicate-token": "Attention to the token's first occurrence",
}


def dynamics_report(run: Run) -> Path:
    """Draws a dynamics run as one offline HTML file in its folder."""
    summary = tables.summary(run, ["run", "task", "method"])
    numbers = tables.frame(run, "numbers", ["step"])
    heads = tables.frame(run, "heads", ["step", "part"])
    scores = tables.frame(run, "scores_by_step", ["step", "part", "score"])
    task = summary["task"] or "no task"
    page = Page(
        kind="dynamics",
        title=f"{summary['run']} over training",
        subtitle=f"{len(numbers) if numbers is not None else 0} checkpoints · {task} · {summary['method']}",
        lead=str(summary.get("lead", "")),
        warnings=warnings(run),
        sections=[
            _losses(numbers),
            *[_look(heads, look, title) for look, title in _LOOKS.items()],
            _scores(scores, str(summary.get("unit") or "")),
            _task(numbers),
        ],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _melted(numbers: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    kept = {k: v for k, v in names.items() if k in numbers}
    table = numbers[["step", *kept]].rename(columns=kept)
    return table.melt("step", var_name="what", value_name="value").dropna()


def _losses(numbers: pd.DataFrame | None) -> Section:
    title = "Loss and in-context learning"
    if numbers is None:
        return Section(title, missing="no checkpoint was measured.")
    losses = _melted(
        numbers,
        {
            "held_out": "held out",
            "repeat_first": "random tokens, first time",
            "repeat_second": "random tokens, second time",
        },
    )
    blocks: list[Chart] = [
        charts.lines(
            losses, "step", "value", ("step (log scale)", "loss (nats)"), "Loss", "what", log_x=True, wide=False
        )
    ]
    if "in_context" in numbers and numbers["in_context"].notna().any():
        blocks.append(
            charts.lines(
                numbers,
                "step",
                "in_context",
                ("step (log scale)", "late minus early loss (nats)"),
                "In-context-learning score",
                log_x=True,
                wide=False,
            )
        )
    read = (
        "a model that copies from its context does better on random tokens the second time; the in-context-learning "
        "score is loss late in a row of held-out text minus loss early in it, below 0 when context helps."
    )
    return Section(title, blocks, read, layout="pair")


def largest(table: pd.DataFrame, value: str) -> list[str]:
    """The parts with the largest |value| at the last step, then at any step."""
    last = table[table["step"] == table["step"].max()].set_index("part")[value].abs()
    return list(last.sort_values(ascending=False, kind="stable").index[:BOLD])


def _curves(table: pd.DataFrame, value: str, title: str, unit: str) -> Chart:
    bold = largest(table, value)
    order = {p: i for i, p in enumerate(bold)}
    table = table.assign(rank=[order.get(p, len(order)) for p in table["part"]])
    table = table.sort_values(["rank", "part", "step"], kind="stable")[["step", "part", value]]
    grey = sorted(set(table["part"]) - set(bold))
    titles = ("step (log scale)", unit)
    return charts.lines(table, "step", value, titles, title, "part", grey, log_x=True, captioned=False)


def _look(heads: pd.DataFrame | None, look: str, title: str) -> Section:
    if heads is None or look not in heads:
        return Section(title, missing="no head was measured.")
    top = heads[heads["step"] == heads["step"].max()].nlargest(1, look).iloc[0]
    read = (
        f"mean attention of each head on repeated random tokens ({look}); the five largest at the end in colour. "
        f"{top['part']} ends at {number(float(top[look]))}."
    )
    return Section(title, [_curves(heads, look, title, "mean attention")], read)


def _scores(scores: pd.DataFrame | None, unit: str) -> Section:
    title = "What matters for the task"
    if scores is None:
        return Section(title, missing="no task was given.")
    read = (
        "the score of every head and MLP, as `vesalius circuit` measures it; positive when the part helps the metric."
    )
    return Section(title, [_curves(scores, "score", title, f"score ({unit})" if unit else "score")], read)


def _task(numbers: pd.DataFrame | None) -> Section:
    title = "The task"
    if numbers is None or "accuracy" not in numbers:
        return Section(title, missing="no task was given.")
    both: list[Any] = [
        charts.lines(
            _melted(numbers, {"accuracy": "accuracy", "chance": "chance"}),
            "step", "value", ("step (log scale)", "share of prompts"), "Accuracy", "what", log_x=True, wide=False,
        ),
        charts.lines(numbers, "step", "metric", ("step (log scale)", "metric"), "Metric", log_x=True, wide=False),
    ]  # fmt: skip
    return Section(title, both, layout="pair")
