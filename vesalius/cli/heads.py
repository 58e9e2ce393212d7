"""`vesalius heads`: every detector over every head, one table, one picture, and some heads closely."""

from __future__ import annotations

import re
from typing import Annotated

import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, typed
from vesalius.errors import VesaliusError
from vesalius.parts import parse_part
from vesalius.runs import Run


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("heads")(g.expanded(heads))
    app.command("detectors")(detectors)


def heads(
    model: o.ModelName = o.MODEL_DEFAULT,
    detectors: Annotated[
        str, typer.Option("--detectors", help="all, or a list such as induction,successor (see `vesalius detectors`).")
    ] = "all",
    head: Annotated[
        list[str] | None,
        typer.Option("--head", help="A head to show on a page of its own, such as L9.H6 or 9.6; repeatable."),
    ] = None,
    detector_set: Annotated[
        list[str] | None,
        typer.Option("--detector-set", help="DETECTOR.KEY=VALUE, repeatable: a parameter of a detector."),
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            "-t",
            help="Where movers and inhibition heads are looked for; 'none' for nowhere.",
            rich_help_panel=o.TASK_PANEL,
        ),
    ] = "ioi",
    n: o.Number = None,
    task_set: o.TaskSet = None,
    memory: o.Memory = o.MEMORY_DEFAULT,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """What every attention head is: induction, successor, retrieval, mover ... each score beside what chance gives.

    Asks every detector about every head, tests each score against shuffled prompts or labels (corrected over all
    heads), and draws some heads closely: where they look in real prompts and what they write. Leaves a run folder with
    all numbers and report.html; with --head, a page for that head beside it. The same command finds its run again, with
    or without --head; an interrupted one goes on where it stopped.
    """
    from vesalius.cli import heads_work as work
    from vesalius.find.detectors.base import DETECTORS, chosen, detect

    screen = machine.screen(where.as_json)
    o.check_memory(memory)
    made = None if task == "none" else o.task_of(task, n, where.seed, task_set, default_n=32)
    names = chosen(detectors, made)
    if made is None and (lost := [x for x in names if DETECTORS.entry(x).info.get("task")]):
        raise VesaliusError(f"{', '.join(lost)}: found in a task; name one with --task")
    options = work.options(detector_set or [], names)
    wanted = [parse_part(re.sub(r"^(\d+)\.(\d+)$", r"L\1.H\2", h.strip())) for h in head or []]
    opened = machine.opened(screen, model)
    for part in wanted:
        if part.kind != "head" or part.side:
            raise VesaliusError(f"--head {part} is no head; a head is called L9.H6")
        opened.anatomy.require(part)
    request = {
        "command": "heads",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "dtype": str(opened.dtype),
        "detectors": names,
        "detector_set": options,
        "task": task,
        "task_fingerprint": made.fingerprint if made else None,
        "seed": where.seed,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            found = detect(
                opened,
                "all" if detectors == "all" else names,
                task=made,
                seed=where.seed,
                memory_gb=memory,
                keep=work.kept(run, screen, len(names)),
                options=options,
            )
            work.store(run, screen, opened, found, where.seed, command)
        work.portray(run, screen, opened, wanted, where.seed)
    report = drawn(screen, run)
    work.show(screen, run, report, [str(p) for p in wanted])


def detectors(seed: o.NoSeed = 0, out: o.NoOut = None, as_json: o.AsJson = False) -> None:
    """Head detectors, and their parameters."""
    from vesalius.find.detectors.base import DETECTORS, detector_parameters

    order = sorted(DETECTORS, key=lambda e: (e.info.get("place", 99), e.name))
    rows = [
        {
            "detector": e.name,
            "what": e.summary,
            "parameters": ", ".join(f"{k}={p.default}" for k, p in detector_parameters(e.name).items()),
            "paper": e.paper,
        }
        for e in order
    ]
    Screen(as_json).show(rows, pd.DataFrame(rows), "", "give a parameter with --detector-set DETECTOR.KEY=VALUE")
