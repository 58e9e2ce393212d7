"""`vesalius sae`: train a sparse autoencoder, show what its features are, and change them in the forward pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import conclude, drawn, typed
from vesalius.errors import VesaliusError
from vesalius.runs import Run

TRAIN_PANEL = "Training"
Corpus = Annotated[
    str | None, typer.Option("--corpus", help="Corpora by name, files or folders, commas between (`vesalius corpora`).")
]
Force = Annotated[bool, typer.Option("--force", help="Use it on a model other than the one it was trained on.")]
Folder = Annotated[str, typer.Argument(help="A run of `sae train`, or a folder that SAELens saved.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens of held-out text to read.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(help="Sparse autoencoders: train, show, use.", no_args_is_help=True)
    group.command("train")(g.expanded(train))
    group.command("show")(g.expanded(show))
    group.command("use")(g.expanded(use))
    app.add_typer(group, name="sae")


def train(
    at: Annotated[str, typer.Option("--at", help="Where: L12.resid_post, L12.MLP, L12.attn, L12.z, L12.neurons.")],
    model: o.ModelName = o.MODEL_DEFAULT,
    corpus: Corpus = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file, one prompt a line, instead of a corpus.")
    ] = None,
    architecture: Annotated[str, typer.Option(help="topk or standard (ReLU and L1).", rich_help_panel=TRAIN_PANEL)] = (
        "topk"
    ),
    width: Annotated[
        int | None,
        typer.Option(
            min=2, help="Features; by default four times the width of the activation.", rich_help_panel=TRAIN_PANEL
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Features on at once (topk).", rich_help_panel=TRAIN_PANEL)] = 32,
    l1: Annotated[
        float, typer.Option("--l1", help="Weight of the penalty (standard).", rich_help_panel=TRAIN_PANEL)
    ] = 5.0,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens to train on.", rich_help_panel=TRAIN_PANEL)
    ] = 60_000,
    passes: Annotated[int, typer.Option(min=1, help="Over those tokens.", rich_help_panel=TRAIN_PANEL)] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Vectors in a step.", rich_help_panel=TRAIN_PANEL)] = 1024,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row of text.", rich_help_panel=TRAIN_PANEL)] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAIN_PANEL)] = 1e-3,
    resample: Annotated[
        int, typer.Option(min=0, help="Steps between looks for dead features; 0: never.", rich_help_panel=TRAIN_PANEL)
    ] = 50,
    check_tokens: Annotated[
        int, typer.Option(min=1, help="Held-out tokens to judge by.", rich_help_panel=TRAIN_PANEL)
    ] = 4096,
    memory: o.Memory = 2.0,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Train a sparse autoencoder on a model's activations over a corpus, in the file format of SAELens.

    Leaves a run whose folder is the SAE, with what it is worth on held-out text: variance explained, features on at
    once, share that is dead, and how much of the model's loss it keeps when put in the activation's place. A run that
    was stopped goes on and ends the same.
    """
    from vesalius.features.dictionaries import SAERecipe, parse_place, train_sae
    from vesalius.features.dictionaries.places import width_of

    screen = machine.screen(where.as_json)
    o.check_memory(memory)
    recipe = SAERecipe(
        architecture=architecture,  # type: ignore[arg-type]  # refused there
        width=width,
        k=k,
        l1=l1,
        tokens=tokens,
        passes=passes,
        batch=batch,
        length=length,
        lr=lr,
        resample=resample,
        check_tokens=check_tokens,
        memory_gb=memory,
        seed=where.seed,
    )
    site = parse_place(at)
    texts = [] if prompts is None else _lines(prompts)
    if prompts is not None and not texts:
        raise VesaliusError(f"{prompts} holds no prompts; write one a line")
    names = o.listed(corpus) if corpus or texts else ["foldoc"]
    opened = machine.opened(screen, model)
    width_of(opened, site)
    command = typed()
    with screen.step("training an SAE") as tell:
        folder = train_sae(
            opened,
            site,
            names,
            recipe,
            prompts=texts,
            out=where.out,
            fresh=where.fresh,
            command_line=command,
            tell=tell,
        )
    run = Run.open(folder)
    drawn(screen, run)
    conclude(screen, run, quality_table(run.json("quality")))


def show(
    sae: Folder,
    model: o.ModelName = o.MODEL_DEFAULT,
    feature: Annotated[
        list[int] | None, typer.Option("--feature", "-f", help="A feature's number; repeatable. By default some.")
    ] = None,
    corpus: Corpus = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text to read instead; repeatable.")] = None,
    tokens: Tokens = 4096,
    shown: Annotated[int, typer.Option(min=1, help="Texts and tokens of each feature.")] = 8,
    force: Force = False,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """What an SAE is worth on a text, and what its features are: where they fire, which tokens they make likelier.

    By default 12 features are shown, drawn from those that fire on 0.1 % to 5 % of the tokens.
    """
    from vesalius.features.dictionaries import SAE, corpus_rows, gather, meanings, prompt_rows, quality

    screen = machine.screen(where.as_json)
    if text and corpus:
        raise VesaliusError("--text and --corpus both say what is read; give one of them")
    folder = folder_of(sae)
    opened = machine.opened(screen, model)
    found = SAE.load(folder, opened, force=force)
    unsure = found.check(opened, force)
    numbers = [found.feature(n) for n in feature or []]
    with screen.step("reading text") as tell:
        if text:
            rows = prompt_rows(opened, text)
        else:
            names = o.listed(corpus) or _own(found) or ["foldoc"]
            rows = corpus_rows(opened, names, 1, held_out_tokens=tokens, tell=tell).held_out
    request = {
        "command": "sae-show",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "sae": identity(folder),
        "place": found.place,
        "text": rows.what,
        "data": rows.fingerprint,
        "features": numbers,
        "shown": shown,
        "seed": where.seed,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            with screen.step("judging") as tell:
                judged = quality(opened, found, rows, force=force, tell=tell)
                read = gather(opened, found.site, rows, tell=tell)
            numbers = numbers or some_features(judged.density, where.seed)
            made = meanings(opened, found, numbers, rows, read, shown=shown)
            run.save_json("quality", judged.numbers)
            table = pd.DataFrame({"feature": range(found.d_sae), "density": judged.density, "largest": judged.largest})
            run.save_table("density", table)
            run.save_json("features", [m.to_json() for m in made])
            from vesalius.features.dictionaries.training import lead, notes

            summary = {
                "model": opened.name,
                "sae": str(folder),
                "place": found.place,
                "architecture": found.architecture,
                "features": found.d_sae,
                "text": rows.what,
                "quality": judged.numbers,
                "lead": lead(found, judged.numbers),
                "notes": [*unsure, *notes(judged.numbers)],
                "command": command,
            }
            run.save_json("summary", summary)
    drawn(screen, run)
    lines: list[Any] = [quality_table(run.json("quality"))]
    for one in run.json("features"):
        lines.append(
            f"\nfeature {one['number']}: fires on {one['density']:.2%} of the tokens, at most {one['largest']:.2f}"
        )
        lines += [f"  {t['value']:7.2f}  {_line(t)}" for t in one["texts"][:5]]
        if one["up"]:
            lines.append("  makes likelier: " + ", ".join(repr(t) for t, _ in one["up"]))
    conclude(screen, run, *lines, features=run.json("features"))


def use(
    sae: Folder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model goes on with.")],
    model: o.ModelName = o.MODEL_DEFAULT,
    feature: Annotated[
        list[int] | None, typer.Option("--feature", "-f", help="A feature's number; repeatable.")
    ] = None,
    to: Annotated[float | None, typer.Option("--set", help="Set these features to this value at every token.")] = None,
    add: Annotated[float | None, typer.Option("--add", help="Add this to them.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="Multiply them by this; 0 switches off.")] = None,
    no_error: Annotated[bool, typer.Option("--no-error", help="Leave out what the SAE does not explain.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 20,
    force: Force = False,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Put an SAE into the forward pass, change some of its features, and see what the model says.

    Without --feature nothing is changed: with --no-error this shows what the reconstruction alone does to the model.
    Names the features that are on in the prompt, so that there is something to change.
    """
    from vesalius.features.dictionaries import SAE
    from vesalius.features.dictionaries.using import outcome

    screen = machine.screen(where.as_json)
    given = {n: v for n, v in (("set", to), ("add", add), ("scale", scale)) if v is not None}
    if len(given) > 1:
        raise VesaliusError(f"{' and '.join('--' + n for n in given)} contradict each other; give one of them")
    for name, number in given.items():
        if not math.isfinite(number):
            raise VesaliusError(f"--{name} {number:g} is nothing a feature can be changed by; give a finite number")
    if bool(given) != bool(feature):
        raise VesaliusError("a change needs both: --feature NUMBER, and one of --set, --add or --scale")
    if not given and not no_error:
        raise VesaliusError("nothing is changed: name a --feature and a --set, --add or --scale, or give --no-error")
    folder = folder_of(sae)
    opened = machine.opened(screen, model)
    if opened.kind != "causal":
        raise VesaliusError(f"{opened.name} is {opened.kind} and writes no text; use a language model's SAE here")
    found = SAE.load(folder, opened, force=force)
    op, value = next(iter(given.items()), ("", 0.0))
    values = {found.feature(n): value for n in feature or []}
    request = {
        "command": "sae-use",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "sae": identity(folder),
        "place": found.place,
        "prompt": prompt,
        "change": op,
        "values": {str(k): v for k, v in values.items()},
        "error": not no_error,
        "tokens": tokens,
        "seed": where.seed,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            with screen.step("writing"):
                made = outcome(opened, found, prompt, values, op, error=not no_error, tokens=tokens, force=force)
            run.save_table("next", made.next)
            run.save_table("active", made.active)
            summary = {
                "model": opened.name,
                "place": found.place,
                "prompt": prompt,
                "texts": made.texts,
                "kl": made.kl,
                "lead": made.lead,
                "notes": found.check(opened, force),
                "command": command,
            }
            run.save_json("summary", summary)
    drawn(screen, run)
    s = run.json("summary")
    lines: list[Any] = [run.table("next").head(8), "", run.table("active").head(8)]
    lines += [f"\nas it is  {' '.join(s['texts'][0].split())}", f"changed   {' '.join(s['texts'][1].split())}"]
    conclude(screen, run, *lines, **{name: run.table(name).to_dict("records") for name in ("next", "active")})


# -- shared


def folder_of(name: str) -> Path:
    """The folder of an SAE, by its path or the name of its run."""
    from vesalius.features.dictionaries.sae import CONFIG
    from vesalius.run_index import find_folder

    return find_folder(name, CONFIG)


def identity(folder: Path) -> str:
    """What identifies an SAE: a short sha256 of its weights and of its config, which decides what they mean."""
    import hashlib

    from vesalius.features.dictionaries.sae import CONFIG, WEIGHTS
    from vesalius.records import sha256

    return hashlib.sha256((sha256(folder / WEIGHTS) + sha256(folder / CONFIG)).encode()).hexdigest()[:16]


def some_features(density: Any, seed: int, n: int = 12) -> list[int]:
    """Features that are neither everywhere nor nearly nowhere, drawn by the seed."""
    middling = np.flatnonzero((density >= 0.001) & (density <= 0.05))
    among = middling if len(middling) >= n else np.flatnonzero(density > 0)
    if not len(among):
        raise VesaliusError("no feature of this SAE fires on this text: it is of another model or site, or all dead")
    picked = np.random.default_rng(seed).choice(among, size=min(n, len(among)), replace=False)
    return sorted(int(i) for i in picked)


def quality_table(q: dict[str, Any]) -> pd.DataFrame:
    """The numbers in a row."""
    row: dict[str, Any] = {k: q[k] for k in ("tokens", "explained", "l0", "dead")}
    if "ce_clean" in q:
        row |= {"loss": q["ce_clean"], "loss with it": q["ce_spliced"], "loss mean-ablated": q["ce_mean"]}
        row |= {"loss recovered": q["recovered_mean"]["mean"], "recovered zero-ablated": q["recovered_zero"]["mean"]}
    return pd.DataFrame([row])


def _own(sae: Any) -> list[str]:
    """The corpora an SAE of ours was trained on; the held-out documents are the same there."""
    from vesalius.corpus.sources import catalogue

    names = o.listed(str(sae.metadata.get("dataset_path") or "")) if sae.metadata.get("vesalius_recipe") else []
    return names if names and all(n in catalogue() or Path(n).exists() for n in names) else []


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise VesaliusError(f"{path} cannot be read as text: {error}") from None


def _line(row: dict[str, Any]) -> str:
    return " ".join(f"{row['before']}[{row['token']}]{row['after']}".split())
