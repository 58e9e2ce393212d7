"""`vesalius subnetwork`: the weights of a model that turn the current token into the next one."""

from __future__ import annotations

from typing import Annotated

import typer

from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, records_of, typed
from vesalius.cli.groups import Machine, RunOptions, expanded
from vesalius.runs import Run

MASK_PANEL = "Masks"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("subnetwork")(expanded(subnetwork))


def subnetwork(
    model: o.ModelName = o.MODEL_DEFAULT,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            help="Corpora by name, files or folders, with commas between (`vesalius corpora`); for a model of a run, "
            "by default what it was trained on.",
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="bigram: the corpus's table of successors; text: its next tokens, for comparison.",
            rich_help_panel=MASK_PANEL,
        ),
    ] = "bigram",
    steps: Annotated[int, typer.Option(min=1, help="Steps at most.", rich_help_panel=MASK_PANEL)] = 1000,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step.", rich_help_panel=MASK_PANEL)] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.", rich_help_panel=MASK_PANEL)] = 64,
    strength: Annotated[
        float, typer.Option(help="Price of size: the larger, the fewer weights.", rich_help_panel=MASK_PANEL)
    ] = 10.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the scores.", rich_help_panel=MASK_PANEL)] = 0.01,
    last_beta: Annotated[
        float, typer.Option("--last-beta", help="Sharpness at the last step.", rich_help_panel=MASK_PANEL)
    ] = 50_000.0,
    stop: Annotated[
        float,
        typer.Option(help="End when fewer masks than this share are undecided; 0: never.", rich_help_panel=MASK_PANEL),
    ] = 0.01,
    top: Annotated[
        int, typer.Option(min=1, help="Successors kept for each token of the table.", rich_help_panel=MASK_PANEL)
    ] = 64,
    controls: Annotated[
        int, typer.Option(min=1, max=100, help="Random masks to compare with.", rich_help_panel=MASK_PANEL)
    ] = 3,
    check: Annotated[int, typer.Option(min=1, help="Held-out batches to judge by.", rich_help_panel=MASK_PANEL)] = 8,
    held_out: Annotated[
        float, typer.Option(help="Share of the documents held out.", rich_help_panel=MASK_PANEL)
    ] = 0.05,
    keep_model: Annotated[
        bool, typer.Option(help="Write the masked model as a checkpoint.", rich_help_panel=MASK_PANEL)
    ] = True,
    dtype: o.Dtype = None,
    *,
    where: RunOptions,
    machine: Machine,
) -> None:
    """Find the subnetwork that predicts the next token from the current one alone.

    A mask over the matrices of attention and MLPs is learnt on the frozen model, then compared with random masks of the
    same counts: how well it keeps to the bigram table, and what the model loses without it. Leaves the mask (one bit a
    weight), the masked model as an ordinary checkpoint, and a report; a run that was stopped goes on.
    """
    from vesalius.features.subnetwork import MaskRecipe, learn_masks

    screen = machine.screen(where.as_json)
    recipe = MaskRecipe(
        target=target,  # type: ignore[arg-type]  # refused there
        steps=steps,
        rows=rows,
        length=length,
        strength=strength,
        lr=lr,
        last_beta=last_beta,
        stop=stop,
        top=top,
        held_out=held_out,
        check=check,
        controls=controls,
        seed=where.seed,
    )
    opened = o.opened(screen, model, dtype, machine.device, None, machine.trust_remote_code)
    names = o.listed(corpus)
    command = typed()
    with screen.step("learning masks") as tell:
        folder = learn_masks(
            opened,
            names,
            recipe,
            out=where.out,
            fresh=where.fresh,
            keep_model=keep_model,
            command_line=command,
            tell=tell,
        )
    run = Run.open(folder)
    drawn(screen, run)
    _show(screen, run)


def _show(screen: Screen, run: Run) -> None:
    found, density = run.table("variants"), run.table("density")
    shown = found.groupby("variant", sort=False)[["kept", "r", "kl", "nll"]].mean().reset_index()
    shown["kept"] = shown["kept"].astype(int)
    parts = density.groupby("part", sort=False)[["weights", "kept"]].sum().reset_index()
    parts["density"] = parts["kept"] / parts["weights"]
    told = records_of({"variants": found, "density": density})
    conclude(screen, run, shown, "", "the densest parts:", parts.nlargest(8, "density"), **told)
