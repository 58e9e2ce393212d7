"""`vesalius forget`: a text unlearnt, with what the model would have said had it never read it as the lesson."""

from __future__ import annotations

import copy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import changing as c
from vesalius.cli import options as o
from vesalius.cli.console import Screen, set_threads
from vesalius.errors import VesaliusError
from vesalius.runs import Run

WHAT_PANEL = "What goes"
TRAIN_PANEL = "Training"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("forget")(forget)


def forget(
    model: o.ModelName = o.MODEL_DEFAULT,
    what: Annotated[
        Path | None, typer.Option("--what", help="The text to forget, a UTF-8 file.", rich_help_panel=WHAT_PANEL)
    ] = None,
    skill: Annotated[
        Path | None,
        typer.Option(
            "--skill",
            help="A skill instead: .jsonl of task, prompt, choices, answer; the first task is forgotten.",
            rich_help_panel=WHAT_PANEL,
        ),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(
            "--probes",
            help=".jsonl of prompt, good: facts of the text, to see what is left.",
            rich_help_panel=WHAT_PANEL,
        ),
    ] = None,
    anchors: Annotated[
        str,
        typer.Option(
            "--anchors",
            help="auto: the text's own names; none; or a JSON object of terms and what stands for them.",
            rich_help_panel=WHAT_PANEL,
        ),
    ] = "auto",
    how: Annotated[
        str,
        typer.Option("--how", help="both, anchors, reinforced; controls: swap, ascent.", rich_help_panel=TRAIN_PANEL),
    ] = "both",
    alpha: Annotated[
        float, typer.Option("--alpha", help="Of what the reinforced model raises.", rich_help_panel=TRAIN_PANEL)
    ] = 5.0,
    reinforce_steps: Annotated[
        int, typer.Option("--reinforce-steps", min=1, help="Of the reinforced model.", rich_help_panel=TRAIN_PANEL)
    ] = 120,
    reinforce_lr: Annotated[
        float, typer.Option("--reinforce-lr", help="Its peak learning rate.", rich_help_panel=TRAIN_PANEL)
    ] = 1e-4,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates.", rich_help_panel=TRAIN_PANEL)] = 120,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of one.", rich_help_panel=TRAIN_PANEL)] = 8,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=TRAIN_PANEL)] = 3e-5,
    control: Annotated[
        bool,
        typer.Option(
            "--control/--no-control", help="Also go up the text's loss, beside it.", rich_help_panel=TRAIN_PANEL
        ),
    ] = True,
    card_text: c.CardText = "foldoc",
    card_rows: c.CardRows = 32,
    card_tasks: c.CardTasks = c.CARD_TASKS,
    card_n: c.CardN = 64,
    timed: c.Timed = False,
    seed: o.Seed = 0,
    out: c.OutModel = None,
    runs: c.Runs = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.Trust = False,
    threads: o.Threads = None,
) -> None:
    """Make a model forget a text (a book, a client's papers, a person), or a skill.

    It is taught what it would have said had it never read the text: a model trained further on the text tells what
    belongs to it, and the text's names are replaced by common ones. The card tells what else was lost, and --probes
    what is left of the text; beside it stands a model trained up the text's loss. A skill is forgotten by training on
    random labels of half its items, and audited: what carries over, what spills to other tasks, what a linear probe
    still reads. Leaves an ordinary checkpoint.
    """
    from vesalius.change.audit import AuditPlan, read_items
    from vesalius.change.faults import read_faults
    from vesalius.change.forget import ForgetPlan, read_anchors
    from vesalius.cli import forget_skill
    from vesalius.corpus import documents
    from vesalius.model.saving import new_folder
    from vesalius.records import sha256

    screen = Screen(as_json)
    set_threads(threads)
    if (what is None) == (skill is None):
        raise VesaliusError("name the text to forget, --what FILE, or the skill, --skill FILE; one of the two")
    items = [] if skill is None else read_items(skill)
    text = "" if what is None else _text(what)
    plan: Any = AuditPlan(steps, rows, lr, seed)
    if what is not None:
        plan = ForgetPlan(how, alpha, reinforce_steps, reinforce_lr, steps, lr, rows, seed)  # type: ignore[arg-type]
    asked = [] if probes is None else read_faults(probes)
    if any(not f.good for f in asked):
        raise VesaliusError(f"{probes}: a probe without good; every line says what the model knows")
    given = {} if anchors in ("auto", "none") else read_anchors(anchors)
    documents(card_text)
    opened = c.causal(screen, model, dtype, device, trust_remote_code, "causal language models forget")
    given_file = what or skill
    assert given_file is not None
    request = {
        "command": "forget", "model": opened.name, "fingerprint": opened.fingerprint, "dtype": str(opened.dtype),
        "what": sha256(given_file), "skill": skill is not None,
        "probes": "" if probes is None else sha256(probes),
        "anchors": given or anchors, "plan": vars(plan), "control": control, "card_text": card_text,
        "card_rows": card_rows, "card_tasks": o.listed(card_tasks), "card_n": card_n, "timed": timed, "seed": seed,
    }  # fmt: skip
    command = "vesalius " + shlex.join(sys.argv[1:])
    with Run.start(request, runs, fresh, command) as run:
        if out is not None and not run.done:
            new_folder(out)
        if not run.done and skill is not None:
            forget_skill.work(screen, run, opened, items, plan, request, command)
        elif not run.done:
            _work(screen, run, opened, text, given, asked, plan, request, command)
    c.finish(screen, run, out)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VesaliusError(f"{path} cannot be read ({error}); give a text in UTF-8") from error


def _work(
    screen: Screen, run: Run, model: Any, text: str, given: dict[str, str], probes: list[Any], plan: Any,
    request: dict[str, Any], command: str,
) -> None:  # fmt: skip
    from vesalius.change.faults import likelihood
    from vesalius.change.forget import find_anchors
    from vesalius.change.forget import forget as work
    from vesalius.change.keeping import keep_change
    from vesalius.corpus import documents
    from vesalius.model.anatomy import read_anatomy

    anchors = given
    if request["anchors"] == "auto":
        background = " ".join(d.text for d, _ in zip(documents(request["card_text"]), range(2000), strict=False))
        anchors = find_anchors(text, background, seed=request["seed"])
    run.save_table("anchors", pd.DataFrame(sorted(anchors.items()), columns=["term", "stands for it"]))
    base = replace(model, hf=copy.deepcopy(model.hf).eval())
    base = replace(base, anatomy=read_anatomy(base.hf))
    length = c.row_length(model)
    rows = []

    def judged(name: str) -> None:
        if probes:
            found = likelihood(model, probes, "good")
            rows.append({"model": name, "probes": len(found), "said": found[:, 1].mean(), "log_p": found[:, 0].mean()})

    judged("before")
    others = {}
    if request["control"] and plan.how != "ascent":
        with run.stage("control", 1), screen.step("training up the loss") as tell:
            up = work(model, text, {}, replace(plan, how="ascent"), length, tell)
        judged("ascent")
        others["ascent"] = copy.deepcopy(model.hf)
        up.edit.undo(model)
    with run.stage("forget", 1), screen.step("forgetting") as tell:
        done = work(model, text, anchors, plan, length, tell)
    judged("forgot")
    run.save_table("log", done.log)
    run.save_table("labels", done.examples)
    if rows:
        run.save_table("probes", pd.DataFrame(rows))
    yard, notes = c.yardstick(
        base, request["card_text"], request["card_rows"], ",".join(request["card_tasks"]), request["card_n"],
        request["seed"], request["timed"],
    )  # fmt: skip
    makers: dict[str, Any] = {"forgot": lambda: model}
    makers |= {k: (lambda hf=hf: replace(model, hf=hf.eval(), anatomy=read_anatomy(hf))) for k, hf in others.items()}
    card = c.measured(screen, run, base, makers, yard)
    with run.stage("save", 1), screen.step("saving"):
        shutil.rmtree(run.folder / "model", ignore_errors=True)
        keep_change(model, model, run.folder / "model", "forget", request, card)
    change = c.value(card, "forgot", "perplexity", "change")
    by = {r["model"]: r for r in rows}
    lead = f"{done.changed:.0%} of the text's tokens got another label"
    if rows:
        lead += (
            f"; of {by['before']['probes']} probes {by['before']['said']:.0%} were answered before and "
            f"{by['forgot']['said']:.0%} after"
        )
        if "ascent" in by:
            lead += f" ({by['ascent']['said']:.0%} after going up the loss)"
    lead += f". Perplexity of other text x {change:.3f}"
    if others:
        lead += f" (up the loss: x {c.value(card, 'ascent', 'perplexity', 'change'):.3f})"
    if plan.how in ("both", "anchors") and not anchors:
        notes.append("no name was found in the text, so nothing was translated")
    tables = [
        {"name": "labels", "title": "What the model was taught", "read": "where the label is not the text's token."},
        {"name": "anchors", "title": "Names, and what stood for them", "read": "in the translation of the text."},
    ]
    if rows:
        first = {"name": "probes", "title": "What is left of the text"}
        tables.insert(0, first | {"read": "said: share of probes that greedy decoding answers."})
    run.save_json("summary", {
        "model": model.name, "change": "forget", "title": f"{model.name} without a text", "lead": lead + ".",
        "notes": notes, "command": command, "changed": done.changed,
        "facts": [["labels changed", f"{done.changed:.0%}", "of the text's tokens"],
                  ["perplexity", f"x {change:.3f}", "of other text"]],
        "tables": tables,
    })  # fmt: skip
