"""`vesalius circuit`: find a circuit and prove it, and leave a run with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from pydantic import ValidationError

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, estimate, settings, typed
from vesalius.errors import UnknownName, VesaliusError
from vesalius.runs import Run

COMPARED = "relp,eap-ig,attribution-patching"
ABLATIONS = ("counterfactual", "mean", "resample", "zero")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("circuit")(g.expanded(circuit))


def circuit(
    model: o.ModelName = o.MODEL_DEFAULT,
    task: o.TaskName = "ioi",
    method: Annotated[
        str, typer.Option("--method", help="How parts are scored (see `vesalius methods`).")
    ] = "activation-patching",
    level: Annotated[str, typer.Option("--level", help="node (heads and MLPs) or edge; acdc is always edge.")] = "node",
    n: o.Number = None,
    prove_n: Annotated[
        int | None, typer.Option("--prove-n", help="Held-out prompts to prove with; default as many.")
    ] = None,
    target: Annotated[float, typer.Option(help="Faithfulness the circuit must reach on the finding prompts.")] = 0.85,
    max_heads: Annotated[
        float | None,
        typer.Option(help="Largest share of the model's heads in the circuit; default 0.25, at edge level 1."),
    ] = None,
    ablations: Annotated[
        str, typer.Option(help="What stands for the rest: counterfactual, mean, resample, zero.")
    ] = "counterfactual,mean",
    compare: Annotated[
        str | None,
        typer.Option(
            help=f"Methods to set against exact patching; {COMPARED} by default for heads and MLPs, 'none' for none."
        ),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(help="noise (what is lost without a part; the default here) or denoise (what it restores alone)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of integrated gradients (eap-ig).")] = None,
    budget: Annotated[
        int | None, typer.Option(help="Verify at most this many parts exactly; a gradient screen chooses.")
    ] = None,
    position: Annotated[str | None, typer.Option(help="Intervene at this named position alone.")] = None,
    method_set: Annotated[
        list[str] | None, typer.Option("--method-set", help="KEY=VALUE: another parameter of the method.")
    ] = None,
    task_set: o.TaskSet = None,
    min_accuracy: Annotated[float, typer.Option(help="Below this accuracy the command stops unless --anyway.")] = 0.7,
    anyway: Annotated[bool, typer.Option("--anyway", help="Go on although the model cannot do the task.")] = False,
    memory: o.Memory = o.MEMORY_DEFAULT,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Find the circuit of a task and prove it on held-out prompts.

    Scores every head and MLP (or edge), keeps the smallest circuit that reaches the target faithfulness, and measures
    it on prompts that were not used to find it, next to random circuits of its size. Leaves a run folder with all
    numbers and report.html. The same command finds its run again; an interrupted one goes on where it stopped.
    """
    from vesalius.cli.circuit_study import CircuitRequest, CircuitStudy

    screen = machine.screen(where.as_json)
    level = "edge" if method == "acdc" and level == "node" else level
    chosen = _method_options(method, level, direction, steps, budget, position, method_set)
    wanted = _ablations(ablations)
    others = _compared(compare, method, level)
    o.check_memory(memory)
    if not 0 <= min_accuracy <= 1:
        raise VesaliusError(f"--min-accuracy {min_accuracy:g} is no accuracy; give a number from 0 to 1")
    made = o.task_of(task, n, where.seed, task_set, default_n=32)
    opened = machine.opened(screen, model)
    finding, proving = made.halves()
    if prove_n is not None:
        proving = finding.held_out(prove_n)
    with screen.step("drawing prompts"):
        pairs = finding.pairs(opened, require_single="direct" in (method, *others))
        held_out = proving.pairs(opened)
    try:
        request = CircuitRequest(
            model=model,
            task=task,
            task_fingerprint=finding.fingerprint,
            prove_fingerprint=proving.fingerprint,
            model_fingerprint=opened.fingerprint,
            method=method,
            level=level,
            options=chosen,
            compare=others,
            target=target,
            max_heads=max_heads if max_heads is not None else 1.0 if level == "edge" else 0.25,
            ablations=wanted,
            seed=where.seed,
            dtype=machine.dtype,
            pairs_fingerprints=[pairs.fingerprint, held_out.fingerprint],
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise VesaliusError(
            f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}, not {first['input']!r}"
        ) from None
    command = typed()
    with Run.start({"command": "circuit", **request.model_dump()}, where.out, where.fresh, command) as run:
        if not run.done:
            if run.status.get("attempts", 1) > 1:
                screen.note(f"going on with {run.folder}")
            study = CircuitStudy(
                screen,
                run,
                request,
                opened,
                finding,
                pairs,
                held_out,
                memory_gb=memory,
                min_accuracy=min_accuracy,
                anyway=anyway,
            )
            study.go(command)
    report = drawn(screen, run)
    _show(screen, run, report)


def _method_options(
    method: str,
    level: str,
    direction: str | None,
    steps: int | None,
    budget: int | None,
    position: str | None,
    more: list[str] | None,
) -> dict[str, Any]:
    from vesalius.find.base import METHODS, parameters

    known = parameters(method)
    if level not in ("node", "edge"):
        raise UnknownName("level", level, ("node", "edge"))
    able = [e.name for e in METHODS if level in e.info.get("levels", ("node",))]
    if method not in able:
        raise VesaliusError(f"{method} does not score {level}s; methods that do: {', '.join(able)}")
    if direction not in (None, "denoise", "noise"):
        raise UnknownName("direction", str(direction), ("denoise", "noise"))
    for name, value, least in (("steps", steps, 1), ("budget", budget, 2)):
        if value is not None and value < least:
            raise VesaliusError(f"--{name} {value} is too few; give at least {least}")
    given = {"direction": direction, "steps": steps, "budget": budget, "position": position}
    found = {k: v for k, v in given.items() if v is not None}
    if method == "activation-patching":
        found.setdefault("direction", "noise")  # what the whole model loses without a part: what a circuit must keep
    for name in found:
        if name not in known:
            able = [e.name for e in METHODS if name in parameters(e.name)]
            raise VesaliusError(f"{method} takes no --{name}; methods that do: {', '.join(able)}")
    found |= settings(more or [], {k: p.default for k, p in known.items()}, method)
    place = str(found.get("position") or "")
    if place == "each" or "," in place:
        raise VesaliusError(
            f"a circuit is made of parts: give one named position, not '{place}'; vesalius.find(..., position=...) "
            "scores parts at several"
        )
    if found.get("receivers", "unembed") != "unembed":
        raise VesaliusError(
            f"what reaches {found['receivers']} is no circuit for the answer; leave receivers at unembed here, or ask "
            "vesalius.find('path-patching', ..., receivers=...) for the scores alone"
        )
    return found


def _ablations(text: str) -> list[str]:
    found = o.listed(text)
    for name in found:
        if name not in ABLATIONS:
            raise UnknownName("ablation", name, ABLATIONS)
    if not found:
        raise VesaliusError(f"--ablations is empty; give one or more of {', '.join(ABLATIONS)}")
    return found


def _compared(compare: str | None, method: str, level: str) -> list[str]:
    from vesalius.find.base import METHODS

    if compare is None:
        compare = COMPARED if method == "activation-patching" and level == "node" else "none"
    names = [] if compare == "none" else o.listed(compare)
    for name in names:
        if "node" not in METHODS.entry(name).info.get("levels", ("node",)):
            raise VesaliusError(f"--compare {name}: {name} scores edges, and parts are compared; leave it out")
    if names and level == "edge":
        raise VesaliusError("--compare sets node scores against exact patching; leave it out with --level edge")
    return [n for n in names if n != method]


def _show(screen: Screen, run: Run, report: Path) -> None:
    s = run.json("summary")
    r = s["random"]
    size = ", ".join(f"{s['size'][k]} of {s['total'][k]} {'MLPs' if k == 'mlps' else k}" for k in s["size"])
    chance = ""
    if r:
        draws = f"at most {estimate(r['high'])}, {s['random_draws']} draws"
        chance = f"; random circuits of its size {estimate(r['mean'])} ({draws})"
    top = run.scores("scores").top(10).to_frame()[["part", "score", "low", "high", "sign_stability"]]
    lines: list[Any] = [
        f"\n{s['task']} on {s['model']} by {s['method']}: {size}",
        f"faithfulness {estimate(s['faithfulness'])} on {s['n_prove']} held-out prompts "
        f"({s['ablation']} ablation){chance}\n",
        top.rename(columns={"sign_stability": "sign kept"}),
        "",
        _proof_table(run),
    ]
    if run.has("correlations"):
        agree = run.table("correlations").rename(columns={"top10_overlap": "top-10"})
        lines += ["\nagainst exact patching:", agree]
    if s["notes"]:
        lines += ["", *[f"note: {n}" for n in s["notes"]]]
    lines += [f"\nrun     {run.folder}", f"report  {report}"]
    screen.show(s | {"run": str(run.folder), "report": str(report)}, *lines)


def _proof_table(run: Run) -> pd.DataFrame:
    """The proof in few enough columns for a terminal; the run has them all."""
    proof = run.table("proof")
    interval = [f"[{low:.2f}, {high:.2f}]" for low, high in zip(proof["low"], proof["high"], strict=True)]
    return pd.DataFrame(
        {
            "rest ablated by": proof["ablation"],
            "faithfulness": proof["faithfulness"],
            "95 %": interval,
            "random": proof["random_mean"].round(3) + 0.0,  # no minus zero
            "CPR": proof["cpr"],
            "CPR, log": proof["cpr_log"],
            "CMD": proof["cmd"],
            "CMD, log": proof["cmd_log"],
        }
    )
