"""`vesalius reuse`: two circuits side by side, and the transplant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import RunStore, Screen, drawn, estimate, typed
from vesalius.defaults import DEFAULT_HELD_OUT
from vesalius.errors import VesaliusError
from vesalius.runs import Run

OVERLAP = ["a", "b", "kind", "shared", "size_a", "size_b", "jaccard", "chance_jaccard", "p", "p_layer", "spearman"]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("reuse")(g.expanded(reuse))


def reuse(
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            "--task",
            "-t",
            help="Tasks to lay side by side, comma-separated (see `vesalius tasks`; files of your prompts too).",
            rich_help_panel=o.TASK_PANEL,
        ),
    ] = "ioi,colored-objects",
    n: o.Number = None,
    prove_n: Annotated[
        int,
        typer.Option("--prove-n", help="Held-out prompts for the transplant, at most.", rich_help_panel=o.TASK_PANEL),
    ] = DEFAULT_HELD_OUT,
    method: Annotated[
        str, typer.Option("--method", help="How parts are scored (see `vesalius methods`).")
    ] = "activation-patching",
    transplant: Annotated[bool, typer.Option(help="Try the transplant from the first task to the second.")] = True,
    models: Annotated[
        str,
        typer.Option(
            "--models",
            "--model",
            "-m",
            help="One model; or several, comma-separated, on one task.",
            rich_help_panel=o.MODEL_PANEL,
        ),
    ] = o.MODEL_DEFAULT,
    memory: o.Memory = o.MEMORY_DEFAULT,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Circuits of several tasks in one model (or of one task in several models) side by side.

    Finds a circuit of the same size for each, and measures how many parts they share against chance, what roles their
    heads have, and, between two tasks, whether making a few heads act as in the first task mends the second. Leaves a
    run folder with all numbers and report.html. The same command finds its run again; an interrupted one goes on where
    it stopped.
    """
    from vesalius.prove.reuse import reuse as lay_out

    screen = machine.screen(where.as_json)
    o.check_memory(memory)
    names, specs = o.listed(tasks), o.listed(models)
    _check(names, specs, method, prove_n)
    made = [o.task_of(t, n, where.seed, None, default_n=32) for t in names]
    opened = [machine.opened(screen, m) for m in specs]
    request = {
        "command": "reuse",
        "model": specs,
        "task": names,
        "method": method,
        "model_fingerprint": [m.fingerprint for m in opened],
        "task_fingerprint": [t.fingerprint for t in made],
        "pairs_fingerprints": [[h.pairs(m).fingerprint for h in t.halves()] for m in opened for t in made],
        "prove_n": prove_n,
        "transplant": transplant,
        "seed": where.seed,
        "dtype": machine.dtype,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            with run.stage("circuits"), screen.step("measuring circuits") as progress:

                def stage(name: str) -> Callable[..., None]:
                    progress(name, 0.0)
                    return progress

                found = lay_out(
                    opened,
                    made,
                    method=method,
                    held_out=prove_n,
                    with_transplant=transplant,
                    seed=where.seed,
                    memory_gb=memory,
                    stage=stage,
                    store=RunStore(run.checkpoint("pieces")),
                )
            for name, table in found.tables().items():
                if isinstance(table, pd.DataFrame):
                    run.save_table(name, table)
                else:
                    run.save_json(name, table | {"command": command} if name == "summary" else table)
    drawn(screen, run)
    _show(screen, run)


def _check(tasks: list[str], models: list[str], method: str, prove_n: int) -> None:
    """Refuses what cannot be laid side by side, before anything is opened."""
    if not tasks or not models:
        raise VesaliusError("give at least one task (--tasks) and one model (--models)")
    if len(tasks) > 1 and len(models) > 1:
        raise VesaliusError(
            f"{len(tasks)} tasks in {len(models)} models; compare tasks in one model, or models on one task"
        )
    if len(tasks) * len(models) < 2:
        raise VesaliusError("one circuit has nothing to be compared with; give two tasks, or two models")
    from vesalius.find.base import METHODS

    levels = METHODS.entry(method).info.get("levels", ("node",))
    if "node" not in levels:
        raise VesaliusError(f"{method} scores edges, and circuits are compared by parts; choose another method")
    if prove_n < 1:
        raise VesaliusError(f"--prove-n {prove_n}: the transplant needs held-out prompts; give 1 or more")


def _show(screen: Screen, run: Run) -> None:
    summary = run.json("summary")
    items = pd.DataFrame(
        [
            {
                "circuit": item["name"],
                "accuracy": item["accuracy"],
                "chance": item["chance"],
                "heads": item["size"]["heads"],
                "mlps": item["size"]["mlps"],
                "faithfulness": estimate(item["faithfulness"]),
                "random": estimate(item.get("random", {}).get("mean")),
            }
            for item in summary["items"]
        ]
    )
    lines: list[Any] = ["\ncircuits (faithfulness and random circuits on held-out prompts):", items]
    shared = run.table("overlap")
    if len(shared):
        lines += ["\nparts in common, against circuits drawn by chance:", shared[OVERLAP]]
    if run.has("transplant"):
        told = summary["transplant"]
        heads = ", ".join(told["heads"])
        lines.append(f"\ntransplant of {heads} from {told['source']} to {told['target']}, {told['n']} prompts:")
        lines.append(transplant_table(run.table("transplant")))
    if summary.get("notes"):
        lines += ["", *[f"note: {note}" for note in summary["notes"]]]
    place = {"run": str(run.folder), "report": str(run.folder / "report.html")}
    tables = {"overlap": shared.to_dict("records")}
    screen.show(summary | tables | place, *lines, f"\nrun     {place['run']}", f"report  {place['report']}")


def transplant_table(frame: pd.DataFrame) -> pd.DataFrame:
    """What the transplant measured, a row a metric: before, after, and the random heads as their mean and range."""
    rows = []
    for metric, some in frame.groupby("metric", sort=False):
        row: dict[str, Any] = {"metric": metric}
        for condition in ("before", "after"):
            one = some[some["condition"] == condition]
            if len(one):
                row[condition] = estimate(one.iloc[0][["value", "low", "high"]].rename({"value": "mean"}).to_dict())
        random = some.loc[some["condition"] == "random", "value"]
        if len(random):
            row["random heads"] = f"{random.mean():.2f} ({random.min():.2f} to {random.max():.2f}, {len(random)} draws)"
        rows.append(row)
    return pd.DataFrame(rows)
