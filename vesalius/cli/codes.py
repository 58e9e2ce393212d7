"""`vesalius codes`: the discrete codes of every head, and which of them are new where the task can be solved."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, typed
from vesalius.runs import Run

SHOWN = 12  # heads in the terminal's table


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("codes")(g.expanded(codes))


def codes(
    model: o.ModelName = o.MODEL_DEFAULT,
    task: o.TaskName = "ioi",
    n: Annotated[
        int, typer.Option("--n", min=1, help="Prompts on which the task can be solved, and as many not.")
    ] = 10,
    task_set: o.TaskSet = None,
    features: Annotated[
        int, typer.Option(min=2, max=10_000, help="Features of the small autoencoder: how fine codes are.")
    ] = 20,
    l1: Annotated[float, typer.Option("--l1", min=0.0, help="Weight of its sparsity penalty.")] = 0.05,
    steps: Annotated[
        int, typer.Option(min=1, max=100_000, help="Steps of training, each over all prompts and heads.")
    ] = 200,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Autoencoders whose scores are averaged.")] = 5,
    of: Annotated[str, typer.Option("--of", help="z (a head's mix of values) or write (what it adds).")] = "z",
    count: Annotated[str, typer.Option(help="examples, codes or share: what is counted.")] = "examples",
    position: Annotated[
        str | None, typer.Option(help="A named position of the task; where the answer is read by default.")
    ] = None,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Which heads take on codes that they never show where the task cannot be solved.

    A small sparse autoencoder turns each head's output on each prompt into one number, its code, with no intervention.
    Beside every head stands the plain baseline, how far its output moves between the two prompts of a pair. For `ioi`
    the prompts that cannot be solved name three people (corruption=abc), unless --task-set says otherwise.
    """
    from vesalius.features.dictionaries.codes import codes_of, head_vectors, heads_of, places_of, rows_of
    from vesalius.find.base import find

    screen = machine.screen(where.as_json)
    items = list(task_set or [])
    if task == "ioi" and not any(i.startswith("corruption") for i in items):
        items.append("corruption=abc")
    made = o.task_of(task, n, where.seed, items, default_n=10)
    opened = machine.opened(screen, model)
    pairs = made.pairs(opened)
    settings: dict[str, Any] = {
        "features": features,
        "l1": l1,
        "steps": steps,
        "seeds": seeds,
        "of": of,
        "position": position,
    }
    request = {
        "command": "codes",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "task": task,
        "task_fingerprint": made.fingerprint,
        "prompts": pairs.fingerprint,
        **settings,
        "count": count,
        "seed": where.seed,
        "dtype": machine.dtype,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            with screen.step("reading heads") as progress:
                scores = find("sae-codes", opened, pairs, seed=where.seed, progress=progress, count=count, **settings)
                plain = find("activation-difference", opened, pairs, of=of, position=position)
            run.save_scores("scores", scores)
            run.save_scores("baseline", plain)
            rows = rows_of(pairs)
            places = places_of(pairs, position, rows)
            sides = [head_vectors(opened, pairs, side, of, places, rows) for side in ("clean", "corrupted")]  # type: ignore[arg-type]
            one = codes_of(
                heads_of(opened), *sides, features=features, l1=l1, steps=steps, seeds=range(1), seed=where.seed
            )
            run.save_table("codes", one.to_frame())
            tokenizer = opened.tokenizer
            texts = [[tokenizer.decode(ids[m.bool()]) for ids, m in zip(side[rows], pairs.mask[rows], strict=True)]
                     for side in (pairs.clean, pairs.corrupted)] if tokenizer else [[], []]  # fmt: skip
            run.save_json("prompts", {"positive": texts[0], "negative": texts[1]})
            run.save_array("seen", positive=one.positive[0], negative=one.negative[0])
            agree = scores.correlation(plain) if np.ptp(scores.values) > 0 else float("nan")
            summary = {
                "model": opened.name,
                "task": task,
                "n": pairs.n_examples,
                "agreement": agree,
                "fvu": scores.info["fvu"],
                "lead": lead(scores, plain, pairs.n_examples, agree),
                "notes": notes(scores, items, task),
                "command": command,
            }
            run.save_json("summary", summary)
    drawn(screen, run)
    _show(screen, run)


def lead(scores: Any, plain: Any, n: int, agree: float) -> str:
    """What was found, in two sentences."""
    best = [f"{p} ({v:.2f})" for p, v in zip(scores.top(4).parts, scores.top(4).values, strict=True)]
    alike = "cannot be compared by rank" if math.isnan(agree) else f"ranks heads alike by Spearman {agree:.2f}"
    return (
        f"From {n} prompts that can be solved and {n} that cannot, codes never seen on the latter are commonest in "
        f"{', '.join(best)}. The plain difference of outputs {alike}, and puts "
        f"{', '.join(map(str, plain.top(4).parts))} first."
    )


def notes(scores: Any, items: list[str], task: str) -> list[str]:
    """What a reader must know."""
    found = []
    if task == "ioi" and "corruption=swap" in items:
        found.append("with corruption=swap both prompts can be solved: codes tell which name, not whether")
    if not (scores.values > 0).any():
        found.append("no head has a code of its own where the task can be solved: lower --l1, or raise --features")
    full = float((scores.values > 0.8).mean())
    if full > 0.3:
        found.append(
            f"{full:.0%} of the heads score above 0.8: most have a code of their own on every prompt; lower --features"
        )
    return found


def _show(screen: Screen, run: Run) -> None:
    scores, plain = run.scores("scores"), run.scores("baseline")
    rank = {str(p): i + 1 for i, p in enumerate(plain.top(len(plain)).parts)}
    table = scores.top(SHOWN).to_frame()[["part", "score", "low", "high", "codes"]]
    table["baseline"] = [plain[str(p)] for p in table["part"]]
    table["its rank"] = [rank[str(p)] for p in table["part"]]
    told = scores.to_frame()[["part", "score"]].to_dict("records")
    conclude(screen, run, table, scores=told)
