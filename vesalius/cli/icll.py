"""`vesalius icll`: how well a model learns languages in its context, like which learner, and by which heads."""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
import typer

from vesalius import checkpoints
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, records_of, set_threads, stored_tables, typed
from vesalius.errors import VesaliusError
from vesalius.run_index import find_run
from vesalius.runs import Run

ROWS = 64  # languages of a step
LOOKED = 16  # of them on which heads are looked at
MARGIN = 0.1  # above chance, from which a head is said to read n-grams


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("icll")(icll)


def icll(
    run: Annotated[str, typer.Argument(help="A training run on icll (`vesalius train icll`).")],
    step: Annotated[str, typer.Option("--step", help="Which checkpoint: last, or a step that was saved.")] = "last",
    n: Annotated[int, typer.Option("--n", min=2, help="Languages it has to learn.")] = 128,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Look at every head, and ablate each.")] = True,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    threads: o.Threads = None,
) -> None:
    """How well a model learns a random regular language in its context, and whose guesses its own are like.

    Holds its distribution over the next symbol against the true automaton's on languages drawn anew, beside learners
    that count 1- to 4-grams in the same context and a uniform guess; finds the heads that read what stood after earlier
    occurrences of the last 1, 2, 3 tokens, and ablates every head. `vesalius train icll` trains a transformer,
    `vesalius train icll-ngram` an LSTM with hard-wired n-gram heads.
    """
    import vesalius
    from vesalius.corpus.automata import RegularLanguages
    from vesalius.train.running import recipe_of

    screen = Screen(as_json)
    set_threads(threads)
    parent = find_run(run)
    recipe = recipe_of(parent)
    if recipe.data.synthetic != RegularLanguages.name:
        what = recipe.data.corpus if recipe.data.synthetic is None else recipe.data.synthetic
        raise VesaliusError(f"{recipe.name} was trained on {what}, not on icll; train one (`vesalius train icll`)")
    saved = checkpoints.chosen(parent.folder / checkpoints.FOLDER, step)
    if len(saved) != 1:
        raise VesaliusError(f"--step {step} means {len(saved)} checkpoints; give one, or last")
    rows = min(n, ROWS)
    task = RegularLanguages(
        rows=rows, length=recipe.data.length, seed=recipe.seed + seed, split="icll", **recipe.data.settings
    )
    request = {
        "command": "icll", "model": recipe.name, "training": parent.hash, "step": saved[0], "n": n, "heads": heads,
        "seed": seed,
    }  # fmt: skip
    command = typed()
    with Run.start(request, out, fresh, command) as found:
        if not found.done:
            _work(screen, found, vesalius.open(f"{parent.folder}@step{saved[0]}"), task, request, command)
    drawn(screen, found)
    _show(screen, found)


def _work(screen: Screen, run: Run, model: Any, task: Any, request: dict[str, Any], command: str) -> None:
    import torch

    from vesalius.evaluate.icll import measure, without_heads
    from vesalius.find.detectors.looks import heads_with_patterns
    from vesalius.find.detectors.ngrams import in_prompts

    with run.stage("guesses", 1), screen.step("learning languages in context"):
        found = measure(model, task, -(-request["n"] // task.rows), request["seed"])
    run.save_table("readers", found.readers)
    run.save_table("strings", found.by_strings)
    told: dict[str, Any] = {
        "model": request["model"], "training": request["training"], "step": request["step"], "nearest": found.nearest,
        "settings": dict(task.options), "length": task.length,
    }  # fmt: skip
    notes: list[str] = []
    if request["heads"]:
        try:
            heads_with_patterns(model)
        except VesaliusError as refusal:
            notes.append(f"heads were not looked at: {refusal}")
        else:
            ids = torch.from_numpy(task.batch(0).ids[:LOOKED, :-1])
            with run.stage("heads", 1), screen.step("looking at heads"):
                scores = in_prompts(model, ids, request["seed"])
                whole, damage = without_heads(model, task)
            run.save_table("heads", _heads(scores, whole, damage))
    run.save_json("summary", told | {"lead": lead(found, told, run), "notes": notes, "command": command})


def _heads(scores: Any, whole: float, damage: dict[str, float]) -> pd.DataFrame:
    """A row a head: its n-gram scores less what chance gives, and the TVD without it."""
    rows = []
    for i, part in enumerate(scores["1-gram"].parts):
        above = {k: float(s.values[i] - s.columns["null"][i]) for k, s in scores.items()}
        rows.append({"part": str(part), **above, "q": float(scores["2-gram"].columns["q"][i]),
                     "tvd_without": damage[str(part)], "rise": damage[str(part)] - whole})  # fmt: skip
    return pd.DataFrame(rows).sort_values("2-gram", ascending=False, ignore_index=True)


def lead(found: Any, told: dict[str, Any], run: Run) -> str:
    """What was found, in a sentence or three."""
    by = found.readers.set_index("reader")
    mine = by.loc["model"]
    text = (
        f"On languages drawn anew, {told['model']} is {mine['tvd']:.2f} away from the true distribution of the "
        f"next symbol (bigram learner {by.loc['2-gram', 'tvd']:.2f}, 3-gram {by.loc['3-gram', 'tvd']:.2f}, uniform "
        f"{by.loc['uniform', 'tvd']:.2f}), and its best guess is possible in {mine['valid']:.0%}. Its guesses are "
        f"nearest to those of a {found.nearest} learner ({by.loc[found.nearest, 'away']:.2f})."
    )
    if run.has("heads.parquet"):
        best = run.table("heads").iloc[0]
        if best["2-gram"] < MARGIN:
            return f"{text} No head reads what stood after earlier occurrences of the last two tokens."
        text += (
            f" {best['part']} reads most what stood after the last two tokens' earlier occurrences "
            f"({best['2-gram']:.2f} above chance); without it the distance rises by {best['rise']:.2f}."
        )
    return text


def _show(screen: Screen, run: Run) -> None:
    found = stored_tables(run, ("readers", "strings", "heads"))
    shown = [x for name, table in found.items() if name != "strings" for x in (table.round(3).head(12), "")]
    conclude(screen, run, *shown[:-1], **records_of(found))
