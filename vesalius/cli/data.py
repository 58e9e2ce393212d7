"""`vesalius data`: the text a training run saw at a step, and the steps at which it saw a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen
from vesalius.errors import VesaliusError
from vesalius.run_index import find_run


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("data")(data)


def data(
    run: Annotated[str, typer.Argument(help="A training run: its folder, its name, or the start of it.")],
    step: Annotated[int | None, typer.Option(min=0, help="Show the rows of this step.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows (or places found) to print.")] = 4,
    find: Annotated[str | None, typer.Option("--find", help="Steps at which a text was seen.")] = None,
    document: Annotated[str | None, typer.Option(help="Steps at which a document was seen, by its id.")] = None,
    until: Annotated[int | None, typer.Option(min=0, help="Count exposures before this step.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Print the sha256 of the step's batch.")] = False,
    seed: o.NoSeed = 0,
    out: o.NoOut = None,
    as_json: o.AsJson = False,
) -> None:
    """Read what a training run saw: by step, by text, or by document.

    Nothing is replayed: the order is a function of the recipe, so any step is looked up at once. A text counts as seen
    at the step at which the last of its tokens was a target.
    """
    from vesalius.train.running import data_of_run, recipe_of

    screen = Screen(as_json)
    found = find_run(run)
    recipe = recipe_of(found)
    if [step is not None, find is not None, document is not None].count(True) != 1:
        raise VesaliusError("give one of --step, --find and --document")
    if step is not None and step >= recipe.steps:
        raise VesaliusError(f"--step {step}: the run has steps 0 to {recipe.steps - 1}")
    made = data_of_run(found, screen.note)
    end = recipe.steps if until is None else min(until, recipe.steps)
    summary: dict[str, Any] = {"run": str(Path(found.folder)), "fingerprint": made.source.fingerprint}
    if step is not None:
        shown = made.rows(step)
        summary |= {"step": step, "rows": shown}
        if verify:
            from vesalius.corpus import digest

            summary["sha256"] = digest(made.source.batch(step))
            screen.note(f"sha256 {summary['sha256']}")
        lines: list[Any] = [f"\nstep {step}: {len(shown)} rows of {made.source.length} tokens"]
        for row in shown[:rows]:
            lines += [f"\n-- row {row['row']}: {row['documents']}".rstrip(": "), row["text"]]
        if len(shown) > rows:
            lines.append(f"\n({len(shown) - rows} more rows; --rows {len(shown)} prints them)")
        screen.show(summary, *lines)
        return
    seen = made.seen(find, document, end)
    summary |= {"seen": seen.to_dict("records"), "times": len(seen), "until": end}
    quoted = find if find is None or len(find) <= 80 else f"{find[:77]}..."
    what = f'"{quoted}"' if find is not None else f"document {document}"
    if seen.empty:
        screen.show(summary, f"\n{what} was not seen before step {end}")
        return
    times = "once" if len(seen) == 1 else f"{len(seen)} times"
    head = f"\n{what} was seen {times} before step {end}, first at step {int(seen['last_step'].min())}:"
    more = [f"({len(seen) - rows * 5} more; --rows shows them)"] if len(seen) > rows * 5 else []
    screen.show(summary, head, seen.head(rows * 5), *more)
