"""`vesalius card`: what was changed in a model, why, and what it cost; and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import changing as c
from vesalius.cli import options as o
from vesalius.cli.console import Screen, records_of, set_threads

COLUMNS = ("model", "metric", "unit", "before", "after", "change", "low", "high")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("card")(card)


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a changed model.", show_default=False)],
    again: Annotated[
        bool, typer.Option("--again", help="Measure it and the model it was made of anew, with the options below.")
    ] = False,
    undo: Annotated[
        Path | None, typer.Option("--undo", help="New folder for the model it was made of, to the last bit.")
    ] = None,
    card_text: c.CardText = "foldoc",
    card_rows: c.CardRows = 32,
    card_tasks: c.CardTasks = c.CARD_TASKS,
    card_n: c.CardN = 64,
    timed: c.Timed = True,
    seed: o.Seed = 0,
    out: o.NoOut = None,
    as_json: o.AsJson = False,
    device: o.Device = None,
    trust_remote_code: o.Trust = False,
    threads: o.Threads = None,
) -> None:
    """Show what was changed in a model, how, and what it cost before and after; take the change back.

    The card is the one that was written with the model; --again measures both models anew. --undo writes the model it
    was made of into a new folder: weights from what was recorded, or the very files, whose sha256 is compared.
    """
    from vesalius.change.keeping import restore, story_of

    screen = Screen(as_json)
    set_threads(threads)
    story = story_of(folder)
    rows: list[dict[str, Any]] = list(story.get("card") or [])
    notes: list[str] = []
    if again:
        rows, notes = _measured(screen, folder, story, card_text, card_rows, card_tasks, card_n, seed, timed, device,
                                trust_remote_code)  # fmt: skip
    of = story.get("of", {})
    what = story.get("change", story.get("edit", "changed"))
    made_of = f"{of.get('spec') or of.get('name', '?')} (fingerprint {of.get('fingerprint', '?')})"
    head = [f"{folder}: {what}, made of {made_of}"]
    asked = {k: v for k, v in story.get("request", {}).items() if k not in ("command", "model", "fingerprint")}
    if asked:
        head.append("  ".join(f"{k}={','.join(v) if isinstance(v, list) else v}" for k, v in asked.items()))
    table = pd.DataFrame(rows)
    shown = table[[k for k in COLUMNS if k in table]] if rows else "nothing was measured; --again measures it"
    restored = ""
    if undo is not None:
        with screen.step("taking the change back"):
            restored = str(restore(folder, undo))
    told = {**story, "card": rows, "notes": notes, "restored": restored}
    end = [f"note: {n}" for n in notes] + ([f"restored {restored}"] if restored else [])
    screen.show(told, *head, "", shown, *end)


def _measured(
    screen: Screen, folder: Path, story: dict[str, Any], text: str, n_rows: int, tasks: str, n: int, seed: int,
    timed: bool, device: str | None, trust: bool,
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    from vesalius.change.keeping import base_of
    from vesalius.evaluate.card import cards, measure

    spec = base_of(folder)
    base = c.causal(screen, spec, None, device, trust, "a card tells of causal language models")
    changed = c.causal(screen, str(folder), None, device, trust, "a card tells of causal language models")
    skip = int(story.get("request", {}).get("card_skip", 0))  # what the change itself has read
    yard, notes = c.yardstick(base, text, n_rows, tasks, n, seed, timed, skip)
    with screen.step(f"measuring {base.name}") as tell:
        before = measure(base, yard, progress=tell)
    with screen.step(f"measuring {folder}") as tell:
        after = measure(changed, yard, base=base, progress=tell)
    table = cards(before, {story.get("change", "changed"): after}, seed)
    found: list[dict[str, Any]] = records_of({"card": table})["card"]
    return found, notes
