"""`vesalius race`: optimizers, models or recipes at equal cost, each tuned over a grid of the same size."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, set_threads, typed
from vesalius.cli.train import parse_changes
from vesalius.errors import VesaliusError
from vesalius.records import plain
from vesalius.runs import Run

GRID = "0.3,1,3"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("race")(race)


def race(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one.")],
    optimizers: Annotated[
        str | None, typer.Option("--optimizers", help="Names joined by commas (see `vesalius optimizers`).")
    ] = None,
    models: Annotated[str | None, typer.Option("--models", help="Presets of models joined by commas.")] = None,
    compute_class: Annotated[
        str | None,
        typer.Option("--compute-class", help="Time for one run, such as 30s, 2min, 6h; else the recipe's steps."),
    ] = None,
    grid: Annotated[
        str, typer.Option("--grid", help="Factors of each competitor's default learning rate, tried on the first seed.")
    ] = GRID,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds joined by commas; the first one tunes.")] = "0,1,2",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, repeatable: what differs from the recipe.")
    ] = None,
    arm_set: Annotated[
        list[str] | None,
        typer.Option("--arm-set", help="ARM:KEY=VALUE, repeatable: for one competitor, as conda:optimizer.period=20."),
    ] = None,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    threads: o.Threads = None,
) -> None:
    """Race optimizers (or models) at equal cost, each tuned over a grid of the same size, over several seeds.

    Every run is reported, the table's control included; of a competitor whose best learning rate lies at the end of
    its grid a note says so. An interrupted race goes on after its last finished run.
    """
    from vesalius.train import race as r
    from vesalius.train.curves import compute_class as compute_of
    from vesalius.train.recipe import read_recipe

    screen = Screen(as_json)
    set_threads(threads)
    seconds = compute_of(compute_class) if compute_class else None
    factors, numbers = _numbers(grid, float, "--grid"), _numbers(seeds, int, "--seeds")
    base = read_recipe(recipe, parse_changes(changes or []))
    arms = [
        r.Arm(name, read_recipe(base.model_dump(mode="json"), change | _own(name, arm_set or [])), tuple(factors))
        for name, change in _arms(base, optimizers, models)
    ]
    for item in arm_set or []:
        if item.partition(":")[0] not in {a.name for a in arms}:
            raise VesaliusError(f"--arm-set {item}: the competitors are {', '.join(a.name for a in arms)}")
    for arm in arms:
        r.learning_rate(arm.recipe)
    request = {
        "command": "race",
        "model": base.name,
        "arms": {a.name: a.recipe.model_dump(mode="json") for a in arms},
        "seconds": seconds,
        "grid": factors,
        "seeds": numbers,
    }
    with Run.start(request, out, fresh, typed()) as run:
        if not run.done:
            _run(screen, run, arms, numbers, seconds)
    drawn(screen, run)
    _show(screen, run)


def _run(screen: Screen, run: Run, arms: Any, seeds: list[int], seconds: float | None) -> None:
    from vesalius.train import race as r

    kept: dict[str, Any] = run.json("laps") if run.has("laps") else {}
    speeds: dict[str, float] = run.json("speeds") if run.has("speeds") else {}

    def known(key: str) -> Any:
        if key not in kept:
            return None
        row = {k: float("nan") if v is None else v for k, v in kept[key]["row"].items()}
        return r.Lap(row, pd.DataFrame(kept[key]["curve"]))

    def speed(arm: Any) -> float:
        if arm.name not in speeds:
            speeds[arm.name] = r.speed_of(arm.recipe)
            run.save_json("speeds", speeds)
        return speeds[arm.name]

    total = sum(len(a.factors) + len(seeds) - 1 for a in arms)
    with run.stage("laps", total) as stage, screen.step("racing") as progress:

        def tell(key: str, done: int, steps: int) -> None:
            progress(key, done / steps)

        for i, (key, lap) in enumerate(r.race(arms, seeds, seconds, known, tell, speed)):
            kept[key] = json.loads(json.dumps(plain({"row": lap.row, "curve": lap.curve.to_dict("list")})))
            run.save_json("laps", kept)
            stage.update(i + 1)
            told = r.measured(lap.row)
            screen.note(f"  {key}: {told:.3f} nats after {lap.row['steps']:,} steps, {lap.row['seconds']:.0f} s", "dim")
    rows = pd.DataFrame([known(k).row for k in kept])
    curves = [known(k).curve.assign(lap=k, arm=kept[k]["row"]["arm"]) for k in kept]
    run.save_table("laps_table", rows)
    run.save_table("curves", pd.concat(curves, ignore_index=True))
    table = r.standings(rows)
    run.save_table("standings", table)
    notes = [
        f"{row.arm}: its best learning rate lies at the end of its grid ({row.grid}); a wider grid may do better"
        for row in table.itertuples()
        if row.edge
    ]
    run.save_json("summary", {"notes": notes, "seconds": seconds, "winner": str(table["arm"].iloc[0])})


def _numbers(text: str, kind: Any, option: str) -> list[Any]:
    try:
        found = [kind(t) for t in text.split(",")]
    except ValueError:
        raise VesaliusError(f"{option} {text}: give numbers joined by commas") from None
    fine = all(0 <= x <= o.MOST_SEED for x in found) and (kind is int or min(found) > 0)
    if not found or not fine or len(set(found)) < len(found):
        raise VesaliusError(f"{option} {text}: give different numbers, {'0 or more' if kind is int else 'above 0'}")
    return found


def _arms(base: Any, optimizers: str | None, models: str | None) -> list[tuple[str, dict[str, Any]]]:
    """The competitors with what makes each of them."""
    if (optimizers is None) == (models is None):
        raise VesaliusError("give --optimizers or --models, one of the two")
    if optimizers is not None:
        from vesalius.train.optimizers import OPTIMIZERS

        names = o.listed(optimizers)
        for name in names:
            OPTIMIZERS.entry(name)
        own = base.optimizer.name
        found: list[tuple[str, dict[str, Any]]] = [(n, {} if n == own else {"optimizer": {"name": n}}) for n in names]
    else:
        from vesalius.build import preset

        names = o.listed(models)
        for name in names:
            preset(name)
        found = [(n, {"model": {"preset": n, "source": None}}) for n in names]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise VesaliusError("a race needs two or more different competitors")
    return found


def _own(name: str, items: list[str]) -> dict[str, Any]:
    mine = [i.partition(":")[2] for i in items if i.partition(":")[0] == name]
    return parse_changes(mine)


def _show(screen: Screen, run: Run) -> None:
    table = run.table("standings")
    summary = run.json("summary")
    place = {"run": str(run.folder), "report": str(run.folder / "report.html")}
    lines: list[Any] = ["\nbest learning rate of each, over the seeds (held-out loss in nats; grid: by rising rate):"]
    rates = [f"{rate:g}" for rate in table["lr"]]  # three decimals would say .001 for .0006
    lines += [table.drop(columns="edge").assign(lr=rates), *[f"note: {n}" for n in summary["notes"]]]
    lines += [f"\nrun     {place['run']}", f"report  {place['report']}"]
    laps = run.table("laps_table")
    screen.show(summary | {"standings": table.to_dict("records"), "laps": laps.to_dict("records")} | place, *lines)
