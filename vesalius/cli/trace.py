"""`vesalius trace`: where a fact is recalled, step by step, and at which step a wrong one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import RunStore, Screen, drawn, staged, typed
from vesalius.errors import VesaliusError
from vesalius.runs import Run
from vesalius.scores import Scores

FACT_PANEL = "Fact"
SHOWN = 10


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("trace")(g.expanded(trace))


def _fact(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=FACT_PANEL, **more)


def trace(
    prompt: Annotated[str, typer.Argument(help="A prompt up to where the answer begins.")],
    model: o.ModelName = o.MODEL_DEFAULT,
    topic: Annotated[
        str | None, _fact("--topic", help="What the prompt is about; by default the known topic in it.")
    ] = None,
    relation: Annotated[
        str | None, _fact("--relation", help="capital, language or currency; by default by the prompt's words.")
    ] = None,
    answer: Annotated[
        str | None, _fact("--answer", help="The right answer, one token; by default from the list.")
    ] = None,
    facts: Annotated[
        Path | None, _fact("--facts", help="A .csv file of your own, topic,answer: other topics to ask about.")
    ] = None,
    n: Annotated[int, _fact("--n", help="Prompts answered rightly, on which the steps are found.")] = 48,
    heads: Annotated[int, _fact("--heads", help="Task heads at most.", min=1)] = 10,
    patched: Annotated[int, _fact("--patched", help="Prompts for path patching.", min=2)] = 16,
    all_facts: Annotated[bool, _fact("--all-facts", help="Take prompts that the model answers wrongly, too.")] = False,
    memory: o.Memory = o.MEMORY_DEFAULT,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Where a fact is recalled: which heads bring the topic, which MLP writes the answer, what the last block does.

    The steps are found on many prompts that ask the same of other topics, and the prompt is read by them; a wrong fact
    is told at which step it fails. Leaves a run folder with all numbers and report.html.
    """
    from vesalius.find.recall import facts_file, take_apart
    from vesalius.find.recall import trace as traced

    screen = machine.screen(where.as_json)
    o.check_memory(memory)
    if facts is not None and relation is not None:
        raise VesaliusError("--facts and --relation both say what is asked; give one of them")
    asked: Any = facts_file(facts) if facts is not None else relation
    opened = machine.opened(screen, model)
    question = take_apart(opened, prompt, topic=topic, relation=asked, answer=answer)
    request = {
        "command": "trace",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "dtype": str(opened.dtype),
        "prompt": question.prompt,
        "topic": question.topic,
        "relation": question.relation.name,
        "facts": dict(question.relation.answers),
        "answer": question.answer,
        "n": n,
        "heads": heads,
        "patched": patched,
        "all_facts": all_facts,
        "seed": where.seed,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            with staged(run, screen) as step:
                found = traced(
                    opened, prompt, topic=topic, relation=asked, answer=answer, n=n, heads=heads, patched=patched,
                    all_facts=all_facts, seed=where.seed, memory_gb=memory, step=step,
                    store=RunStore(run.checkpoint("patching")),
                )  # fmt: skip
            _store(run, opened, found, command)
    report = drawn(screen, run)
    _show(screen, run, str(report))


def _store(run: Run, model: Any, found: Any, command: str) -> None:
    machinery = found.machinery
    run.save_scores("heads", machinery.heads.scores)
    run.save_scores("direct", machinery.heads.direct)
    run.save_scores("terms", found.terms)
    run.save_scores("last", machinery.last.scores)
    run.save_table("mixing", machinery.mixing_frame())
    run.save_array("intercepts", **{m.part: m.intercept for m in machinery.mixings})
    run.save_table("vectors", machinery.vectors)
    run.save_table("layers", found.layers)
    run.save_table("attention", found.attention)
    run.save_table("steps", found.steps())
    texts = [
        (e.clean, t, e.answer[0], e.wrong[0])
        for e, t in zip(machinery.asked.examples, machinery.asked.topics, strict=True)
    ]
    run.save_table("prompts", pd.DataFrame(texts, columns=["prompt", "topic", "answer", "wrong"]))
    summary = found.summary()
    notes = [*summary.pop("warnings")]
    n, own, tried = summary["prompts"], summary["own_wording"], summary["tried"]
    notes.append(f"the steps are found on {n} prompts ({own} of them in this wording), of {tried} that were tried")
    run.save_json("summary", {"model": model.name, "lead": found.verdict, "notes": notes, "command": command} | summary)


def _show(screen: Screen, run: Run, report: str) -> None:
    summary = run.json("summary")
    heads: Scores = run.scores("heads")
    named = [str(p) for p in heads.parts]
    rows = [named.index(h) for h in summary["task_heads"]]
    table = pd.DataFrame({"head": summary["task_heads"], "effect": heads.values[rows]})
    for name, column in (
        ("to_mlps", "by MLPs"),
        ("attention", "attention"),
        ("topic_rank", "topic rank"),
        ("other_rank", "other topics"),
    ):
        values = heads.columns[name][rows]
        table[column] = pd.Series(values).round().astype("Int64") if name.endswith("rank") else values
    last = summary["last"]
    lines: list[Any] = ["", run.table("steps"), "\ntask heads", table.head(SHOWN)]
    vectors = run.table("vectors")
    best = vectors.sort_values("moved", ascending=False, kind="stable").head(3)
    lines += ["\nintercepts that move the answer most, added where nothing is asked"]
    lines += [best[["part", "scale", "moved", "low", "high", "random", "first_before", "first"]]]
    told = f"\nOver {summary['prompts']} prompts the last block's parts add {_estimate(last['total'])} to the lead; "
    told += f"p(right) {last['before']['mean']:.3f} before it, {last['after']['mean']:.3f} after it. "
    lines += [told + mitigation(last), f"\n{summary['lead']}", *[f"note: {n}" for n in summary["notes"]]]
    lines += [f"\nrun     {run.folder}", f"report  {report}"]
    screen.show(summary | {"run": str(run.folder), "report": report}, *lines)


def _estimate(value: dict[str, float]) -> str:
    return f"{value['mean']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"


def mitigation(last: dict[str, Any]) -> str:
    """What scaling the suppressors does, in a sentence."""
    it = last["mitigation"]
    if it is None:
        return "None of its parts suppresses the answer, so no remedy is offered."
    parts = ", ".join(it["parts"])
    if not it["helps"]:
        return f"Scaling its suppressors ({parts}) down does not help on other prompts."
    return (
        f"Scaling its suppressors ({parts}) by {it['scale']:g} raises p(right) on other prompts from "
        f"{it['before']['mean']:.3f} to {it['after']['mean']:.3f}, and the share answered rightly from "
        f"{it['first_before']:.2f} to {it['first_after']:.2f}."
    )
