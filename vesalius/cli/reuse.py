"""`vesalius reuse`: two circuits side by side, and the transplant."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import RunStore, Screen, set_threads
from vesalius.errors import VesaliusError


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("reuse")(reuse)


def reuse(
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks to lay side by side, comma-separated.")] = (
        "ioi,colored-objects"
    ),
    models: Annotated[
        str, typer.Option("--models", "--model", "-m", help="One model, or several (comma-separated) on one task.")
    ] = o.MODEL_DEFAULT,
    method: Annotated[str, typer.Option("--method", help="How parts are scored.")] = "activation-patching",
    n: o.Number = None,
    prove_n: Annotated[int, typer.Option("--prove-n", help="Held-out prompts for the transplant.")] = 200,
    transplant: Annotated[bool, typer.Option(help="Try the transplant from the first task to the second.")] = True,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    device_map: o.DeviceMap = None,
    trust_remote_code: o.Trust = False,
    memory: o.Memory = o.MEMORY_DEFAULT,
    threads: o.Threads = None,
) -> None:
    """Circuits of several tasks in one model (or one task in several models): overlap, roles, the transplant."""
    from vesalius.prove.reuse import reuse as lay_out
    from vesalius.report import reuse_report
    from vesalius.runs import Run

    screen = Screen(as_json)
    set_threads(threads)
    names = [t.strip() for t in tasks.split(",") if t.strip()]
    specs = [m.strip() for m in models.split(",") if m.strip()]
    if not names or not specs:
        raise VesaliusError("give at least one task and one model")
    made = [o.task_of(t, n, seed, None, default_n=32) for t in names]
    opened = [o.opened(screen, m, dtype, device, device_map, trust_remote_code) for m in specs]
    request = {
        "command": "reuse",
        "model": ",".join(specs),
        "task": ",".join(names),
        "method": method,
        "model_fingerprint": [m.fingerprint for m in opened],
        "task_fingerprint": [t.fingerprint for t in made],
        "prove_n": prove_n,
        "transplant": transplant,
        "seed": seed,
        "dtype": dtype,
    }
    command = "vesalius " + shlex.join(sys.argv[1:])
    with Run.start(request, out, fresh, command) as run:
        if not run.done:
            with screen.step("measuring circuits") as progress:

                def stage(name: str) -> object:
                    progress(name, 0.0)
                    return progress

                found = lay_out(
                    opened,
                    made,
                    method=method,
                    held_out=prove_n,
                    with_transplant=transplant,
                    seed=seed,
                    memory_gb=memory,
                    stage=stage,  # type: ignore[arg-type]
                    store=RunStore(run.checkpoint("pieces")),
                )
            for name, table in found.tables().items():
                if isinstance(table, pd.DataFrame):
                    run.save_table(name, table)
                else:
                    run.save_json(name, table | {"command": command} if name == "summary" else table)
            reuse_report(run)
        lines: list[object] = [run.table("overlap")]
        if run.has("transplant"):
            lines.append(run.table("transplant"))
        lines += [f"note: {note}" for note in run.json("summary").get("notes", [])]
        place = {"run": str(run.folder), "report": str(run.folder / "report.html")}
        screen.show(run.json("summary") | place, *lines, f"report  {place['report']}")
