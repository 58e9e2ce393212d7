"""`vesalius dynamics`: a finding over the checkpoints of a training run."""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
import typer

from vesalius import checkpoints
from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, set_threads, typed
from vesalius.run_index import find_run
from vesalius.runs import Run


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("dynamics")(dynamics)


def dynamics(
    run: Annotated[str, typer.Argument(help="A training run: its folder, its name, or the start of it.")],
    task: Annotated[str, typer.Option("--task", "-t", help="What parts are scored on; 'none' for attention alone.")] = (
        "induction"
    ),
    task_set: o.TaskSet = None,
    method: Annotated[str, typer.Option("--method", help="How parts are scored.")] = "activation-patching",
    n: o.Number = None,
    steps: Annotated[str, typer.Option(help="Which checkpoints: all, or a list such as 0,64,512.")] = "all",
    batches: Annotated[int, typer.Option(min=1, help="Held-out batches read for the loss.")] = 4,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    memory: o.Memory = o.MEMORY_DEFAULT,
    threads: o.Threads = None,
) -> None:
    """Loss, in-context learning and every head's score over the checkpoints of a training run.

    Scores come from the same methods as `vesalius circuit`; attention is measured on repeated random tokens. Leaves a
    run with all numbers and report.html; an interrupted one goes on after the last checkpoint it measured.
    """
    import vesalius
    from vesalius.prove.dynamics import moment
    from vesalius.train.running import data_of_run, recipe_of

    screen = Screen(as_json)
    set_threads(threads)
    o.check_memory(memory)
    from vesalius.find.base import METHODS

    METHODS.entry(method)
    parent = find_run(run)
    recipe = recipe_of(parent)
    chosen = checkpoints.chosen(parent.folder / checkpoints.FOLDER, steps)
    made = None if task == "none" else o.task_of(task, n, seed, task_set, default_n=32)
    request = {
        "command": "dynamics",
        "model": recipe.name,
        "task": task,
        "method": method,
        "training": parent.hash,
        "task_fingerprint": made.fingerprint if made else None,
        "steps": chosen,
        "batches": batches,
        "seed": seed,
    }
    command = typed()
    with Run.start(request, out, fresh, command) as found:
        if not found.done:
            held_out = data_of_run(parent, screen.note).held_out
            tables: dict[str, list[Any]] = {"numbers": [], "heads": [], "scores_by_step": []}
            unit = ""
            with found.stage("checkpoints", len(chosen)) as stage, screen.step("measuring checkpoints") as progress:
                for i, step in enumerate(chosen):
                    pieces = [f"numbers-{step}", f"heads-{step}"] + ([f"scores-{step}"] if made else [])
                    if not all(found.has(p) for p in pieces):
                        model = vesalius.open(f"{parent.folder}@step{step}")
                        it = moment(
                            model,
                            step,
                            task=made,
                            method=method,
                            held_out=held_out,
                            batches=batches,
                            seed=seed,
                            memory_gb=memory,
                        )
                        if it.scores is not None:
                            found.save_scores(f"scores-{step}", it.scores)
                        found.save_table(f"heads-{step}", it.heads)
                        found.save_json(f"numbers-{step}", it.numbers)
                    tables["numbers"].append({"step": step, **found.json(f"numbers-{step}")})
                    tables["heads"].append(found.table(f"heads-{step}").assign(step=step))
                    if made:
                        scores = found.scores(f"scores-{step}")
                        unit = scores.unit
                        frame = scores.to_frame()
                        tables["scores_by_step"].append(frame[["part", "score", "low", "high"]].assign(step=step))
                    stage.update(i + 1)
                    progress(i + 1, len(chosen))
            numbers = pd.DataFrame(tables["numbers"])
            heads = pd.concat(tables["heads"], ignore_index=True)
            found.save_table("numbers", numbers)
            found.save_table("heads", heads)
            if made:
                found.save_table("scores_by_step", pd.concat(tables["scores_by_step"], ignore_index=True))
            summary: dict[str, Any] = {
                "run": recipe.name,
                "training": str(parent.folder),
                "task": task,
                "method": method,
            }
            summary |= {"unit": unit, "lead": lead(numbers, heads), "notes": [], "command": command}
            found.save_json("summary", summary | story(numbers, heads))
    drawn(screen, found)
    _show(screen, found)


def story(numbers: pd.DataFrame, heads: pd.DataFrame) -> dict[str, Any]:
    """The strongest induction head at the end, and when it formed: the first step at half its final attention."""
    last = heads[heads["step"] == heads["step"].max()]
    best = last.nlargest(1, "induction").iloc[0]
    mine = heads[heads["part"] == best["part"]].sort_values("step")
    formed = mine.loc[mine["induction"] >= best["induction"] / 2, "step"]
    found = {
        "induction_head": str(best["part"]),
        "induction_attention": float(best["induction"]),
        "formed_at": int(formed.iloc[0]) if len(formed) else None,
        "previous_token_head": str(last.nlargest(1, "previous-token").iloc[0]["part"]),
        "previous_token_attention": float(last["previous-token"].max()),
    }
    if "in_context" in numbers:
        found["in_context"] = float(numbers["in_context"].iloc[-1])
    return found | {k: float(numbers[k].iloc[-1]) for k in ("repeat_first", "repeat_second")}


def lead(numbers: pd.DataFrame, heads: pd.DataFrame) -> str:
    """The story in a sentence or two."""
    told = story(numbers, heads)
    text = (
        f"At the end {told['induction_head']} attends to what followed a repeated token's first occurrence with "
        f"{told['induction_attention']:.2f} of its attention"
    )
    if told["induction_attention"] >= 0.2 and told["formed_at"] is not None:
        text += f"; it passed half of that by step {told['formed_at']:,}"
    else:
        text += ": no induction head has formed"
    first, second = told["repeat_first"], told["repeat_second"]
    return text + f". Random tokens cost {first:.2f} nats the first time and {second:.2f} when they come again."


def _show(screen: Screen, run: Run) -> None:
    summary = run.json("summary")
    numbers, heads = run.table("numbers"), run.table("heads")
    best = heads.groupby("step")["induction"].max().rename("best induction head")
    before = heads.groupby("step")["previous-token"].max().rename("best previous-token head")
    table = numbers.merge(best, on="step").merge(before, on="step")
    table["gain on repeats"] = table["repeat_first"] - table["repeat_second"]
    wanted = ["step", "held_out", "in_context", "gain on repeats", before.name, best.name, "accuracy", "metric"]
    place = {"run_folder": str(run.folder), "report": str(run.folder / "report.html")}
    rows = table[[c for c in wanted if c in table]]
    lines = ["", rows, f"\n{summary['lead']}", *[f"note: {n}" for n in summary["notes"]]]
    lines += [f"\nrun     {run.folder}", f"report  {place['report']}"]
    screen.show(summary | {"numbers": numbers.to_dict("records")} | place, *lines)
