"""The report of `vesalius trace`.

It reads `summary.json` (`Trace.summary`, with `model`, `lead`, `notes`, `command`), `steps`, `layers`, `attention`,
`mixing`, `vectors` and `prompts` (tables), and the scores `heads`, `terms`, `last`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vesalius.report import charts, readings, tables
from vesalius.report.page import Cell, Page, Section, Table, cell, record, warnings, write
from vesalius.report.words import count, number, percent, token
from vesalius.runs import Run


def trace_report(run: Run) -> Path:
    """Draws a run of `vesalius trace` as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "prompt", "topic", "answer", "lead", "last"])
    page = Page(
        kind="trace",
        title=f"Where {summary['model']} recalls a fact",
        subtitle=f"“{summary['prompt']}” → “{summary['answer']}” · {summary['relation']}",
        lead=str(summary["lead"]),
        facts=_facts(summary),
        warnings=warnings(run),
        sections=[_steps(run), _terms(run, summary), _heads(run, summary), _mixing(run, summary), _vectors(run),
                  _last(run, summary), _prompts(run, summary)],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )  # fmt: skip
    return write(run, page)


def _facts(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        ("the model says", f"“{token(summary['said'])}”", f"with {number(summary['p_said'])}"),
        ("right answer", number(summary["p_right"]), f"rank {summary['rank']}"),
        ("topic", percent(summary["moved"]["strength"]), "as strong at the end as usual"),
        ("answer written by", str(summary["written_by"]), f"of {count(summary['prompts'], 'prompt')}: "
         + (", ".join(summary["writers"]) or "no MLP")),
    ]  # fmt: skip


def _steps(run: Run) -> Section:
    found = tables.frame(run, "steps", ["step", "holds", "what"])
    if found is None:
        return Section("The steps", missing="the prompt was not read.")
    rows = [
        [Cell(r["step"], r["step"], ""), _yes(bool(r["holds"])),
         Cell(r["what"], r["what"], "")]
        for r in found.to_dict("records")
    ]  # fmt: skip
    layers = tables.frame(run, "layers", ["layer", "lead", "place", "first"])
    blocks: list[Any] = [Table(["step", "holds", "what was seen"], rows)]
    if layers is not None:
        blocks.append(
            charts.lines(
                layers, "layer", "lead", ("layer", "lead (logits)"), "If the model ended after each block", height=200
            )
        )
    return Section(
        "The steps", blocks,
        "The lead is the logit of the right answer over the mean of the relation's other answers, read by the model's "
        "own ending after each block.",
    )  # fmt: skip


def _yes(holds: bool) -> Cell:
    return Cell("yes" if holds else "no", int(holds), "pos" if holds else "neg")


def _terms(run: Run, summary: dict[str, Any]) -> Section:
    terms = run.scores("terms").to_frame()
    order = terms["score"].abs().sort_values(ascending=False, kind="stable").index
    usual = run.scores("direct").to_frame().set_index("part")["score"]
    shown = terms.loc[order[:20], ["part", "score"]].rename(columns={"score": "value"})
    both = terms.loc[order[:40], ["part", "score"]].assign(usual=lambda t: usual.reindex(t["part"]).to_numpy())
    both.columns = pd.Index(["part", "this prompt", "usual"])
    read = (
        "each part's own contribution to the lead, final norm at its actual scale; usual: mean over the other prompts."
    )
    return Section(
        "Who writes the answer",
        [readings.terms(shown, "logits"), tables.frame_table(both, shown=20)],
        read,
        layout="pair",
    )


def _heads(run: Run, summary: dict[str, Any]) -> Section:
    scores = run.scores("heads")
    frame = scores.to_frame()
    members = {h: {"role": "task head"} for h in summary["task_heads"]}
    cells = charts.cells(frame, members)
    look = tables.frame(run, "attention", ["head", "here", "usual"])
    here = {} if look is None else dict(zip(look["head"], look["here"], strict=True))
    mine = frame.set_index("part").loc[summary["task_heads"]].reset_index()
    rows = [
        [Cell(r["part"], r["part"], "part"), cell(r["score"]), cell(r["low"]), cell(r["high"]), cell(r["to_mlps"]),
         cell(r["attention"]), cell(here.get(r["part"])), cell(r["topic_rank"]), cell(r["other_rank"])]
        for r in mine.to_dict("records")
    ]  # fmt: skip
    heads = [
        "head",
        "effect",
        "low",
        "high",
        "through writers",
        "looks at topic",
        "in this prompt",
        "topic's rank",
        "other topics' rank",
    ]
    blocks: list[Any] = [
        charts.heatmap(cells, scores.unit, charts.scale_limit(cells), "Effect of every head"),
        Table(heads, rows),
    ]
    read = (
        f"effect: how much of the lead goes if the head's output is as on a prompt about another topic (path "
        f"patching). Through writers: only by the inputs of {', '.join(summary['writers']) or 'no MLP'}. Ranks are of "
        "the topic's own token among all tokens in what the head writes (median; 1 is first), and of other topics."
    )
    if not rows:
        return Section("Step 1: heads that bring the topic", blocks[:1], read + " No head counts as a task head.")
    return Section("Step 1: heads that bring the topic", blocks, read)


def _mixing(run: Run, summary: dict[str, Any]) -> Section:
    found = tables.frame(run, "mixing", ["part", "layer", "r2", "null", "rest", "task_heads"])
    title = "Step 2: what MLPs make of what they are given"
    if found is None:
        return Section(title, missing="no regression was fitted.")
    both = pd.concat(
        [found[["layer"]].assign(share=found["r2"].clip(lower=-0.2), what="inputs"),
         found[["layer"]].assign(share=found["null"].clip(lower=-0.2), what="other prompts' inputs")]
    )  # fmt: skip
    chart = charts.lines(
        both, "layer", "share", ("layer", "share of variance, prompts left out"), "How linear each MLP is", "what",
        grey=["other prompts' inputs"], height=220, wide=False,
    )  # fmt: skip
    table = found[["part", "r2", "rest", "task_heads", "largest"]]
    table.columns = pd.Index(["MLP", "explained", "weight of rest", "of task heads", "largest weights of heads"])
    read = (
        "each MLP's output as a weighted sum of what the heads and the rest of the stream wrote, one weight for "
        "all prompts: −1 erases, above 0 amplifies. Below 0.5 of the variance the weights describe little."
    )
    low = int((found["r2"] < 0.5).sum())
    remarks = [f"{count(low, 'MLP', len(found))} explained by less than half"] if low else []
    return Section(title, [chart, tables.frame_table(table, shown=12)], read, remarks=remarks)


def _vectors(run: Run) -> Section:
    found = tables.frame(run, "vectors", ["part", "scale", "moved", "random", "first"])
    title = "Step 3: intercepts as function vectors"
    if found is None:
        return Section(title, missing="no intercept was tried.")
    layers = [int(str(p).split(".")[-2].removeprefix("L")) for p in found["part"]]
    data = found.assign(layer=layers)
    series = [data.assign(y=data["moved"], what=[f"intercept x {s:g}" for s in data["scale"]])]
    series += [data.assign(y=data["random"], what=[f"random x {s:g}" for s in data["scale"]])]
    both = pd.concat(series)
    grey = [w for w in dict.fromkeys(both["what"]) if str(w).startswith("random")]
    chart = charts.lines(
        both, "layer", "y", ("layer", "growth of the lead (logits)"), "Adding an MLP's intercept", "what", grey=grey,
        height=220, wide=False,
    )  # fmt: skip
    best = found.sort_values("moved", ascending=False, kind="stable")
    table = best[["part", "scale", "moved", "low", "high", "random", "first_before", "first"]]
    table.columns = pd.Index(["MLP", "times", "moved", "low", "high", "random vector", "answer first, before", "after"])
    n = int(found["n"].iloc[0])
    read = (
        f"what an MLP adds whatever the topic, put into {n} prompts that ask nothing (“We talked about ...”). Answer "
        "first: share of topics whose own answer then leads all answers of the relation. Grey: random vectors as long."
    )
    return Section(title, [chart, tables.frame_table(table, shown=8)], read)


def _last(run: Run, summary: dict[str, Any]) -> Section:
    last = summary["last"]
    frame = run.scores("last").to_frame()
    frame["what"] = np.where(frame["part"].isin(last["suppressors"]), "suppresses", "other")
    data = frame.assign(what=["before" if w == "suppresses" else "after" for w in frame["what"]])
    chart = charts.bars(data, "score", "part", "Contribution of the last block's parts to the lead (logits)", step=24)
    p = pd.DataFrame(
        [
            {"how": "before the last block", **last["before"], "what": "control"},
            {"how": "as it is", **last["after"], "what": "after"},
        ]
    )
    it = last["mitigation"]
    if it is not None:
        p = pd.concat([p, pd.DataFrame([
            {"how": "held out, as it is", **it["before"], "what": "control"},
            {"how": f"held out, suppressors x {it['scale']:g}", **it["after"], "what": "after"}])])  # fmt: skip
    p = p.rename(columns={"mean": "p"})
    second = charts.bars(p, "p", "how", "Probability of the right answer", step=24)
    if it is None:
        told = "No part's whole interval is below 0: nothing is suppressed, and no remedy is offered."
    elif it["helps"]:
        told = f"Scaling {', '.join(it['parts'])} by {it['scale']:g} helps on prompts it was not chosen on."
    else:
        told = f"Scaling {', '.join(it['parts'])} down does not help on prompts it was not chosen on."
    return Section("Step 4: the last block", [chart, second], told, layout="pair")


def _prompts(run: Run, summary: dict[str, Any]) -> Section:
    found = tables.frame(run, "prompts", ["prompt", "answer", "wrong"])
    if found is None:
        return Section("The prompts", missing="none were kept.")
    rows = [[r["prompt"], r["answer"], r["wrong"]] for r in found.to_dict("records")]
    return Section("The prompts behind it", [Table.of(["prompt", "answer", "counterfactual's answer"], rows, shown=8)])
