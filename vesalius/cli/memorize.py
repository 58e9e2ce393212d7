"""`vesalius memorize`: what a training run memorized, when, after how many readings, and who foretold it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius import checkpoints
from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, set_threads, typed
from vesalius.errors import VesaliusError
from vesalius.run_index import find_run
from vesalius.runs import Run

EARLY = 0.6  # share of the training after which forecasts are judged: the sheet's claim is for 50 to 60 %

MOST_HELD_OUT = 500  # rows of the control


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("memorize")(memorize)


def memorize(
    run: Annotated[str, typer.Argument(help="A training run: its folder, its name, or the start of it.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Tokens of the prompt: the beginning of what was read.")] = 32,
    continuation: Annotated[
        int | None, typer.Option(min=1, help="Tokens to be recited after them; as many as the prompt by default.")
    ] = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Training rows asked about, and as many held-out ones, at most 500.")
    ] = 2000,
    document: Annotated[
        list[str] | None,
        typer.Option(help="Documents asked about too: an id, a pattern such as 'rfc79*', or canaries. Repeatable."),
    ] = None,
    target: Annotated[str, typer.Option(help="The checkpoint whose set is foretold: last, or a step.")] = "last",
    steps: Annotated[str, typer.Option(help="Which checkpoints: all, or a list such as 0,64,512.")] = "all",
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another run (or RUN@step512) as a predictor, such as a smaller model. Repeatable."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences decoded together; by memory if not given.")
    ] = None,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    threads: o.Threads = None,
) -> None:
    """Which training sequences each checkpoint recites, by exposures and by step, and who foretold them.

    A sequence is memorized when the model, given its first K tokens, goes on with the next ones exactly (greedy
    decoding). Held-out rows are the control. Earlier checkpoints, and other runs (`--against`), are judged as
    forecasts of the target's set. Leaves a run with all numbers and report.html; an interrupted one goes on after the
    last checkpoint it measured.
    """
    from vesalius.train.running import data_of_run, recipe_of

    screen = Screen(as_json)
    set_threads(threads)
    parent = find_run(run)
    recipe = recipe_of(parent)
    chosen, final = _steps(parent, steps, target)
    others = [_other(text) for text in against or []]
    if not rows and not document:
        raise VesaliusError("--rows 0 asks about nothing; name a --document too")
    request = {
        "command": "memorize",
        "model": recipe.name,
        "training": parent.hash,
        "prompt": k,
        "continuation": continuation or k,
        "rows": rows,
        "documents": list(document or []),
        "target": final,
        "steps": chosen,
        "against": [f"{other.hash}@{step}" for _, other, step in others],
        "seed": seed,
    }
    command = typed()
    with Run.start(request, out, fresh, command) as found:
        if not found.done:
            data = data_of_run(parent, screen.note)
            with screen.step("reading the order of training") as progress:
                asked = _asked(data, recipe.steps, rows, list(document or []), k, continuation or k, seed, progress)
            found.save_table("sequences", _described(asked, data.tokenizer))
            measured, flops = _measure(found, screen, parent, chosen, asked, batch)
            foreign, notes = _foreign(found, screen, others, asked, batch, data.source.fingerprint)
            _conclude(found, asked, measured, final, flops, foreign, notes, recipe.name, parent, command)
    drawn(screen, found)
    _show(screen, found)


def _steps(run: Run, text: str, target: str) -> tuple[list[int], int]:
    """The checkpoints to measure, none after the target, and the target."""
    place = run.folder / checkpoints.FOLDER
    final = checkpoints.chosen(place, target)[-1]
    return sorted({s for s in checkpoints.chosen(place, text) if s <= final} | {final}), final


def _other(text: str) -> tuple[str, Run, int]:
    """A predictor: its name, its run and its step."""
    from vesalius.model.sources.spec import STEP

    split = STEP.fullmatch(text)
    run = find_run(split["run"] if split else text)
    step = checkpoints.chosen(run.folder / checkpoints.FOLDER, (split["step"] if split else None) or "last")[-1]
    return f"{run.request.get('model', run.name)} step {step}", run, step


def _asked(data: Any, steps: int, rows: int, documents: list[str], k: int, m: int, seed: int, progress: Any) -> Any:
    """The sequences asked about: rows, documents, and held-out rows as the control."""
    from vesalius.evaluate import documents_of, rows_of

    groups = []
    if rows:
        groups.append(rows_of(data.source, steps, rows, k, m, seed=seed, progress=progress))
    for pattern in documents:
        group = "canary" if pattern == "canaries" else pattern
        groups.append(documents_of(data.viewer(), steps, pattern, None, k, m, seed=seed, group=group))
    if data.held_out is not None:
        wanted = min(MOST_HELD_OUT, rows or sum(len(g) for g in groups))
        enough = -(-wanted // data.held_out.rows)
        groups.append(rows_of(data.held_out, enough, wanted, k, m, seed=seed, group="held-out", seen=False))
    return sum(groups[1:], groups[0])


def _described(asked: Any, tokenizer: Any) -> pd.DataFrame:
    table: pd.DataFrame = asked.to_frame()
    if tokenizer is not None:
        parts = {"prompt": asked.ids[:, : asked.prompt], "continuation": asked.ids[:, asked.prompt :]}
        for name, ids in parts.items():
            table[name] = [str(tokenizer.decode(row.tolist())) for row in ids]
    return table


def _measure(
    found: Run, screen: Screen, parent: Run, steps: list[int], asked: Any, batch: int | None
) -> tuple[pd.DataFrame, dict[int, float]]:
    """Scores of all checkpoints, one stored piece each, and what training up to each took."""
    import vesalius
    from vesalius.evaluate import at_checkpoint

    tables, flops = [], {}
    with found.stage("checkpoints", len(steps)) as stage, screen.step("reciting") as progress:
        for i, step in enumerate(steps):
            name = f"scores-{step}"
            if not found.has(name) or not found.has(f"cost-{step}"):
                model = vesalius.open(f"{parent.folder.resolve()}@step{step}")
                found.save_json(f"cost-{step}", {"flops": _flops(model, parent, step)})
                found.save_table(name, at_checkpoint(model, step, asked, batch=batch))
            tables.append(found.table(name))
            flops[step] = float(found.json(f"cost-{step}")["flops"])
            stage.update(i + 1)
            progress(i + 1, len(steps))
    return pd.concat(tables, ignore_index=True), flops


def _flops(model: Any, run: Run, step: int) -> int:
    """6 N T of training up to a step."""
    from vesalius.train.ledger import six_n_t
    from vesalius.train.running import recipe_of

    data = recipe_of(run).data
    return six_n_t(model.hf, step * data.rows * data.length)


def _foreign(
    found: Run, screen: Screen, others: list[tuple[str, Run, int]], asked: Any, batch: int | None, fingerprint: str
) -> tuple[dict[str, tuple[pd.DataFrame, float]], list[str]]:
    """Scores of other runs' checkpoints, and what training them took."""
    import vesalius
    from vesalius.evaluate import at_checkpoint
    from vesalius.train.assembly import data_of
    from vesalius.train.running import recipe_of

    scored: dict[str, tuple[pd.DataFrame, float]] = {}
    notes = []
    for i, (name, run, step) in enumerate(others):
        if data_of(recipe_of(run)).source.fingerprint != fingerprint:
            notes.append(f"{name} read other data or another order; what it had seen is counted by this run's order")
        if not found.has(f"against-{i}") or not found.has(f"cost-against-{i}"):
            with screen.step(f"reciting with {name}") as progress:
                model = vesalius.open(f"{run.folder.resolve()}@step{step}")
                found.save_json(f"cost-against-{i}", {"flops": _flops(model, run, step)})
                found.save_table(f"against-{i}", at_checkpoint(model, step, asked, batch=batch, progress=progress))
        scored[name] = (found.table(f"against-{i}"), float(found.json(f"cost-against-{i}")["flops"]))
    return scored, notes


def _conclude(
    found: Run,
    asked: Any,
    measured: pd.DataFrame,
    final: int,
    flops: dict[int, float],
    foreign: dict[str, tuple[pd.DataFrame, float]],
    notes: list[str],
    name: str,
    parent: Run,
    command: str,
) -> None:
    """Stores tables and summary."""
    from vesalius import evaluate as e

    last = measured[measured["step"] == final]
    shares = e.share(last, ["group"])
    trained = measured[measured["group"] != "held-out"]
    at_end = trained[trained["step"] == final]
    place = e.place_of(asked, at_end[at_end["group"] == at_end["group"].iloc[0]])
    predicted = e.forecast_table(e.forecasts(measured, final, flops, foreign))
    truth = last.sort_values("sequence")["extractible"].to_numpy()
    early = [s for s in sorted(flops) if 0 < s <= EARLY * final]
    curves, trajectory = [], None
    if early:
        trajectory = e.trajectory_forecast(e.trajectories(measured, early[-1]), truth)
        one = measured[measured["step"] == early[-1]].sort_values("sequence")
        curves.append(e.precision_recall(one["score"], truth).assign(predictor=f"step {early[-1]}"))
    for other, (rows, _) in foreign.items():
        curves.append(e.precision_recall(rows.sort_values("sequence")["score"], truth).assign(predictor=other))
    found.save_table("scores", measured)
    found.save_table("by_step", e.by_step(measured))
    found.save_table("by_exposures", e.by_exposures(trained))
    found.save_table("by_dose", e.by_dose(trained))
    found.save_table("histogram", e.histogram(measured))
    found.save_table("places", place.counts)
    found.save_table("quantiles", place.quantiles)
    found.save_table("forecasts", predicted)
    if curves:
        found.save_table("precision_recall", pd.concat(curves, ignore_index=True))
    close = int((last["margin"] < e.CLOSE).sum())
    notes = [*notes, *(f"left out: {n} {why}" for why, n in asked.left_out)]
    if close:
        notes.append(
            f"{close} of {len(last)} recitals had a choice closer than {e.CLOSE} logits, which rounding may turn"
        )
    if cut := sum(asked.cut):
        total = sum(len(r) for r in asked.reads)
        notes.append(f"{cut} of {total} readings fell on two rows, so that the beginning was out of the model's sight")
    told = {
        "run": name,
        "training": str(parent.folder),
        "target": final,
        "flops": flops[final],
        "prompt": asked.prompt,
        "continuation": asked.continuation,
        "memorized": shares.to_dict("records"),
        "dose_response": e.dose_response(at_end),
        "place": place.to_json(),
        "early": early[-1] if early else None,
        "trajectory": None
        if trajectory is None
        else {k: v for k, v in asdict(trajectory).items() if k != "probability"},
    }
    told |= {"lead": lead(told, shares, predicted), "notes": notes, "command": command}
    found.save_json("summary", told)


def lead(told: dict[str, Any], shares: pd.DataFrame, predicted: pd.DataFrame) -> str:
    """The findings in a few sentences."""
    parts = []
    for row in shares.to_dict("records"):
        kind = {"row": "training rows", "held-out": "held-out rows", "canary": "canaries"}.get(
            row["group"], f"documents {row['group']}"
        )
        parts.append(f"{row['memorized']:,} of {row['n']:,} {kind} ({row['share']:.1%})")
    text = f"Given {told['prompt']} tokens, step {told['target']:,} recites the next {told['continuation']} of "
    text += ", ".join(parts) + "."
    if told["early"] is not None:
        it = predicted[(predicted["predictor"] == f"step {told['early']}") & (predicted["among"] == "all")].iloc[0]
        if it["memorized"]:
            text += f" Step {told['early']:,} had foretold {it['recall']:.0%} of them"
            text += f", right in {it['precision']:.0%} of its forecasts." if it["foretold"] else "."
    if told["place"]["poisson"] is not None:
        fits = "as if by chance" if told["place"]["poisson"] else "unevenly"
        text += f" What is memorized of sequences read equally often lies {fits} in the order of training."
    return text


def _show(screen: Screen, found: Run) -> None:
    summary = found.json("summary")
    steps, predicted = found.table("by_step"), found.table("forecasts")
    doses = found.table("by_dose")
    doses = doses[doses["step"] == summary["target"]]
    over = steps[steps["among"] == "all"].pivot_table(index="step", columns="group", values="share").reset_index()
    wanted = ["predictor", "among", "flops", "precision", "recall", "f1", "auroc"]
    place = {"run_folder": str(Path(found.folder)), "report": str(found.folder / "report.html")}
    lines: list[Any] = ["", "share memorized by checkpoint", over]
    lines += [
        "",
        f"by times read until step {summary['target']} (2 stands for 2 or 3, 4 for 4 to 7, ...)",
        doses[["group", "dose", "n", "share", "low", "high"]],
    ]
    if len(predicted):
        shown = predicted.loc[predicted["among"] == "all", wanted].copy()
        shown["flops"] = [f"{f:.2g}" for f in shown["flops"]]
        lines += ["", f"forecasts of step {summary['target']}", shown]
    lines += [f"\n{summary['lead']}", *[f"note: {n}" for n in summary["notes"]]]
    lines += [f"\nrun     {found.folder}", f"report  {place['report']}"]
    tables = {"by_step": steps, "by_dose": doses, "forecasts": predicted}
    screen.show(summary | {n: t.to_dict("records") for n, t in tables.items()} | place, *lines)
