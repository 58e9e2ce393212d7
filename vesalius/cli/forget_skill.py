"""What `vesalius forget --skill` does: a skill forgotten by random labels, and the audit of what is really gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from vesalius.cli import changing as c
from vesalius.cli.console import Screen
from vesalius.errors import VesaliusError
from vesalius.runs import Run


def work(
    screen: Screen, run: Run, model: Any, items: Sequence[Any], plan: Any, card: c.Card, request: dict[str, Any],
    command: str,
) -> None:  # fmt: skip
    """The matrix of all tasks, then the first one forgotten for good, measured and kept."""
    from vesalius.change.audit import ask, halves, matrix, predictors, still_there, unlearn
    from vesalius.change.keeping import keep_change

    tasks = list(dict.fromkeys(i.task for i in items))
    with run.stage("matrix", 1), screen.step("forgetting every task in turn") as tell:
        found = matrix(model, items, plan, tell)
    run.save_table("matrix", found)
    run.save_table("predictors", predictors(model, items, found, plan.seed))
    base = model.copied()
    train, held = halves(items, tasks[0], plan.seed)
    mine, notes, probes = [i for i in items if i.task == tasks[0]], list[str](), []
    with run.stage("forget", 1), screen.step(f"forgetting {tasks[0]}") as tell:
        _, log = unlearn(model, train, plan, tell, held)
    run.save_table("log", log)
    with run.stage("probe", 1), screen.step("probing"):
        for name, one in (("before", base), ("forgot", model)):
            try:
                probes.append(still_there(one, mine, plan.seed).assign(model=name))
            except VesaliusError as error:
                notes = [f"no probe was fitted: {error}"]
    if probes:
        run.save_table("probes", pd.concat(probes, ignore_index=True))
    yard, missing = card.yardstick(base)
    measured = c.measured(screen, run, base, {"forgot": lambda: model}, yard)
    with run.stage("save", 1), screen.step("saving"):
        keep_change(model, base, c.cleared(run.folder / "model"), "forget", request, measured)
    own = found[(found["forgot"] == tasks[0]) & (found["asked"] == tasks[0])].set_index("items")
    after = ask(model, held)
    lead = (
        f"Trained on random labels of half of {tasks[0]}, accuracy there goes from {own.loc['trained', 'before']:.0%} "
        f"to {own.loc['trained', 'after']:.0%}, and on the other half from {own.loc['held out', 'before']:.0%} to "
        f"{own.loc['held out', 'after']:.0%} (chance {own.loc['held out', 'chance']:.0%}; answers' entropy "
        f"{after.entropy:.2f} bits)."
    )
    if probes:
        best = [float(t["accuracy"].max()) for t in probes]
        lead += f" A probe reads the answer off the model with {best[0]:.0%} before and {best[1]:.0%} after."
    run.save_json("summary", {
        "model": model.name, "change": "forget", "title": f"{model.name} without {tasks[0]}", "lead": lead,
        "notes": notes + missing, "command": command,
        "facts": [["forget ratio", f"{own.loc['held out', 'ratio']:.2f}", "on items that were not trained on"],
                  ["on those trained on", f"{own.loc['trained', 'ratio']:.2f}", "1: all of what was above chance"]],
        "tables": [
            {"name": "matrix", "title": "Every task forgotten in turn, every task asked",
             "read": "ratio: of what was above chance, the share that is gone; [low, high] 95 % over items."},
            {"name": "predictors", "title": "What might foretell it",
             "read": "confidence and spread of states before; the last row: rank correlations with the ratio."},
            *([{"name": "probes", "title": "Is it gone, or only not said?",
                "read": "linear probes of the right answer at every layer; control: on labels drawn by chance."}]
              if probes else []),
        ],
    })  # fmt: skip
