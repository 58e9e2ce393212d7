"""`vesalius compare RUN RUN ...`: how far recorded runs agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, typed
from vesalius.errors import VesaliusError
from vesalius.run_index import find_run
from vesalius.runs import DEFAULT_ROOT, Run
from vesalius.scores import Scores

TOP = 10
KINDS = ("head", "mlp", "edge")
FEWEST = 3  # parts in common below which a correlation says nothing


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("compare")(compare)


def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Two or more circuit runs: folders, name starts, hashes or 'last'.")
    ],
    seed: o.NoSeed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
) -> None:
    """How far the scores of recorded circuit runs agree: rank correlation, linear correlation, overlap of the largest.

    The runs may differ in method, task or model. Scores are compared over the parts that both runs scored, heads, MLPs
    and edges apart. Leaves a run with a report.
    """
    if len(runs) < 2:
        raise VesaliusError("comparing takes two or more runs; `vesalius runs` lists them")
    found = [find_run(r, [out or DEFAULT_ROOT]) for r in runs]
    for run in found:
        if run.request.get("command") != "circuit":
            raise VesaliusError(
                f"{run.folder} is a run of `vesalius {run.request.get('command')}`; compare circuit runs"
            )
        if not run.has("summary") or not run.has("scores.parquet"):
            raise VesaliusError(
                f"{run.folder} is {run.state} and has no circuit yet; run its command again to finish it"
            )
    summaries = [r.json("summary") for r in found]
    names = name_runs(summaries, [r.hash for r in found])
    scores = [r.scores("scores") for r in found]
    rows = [
        row
        for i, a in enumerate(scores)
        for j, b in enumerate(scores)
        for kind in KINDS
        if (row := _pair(names[i], names[j], kind, a, b)) is not None
    ]
    matrix = pd.DataFrame(rows, columns=["a", "b", "kind", "pearson", "spearman", "overlap", "k", "n"])
    order = {name: i for i, name in enumerate(names)}
    shown = matrix[[order[a] < order[b] for a, b in zip(matrix["a"], matrix["b"], strict=True)]]
    if shown.empty:
        levels = ", ".join(f"{n}: {s.get('level')} scores" for n, s in zip(names, summaries, strict=True))
        raise VesaliusError(
            f"no two of the runs scored {FEWEST} or more parts in common ({levels}); compare runs of one level"
        )
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
    notes = []
    if len({s.get("model_fingerprint") for s in summaries}) > 1:
        notes.append(
            "parts of different models are matched by address: it means something if one was made from another"
        )
    command = typed()
    with Run.start({"command": "compare", "runs": [r.hash for r in found], "seed": seed}, out, True, command) as made:
        made.save_json("summary", {"runs": entries, "notes": notes, "command": command})
        made.save_table("matrix", matrix)
        made.save_table("top", pd.DataFrame(tops))
    screen = Screen(as_json)
    path = drawn(screen, made)
    screen.show(
        {"runs": entries, "matrix": rows, "notes": notes, "run": str(made.folder), "report": str(path)},
        shown,
        *["", *(f"note: {n}" for n in notes)][: 1 + len(notes)],
        f"run     {made.folder}",
        f"report  {path}",
    )


def name_runs(summaries: Sequence[Mapping[str, Any]], hashes: Sequence[str]) -> list[str]:
    """What the runs are called in tables: by what tells them apart, and by their hash or number where nothing does.

    Example:
        >>> name_runs([{"task": "ioi", "method": "relp"}, {"task": "ioi", "method": "eap-ig"}], ["3fa9c1", "77b0e2"])
        ['relp', 'eap-ig']
    """
    fields = [[_short(s.get(k)) for k in ("task", "model", "method", "level")] for s in summaries]
    telling = [i for i in range(4) if len({f[i] for f in fields}) > 1] or [0, 1, 2]
    names = [" ".join(f[i] for i in telling if f[i]) for f in fields]
    names = [n if names.count(n) == 1 else f"{n} {h[:6]}" for n, h in zip(names, hashes, strict=True)]
    return [n if names.count(n) == 1 else f"{n} ({names[:i].count(n) + 1})" for i, n in enumerate(names)]


def _short(value: Any) -> str:
    """A file of prompts by its stem; names as they are."""
    text = "" if value is None else str(value)
    return Path(text).stem if Path(text).suffix in (".jsonl", ".csv") else text


def _pair(a_name: str, b_name: str, kind: str, a: Scores, b: Scores) -> dict[str, Any] | None:
    left, right = a.kind(kind), b.kind(kind)
    n = len(set(left.parts) & set(right.parts))
    if n < FEWEST:
        return None
    k = min(TOP, max(1, n // 2))  # of the four MLPs of a small model, the ten largest are always the same
    row: dict[str, Any] = {"a": a_name, "b": b_name, "kind": kind, "k": k, "n": n}
    try:
        row |= {"pearson": left.correlation(right), "spearman": left.correlation(right, "spearman")}
        row["overlap"] = left.overlap(right, k)
    except VesaliusError:
        row |= {"pearson": np.nan, "spearman": np.nan, "overlap": np.nan}
    return row
