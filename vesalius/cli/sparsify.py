"""`vesalius sparsify`: most weights of a model become zero while it learns, and which of them is learnt too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import changing as c
from vesalius.cli import options as o
from vesalius.cli.console import Screen
from vesalius.cli.groups import Machine, expanded
from vesalius.runs import Run

SPARSE_PANEL = "What goes"
TRAIN_PANEL = "Training"
NAMES = {"pst": "PST", "full": "a score for each", "movement": "movement pruning", "magnitude": "magnitude"}


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("sparsify")(expanded(sparsify))


def sparsify(
    model: o.ModelName = o.MODEL_DEFAULT,
    sparsity: Annotated[
        float,
        typer.Option("--sparsity", help="Share of every matrix that becomes zero.", rich_help_panel=SPARSE_PANEL),
    ] = 0.5,
    how: Annotated[
        str,
        typer.Option(
            "--how",
            help="pst: scores in few numbers; full: a number for every weight; movement: the same without its size; "
            "magnitude: the smallest, at once.",
            rich_help_panel=SPARSE_PANEL,
        ),
    ] = "pst",
    rank: Annotated[
        int,
        typer.Option(
            "--rank", min=1, max=1024, help="Of PST's scores and of its update.", rich_help_panel=SPARSE_PANEL
        ),
    ] = 8,
    on: Annotated[
        str,
        typer.Option(
            "--on",
            help="What it learns: a name of `vesalius corpora`, a file or a folder of text, or a .jsonl of prompt, "
            "good.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = "foldoc",
    texts: Annotated[
        int, typer.Option("--texts", min=2, help="Texts of a corpus, 128 tokens each.", rich_help_panel=TRAIN_PANEL)
    ] = 256,
    steps: Annotated[
        int, typer.Option("--steps", min=1, max=o.MOST_STEPS, help="Updates.", rich_help_panel=TRAIN_PANEL)
    ] = 200,
    rows: Annotated[
        int,
        typer.Option("--rows", min=1, max=o.MOST_ROWS, help="Texts or examples of one.", rich_help_panel=TRAIN_PANEL),
    ] = 8,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=TRAIN_PANEL)] = 3e-4,
    control: Annotated[
        bool,
        typer.Option(
            "--control/--no-control",
            help="Also drop the smallest weights at once, and train as long.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = True,
    dtype: o.Dtype = None,
    *,
    yardstick: c.CardOptions,
    where: c.RunOptions,
    machine: Machine,
) -> None:
    """Make most weights of a model zero while it learns a task; which of them stay is learnt with few numbers.

    PST: a weight's score is its size and what a low-rank matrix, a row and a column learnt of it. The smallest scores
    go, more and more of them, and a low-rank update makes up for them. Beside it stand the smallest weights dropped at
    once and the rest trained as long. Zeros in a plain checkpoint make it neither smaller nor faster by themselves.
    Leaves an ordinary checkpoint, and a report.
    """
    from vesalius.change.lessons import read_lesson, texts_read
    from vesalius.change.sparse import SparsePlan
    from vesalius.records import sha256

    screen = machine.screen(where.as_json)
    plan = SparsePlan(sparsity, how, steps, rows, lr, rank, seed=where.seed)  # type: ignore[arg-type]
    examples = read_lesson(on)
    card = yardstick.card(where.seed, texts_read(texts) if yardstick.card_text == on else 0)
    read = c.texts(screen, yardstick.card_text, *([on] if examples is None else []))
    opened = c.to_change(
        screen, model, machine,
        "the command makes causal language models sparse, vesalius.change.sparse.sparsify any in Python", dtype,
    )  # fmt: skip
    request = {
        "command": "sparsify", "model": opened.name, "model_fingerprint": opened.fingerprint,
        "dtype": str(opened.dtype),
        "on": on if examples is None else sha256(Path(on)), "plan": plan.describe(), "texts": texts,
        "control": control, "read": read, **card.request(),
    }  # fmt: skip
    c.carry_out(
        screen, request, where,
        lambda run, line: _work(screen, run, opened, on, examples, plan, card, request, line),
    )  # fmt: skip


def _work(
    screen: Screen, run: Run, model: Any, on: str, examples: Any, plan: Any, card: c.Card, request: dict[str, Any],
    command: str,
) -> None:  # fmt: skip
    from vesalius.change.keeping import keep_change
    from vesalius.change.lessons import Lesson
    from vesalius.change.sparse import sparsify as work

    lesson = Lesson.of(model, on, examples, request["texts"], c.row_length(model), plan.rows, plan.seed)
    judged, made, first = [{"model": "before", **lesson.judge(model)}], {}, None
    for name, each in ways(plan, request["control"]).items():
        with run.stage(name, 1), screen.step(f"becoming sparse by {name}") as tell:
            done = work(model, lesson.source, lesson.objective, each, tell=tell)
        judged.append({"model": name, **lesson.judge(done.model)})
        made[name] = done.model
        first = first or replace(done, trained=done.model)
    assert first is not None
    run.save_table("log", first.log)
    run.save_table("maps", first.maps)
    held = pd.DataFrame(judged)
    run.save_table("held_out", held)
    yard, notes = card.yardstick(model)
    measured = c.measured(screen, run, model, c.at_hand(made), yard)
    with run.stage("save", 1), screen.step("saving"):
        keep_change(first.model, model, c.cleared(run.folder / "model"), "sparsify", request, measured)
    zeros, numbers = int(first.maps["zeros"].sum()), int((first.maps["out"] * first.maps["in"]).sum())
    told = {"sparsity": plan.sparsity, "zeros": zeros, "numbers": numbers, "trained": first.trained_numbers,
            "of_trained": first.trained_numbers / numbers}  # fmt: skip
    change = c.value(measured, plan.how, "perplexity", "change")
    run.save_json("summary", {
        "model": model.name, "change": "sparsify", "title": f"{model.name}, {plan.sparsity:.0%} of its matrices zero",
        **told, "lead": lead(model.name, plan, told, held), "notes": notes, "command": command,
        "facts": [["zeros", f"{zeros / 1e6:.1f} M", f"of {numbers / 1e6:.1f} M in the blocks' matrices"],
                  ["trained", f"{told['of_trained']:.1%}", f"as many numbers as that share: {first.trained_numbers:,}"],
                  ["perplexity", f"x {change:.2f}", "of plain text"]],
        "tables": [
            {"name": "held_out", "title": "What was learnt, on what was held out",
             "read": "said: share of answers that greedy decoding gives; log_p: mean, of a token."},
            {"name": "maps", "title": "Matrix by matrix",
             "read": "trained: numbers; otherwise: share of what stays that would have gone by size alone."},
        ],
    })  # fmt: skip


def ways(plan: Any, control: bool) -> dict[str, Any]:
    """The plan, and beside it the control."""
    beside = {"magnitude": replace(plan, how="magnitude")} if control and plan.how != "magnitude" else {}
    return {plan.how: plan, **beside}


def lead(model: str, plan: Any, told: dict[str, Any], held: pd.DataFrame) -> str:
    """What came out, in two sentences."""
    found = held.set_index("model")
    what = "perplexity" if "perplexity" in found else "said"
    shown = {name: f"{v:.1f}" if what == "perplexity" else f"{v:.0%}" for name, v in found[what].items()}
    text = (
        f"{plan.sparsity:.0%} of the numbers in every matrix of {model}'s blocks are zero by {NAMES[plan.how]}; "
        f"{told['trained']:,} numbers were trained ({told['of_trained']:.1%} of the matrices'). "
    )
    of = "Perplexity of held-out texts" if what == "perplexity" else "The share of held-out answers that are said"
    text += f"{of} goes from {shown['before']} to {shown[plan.how]}"
    if "magnitude" in shown and plan.how != "magnitude":
        text += f" (the smallest dropped at once, trained as long: {shown['magnitude']})"
    return text + ". The zeros are stored as zeros: files and times stay what they were."
