"""`vesalius models`, `tasks`, `methods`, `runs` and `report`."""

from __future__ import annotations

import dataclasses
import webbrowser
from collections.abc import Hashable, Mapping
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn
from vesalius.errors import VesaliusError

_SET = "give a parameter with --{0}-set KEY=VALUE"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (models, tasks, methods, runs, report):
        app.command(command.__name__)(command)


def models(
    refetch: Annotated[str | None, typer.Option(help="Fetch this model again, replacing what is cached.")] = None,
    verify: Annotated[str | None, typer.Option(help="Check every byte of this cached model.")] = None,
    seed: o.NoSeed = 0,
    out: o.NoOut = None,
    as_json: o.AsJson = False,
) -> None:
    """What opens here by a short name, and what is cached. A hub name, folder, .gguf file or wheel opens too."""
    from vesalius.model.sources import listing, resolve

    screen = Screen(as_json)
    for wanted, again in ((refetch, True), (verify, False)):
        if wanted is not None:
            with screen.step(f"{'fetching' if again else 'verifying'} {wanted}") as progress:
                found = resolve(wanted, progress=progress, verify=True, refetch=again)
            screen.note(f"{wanted}: good, sha256 {found.sha256[:16]}..., in {found.folder}")
    rows = listing()
    frame = pd.DataFrame(
        [
            {
                "name": r.name,
                "what": r.what,
                "parameters": f"{r.parameters / 1e6:.0f}M" if r.parameters else "",
                "cached": "damaged" if r.problem else "yes" if r.cached else "no",
                "from": _short(r.source),
                "licence": r.licence,
            }
            for r in rows
        ]
    )
    problems = [f"{r.name}: {r.problem}" for r in rows if r.problem]
    screen.show([dataclasses.asdict(r) for r in rows], frame, *problems)


def _short(source: str) -> str:
    """The first of several wheels, and how many more there are."""
    first, *more = source.split(" + ")
    return f"{first} and {len(more)} more" if more else first


def tasks(seed: o.NoSeed = 0, out: o.NoOut = None, as_json: o.AsJson = False) -> None:
    """Tasks with counterfactuals, and their parameters."""
    from vesalius.tasks import TASKS

    rows = [
        {
            "task": e.name,
            "what": e.summary,
            "parameters": ", ".join(f"{k}={p.default}" for k, p in TASKS.get(e.name).parameters.items()),
            "paper": e.paper,
        }
        for e in TASKS
    ]
    more = "or a .jsonl/.csv file of your prompts, with clean, corrupted, answer, wrong"
    Screen(as_json).show(rows, pd.DataFrame(rows), "", f"{_SET.format('task')}; {more}")


def methods(seed: o.NoSeed = 0, out: o.NoOut = None, as_json: o.AsJson = False) -> None:
    """Methods that score parts, and their parameters."""
    from vesalius.find.base import METHODS, parameters

    rows = [
        {
            "method": e.name,
            "what": e.summary,
            "levels": ", ".join(e.info["levels"]),
            "parameters": ", ".join(f"{k}={p.default}" for k, p in parameters(e.name).items()),
            "paper": e.paper,
        }
        for e in METHODS
    ]
    Screen(as_json).show(rows, pd.DataFrame(rows), "", _SET.format("method"))


def runs(seed: o.NoSeed = 0, out: o.Out = None, as_json: o.AsJson = False) -> None:
    """The runs in a folder (./runs by default), the latest first."""
    from vesalius.run_index import list_runs
    from vesalius.runs import DEFAULT_ROOT

    root = out or DEFAULT_ROOT
    if root.exists() and not root.is_dir():
        raise VesaliusError(f"{root} is a file, not a folder that holds runs; name another with --out")
    frame = list_runs(root)
    screen = Screen(as_json)
    if frame.empty:
        screen.show([], f"no runs in {root}; `vesalius circuit --task ioi` makes one")
        return
    rows = [row | {"when": None if pd.isna(row["when"]) else str(row["when"])} for row in frame.to_dict("records")]
    called = [row["hash"] if isinstance(row["hash"], str) else row["run"] for row in rows]  # a damaged one has none
    shown = pd.DataFrame(
        {
            "run": called,
            "what": [str(row["run"]).removesuffix(f"-{row['hash']}") for row in rows],
            "state": frame["state"],
            "when (UTC)": frame["when"].dt.strftime("%m-%d %H:%M"),
            "faithfulness": frame["faithfulness"],
            "size": [_size(row) for row in rows],
        }
    )
    errors = [
        f"{name}: {row['error']}" for name, row in zip(called, rows, strict=True) if isinstance(row["error"], str)
    ]
    screen.show(rows, shown, *(["", *errors] if errors else []))


def _size(row: Mapping[Hashable, Any]) -> str:
    if row["command"] == "train" and row["parameters"] == row["parameters"] and row["parameters"] is not None:
        loss = row["held_out"]
        told = f", held-out loss {loss:.3f}" if loss is not None and loss == loss else ""
        return f"{row['parameters'] / 1e6:.2f} M parameters{told}"
    counts = [(row[k], noun) for k, noun in (("heads", "heads"), ("mlps", "MLPs"), ("edges", "edges"))]
    return ", ".join(f"{int(n)} {noun}" for n, noun in counts if n is not None and n == n) or "-"


def report(
    run: Annotated[str, typer.Argument(help="A run's folder, the start of its name, its hash, or 'last'.")] = "last",
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    seed: o.NoSeed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
) -> None:
    """Draw a run's report again from what it recorded, and say where it is."""
    from vesalius.errors import UnknownName
    from vesalius.run_index import find_run
    from vesalius.runs import DEFAULT_ROOT

    found = find_run(run, [out or DEFAULT_ROOT])
    if not found.has("summary"):
        raise VesaliusError(
            f"{found.folder} has no summary yet (it is {found.state}); run its command again to finish it"
        )
    screen = Screen(as_json)
    try:
        path = drawn(screen, found)
    except UnknownName:
        raise VesaliusError(
            f"`vesalius {found.request.get('command')}` leaves no report; its tables are in {found.folder}"
        ) from None
    screen.show({"run": str(found.folder), "report": str(path)}, str(path))
    if show:
        webbrowser.open(path.resolve().as_uri())
