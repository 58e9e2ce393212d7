"""`vesalius card`: what was changed in a model, why, and what it cost; and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import changing as c
from vesalius.cli import options as o
from vesalius.cli.console import Screen, records_of
from vesalius.cli.groups import Machine, expanded


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("card")(expanded(card))


def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a changed model.", show_default=False)],
    again: Annotated[
        bool, typer.Option("--again", help="Measure it and the model it was made of anew, with the options below.")
    ] = False,
    undo: Annotated[
        Path | None, typer.Option("--undo", help="New folder for the model it was made of, to the last bit.")
    ] = None,
    seed: o.Seed = 0,
    out: o.NoOut = None,
    as_json: o.AsJson = False,
    *,
    yardstick: c.TimedCardOptions,
    machine: Machine,
) -> None:
    """Show what was changed in a model, how, and what it cost before and after; take the change back.

    The card is the one that was written with the model; --again measures both models anew. --undo writes the model it
    was made of into a new folder: weights from what was recorded, or the very files, whose sha256 is compared.
    """
    from vesalius.change.keeping import restore, story_of

    screen = machine.screen(as_json)
    story = story_of(folder)
    rows: list[dict[str, Any]] = list(story.get("card") or [])
    notes: list[str] = []
    if again:
        skip = int((story.get("request") or {}).get("card_skip", 0))  # what the change itself has read
        wanted = yardstick.card(seed, skip)
        rows, notes = _measured(screen, folder, story, wanted, machine)
    of = story.get("of") or {}
    what = story.get("change", story.get("edit", "changed"))
    made_of = f"{of.get('spec') or of.get('name', '?')} (fingerprint {of.get('fingerprint', '?')})"
    head = [f"{folder}: {what}, made of {made_of}"]
    told_above = ("command", "model", "model_fingerprint", "read")
    asked = {k: v for k, v in (story.get("request") or {}).items() if k not in told_above}
    if asked:
        head.append("  ".join(f"{k}={','.join(v) if isinstance(v, list) else v}" for k, v in asked.items()))
    shown = c.shown_card(pd.DataFrame(rows)) if rows else "nothing was measured; --again measures it"
    restored = ""
    if undo is not None:
        with screen.step("taking the change back"):
            restored = str(restore(folder, undo))
    told = {**story, "card": rows, "notes": notes, "restored": restored}
    end = [f"note: {n}" for n in notes] + ([f"restored {restored}"] if restored else [])
    screen.show(told, *head, "", shown, *end)


def _measured(
    screen: Screen, folder: Path, story: dict[str, Any], wanted: c.Card, machine: Machine
) -> tuple[list[dict[str, Any]], list[str]]:
    from vesalius.change.keeping import base_of
    from vesalius.evaluate.card import cards, measure

    spec = base_of(folder)
    base = c.causal(screen, spec, machine, "a card tells of causal language models")
    changed = c.causal(screen, str(folder), machine, "a card tells of causal language models")
    yard, notes = wanted.yardstick(base)
    with screen.step(f"measuring {base.name}") as tell:
        before = measure(base, yard, progress=tell)
    with screen.step(f"measuring {folder}") as tell:
        after = measure(changed, yard, base=base, progress=tell)
    table = cards(before, {story.get("change", "changed"): after}, wanted.seed)
    found: list[dict[str, Any]] = records_of({"card": table})["card"]
    return found, notes
