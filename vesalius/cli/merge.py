"""`vesalius merge`: fine-tuned models of one base made one, on the files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from vesalius.cli import changing as c
from vesalius.cli import options as o
from vesalius.cli.console import Screen
from vesalius.cli.groups import Machine, expanded
from vesalius.errors import VesaliusError
from vesalius.runs import Run

MERGE_PANEL = "How"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("merge")(expanded(merge))


def merge(
    base: Annotated[str, typer.Argument(help="The model all others were made of.", show_default=False)],
    models: Annotated[list[str], typer.Argument(help="Models fine-tuned from it.", show_default=False)],
    method: Annotated[
        str,
        typer.Option("--method", help="linear, task, dare, ties, dare-ties or magnitude.", rich_help_panel=MERGE_PANEL),
    ] = "dare",
    weights: Annotated[
        str, typer.Option("--weights", help="One a model, with commas between; 1 each.", rich_help_panel=MERGE_PANEL)
    ] = "",
    scale: Annotated[
        float, typer.Option("--scale", help="Of all changes together.", rich_help_panel=MERGE_PANEL)
    ] = 1.0,
    drop: Annotated[
        float, typer.Option("--drop", help="Share of a change that dare drops.", rich_help_panel=MERGE_PANEL)
    ] = 0.9,
    density: Annotated[
        float, typer.Option("--density", help="Share of a change that ties keeps.", rich_help_panel=MERGE_PANEL)
    ] = 0.2,
    rescale: Annotated[
        bool,
        typer.Option("--rescale/--no-rescale", help="Pay back what dare drops.", rich_help_panel=MERGE_PANEL),
    ] = True,
    *,
    yardstick: c.CardOptions,
    where: c.RunOptions,
    machine: Machine,
) -> None:
    """Merge models fine-tuned from one base: the skills of each, with no training.

    Works on the files, tensor by tensor: no two models are in memory at once. The card compares the merged model with
    the base, with each model that went into it, and with their plain average. Leaves an ordinary checkpoint, and a
    report that says how far each model went from the base.
    """
    from vesalius.change.merge import MergePlan
    from vesalius.model.sources import resolve

    screen = machine.screen(where.as_json)
    try:
        each = tuple(float(w) for w in o.listed(weights))
    except ValueError:
        raise VesaliusError(f"--weights {weights} are not numbers with commas between") from None
    plan = MergePlan(method, each, scale, drop, density, rescale, where.seed)
    card = yardstick.card(where.seed)
    read = c.texts(screen, yardstick.card_text)
    located = []
    for spec in (base, *models):
        with screen.step(f"finding {spec}") as progress:
            located.append(resolve(spec, trust_remote_code=machine.trust_remote_code, progress=progress))
    request = {
        "command": "merge", "model": located[0].name, "model_fingerprint": located[0].fingerprint,
        "models": [m.fingerprint for m in located[1:]], "method": method, "weights": list(each), "scale": scale,
        "drop": drop, "density": density, "rescale": rescale, "read": read, **card.request(),
    }  # fmt: skip

    def opened(spec: str) -> Any:
        return c.causal(screen, spec, machine, "a card tells of causal language models")

    c.carry_out(
        screen,
        request,
        where,
        lambda run, line: _work(screen, run, located, opened, plan, card, request, line),
    )


def vocabulary(model: Any) -> Any:
    """Tokens of a model on disk, as its config tells."""
    from vesalius.model.sources.checkpoint import read_json

    return read_json(model.folder / "config.json").get("vocab_size")


def _work(
    screen: Screen, run: Run, located: list[Any], opened: Callable[[str], Any], plan: Any, card: c.Card,
    request: dict[str, Any], command: str,
) -> None:  # fmt: skip
    from dataclasses import replace

    from vesalius.change.keeping import beside, keep_files
    from vesalius.change.merge import MergePlan
    from vesalius.change.merge import merge as make
    from vesalius.model.sources import lasting

    base, *others = located

    made, folders = {}, {"merged": plan}
    if plan.method != "linear" and sum(plan.weights or (1,)) > 0:  # taking a skill away has no average beside it
        folders["average"] = replace(MergePlan("linear"), weights=plan.weights)
    for name, how in folders.items():
        part = c.cleared(run.folder / f"{name}.part")
        with run.stage(name, 1), screen.step(f"merging ({name})") as tell:
            made[name] = make(base, others, how, part, progress=tell)
    merged, told = made["merged"]
    model = opened(base.spec)
    yard, notes = card.yardstick(model)
    makers = {name: (lambda f=folder: opened(str(f))) for name, (folder, _) in made.items()}
    names = [m.name if [x.name for x in located].count(m.name) == 1 else m.spec for m in others]
    for name, m in zip(names, others, strict=True):
        size, own = vocabulary(m), vocabulary(base)
        if size == own:
            makers[name] = lambda s=m.spec: opened(s)
        else:
            notes.append(f"{name} is not on the card: it has {size} tokens and {base.name} {own}")
    measured = c.measured(screen, run, model, makers, yard)
    run.save_table("deltas", told.by_model())
    notes += told.notes()
    with run.stage("save", 1), screen.step("saving"):
        of = [{"name": m.name, "spec": lasting(m.spec), "fingerprint": m.fingerprint, "sha256": m.sha256,
               "files": m.fingerprint} for m in located]  # fmt: skip
        of[0]["beside"] = beside(located[0].folder)
        keep_files(merged, c.cleared(run.folder / "model"), "merge", of, request, measured)
    for folder, _ in made.values():
        c.cleared(folder)
    change = c.value(measured, "merged", "perplexity", "change")
    names_told = ", ".join(names)
    lead = (
        f"{names_told} merged into {base.name} by {plan.method}"
        + (f", {plan.drop:.0%} of each change dropped" if plan.method in ("dare", "dare-ties", "magnitude") else "")
        + f": perplexity of plain text {c.value(measured, 'merged', 'perplexity'):.1f}, "
        + f"{c.value(measured, 'merged', 'perplexity', 'before'):.1f} before"
    )
    if "average" in made:
        lead += f" and {c.value(measured, 'average', 'perplexity'):.1f} for the plain average"
    summary = {
        "model": base.name, "change": "merge", "title": f"{names_told} merged", "lead": lead + ".", "notes": notes,
        "command": command, "kept": told.kept, "tensors": told.tensors,
        "facts": [["models", str(len(others)), f"of {base.name}"], ["perplexity", f"x {change:.2f}", "of the base"]],
        "tables": [{"name": "deltas", "title": "How far each model went from the base",
                    "read": "of the absolute changes of all weights: mean, 99th percentile (of the widest tensor), "
                    "largest, and the share of weights that changed at all. Fine-tuning stays near; continued "
                    "pre-training goes far, and bears no dropping."}],
    }  # fmt: skip
    run.save_json("summary", summary)
