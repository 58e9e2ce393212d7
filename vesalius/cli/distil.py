"""`vesalius distil`: a smaller model learns from a larger one, beside a control that reads the same text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vesalius.cli import changing as c
from vesalius.cli import options as o
from vesalius.cli.console import Screen
from vesalius.cli.groups import Machine, expanded
from vesalius.errors import ModelError, VesaliusError
from vesalius.runs import Run

STUDENT_PANEL = "The student"
TRAIN_PANEL = "Training"
SAME = "same"  # as deep as the teacher: what is converted and nothing else


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("distil")(expanded(distil))


def distil(
    teacher: Annotated[str, typer.Option("--teacher", help="The larger model, causal or masked.")] = "smollm2-135m",
    student: Annotated[
        str,
        typer.Option(
            "--student",
            help="half, N-layers: alternate blocks of the teacher; a recipe (.yaml): its model, new; same: the teacher "
            "with another --attention.",
            rich_help_panel=STUDENT_PANEL,
        ),
    ] = "half",
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            help="full, or longformer: BERT and RoBERTa get sliding windows.",
            rich_help_panel=STUDENT_PANEL,
        ),
    ] = "full",
    window: Annotated[
        int, typer.Option("--window", help="Of longformer: positions read, both sides.", rich_help_panel=STUDENT_PANEL)
    ] = 256,
    length: Annotated[
        int, typer.Option("--length", min=1, help="Of longformer: tokens of a text.", rich_help_panel=STUDENT_PANEL)
    ] = 4096,
    corpus: Annotated[
        str,
        typer.Option(
            "--corpus",
            help="What it reads: a name of `vesalius corpora`, a file or a folder.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = "foldoc",
    steps: Annotated[
        int,
        typer.Option(
            "--steps", min=0, max=o.MOST_STEPS, help="Updates; 0: nothing is learnt.", rich_help_panel=TRAIN_PANEL
        ),
    ] = 500,
    rows: Annotated[
        int, typer.Option("--rows", min=1, max=o.MOST_ROWS, help="Texts of one.", rich_help_panel=TRAIN_PANEL)
    ] = 8,
    row_length: Annotated[
        int, typer.Option("--row-length", min=4, help="Tokens of a text.", rich_help_panel=TRAIN_PANEL)
    ] = 128,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=TRAIN_PANEL)] = 5e-4,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of both distributions.", rich_help_panel=TRAIN_PANEL)
    ] = 2.0,
    soft: Annotated[
        float, typer.Option("--soft", help="Weight of the teacher's distribution.", rich_help_panel=TRAIN_PANEL)
    ] = 5.0,
    hard: Annotated[float, typer.Option("--hard", help="Weight of the text.", rich_help_panel=TRAIN_PANEL)] = 2.0,
    cosine: Annotated[
        float | None,
        typer.Option(
            "--cosine",
            help="Weight of the last hidden states' direction; 1, but 0 where widths differ.",
            rich_help_panel=TRAIN_PANEL,
        ),
    ] = None,
    dtype: o.Dtype = None,
    *,
    yardstick: c.TimedCardOptions,
    where: c.RunOptions,
    machine: Machine,
) -> None:
    """Teach a smaller model what a larger one knows: half of its blocks, or a model of your own.

    It learns the text, the teacher's distribution over it, and the direction of its last hidden states (DistilBERT's
    5 / 2 / 1, T = 2). The card shows it beside a control that starts alike and reads as much without a teacher. With
    --attention longformer an encoder reads long texts; with --steps 0 it is only converted, or cut. Leaves an ordinary
    checkpoint, and a report.
    """
    from vesalius.change.distil import DistilPlan

    screen = machine.screen(where.as_json)
    if attention not in ("full", "longformer"):
        raise VesaliusError(f"--attention {attention} is none of full, longformer")
    if student == SAME and attention == "full":
        raise VesaliusError("--student same with --attention full is the teacher itself; change one of the two")
    plan = DistilPlan(corpus, steps, rows, row_length, lr, temperature, soft, hard, cosine or 0.0, seed=where.seed)
    card = yardstick.card(where.seed)
    read = c.texts(screen, corpus, yardstick.card_text)
    opened = o.opened(screen, teacher, dtype or "auto", machine.device, None, machine.trust_remote_code)
    sides = _Sides(opened, student, attention, window, length)  # refuses before anything is written
    plan = sides.fitted(plan, cosine)
    request = {
        "command": "distil", "model": opened.name, "model_fingerprint": opened.fingerprint, "dtype": str(opened.dtype),
        "student": student, "attention": attention, "window": window, "length": length, "corpus": corpus,
        "steps": steps, "rows": rows, "row_length": row_length, "lr": lr, "temperature": temperature, "soft": soft,
        "hard": hard, "cosine": plan.cosine, "recipe": sides.recipe, "read": read, **card.request(),
    }  # fmt: skip
    if sides.recipe and sides.recipe["source"]:  # files that another model may lie in tomorrow
        request["student_fingerprint"] = sides.student.fingerprint
    c.carry_out(screen, request, where, lambda run, line: _work(screen, run, sides, plan, card, request, line))


class _Sides:
    """Who teaches and who learns: the model as opened, what it was converted to, the teacher and the student."""

    def __init__(self, opened: Any, student: str, attention: str, window: int, length: int) -> None:
        from vesalius.change.distil import student_of
        from vesalius.change.longformer import to_longformer
        from vesalius.model.saving import refuse_rounded
        from vesalius.train.recipe import read_recipe

        if opened.kind not in ("causal", "masked"):
            raise ModelError(f"{opened.name} is {opened.kind}; a teacher foretells tokens, causal or masked")
        refuse_rounded(opened.hf, opened.name)
        self.opened, self.what, self.attention = opened, student, attention
        self.converted: Any = None if attention == "full" else to_longformer(opened, window, length)
        self.teacher: Any = opened if self.converted is None or student == SAME else self.converted
        self.student: Any = self.converted if student == SAME else student_of(self.teacher, student)
        named = student == SAME or student == "half" or student.endswith("-layers")
        self.recipe = None if named else read_recipe(student).model_dump(mode="json")["model"]

    def fitted(self, plan: Any, cosine: float | None) -> Any:
        """The plan with the weight of hidden states that these two widths allow.

        Raises:
            VesaliusError: for a weight that they do not allow, or rows longer than both read.
        """
        from dataclasses import replace

        alike = self.student.d_model == self.teacher.d_model
        if cosine and not alike:
            raise VesaliusError(
                f"--cosine compares hidden states of {self.student.d_model} numbers with those of "
                f"{self.teacher.d_model}; leave it out, or give a student of the teacher's width"
            )
        for model in (self.teacher, self.student) if plan.steps else ():
            if c.row_length(model, plan.length) < plan.length:
                raise VesaliusError(
                    f"--row-length {plan.length} is more than {model.name} reads ({c.row_length(model, plan.length)}); "
                    "give less"
                )
        return replace(plan, cosine=(1.0 if alike else 0.0) if cosine is None else cosine)


def _work(
    screen: Screen, run: Run, sides: _Sides, plan: Any, card: c.Card, request: dict[str, Any], command: str
) -> None:
    import vesalius
    from vesalius.change.keeping import keep_change

    def kept(model: Any, name: str, **more: Any) -> Path:
        return keep_change(model, sides.opened, c.cleared(run.folder / name), "distil", request, **more)

    start, made = sides.student, {}
    if plan.steps:
        place = sides.opened.spec if sides.teacher is sides.opened else str(kept(sides.teacher, "teacher"))
        made = _trained(screen, run, sides, plan, card, str(kept(start, "student")), place)
    yard, notes = card.yardstick(sides.teacher)
    makers: dict[str, Any] = {name: (lambda m=m: vesalius.open(m, dtype="auto")) for name, m in made.items()}
    name = "distilled" if made else "converted" if sides.what == SAME else "student"
    makers["start" if made else name] = lambda: start
    measured = c.measured(screen, run, sides.teacher, makers, yard)
    with run.stage("save", 1), screen.step("saving"):
        final = start if not made else vesalius.open(made["distilled"], dtype="auto")
        kept(final, "model", card=measured)
    sizes = {"before": sides.teacher.n_parameters, "after": start.n_parameters, "blocks": start.n_layers}
    text, facts = told(sides, measured, name, sizes)
    tables = [
        {
            "name": "training",
            "title": "Held-out documents while they learnt",
            "read": "nll: nats a target; divergence: of the teacher's distribution at T, where it was learnt.",
        }
    ]
    run.save_json("summary", {
        "model": sides.opened.name, "change": "distil", "title": f"{sides.opened.name}, {NAMES[name]}", **sizes,
        "lead": text, "facts": facts, "notes": notes, "command": command, "tables": tables if made else [],
    })  # fmt: skip


NAMES = {"distilled": "distilled", "converted": "with sliding windows", "student": "cut for a student"}


def _trained(
    screen: Screen, run: Run, sides: _Sides, plan: Any, card: c.Card, student: str, teacher: str
) -> dict[str, str]:
    """What opens the student and the control; two runs of the trainer, in the run's folder `training`."""
    from dataclasses import replace

    import pandas as pd

    from vesalius.change.distil import distillation
    from vesalius.cli.train import Watching
    from vesalius.train.running import train

    if card.text == plan.corpus:
        plan = replace(plan, corpus=str(c.others(sides.teacher, card, run.folder / "corpus.jsonl")))
    made, curves = {}, []
    for name, source in (("distilled", teacher), ("control", None)):
        recipe = distillation(student, source, sides.teacher.kind, sides.teacher.tokenizer, plan)
        with run.stage(name, 1), Watching(screen, name=f"training {name}") as watcher:
            folder = train(recipe, run.folder / "training", watcher=watcher)
        made[name] = f"{folder}@last"
        found = Run.open(folder).table("evaluation")
        curves.append(found[[k for k in ("step", "nll", "divergence", "cosine") if k in found]].assign(model=name))
    run.save_table("training", pd.concat(curves, ignore_index=True))
    return made


def told(sides: _Sides, card: Any, name: str, sizes: dict[str, int]) -> tuple[str, list[list[str]]]:
    """What came out, in words, and its facts."""
    masked = sides.teacher.kind == "masked"
    before, after = (c.value(card, name, "perplexity", k) for k in ("before", "after"))
    what = "hidden words" if masked else "plain text"
    text = (
        f"{sizes['blocks']} blocks of {sides.teacher.name}'s {sides.teacher.n_layers}, {sizes['after'] / 1e6:.1f} M of "
        f"{sizes['before'] / 1e6:.1f} M parameters: perplexity of {what} is {after:.1f}, the teacher's {before:.1f}"
    )
    facts = [["parameters", f"{sizes['after'] / 1e6:.1f} M", f"of {sizes['before'] / 1e6:.1f} M"],
             ["perplexity", f"{after:.1f}", f"of {what}; teacher {before:.1f}"]]  # fmt: skip
    if name == "distilled":
        control, start = (c.value(card, other, "perplexity") for other in ("control", "start"))
        text += f"; {control:.1f} after as long on the same text without the teacher, {start:.1f} at the start"
        facts.append(["without a teacher", f"{control:.1f}", "the same start and text"])
    if masked:
        right = c.value(card, name, "hidden words accuracy"), c.value(card, name, "hidden words accuracy", "before")
        text += f". It says {right[0]:.0%} of them right, the teacher {right[1]:.0%}"
    if (card["metric"] == "prefill").any():
        text += f". Reading takes x {c.value(card, name, 'prefill', 'change'):.2f} of the time"
    return text + ".", facts
