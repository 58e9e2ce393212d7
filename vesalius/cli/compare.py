"""`vesalius compare RUN RUN ...`: how far recorded runs agree."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen
from vesalius.errors import VesaliusError
from vesalius.scores import Scores

TOP = 10


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("compare")(compare)


def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Two or more circuit runs: folders, name starts, hashes or 'last'.")
    ],
    out: o.Out = None,
    as_json: o.AsJson = False,
    seed: o.Seed = 0,
) -> None:
    """Rank correlation and overlap between the scores of recorded circuit runs."""
    from vesalius.report import compare_report
    from vesalius.runs import DEFAULT_ROOT, Run, find_run

    if len(runs) < 2:
        raise VesaliusError("comparing takes two or more runs; `vesalius runs` lists them")
    found = [find_run(r, [out or DEFAULT_ROOT]) for r in runs]
    for run in found:
        if not run.has("summary") or not run.has("scores"):
            raise VesaliusError(f"{run.folder} holds no finished circuit; compare runs of `vesalius circuit`")
    summaries = [r.json("summary") for r in found]
    names = []
    for s in summaries:
        name = f"{s['task']} {s['model']} {s['method']}"
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    scores = [r.scores("scores") for r in found]
    rows = [
        _pair(names[i], names[j], kind, a, b)
        for i, a in enumerate(scores)
        for j, b in enumerate(scores)
        for kind in ("head", "mlp", "edge")
        if len(a.kind(kind)) >= 3 and len(b.kind(kind)) >= 3
    ]
    tops = [
        {"name": name, "rank": rank, "part": str(part), "score": float(value)}
        for name, s in zip(names, scores, strict=True)
        for rank, (part, value) in enumerate(zip(s.top(TOP).parts, s.top(TOP).values, strict=True), 1)
    ]
    kept = ("model", "task", "method", "level", "accuracy", "faithfulness", "size")
    entries = [
        {"name": n, "run": r.name, **{k: s.get(k) for k in kept}}
        for n, r, s in zip(names, found, summaries, strict=True)
    ]
    command = "vesalius " + shlex.join(sys.argv[1:])
    request = {"command": "compare", "runs": [r.hash for r in found], "seed": seed}
    with Run.start(request, out, True, command) as made:
        made.save_json("summary", {"runs": entries, "notes": [], "command": command})
        matrix = pd.DataFrame(rows, columns=["a", "b", "kind", "pearson", "spearman", "overlap", "k", "n"])
        made.save_table("matrix", matrix)
        made.save_table("top", pd.DataFrame(tops))
        path = compare_report(made)
    shown = matrix[matrix["a"] < matrix["b"]] if len(set(names)) > 1 else matrix
    screen = Screen(as_json)
    screen.show(
        {"runs": entries, "matrix": rows, "run": str(made.folder), "report": str(path)}, shown, f"report  {path}"
    )


def _pair(a_name: str, b_name: str, kind: str, a: Scores, b: Scores) -> dict[str, object]:
    left, right = a.kind(kind), b.kind(kind)
    row: dict[str, object] = {
        "a": a_name,
        "b": b_name,
        "kind": kind,
        "k": TOP,
        "n": len(set(left.parts) & set(right.parts)),
    }
    try:
        row |= {"pearson": left.correlation(right), "spearman": left.correlation(right, "spearman")}
        row["overlap"] = left.overlap(right, TOP)
    except VesaliusError:
        row |= {"pearson": np.nan, "spearman": np.nan, "overlap": np.nan}
    return row
