"""`vesalius channels`: which heads talk to which, by weights alone, and what the channel does."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, typed
from vesalius.errors import UnknownName, VesaliusError
from vesalius.parts import Edge, parse_part
from vesalius.runs import Run
from vesalius.scores import Scores

KINDS = ("all", "q", "k", "v")
SHOWN = 8  # edges whose components are kept one by one, and whose effect is measured


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("channels")(g.expanded(channels))


def channels(
    model: o.ModelName = o.MODEL_DEFAULT,
    senders: Annotated[
        str | None, typer.Option("--from", help="Sending heads, such as L3.H2 or L3.H2,L4.H0; all by default.")
    ] = None,
    receivers: Annotated[str | None, typer.Option("--to", help="Receiving heads; all by default.")] = None,
    kind: Annotated[str, typer.Option("--kind", help="What of the receiver reads: q, k, v or all.")] = "all",
    top: Annotated[int, typer.Option(min=1, help="How many channels are shown.")] = 20,
    offsets: Annotated[
        int, typer.Option(min=0, help="Average rotary queries and keys over so many positions; 0: content alone.")
    ] = 0,
    unfolded: Annotated[bool, typer.Option("--unfolded", help="Leave the gains of norms out of the matrices.")] = False,
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="Take each component of the first 8 channels out and measure this task."),
    ] = None,
    right: Annotated[str, typer.Option("--right", help="Position of the task the receiver should look at.")] = "IO",
    wrong: Annotated[str, typer.Option("--wrong", help="Position of the task it should not look at.")] = "S2",
    n: o.Number = None,
    task_set: o.TaskSet = None,
    memory: o.Memory = o.MEMORY_DEFAULT,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Find the channels between heads: single components of one head's output that another head reads.

    Every head's output matrix is taken apart into components, and each is scored by how much of a later head's query,
    key or value input lies along it (composition scores). No text is read unless --task asks what the channels do.
    """
    screen = machine.screen(where.as_json)
    o.check_memory(memory)
    if kind not in KINDS:
        raise UnknownName("kind of composition", kind, KINDS)
    opened = machine.opened(screen, model)
    sending, receiving = (_named(opened, text) for text in (senders, receivers))
    made = None if task is None else o.task_of(task, n, where.seed, task_set, default_n=32)
    pairs = None if made is None else made.pairs(opened, require_single=True)
    for name in () if pairs is None else (right, wrong):
        if name not in pairs.positions:  # type: ignore[union-attr]
            raise UnknownName("position", name, pairs.positions, "name them with --right and --wrong")  # type: ignore[union-attr]
    request = {
        "command": "channels",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "from": sending,
        "to": receiving,
        "kind": kind,
        "top": top,
        "offsets": offsets,
        "fold": not unfolded,
        "task": task,
        "task_fingerprint": made.fingerprint if made else None,
        "places": [right, wrong] if made else None,
        "seed": where.seed,
        "dtype": machine.dtype,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            _study(screen, run, request, opened, pairs, memory, command)
    drawn(screen, run)
    _show(screen, run, top)


def _named(model: Any, text: str | None) -> list[str] | None:
    """The heads of a list of addresses, each of which the model has."""
    if text is None:
        return None
    found = [model.anatomy.require(parse_part(t.strip())) for t in o.listed(text)]
    for part in found:
        if part.side:
            raise VesaliusError(f"{part} names what a head reads; name the head, and what it reads with --kind")
    return [str(p) for p in found]


def _study(
    screen: Screen, run: Run, request: dict[str, Any], model: Any, pairs: Any, memory: float, command: str
) -> None:
    from vesalius.lens import Wiring, components_between, composition, inhibition
    from vesalius.lens.wiring import ENOUGH

    with run.stage("weights", 1), screen.step("taking heads apart") as progress:
        wired = Wiring.of(model, fold=request["fold"], offsets=request["offsets"])
        kinds = "qkv" if request["kind"] == "all" else request["kind"]
        scores = composition(wired, request["from"], request["to"], kinds=kinds, progress=progress)
    run.save_scores("scores", scores)
    best = scores.top(SHOWN)
    pieces = [components_between(wired, e).assign(channel=str(e)) for e in best.parts if isinstance(e, Edge)]
    run.save_table("components", pd.concat(pieces, ignore_index=True))
    notes = []
    if scores.info["components"] < ENOUGH:
        notes.append(
            f"heads of this model have {scores.info['components']} components: too few for their z to mean much "
            f"(at least {ENOUGH} are needed)"
        )
    if model.n_kv_heads != model.n_heads:
        notes.append(
            f"{model.anatomy.group} heads share a value matrix each: their components read the same inputs, and what "
            "they write differs"
        )
    summary = {
        "model": model.name,
        "task": request["task"],
        "edges": len(scores),
        "components": scores.info["components"],
        "kinds": kinds,
        "lead": lead(scores),
    }
    if pairs is not None:
        with run.stage("effects", pairs.n_examples), screen.step("taking channels out") as progress:
            edges = [e for e in best.parts if isinstance(e, Edge)]
            effects = inhibition(
                wired,
                pairs,
                edges,
                right=request["places"][0],
                wrong=request["places"][1],
                seed=request["seed"],
                memory_gb=memory,
                progress=progress,
            )
        run.save_scores("effects", effects)
        summary |= {"right": request["places"][0], "wrong": request["places"][1], "n": pairs.n_examples}
        summary |= {"metric_unit": effects.info["metric_unit"]}
        most = effects.top(1)
        summary["lead"] += (
            f" Taken out one by one on {request['task']}, the component that matters most is "
            f"{int(most.columns['component'][0])} of {most.parts[0]}: with it the receiver's attention to "
            f"{request['places'][0]} less that to {request['places'][1]} is larger by {most.values[0]:.2f}, and the "
            f"metric ({effects.info['metric_unit']}) by {most.columns['logit_effect'][0]:.2f}."
        )
    run.save_json("summary", summary | {"notes": notes, "command": command})


def lead(scores: Scores) -> str:
    """The finding in a sentence or two."""
    best = scores.top(1)
    share, z, p = 100 * float(best.values[0]) ** 2, best.columns["z"][0], best.columns["p"][0]
    first = "The channel" if len(scores) == 1 else f"Of {len(scores):,} possible channels the strongest"
    text = (
        f"{first} leads {_way(best.parts[0])}: component {int(best.columns['component'][0])} of the sender carries "
        f"{share:.1f} % of what the receiver reads there (composition score {best.values[0]:.3f}, z {z:.1f} among the "
        f"sender's components, p {p:.3f} among pairs of these layers)."
    )
    by_z = int(np.argmax(scores.columns["z"]))
    if scores.parts[by_z] != best.parts[0]:
        text += f" The one that stands out most among its sender's components leads {_way(scores.parts[by_z])} "
        text += f"(z {scores.columns['z'][by_z]:.1f}, score {scores.values[by_z]:.3f})."
    return text


def _way(edge: Any) -> str:
    side = {"q": "queries", "k": "keys", "v": "values"}[edge.receiver.side]
    return f"from {edge.sender} to the {side} of {edge.receiver.output}"


def _show(screen: Screen, run: Run, top: int) -> None:
    summary, scores = run.json("summary"), run.scores("scores").top(top)
    table = scores.to_frame()[["part", "score", "component", "z", "p", "whole", "p_whole", "share"]]
    table["component"] = table["component"].astype(int)
    table = table.rename(columns={"part": "channel", "p_whole": "p(whole)"})
    lines: list[Any] = [table]
    found: dict[str, Any] = {"channels": table.to_dict("records")}
    if run.has("effects.parquet"):
        frame = run.scores("effects").to_frame()
        most = frame.loc[frame.groupby("part", sort=False)["score"].apply(lambda x: x.abs().idxmax())]
        shown = most[["part", "component", "score", "low", "high", "logit_effect", "to_right", "to_wrong"]]
        shown = shown.rename(columns={"part": "channel", "score": "inhibition"})
        shown["component"] = shown["component"].astype(int)
        lines += [
            f"\ntaken out at END, {summary['n']} prompts of {summary['task']}; the component that matters most:",
            shown,
        ]
        found["effects"] = shown.to_dict("records")
    conclude(screen, run, *lines, **found)
