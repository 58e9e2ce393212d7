"""`vesalius models`, `tasks`, `methods`, `runs` and `report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen
from vesalius.errors import VesaliusError


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (models, tasks, methods, runs, report):
        app.command(command.__name__)(command)


def models(
    refetch: Annotated[str | None, typer.Option(help="Fetch this model again, replacing what is cached.")] = None,
    verify: Annotated[str | None, typer.Option(help="Check every byte of this cached model.")] = None,
    as_json: o.AsJson = False,
    out: o.Out = None,
    seed: o.Seed = 0,
) -> None:
    """What can be opened here by a short name, and what is cached. Any hub name, folder, .gguf or wheel: works too."""
    from vesalius.model.sources import listing, resolve

    screen = Screen(as_json)
    wanted = refetch or verify
    if wanted:
        with screen.step(f"{'fetching' if refetch else 'verifying'} {wanted}") as progress:
            found = resolve(wanted, progress=progress, verify=True, refetch=bool(refetch))
        screen.note(f"{wanted}: good, sha256 {found.sha256[:16]}..., in {found.folder}")
    rows = listing()
    frame = pd.DataFrame(
        [
            {
                "name": r.name,
                "what": r.what,
                "parameters": f"{r.parameters / 1e6:.0f}M" if r.parameters else "",
                "cached": "damaged" if r.problem else "yes" if r.cached else "no",
                "from": r.source,
                "licence": r.licence,
            }
            for r in rows
        ]
    )
    problems = [f"{r.name}: {r.problem}" for r in rows if r.problem]
    screen.show([vars(r) if hasattr(r, "__dict__") else r._asdict() for r in rows], frame, *problems)


def tasks(as_json: o.AsJson = False, out: o.Out = None, seed: o.Seed = 0) -> None:
    """Tasks with counterfactuals, and their parameters."""
    from vesalius.tasks import TASKS

    rows = [
        {
            "task": e.name,
            "what": e.summary,
            "parameters (--task-set)": ", ".join(f"{k}={p.default}" for k, p in TASKS.get(e.name).parameters.items()),
            "paper": e.paper,
        }
        for e in TASKS
    ]
    Screen(as_json).show(rows, pd.DataFrame(rows), "", "or a .jsonl/.csv file with clean, corrupted, answer, wrong")


def methods(as_json: o.AsJson = False, out: o.Out = None, seed: o.Seed = 0) -> None:
    """Methods that score parts, and their parameters."""
    from vesalius.find.base import METHODS, parameters

    rows = [
        {
            "method": e.name,
            "what": e.summary,
            "levels": ", ".join(e.info["levels"]),
            "parameters (--method-set)": ", ".join(f"{k}={p.default}" for k, p in parameters(e.name).items()),
            "paper": e.paper,
        }
        for e in METHODS
    ]
    Screen(as_json).show(rows, pd.DataFrame(rows))


def runs(out: o.Out = None, as_json: o.AsJson = False, seed: o.Seed = 0) -> None:
    """The runs in a folder (./runs by default)."""
    from vesalius.runs import DEFAULT_ROOT, list_runs

    root = out or DEFAULT_ROOT
    frame = list_runs(root)
    screen = Screen(as_json)
    if frame.empty:
        screen.show([], f"no runs in {root}; `vesalius circuit --task ioi` makes one")
        return
    shown = frame.loc[:, frame.notna().any()]
    screen.show(frame.to_dict("records"), shown)


def report(
    run: Annotated[str, typer.Argument(help="A run's folder, the start of its name, its hash, or 'last'.")] = "last",
    out: o.Out = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: o.AsJson = False,
    seed: o.Seed = 0,
) -> None:
    """Draw a run's report again from what it recorded, and say where it is."""
    from vesalius.report import report as draw
    from vesalius.runs import DEFAULT_ROOT, find_run

    found = find_run(run, [out or DEFAULT_ROOT])
    if not found.has("summary"):
        raise VesaliusError(
            f"{found.folder} has no summary yet (it is {found.state}); run its command again to finish it"
        )
    path = Path(draw(found))
    Screen(as_json).show({"run": str(found.folder), "report": str(path)}, str(path))
    if show:
        webbrowser.open(path.resolve().as_uri())
