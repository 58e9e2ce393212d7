"""The long commands of `vesalius lens`: training a lens, a causal basis, odd prompts."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import conclude, drawn, typed
from vesalius.cli.lens import LensOf, Transfer, lens_of
from vesalius.errors import PartError, VesaliusError
from vesalius.runs import Run

TRAIN_PANEL = "Training"

Corpus = Annotated[
    str, typer.Option("--corpus", help="Corpora by name, files or folders, with commas between (`vesalius corpora`).")
]

Words = Annotated[
    int, typer.Option("--words", min=0, help="Words that stand for the vocabulary while learning; 0 for all.")
]


def train(
    corpus: Corpus = "foldoc,gcide,anarchism",
    model: o.ModelName = o.MODEL_DEFAULT,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens to read in all.", rich_help_panel=TRAIN_PANEL)
    ] = 120_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.", rich_help_panel=TRAIN_PANEL)] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Rows read in a step.", rich_help_panel=TRAIN_PANEL)] = 2,
    states: Annotated[
        int, typer.Option(min=1, help="States trained in a step, at most.", rich_help_panel=TRAIN_PANEL)
    ] = 256,
    start: Annotated[
        str,
        typer.Option(
            help="regression: least squares on the first tokens; zero: the logit lens.", rich_help_panel=TRAIN_PANEL
        ),
    ] = "regression",
    start_share: Annotated[
        float, typer.Option(help="Share of the tokens for the regression.", rich_help_panel=TRAIN_PANEL)
    ] = 0.5,
    words: Words = 4096,
    optimizer: Annotated[str, typer.Option(help="See `vesalius optimizers`.", rich_help_panel=TRAIN_PANEL)] = "adamw",
    lr: Annotated[float, typer.Option(help="Peak learning rate; it falls to 0.", rich_help_panel=TRAIN_PANEL)] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of the matrices.", rich_help_panel=TRAIN_PANEL)] = 1e-3,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Thin matrices of this rank.", rich_help_panel=TRAIN_PANEL)
    ] = None,
    bias_only: Annotated[
        bool, typer.Option("--bias-only", help="Shifts alone, no matrices.", rich_help_panel=TRAIN_PANEL)
    ] = False,
    check_states: Annotated[
        int, typer.Option(min=1, help="Held-out states to judge the lens by.", rich_help_panel=TRAIN_PANEL)
    ] = 1024,
    held_out: Annotated[
        float, typer.Option(help="Share of the documents held out.", rich_help_panel=TRAIN_PANEL)
    ] = 0.05,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Train a tuned lens: an affine map a layer, so that each layer reads as the model's own prediction.

    The model is frozen. Leaves a run whose folder is the lens (`--lens RUN`), with its distance from the model layer by
    layer beside the logit lens's, on held-out text; a run that was stopped or killed goes on and ends the same.
    """
    from vesalius.lens import LensRecipe, train_lens

    screen = machine.screen(where.as_json)
    recipe = LensRecipe(
        tokens=tokens,
        length=length,
        rows=rows,
        states=states,
        start=start,  # type: ignore[arg-type]  # refused there
        start_share=start_share,
        words=words or None,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        rank=rank,
        bias_only=bias_only,
        held_out=held_out,
        check_states=check_states,
        seed=where.seed,
    )
    opened = machine.opened(screen, model)
    command = typed()
    with screen.step("training a lens") as tell:
        folder = train_lens(
            opened, o.listed(corpus), recipe, out=where.out, fresh=where.fresh, command_line=command, tell=tell
        )
    run = Run.open(folder)
    drawn(screen, run)
    quality, spent = run.table("quality"), run.json("spent")
    wide = quality.pivot(index="layer", columns="lens", values=["kl", "perplexity", "agree"])
    names = quality.drop_duplicates("layer").set_index("layer")["name"]
    shown = pd.DataFrame({"layer": names.loc[wide.index[::-1]]})
    for column, label in (("kl", "KL"), ("agree", "agree")):
        for lens in ("logit", "tuned"):
            shown[f"{label} {lens}"] = wide[column, lens].iloc[::-1]
    shown["perplexity tuned"] = wide["perplexity", "tuned"].iloc[::-1]
    seconds = spent["start"].get("seconds", 0) + spent["training"]["seconds"]
    screen.note(f"trained for {seconds:.0f} s, peak memory {spent['peak_bytes'] / 2**20:,.0f} MiB")
    conclude(screen, run, shown, quality=quality.to_dict("records"), recipe=asdict(recipe))


def basis(
    model: o.ModelName = o.MODEL_DEFAULT,
    lens: LensOf = "tuned",
    transfer: Transfer = False,
    layer: Annotated[
        str | None, typer.Option("--layer", help="As L15 or 15, or embed; the middle one by default.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Directions to extract.")] = 10,
    ablation: Annotated[str, typer.Option(help="What replaces a component: mean, resample or zero.")] = "mean",
    corpus: Corpus = "foldoc",
    rows: Annotated[int, typer.Option(min=1, help="Rows of text.")] = 12,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 32,
    iterations: Annotated[int, typer.Option(min=1, help="Of L-BFGS, for each direction.")] = 100,
    words: Words = 4096,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """The directions of a layer that a lens's predictions depend on most, and whether the model agrees.

    Each direction is then ablated in the model's own forward pass: influence in the lens against influence in the
    model (Spearman), and how far the two changes point the same way; beside as many random directions.
    """
    import torch

    from vesalius.corpus.order import Order
    from vesalius.lens.base import layer_name
    from vesalius.lens.basis import agreement, causal_basis, influences, random_directions, sample_states
    from vesalius.train.assembly import store_of

    screen = machine.screen(where.as_json)
    kind: Any = ablation  # an unknown one is refused where it is used
    opened = machine.opened(screen, model)
    found, identity = lens_of(opened, lens, transfer)
    at = opened.n_layers // 2 if layer is None else _layer(layer)
    if opened.tokenizer is None:
        raise VesaliusError(f"{opened.name} has no tokenizer, so no text can be read with it")
    with screen.step("reading text") as tell:
        order = Order(
            store_of(o.listed(corpus), opened.tokenizer, lambda t: tell(t, None)), length, rows, where.seed, tail="drop"
        )
    if rows > order.rows_per_epoch:
        raise VesaliusError(
            f"{corpus} holds {order.rows_per_epoch} rows of {length} tokens, and --rows is {rows}; give fewer rows, or "
            "more text"
        )
    request = {
        "command": "lens-basis",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "lens": identity,
        "layer": at,
        "k": k,
        "ablation": ablation,
        "data": order.fingerprint,
        "iterations": iterations,
        "words": words,
        "seed": where.seed,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            sample = sample_states(opened, torch.from_numpy(order.batch(0).ids[:, :-1].copy()), at)
            with screen.step("extracting directions") as progress:
                made = causal_basis(
                    opened,
                    found,
                    sample,
                    k,
                    ablation=kind,
                    iterations=iterations,
                    words=words or None,
                    seed=where.seed,
                    progress=progress,
                )
            both = torch.cat([made.directions, random_directions(opened.d_model, k, where.seed).to(made.directions)])
            with screen.step("ablating them in the model") as progress:
                table = influences(opened, found, sample, both, ablation=kind, seed=where.seed, progress=progress)
            table["kind"] = ["basis"] * k + ["random"] * k
            run.save_array("basis", directions=made.directions.cpu().numpy(), influence=made.influence)
            run.save_table("directions", table)
            agreed = {kind: agreement(table[table["kind"] == kind]) for kind in ("basis", "random")}
            told = _basis_lead(layer_name(at), len(sample.hidden), agreed, table)
            summary = {"model": opened.name, "lens": found.name, "layer": layer_name(at), "ablation": ablation}
            summary |= {
                "states": len(sample.hidden),
                "agreement": agreed,
                "lead": told,
                "notes": [f"{sample.left_out} states over ten times as long as most were left out"]
                * bool(sample.left_out),
                "command": command,
            }
            run.save_json("summary", summary)
    drawn(screen, run)
    shown = run.table("directions")[["kind", "direction", "lens", "model", "alignment"]]
    conclude(screen, run, shown, directions=shown.to_dict("records"))


def _basis_lead(layer: str, states: int, agreed: dict[str, Any], table: pd.DataFrame) -> str:
    """The finding in three sentences."""
    rho = agreed["basis"]["spearman"]
    ranks = "cannot be ranked" if rho is None else f"agree by rank with Spearman {rho:.2f}"
    move = {kind: float(table.loc[table["kind"] == kind, "model"].mean()) for kind in ("basis", "random")}
    return (
        f"{agreed['basis']['n']} directions of {layer} over {states} states: influence in lens and model {ranks}. The "
        f"changes align by {agreed['basis']['alignment']:.2f} (random directions {agreed['random']['alignment']:.2f}). "
        f"In the model they move predictions by {move['basis']:.3f} nats each, random ones by {move['random']:.4f}."
    )


def _layer(text: str) -> int:
    if text == "embed":
        return -1
    match = re.fullmatch(r"L?(\d+)(?:\.resid_post)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise PartError(f"'{text}' names no layer; give L15, 15 or embed")
    return int(match[1])


def anomaly(
    normal: Annotated[
        Path, typer.Option("--normal", help="Prompts that are as usual: a .txt file, one a line, or .jsonl.")
    ],
    test: Annotated[Path, typer.Option("--test", help="Prompts under suspicion, likewise.")],
    model: o.ModelName = o.MODEL_DEFAULT,
    lens: LensOf = "tuned",
    transfer: Transfer = False,
    detector: Annotated[str, typer.Option(help="lof (local outlier factor) or isolation-forest.")] = "lof",
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Tell odd prompts from normal ones by the trajectory of the model's predictions.

    A detector is fitted to half of the normal prompts and judged on the other half against the test prompts. Beside it
    stand the same with the logit lens, and final entropy and the prompt's perplexity, which need no lens.
    """
    from vesalius.lens import detect
    from vesalius.lens.anomaly import DETECTORS, feature_names, read_prompts

    screen = machine.screen(where.as_json)
    DETECTORS.entry(detector)
    usual, suspicious = read_prompts(normal), read_prompts(test)
    opened = machine.opened(screen, model)
    found, identity = lens_of(opened, lens, transfer)
    request = {
        "command": "lens-anomaly",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "lens": identity,
        "normal": usual,
        "test": suspicious,
        "detector": detector,
        "seed": where.seed,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            with screen.step("reading prompts") as progress:
                made = detect(opened, found, usual, suspicious, detector=detector, seed=where.seed, progress=progress)
            run.save_table("prompts", made.table)
            run.save_table("features", pd.DataFrame(made.features, columns=feature_names(opened)))
            best = made.auroc["trajectory"]
            others = {"logit": "the logit lens's", "entropy": "final entropy alone", "perplexity": "perplexity alone"}
            beside = [f"by {others[k]} {v['auroc']:.3f}" for k, v in made.auroc.items() if k in others]
            told = (
                f"By its {found.name}-lens trajectory a test prompt is told from a normal one with an AUROC of "
                f"{best['auroc']:.3f} [{best['low']:.3f}, {best['high']:.3f}] ({detector}, fitted to {made.fitted} "
                f"prompts); {', '.join(beside)}."
            )
            summary = {"model": opened.name, "lens": found.name, "detector": detector, "auroc": made.auroc}
            summary |= {"normal": len(usual), "test": len(suspicious), "lead": told, "notes": [], "command": command}
            run.save_json("summary", summary)
    drawn(screen, run)
    table = run.table("prompts").sort_values("score", ascending=False, kind="stable")
    rates = pd.DataFrame([{"by": k, **v} for k, v in run.json("summary")["auroc"].items()])
    conclude(screen, run, rates, table.head(10), prompts=table.to_dict("records"))
