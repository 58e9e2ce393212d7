"""`vesalius tune`: find the parts that do a task, knock them out, and train them alone."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

import numpy as np
import typer

from vesalius import checkpoints
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, records_of, stored_tables, typed
from vesalius.cli.groups import Machine, RunOptions, expanded
from vesalius.errors import VesaliusError
from vesalius.runs import Run

FIND_PANEL = "Which parts"
TRAIN_PANEL = "Training"
TEXTS, TOKENS = 16, 64  # plain texts, and tokens of each


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("tune")(expanded(tune))


def tune(
    model: o.ModelName = o.MODEL_DEFAULT,
    task: o.TaskName = "arithmetic",
    n: Annotated[
        int,
        typer.Option(
            "--n", min=16, help="Prompts; a quarter of the questions is held out.", rich_help_panel=o.TASK_PANEL
        ),
    ] = 192,
    task_set: o.TaskSet = None,
    share: Annotated[
        float, typer.Option("--share", help="Share of the heads to take.", rich_help_panel=FIND_PANEL)
    ] = 0.05,
    mlps: Annotated[int, typer.Option("--mlps", min=0, help="MLPs to take.", rich_help_panel=FIND_PANEL)] = 3,
    draws: Annotated[
        int,
        typer.Option("--draws", min=1, max=1000, help="Draws of other heads to knock out.", rich_help_panel=FIND_PANEL),
    ] = 5,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train, or find and knock out only.", rich_help_panel=TRAIN_PANEL)
    ] = True,
    steps: Annotated[int, typer.Option(min=1, help="Updates.", rich_help_panel=TRAIN_PANEL)] = 200,
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Prompts of an update.", rich_help_panel=TRAIN_PANEL)] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAIN_PANEL)] = 1e-4,
    corpus: Annotated[
        str, typer.Option("--corpus", help="Plain text to see what is lost (see `vesalius corpora`), a file, or none.")
    ] = "foldoc",
    also: Annotated[str, typer.Option("--also", help="Other tasks to see what is lost, with commas between.")] = "",
    dtype: o.Dtype = None,
    memory: o.Memory = o.MEMORY_DEFAULT,
    *,
    where: RunOptions,
    machine: Machine,
) -> None:
    """Find the few heads and MLPs that do a task, knock them out, and train them alone.

    Path patching finds the parts; the task and plain text are measured without them, and without as many others. Then
    their slices of the weights are trained on the task's answers, all else held to the last bit, beside random parts
    and the whole model trained for as many steps; held-out questions tell what was gained, plain text and other tasks
    what was lost. Leaves the tuned model as an ordinary checkpoint, and a report.
    """
    import vesalius
    from vesalius.corpus import plain_text
    from vesalius.features.tuning import Plan, split
    from vesalius.tasks import TASKS

    screen = machine.screen(where.as_json)
    o.check_memory(memory)
    if not 0 < share <= 1:
        raise VesaliusError(f"--share {share:g} is no share of the heads; give more than 0, up to 1")
    plan = Plan(steps, rows, lr, seed=where.seed)
    made = o.task_of(task, n, where.seed, task_set, default_n=n)
    names = o.listed(also)
    for name in names:
        TASKS.entry(name)
    opened: Any = o.opened(screen, model, dtype, machine.device, None, machine.trust_remote_code)
    if opened.kind != "causal":
        raise VesaliusError(f"{opened.name} is {opened.kind}; parts are tuned in causal language models")
    longest = opened.n_positions or TOKENS
    text = None if corpus == "none" else plain_text(opened, corpus, TEXTS, min(TOKENS, longest))
    request = {
        "command": "tune", "model": opened.name, "model_fingerprint": opened.fingerprint, "dtype": str(opened.dtype),
        "task": task, "task_fingerprint": made.fingerprint, "share": share, "mlps": mlps, "draws": draws,
        "train": train, "steps": steps, "rows": rows, "lr": lr, "corpus": corpus,
        "text": None if text is None else text.tolist(), "also": names, "seed": where.seed,
    }  # fmt: skip
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done or (train and checkpoints.troubles(run.folder / "model")):
            prompts = split(made.pairs(opened), where.seed)
            controls = {x: vesalius.task(x, n=32, seed=where.seed).pairs(opened, require_single=True) for x in names}
            _work(screen, run, opened, prompts, text, controls, plan, request | {"memory": memory}, command)
    drawn(screen, run)
    _show(screen, run)


def _work(
    screen: Screen, run: Run, model: Any, prompts: Any, text: Any, controls: Any, plan: Any, request: dict[str, Any],
    command: str,
) -> None:  # fmt: skip
    from vesalius.features.tuning import compare, key_parts, knock_out

    with run.stage("find", 1), screen.step("path patching") as tell:
        found = key_parts(
            model, prompts.train, request["share"], request["mlps"], memory_gb=request["memory"], tell=tell
        )
    for name, scores in (("heads", found.head_scores), ("mlps", found.mlp_scores)):
        run.save_table(name, scores.to_frame().sort_values("score", ascending=False, ignore_index=True))
    with run.stage("knock out", 1), screen.step("knocking heads out") as tell:
        out = knock_out(model, found.heads, prompts.test, text, controls, request["draws"], request["seed"], tell)
    run.save_table("knocked_out", out)
    told: dict[str, Any] = {
        "model": model.name, "task": request["task"], "heads": [str(p) for p in found.heads],
        "mlps": [str(p) for p in found.mlps], "n_find": found.n, "asked": prompts.asked, "of_heads":
        len(model.parts(("head",))), "test": prompts.test.n_examples, "controls": list(controls), "checkpoint": None,
    }  # fmt: skip
    if request["train"]:
        part = run.folder / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(run.folder / "model", ignore_errors=True)
        with run.stage("train", 1), screen.step("training") as tell:
            tuned, log = compare(
                model, [*found.heads, *found.mlps], prompts, text, plan, controls=controls, save=part, tell=tell
            )
        part.rename(run.folder / "model")
        run.save_table("tuned", tuned)
        run.save_table("log", log)
        told["checkpoint"] = str(run.folder / "model")
    notes = (
        []
        if text is not None
        else ["no plain text was read (--corpus none), so heads were set to their means on the task"]
    )
    run.save_json("summary", told | {"lead": lead(told, run), "notes": notes, "command": command})


def lead(told: dict[str, Any], run: Run) -> str:
    """What was found, in a sentence or three."""
    out = run.table("knocked_out")
    whole, found = (out[out["without"] == k].iloc[0] for k in ("nothing", "found"))
    random = out[out["without"] == "random"]
    named = ", ".join(told["heads"][:4]) + (" ..." if len(told["heads"]) > 4 else "")
    text = (
        f"{len(told['heads'])} of {told['of_heads']} heads ({named}) do {told['task']} most: without them "
        f"{found['accuracy']:.0%} of the held-out questions are answered rightly ({whole['accuracy']:.0%} with them, "
        f"{random['accuracy'].mean():.0%} without as many others)"
    )
    if not np.isnan(found["text_loss"]):
        text += (
            f", and the loss on plain text rises by {found['text_loss'] - whole['text_loss']:.2f} nats "
            f"({(random['text_loss'] - whole['text_loss']).mean():.2f} without others)"
        )
    text += "."
    if run.has("tuned.parquet"):
        by: dict[str, dict[Any, Any]] = {str(r["tuned"]): r for r in run.table("tuned").to_dict("records")}
        names = {"found": "these parts alone", "random": "as many random ones", "full": "the whole model"}
        said = []
        for name in (k for k in by if k != "before"):
            change = by[name]["text_loss"] - by["before"]["text_loss"]
            cost = "" if np.isnan(change) else f" ({change:+.3f})"
            said.append(f"{names[name]} {by[name]['accuracy']:.0%}{cost}")
        text += f" Trained for as many steps, held-out accuracy goes from {by['before']['accuracy']:.0%} to: "
        text += ", ".join(said)
        text += "." if np.isnan(found["text_loss"]) else " (in brackets the change of the loss on plain text)."
    return text


def _show(screen: Screen, run: Run) -> None:
    found = stored_tables(run, ("knocked_out", "tuned"))
    shown = [t.drop(columns=[c for c in ("heads", "parts") if c in t]).round(3) for t in found.values()]
    conclude(screen, run, *(x for table in shown for x in (table, "")), **records_of(found))
