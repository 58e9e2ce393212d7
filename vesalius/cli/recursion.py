"""`vesalius recursion`: what a model trained on a recursive function really learnt."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vesalius import checkpoints
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, records_of, set_threads, stored_tables, typed
from vesalius.errors import VesaliusError
from vesalius.run_index import find_run
from vesalius.runs import Run

EXAMPLES = 12  # failures shown


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("recursion")(recursion)


def recursion(
    run: Annotated[str, typer.Argument(help="A training run on binary_successor or tree_traversal.")],
    step: Annotated[str, typer.Option("--step", help="Which checkpoint: last, or a step that was saved.")] = "last",
    n: Annotated[int, typer.Option("--n", min=1, help="Inputs of each size and depth.")] = 24,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Force every head, and probe every layer.")] = True,
    inputs: Annotated[int, typer.Option(min=32, help="Inputs on which heads are forced.")] = 64,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    threads: o.Threads = None,
) -> None:
    """Where a model trained on a recursive function fails, and which short program fails alike.

    Lets it answer freely on inputs as trained, longer and deeper; fits the program that foretells its answers on half
    of them and counts on the other half how many failures, and which very outputs, it foretells. For binary successors
    it also forces every head to look elsewhere in the input and sees whether the switch from rewriting to copying
    follows. `vesalius train successor` trains such a model.
    """
    import vesalius
    from vesalius.corpus.recursion import Recursive
    from vesalius.corpus.synthetic import SYNTHETIC, synthetic_source
    from vesalius.features.recursion import ModelSolver
    from vesalius.train.running import recipe_of

    screen = Screen(as_json)
    set_threads(threads)
    parent = find_run(run)
    recipe = recipe_of(parent)
    name = recipe.data.synthetic
    if name is None or not issubclass(SYNTHETIC.get(name), Recursive):
        what = recipe.data.corpus if name is None else name
        raise VesaliusError(
            f"{recipe.name} was trained on {what}, which is no recursive function; train one on binary_successor or "
            "tree_traversal (`vesalius train successor`)"
        )
    saved = checkpoints.chosen(parent.folder / checkpoints.FOLDER, step)
    if len(saved) != 1:
        raise VesaliusError(f"--step {step} means {len(saved)} checkpoints; give one, or last")
    task = synthetic_source(name, length=recipe.data.length, rows=1, **recipe.data.settings)
    assert isinstance(task, Recursive)
    request = {
        "command": "recursion",
        "model": recipe.name,
        "task": name,
        "training": parent.hash,
        "step": saved[0],
        "n": n,
        "heads": heads,
        "inputs": inputs,
        "seed": seed,
    }
    command = typed()
    with Run.start(request, out, fresh, command) as found:
        if not found.done:
            opened = vesalius.open(f"{parent.folder}@step{saved[0]}")
            _work(screen, found, ModelSolver(opened, task), request, command)
    drawn(screen, found)
    _show(screen, found)


def _work(screen: Screen, run: Run, solver: Any, request: dict[str, Any], command: str) -> None:
    from vesalius.corpus.recursion import BinarySuccessor
    from vesalius.features.recursion import by_kind, cases, grid, mechanism, modes, reconstruct
    from vesalius.features.recursion.program import shown

    task, seed = solver.task, request["seed"]
    binary = isinstance(task, BinarySuccessor)
    sizes = list(range(1, task.width + 1)) if binary else task.sizes
    depths = range(task.width) if binary else range(1, len(task.sizes) + 1)
    with run.stage("answers", 1), screen.step("answering freely") as progress:
        found = cases(solver, task, sizes, depths, request["n"], seed, progress)
    run.save_table("grid", grid(found, task))
    kinds = by_kind(found, task)
    run.save_table("kinds", kinds)
    told: dict[str, Any] = {
        "model": request["model"], "task": task.name, "training": request["training"], "step": request["step"],
        "size": task.size, "depth": task.depth, "settings": dict(task.options),
    }  # fmt: skip
    notes: list[str] = []
    program = None
    try:
        with run.stage("program", 1), screen.step("reconstructing"):
            it = reconstruct(found, task, seed)
        program = it.program
        run.save_table("score", it.score)
        run.save_table("candidates", it.candidates)
        told |= {"program": program.name, "lines": list(program.lines), "cutoff": it.cutoff, **it.info}
    except VesaliusError as refusal:
        notes.append(str(refusal))
    failures = [c for c in found if c.failed]
    rows = []
    for i in np.random.default_rng(seed).permutation(len(failures))[:EXAMPLES]:
        case = failures[i]
        row = {"size": case.size, "depth": case.depth, "input": shown(case.x, task)}
        row |= {"right": shown(case.right, task), "said": shown(case.out, task)}
        if program is not None:
            row["foretold"] = shown(program.run(case.x), task)
        rows.append(row)
    columns = ["size", "depth", "input", "right", "said"]
    run.save_table("failures", pd.DataFrame(rows, columns=columns if not rows else None))
    if request["heads"] and binary:
        with run.stage("heads", 1), screen.step("forcing heads") as progress:
            table, summary = mechanism(solver, request["inputs"], seed, progress)
        run.save_table("heads", table)
        told["mechanism"] = summary
        try:
            with run.stage("modes", 1), screen.step("probing"):
                run.save_table("modes", modes(solver, request["inputs"], seed))
        except VesaliusError as refusal:
            notes.append(str(refusal))
    elif request["heads"]:
        notes.append("heads are forced for binary successors alone: a tree's recursion has no one end")
    trained = kinds[kinds["where"] == "trained"]
    if len(trained) and trained["right"].iloc[0] < 0.9:
        notes.append("the model has not learnt its own training range: train it longer before asking what it learnt")
    run.save_json("summary", told | {"lead": lead(told, kinds, run), "notes": notes, "command": command})


def lead(told: dict[str, Any], kinds: pd.DataFrame, run: Run) -> str:
    """What was found, in a sentence or four."""
    words = {"trained": "as trained", "deeper": "deeper", "longer": "longer", "both": "longer and deeper"}
    shares = [f"{r['right']:.0%} of {r['n']} {words[r['where']]}" for r in kinds.to_dict("records")]
    text = f"Running freely, {told['model']} answers {', '.join(shares)} inputs right."
    if "program" in told:
        kept = run.table("score").iloc[0]
        end = "; ".join(told["lines"][:2]) + (" ..." if len(told["lines"]) > 2 else "")
        limit = "at every depth" if told["cutoff"] is None else f"down to depth {told['cutoff']}"
        text += (
            f" The program that fails most alike ({told['program']}: {end}) is right {limit}; of the failures held out "
            f"it foretells {kept['recall']:.0%} (precision {kept['precision']:.0%}), {kept['exact']:.0%} to the last "
            "symbol."
        )
    if "mechanism" in told:
        it = told["mechanism"]
        if it["moved"] < 0.1:
            text += " No head that is forced to look elsewhere moves the switch."
        else:
            text += (
                f" Forced to look elsewhere, {it['decides']} moves the switch there in {it['moved']:.0%} of inputs, "
                f"other heads in {it['others']:.0%}."
            )
    return text


def _show(screen: Screen, run: Run) -> None:
    summary, found = run.json("summary"), stored_tables(run, ("kinds", "score", "heads", "modes"))
    lines: list[Any] = [x for table in found.values() for x in (table.head(12), "")]
    if "lines" in summary:
        lines += [f"{summary['program']}:", *[f"  {line}" for line in summary["lines"]]]
    conclude(screen, run, *lines, **records_of(found))
