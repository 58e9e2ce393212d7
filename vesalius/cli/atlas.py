"""`vesalius atlas`: the anatomy of a model on one page, from the other commands' runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen, set_threads, typed
from vesalius.errors import UnknownName, VesaliusError

TASKS_DEFAULT = "ioi,greater-than,successor,induction,capital"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("atlas")(atlas)


def atlas(
    model: o.ModelName = o.MODEL_DEFAULT,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", help="Tasks whose circuits are looked for, by commas; roles and methods are judged in the first."
        ),
    ] = (TASKS_DEFAULT),
    n: o.Number = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="The Markdown file to write; atlas-MODEL.md by default.")
    ] = None,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    threads: o.Threads = None,
) -> None:
    """The anatomy of a model on one page: which heads do what, by which evidence, and which a circuit needs.

    Runs the other commands (heads, circuit, codes, lens), each of which leaves a run of its own, and puts what they
    found together. The page names the command behind every part of it. Runs that exist are found again, so a stopped
    atlas goes on where it was; expect about half an hour on two cores the first time.
    """
    from vesalius.cli.atlas_work import Atlas
    from vesalius.tasks import TASKS
    from vesalius.tasks.files import is_path

    screen = Screen(as_json)
    set_threads(threads)
    names = list(dict.fromkeys(o.listed(tasks)))
    for name in names:
        if name not in TASKS and not is_path(name):
            raise UnknownName("task", name, TASKS.names())
    if not names:
        raise VesaliusError("--tasks is empty; name one or more (see `vesalius tasks`)")
    target = page or Path(f"atlas-{Path(model).name}.md")
    if target.is_dir():
        raise VesaliusError(f"--page {target} is a folder; give the file to write")
    made = Atlas(screen, model, names, n, seed, out, threads)
    made.write(target, typed())
    table = pd.DataFrame(made.runs.items(), columns=["command", "run"])
    screen.show({"page": str(target), "runs": made.runs}, table, f"\npage  {target}")
