"""`vesalius lens`: what the residual stream says at every layer, who writes it, and what a lens is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, typed
from vesalius.runs import Run

READ_PANEL = "Reading"

Prompt = Annotated[str, typer.Argument(help="The text to read.")]
Tokens = Annotated[
    list[str] | None,
    typer.Option(
        "--token", help="A token to follow, as ' Paris' with its space. Repeatable.", rich_help_panel=READ_PANEL
    ),
]
Position = Annotated[
    int, typer.Option("--position", help="Which position to show; -1 is the end.", rich_help_panel=READ_PANEL)
]
Top = Annotated[int, typer.Option("--top", min=1, help="Likeliest tokens to show.", rich_help_panel=READ_PANEL)]
Decoder = Annotated[
    str | None,
    typer.Option("--decoder", help="Encoder-decoders: what has been written so far.", rich_help_panel=READ_PANEL),
]
LensOf = Annotated[
    str,
    typer.Option(
        "--lens",
        help="tuned (the model's latest in ./runs), logit, or a run of `lens train`.",
        rich_help_panel=READ_PANEL,
    ),
]
Transfer = Annotated[
    bool,
    typer.Option("--transfer", help="Read with a lens of another model of the same shape.", rich_help_panel=READ_PANEL),
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    from vesalius.cli.lens_work import anomaly, basis, train

    group = typer.Typer(
        no_args_is_help=True,
        help="Read the residual stream at every layer: logit lens, tuned lens, exact direct attribution.",
        rich_markup_mode="markdown",
    )
    for command in (logit, tuned, direct, train, basis, anomaly):
        group.command(command.__name__)(g.expanded(command))
    app.add_typer(group, name="lens")


def logit(
    prompt: Prompt,
    model: o.ModelName = o.MODEL_DEFAULT,
    tokens: Tokens = None,
    position: Position = -1,
    top: Top = 5,
    decoder: Decoder = None,
    *,
    where: g.UndrawnRunOptions,
    machine: g.Opening,
) -> None:
    """What the model would say if it ended at each layer (the logit lens).

    The model's own final norm and unembedding, applied to the residual stream after every block. Many models are not
    legible this way before their last layers; `vesalius lens tuned` is the remedy. Leaves a run with report.html.
    """
    screen = machine.screen(where.as_json)
    opened = machine.opened(screen, model)
    _read(screen, opened, prompt, "logit", False, list(tokens or []), position, top, decoder, where.out, where.fresh)


def tuned(
    prompt: Prompt,
    model: o.ModelName = o.MODEL_DEFAULT,
    lens: LensOf = "tuned",
    transfer: Transfer = False,
    tokens: Tokens = None,
    position: Position = -1,
    top: Top = 5,
    decoder: Decoder = None,
    *,
    where: g.UndrawnRunOptions,
    machine: g.Opening,
) -> None:
    """What each layer foretells, through a lens trained for this model (`vesalius lens train`).

    The report sets it beside the logit lens on the same prompt.
    """
    screen = machine.screen(where.as_json)
    opened = machine.opened(screen, model)
    _read(screen, opened, prompt, lens, transfer, list(tokens or []), position, top, decoder, where.out, where.fresh)


def lens_of(opened: Any, name: str, transfer: bool) -> tuple[Any, str]:
    """A lens by name or run, and what identifies it."""
    from vesalius.lens import LENSES, open_lens
    from vesalius.lens.tuned import open_tuned

    found = open_lens(name, opened, transfer=transfer) if name in LENSES else open_tuned(opened, name, transfer)
    return found, str(getattr(found, "note", {}).get("sha256", found.name))


def _read(
    screen: Screen,
    opened: Any,
    prompt: str,
    name: str,
    transfer: bool,
    tokens: list[str],
    position: int,
    top: int,
    decoder: str | None,
    out: Path | None,
    fresh: bool,
) -> None:
    from vesalius.lens import trajectory
    from vesalius.lens.base import layer_name, position_of
    from vesalius.report.words import token

    lens, identity = lens_of(opened, name, transfer)
    found = trajectory(opened, prompt, lens, top=top, tokens=tokens, decoder=decoder)
    place = position_of(len(found.positions), position)
    request = {
        "command": f"lens-{lens.name}",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "lens": identity,
        "prompt": prompt,
        "decoder": decoder,
        "tokens": tokens,
        "position": place,
        "top": top,
    }
    command = typed()
    likeliest: list[dict[str, Any]] = [
        {"layer": n, "name": layer_name(n), "top": found.top(n, place)} for n in found.layers
    ]
    depth = int(found.depth[place])
    with Run.start(request, out, fresh, command) as run:
        if not run.done:
            run.save_table("trajectory", found.to_frame())
            run.save_json("likeliest", likeliest)
            if lens.name != "logit":
                run.save_table("plain", trajectory(opened, prompt, "logit", top=1, decoder=decoder).to_frame())
            end = found.top(found.layers[-1], place)[0]
            told = f"After “{token(found.tokens[place])}” the model says “{token(end[0])}” ({end[1]:.2f}); "
            told += f"that is the {lens.name} lens's first choice from {layer_name(depth)} on."
            summary = {"model": opened.name, "lens": lens.name, "prompt": prompt, "position": place}
            summary |= {"tokens": found.chosen, "depth": depth, "lead": told, "notes": [], "command": command}
            run.save_json("summary", summary)
    drawn(screen, run)
    frame = found.to_frame()
    here = frame[frame["position"] == place].iloc[::-1]
    shown = pd.DataFrame({"layer": here["name"]})
    shown["likeliest"] = [
        "  ".join(f"{t!r} {p:.2f}" for t, p in row["top"][: min(top, 3)]) for row in reversed(likeliest)
    ]
    for column in ("entropy", "kl"):
        shown[column] = here[column].to_numpy()
    for text in found.chosen:
        shown[f"p {text}"], shown[f"rank {text}"] = here[f"p {text}"].to_numpy(), here[f"rank {text}"].to_numpy()
    conclude(screen, run, shown, **{"likeliest": likeliest, "layers": here.iloc[::-1].to_dict("records")})


def direct(
    prompt: Prompt,
    model: o.ModelName = o.MODEL_DEFAULT,
    tokens: Annotated[
        str | None,
        typer.Option("--token", help="The token asked about, as ' Paris'; the likeliest by default."),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Another token: attribute the difference of the two logits.")
    ] = None,
    position: Position = -1,
    neurons: Annotated[
        list[str] | None, typer.Option("--neurons", help="Split this MLP into its neurons, as L9.MLP. Repeatable.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Terms to print.")] = 15,
    decoder: Decoder = None,
    *,
    where: g.UndrawnRunOptions,
    machine: g.Opening,
) -> None:
    """How much of a token's logit every part writes itself; the terms add up to what the model says.

    Embedding, heads, MLPs (or neurons) and biases, through the final norm at its actual scale. Leaves a run with the
    terms as scores and report.html.
    """
    from vesalius.lens import attribute
    from vesalius.report.words import token

    screen = machine.screen(where.as_json)
    opened = machine.opened(screen, model)
    split = list(neurons or [])
    found = attribute(opened, prompt, tokens, against, position=position, neurons=split, decoder=decoder)
    request = {
        "command": "lens-direct",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "prompt": prompt,
        "decoder": decoder,
        "answer": found.answer,
        "against": found.against,
        "position": found.position,
        "neurons": split,
    }
    command = typed()
    frame = found.to_frame()
    rows = frame.loc[frame["value"].abs().sort_values(ascending=False, kind="stable").index].head(top)
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            run.save_table("terms", frame)
            run.save_table("by_layer", found.by_layer())
            run.save_scores("scores", found.scores())
            best = rows.iloc[0]
            what = f"“{token(found.answer)}”" + (f" over “{token(found.against)}”" if found.against is not None else "")
            unit = "logit" if found.against is None else "logit difference"
            told = f"The {unit} of {what} is {found.logit:.3f}; the largest term is {best['part']} with "
            away = abs(found.total - found.logit)
            told += f"{best['value']:+.3f}. All {len(frame)} terms sum to {found.total:.4f}, {away:.1e} away from what "
            told += "the model says."
            summary = {"model": opened.name, "prompt": prompt, "answer": found.answer, "against": found.against}
            summary |= {"logit": found.logit, "total": found.total, "biases": found.biases, "head": found.head}
            notes = []
            if found.head:
                notes.append(
                    "this model's head is not linear: its slope at the actual state is used, and `head` is the rest"
                )
            run.save_json("summary", summary | {"lead": told, "notes": notes, "command": command})
    drawn(screen, run)
    conclude(screen, run, rows[["part", "kind", "value"]], terms=rows[["part", "kind", "value"]].to_dict("records"))
