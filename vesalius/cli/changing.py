"""What the commands that change a model share: where the model goes, the yardstick, the card, the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude
from vesalius.errors import TaskError, VesaliusError
from vesalius.runs import Run

CARD_PANEL = "Card"
CARD_TASKS = "ioi,capital"

OutModel = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="New folder for the changed model; a folder `model` in the run if not given.",
        rich_help_panel=o.RUN_PANEL,
    ),
]
Runs = Annotated[
    Path | None,
    typer.Option("--runs", help="Folder that holds the runs; ./runs by default.", rich_help_panel=o.RUN_PANEL),
]
CardText = Annotated[
    str, typer.Option("--card-text", help="Plain text that both are measured on.", rich_help_panel=CARD_PANEL)
]
CardRows = Annotated[
    int, typer.Option("--card-rows", min=2, help="Rows of 128 tokens of it.", rich_help_panel=CARD_PANEL)
]
CardTasks = Annotated[
    str,
    typer.Option("--card-tasks", help="Tasks that must not move, with commas between.", rich_help_panel=CARD_PANEL),
]
CardN = Annotated[int, typer.Option("--card-n", min=2, help="Prompts of each task.", rich_help_panel=CARD_PANEL)]
Timed = Annotated[
    bool, typer.Option("--time/--no-time", help="Measure reading and writing speed.", rich_help_panel=CARD_PANEL)
]
LENGTH = 128


def row_length(model: Any, wanted: int = LENGTH) -> int:
    """Tokens of a row, as far as the model has positions."""
    return min(wanted, int(getattr(model.hf.config, "max_position_embeddings", 0) or wanted))


def causal(screen: Screen, spec: str, dtype: str | None, device: str | None, trust: bool, what: str) -> Any:
    """The model, opened whole; in the checkpoint's own precision unless asked otherwise."""
    opened = o.opened(screen, spec, dtype or "auto", device, None, trust)
    if opened.kind != "causal":
        raise VesaliusError(f"{opened.name} is {opened.kind}; {what}")
    return opened


def yardstick(
    model: Any, text: str, rows: int, tasks: str, n: int, seed: int, timed: bool, skip: int = 0
) -> tuple[Any, list[str]]:
    """What both sides are measured on, and notes on tasks that this tokenizer cannot ask."""
    import vesalius
    from vesalius.evaluate.card import Yardstick
    from vesalius.tasks import TASKS

    found, notes = {}, []
    for name in o.listed(tasks):
        TASKS.entry(name)
        try:
            found[name] = vesalius.task(name, n=n, seed=seed).pairs(model)
        except TaskError as error:
            notes.append(f"{name} is not on the card: {error}")
    return Yardstick.of(model, text, rows, row_length(model), found, skip=skip, seed=seed, timed=timed), notes


def measured(
    screen: Screen,
    run: Run,
    base: Any,
    models: Mapping[str, Callable[[], Any]],
    yard: Any,
) -> pd.DataFrame:
    """The card of several changed models beside the base; the first is the one that is kept. Stored as `card`.

    Args:
        models: makers by name: one model is held at a time. yard: from `yardstick`.
    """
    from dataclasses import replace

    from vesalius.evaluate.card import cards, measure

    with run.stage("measure", len(models) + 1) as stage:
        with screen.step(f"measuring {base.name}") as tell:
            before = measure(base, yard, progress=tell)
        stage.update(1)
        after = {}
        for number, (name, make) in enumerate(models.items()):
            with screen.step(f"measuring {name}") as tell:
                mine = yard if number == 0 else replace(yard, timed=False)
                after[name] = measure(make(), mine, base=base, progress=tell)
            stage.update(number + 2)
    card = cards(before, after, yard.seed)
    run.save_table("card", card)
    return card


def cleared(folder: Path) -> Path:
    """The folder without what a killed sitting left."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return folder


def value(card: pd.DataFrame, model: str, metric: str, column: str = "after") -> float:
    """One cell of a card."""
    row = card[(card["model"] == model) & (card["metric"] == metric)]
    return float(row[column].iloc[0])


def finish(screen: Screen, run: Run, out: Path | None, tables: Sequence[pd.DataFrame] = ()) -> None:
    """Delivers the model, draws the report, prints the card."""
    from vesalius.change.keeping import deliver
    from vesalius.report import change_report
    from vesalius.report.words import amount

    folder = deliver(run.folder / "model", out)
    change_report(run)
    card = run.table("card")
    shown = card[["model", "metric", "before", "after", "change", "low", "high"]]
    shown = shown.assign(**{k: shown[k].map(amount) for k in ("before", "after")})
    conclude(screen, run, shown, *tables, f"\nmodel   {folder}", checkpoint=str(folder), card=card.to_dict("records"))
