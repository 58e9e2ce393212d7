"""`vesalius repair`: a fault repaired in the few blocks that feel it, or loops taken out of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vesalius.cli import changing as c
from vesalius.cli import options as o
from vesalius.cli.groups import Machine, expanded
from vesalius.errors import VesaliusError
from vesalius.runs import Run

FAULT_PANEL = "The fault"
TRAIN_PANEL = "Training"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("repair")(expanded(repair))


def repair(
    model: o.ModelName = o.MODEL_DEFAULT,
    bad: Annotated[
        Path | None,
        typer.Option(
            "--bad",
            help=".jsonl of prompt, good, bad: what should follow, what should not.",
            rich_help_panel=FAULT_PANEL,
        ),
    ] = None,
    loops: Annotated[
        bool,
        typer.Option("--loops", help="Repair sentence-level repetition instead (DITTO).", rich_help_panel=FAULT_PANEL),
    ] = False,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            help="Plain text that must not move: a name of `vesalius corpora`, a file or a folder.",
            rich_help_panel=FAULT_PANEL,
        ),
    ] = "foldoc",
    keep_rows: Annotated[int, typer.Option("--keep-rows", min=2, help="Rows of it.", rich_help_panel=FAULT_PANEL)] = 64,
    loss: Annotated[
        str, typer.Option("--loss", help="sft, unlikelihood or dpo; chosen by the file.", rich_help_panel=TRAIN_PANEL)
    ] = "",
    how: Annotated[
        str, typer.Option("--how", help="dynamic, fixed, random or all blocks.", rich_help_panel=TRAIN_PANEL)
    ] = "dynamic",
    size: Annotated[
        str,
        typer.Option(
            "--size",
            help="Sensitivity by size, raw, less that of neutral text, or as a ratio to it.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = "size",
    k: Annotated[int, typer.Option("--k", min=1, help="Blocks trained at a step.", rich_help_panel=TRAIN_PANEL)] = 2,
    leash: Annotated[
        float, typer.Option("--leash", help="Weight of the divergence on plain text.", rich_help_panel=TRAIN_PANEL)
    ] = 1.0,
    gamma: Annotated[
        float,
        typer.Option(
            "--gamma", help="Of --loops: what a repeat may keep of its probability.", rich_help_panel=TRAIN_PANEL
        ),
    ] = 0.5,
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=o.MOST_STEPS, help="Updates.", rich_help_panel=TRAIN_PANEL)
    ] = 60,
    rows: Annotated[
        int, typer.Option("--rows", min=1, max=o.MOST_ROWS, help="Examples of one.", rich_help_panel=TRAIN_PANEL)
    ] = 8,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=TRAIN_PANEL)] = 5e-5,
    dtype: o.Dtype = None,
    *,
    yardstick: c.CardOptions,
    where: c.RunOptions,
    machine: Machine,
) -> None:
    """Repair a fault where it is felt: at every step only the most sensitive blocks are trained, on a leash.

    A quarter of the examples is held out and tells how well the repair carries over; beside it stands the whole model
    trained on the same examples. With --loops the model is trained to believe repeated sentences less and less, and
    greedy continuations tell how many loops are left. Leaves an ordinary checkpoint, its undo, and a report.
    """
    from vesalius.change.faults import RepairPlan, read_faults
    from vesalius.change.repetition import DittoPlan
    from vesalius.cli.repair_work import Work
    from vesalius.records import sha256

    screen = machine.screen(where.as_json)
    if (bad is None) != loops:
        raise VesaliusError("give --bad FILE (examples of a fault) or --loops (repetition), one of the two")
    card = yardstick.card(where.seed, keep_rows if keep == yardstick.card_text else 0)
    read = c.texts(screen, keep, yardstick.card_text)
    faults = [] if bad is None else read_faults(bad)
    if bad is not None and len(faults) < 4:
        raise VesaliusError(f"{bad} holds {len(faults)} examples; at least 4 are needed, a quarter is held out")
    kind = loss or ("dpo" if all(f.good and f.bad for f in faults) else "sft" if all(f.good for f in faults)
                    else "unlikelihood")  # fmt: skip
    plan: Any = DittoPlan(steps, rows, lr, gamma, seed=where.seed)
    if bad is not None:
        plan = RepairPlan(steps, rows, lr, k, how, size, kind, leash, seed=where.seed)  # type: ignore[arg-type]
    opened = c.to_change(screen, model, machine, "causal language models are repaired", dtype)
    request = {
        "command": "repair", "model": opened.name, "model_fingerprint": opened.fingerprint, "dtype": str(opened.dtype),
        "bad": "" if bad is None else sha256(bad), "loops": loops, "keep": keep, "keep_rows": keep_rows,
        "plan": vars(plan), "read": read, **card.request(),
    }  # fmt: skip

    def begin(run: Run, line: str) -> None:
        work = Work(screen, run, opened, plan, card, request, line)
        work.loops() if loops else work.fault(faults)

    c.carry_out(screen, request, where, begin)
