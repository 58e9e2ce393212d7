"""`vesalius codebook`: put codebooks into a model, see what codes mean, and force them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, set_threads, typed
from vesalius.errors import VesaliusError
from vesalius.runs import Run

TRAIN_PANEL = "Training"
Corpus = Annotated[
    str, typer.Option("--corpus", help="Corpora by name, files or folders, commas between; or synthetic:NAME.")
]
Folder = Annotated[str, typer.Argument(help="A run of `codebook train`.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(help="Codebook features: train, show, steer.", no_args_is_help=True)
    group.command("train")(g.expanded(train))
    group.command("show")(show)
    group.command("steer")(steer)
    app.add_typer(group, name="codebook")


def train(
    at: Annotated[str, typer.Option("--at", help="MLP, z, attn or resid_post for every block, or L3.MLP,L4.z,...")],
    corpus: Corpus = "foldoc",
    model: o.ModelName = o.MODEL_DEFAULT,
    size: Annotated[int, typer.Option(min=2, help="Codes of each codebook.", rich_help_panel=TRAIN_PANEL)] = 1000,
    k: Annotated[int, typer.Option("--k", min=1, help="Codes on at once.", rich_help_panel=TRAIN_PANEL)] = 8,
    steps: Annotated[int, typer.Option(min=0, help="Of fine-tuning.", rich_help_panel=TRAIN_PANEL)] = 300,
    rows: Annotated[int, typer.Option(min=1, help="Rows of text in a step.", rich_help_panel=TRAIN_PANEL)] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row.", rich_help_panel=TRAIN_PANEL)] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAIN_PANEL)] = 5e-4,
    every: Annotated[
        int, typer.Option(min=0, help="Steps between looks for unused codes; 0: never.", rich_help_panel=TRAIN_PANEL)
    ] = 50,
    plain: Annotated[
        bool, typer.Option("--plain", help="Fine-tune without codes as well.", rich_help_panel=TRAIN_PANEL)
    ] = False,
    data_set: Annotated[
        list[str] | None, typer.Option("--data-set", help="KEY=VALUE, repeatable: an option of a synthetic corpus.")
    ] = None,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Fine-tune a model with codebooks in it: its hidden states become means of few codes.

    Leaves a run with an ordinary checkpoint (model/), the codes beside it, and the loss on held-out text: of the model
    as it was, with codes merely put in, and after training. A run that was stopped goes on and ends the same.
    """
    from vesalius.cli.console import settings
    from vesalius.features.codebooks import CodebookRecipe, train_codebooks

    screen = machine.screen(where.as_json)
    recipe = CodebookRecipe(
        size=size, k=k, steps=steps, rows=rows, length=length, lr=lr, every=every, plain=plain, seed=where.seed
    )
    options: dict[str, Any] = {}
    if corpus.startswith("synthetic:"):
        from vesalius.corpus import SYNTHETIC

        name = corpus.removeprefix("synthetic:")
        options = settings(data_set or [], SYNTHETIC.get(name).defaults, f"synthetic corpus {name}")
    elif data_set:
        raise VesaliusError("--data-set is for a synthetic corpus, as --corpus synthetic:fsm --data-set states=30")
    opened = machine.opened(screen, model)
    source: Any = corpus if corpus.startswith("synthetic:") else o.listed(corpus)
    command = typed()
    with screen.step("training codebooks") as tell:
        places = o.listed(at)
        folder = train_codebooks(
            opened, places, source, recipe, out=where.out, fresh=where.fresh, command_line=command, tell=tell, **options
        )
    run = Run.open(folder)
    drawn(screen, run)
    losses = run.json("summary")["losses"]
    conclude(screen, run, pd.DataFrame({"held-out loss": list(losses), "nats": list(losses.values())}))


def show(
    codebook: Folder,
    at: Annotated[str | None, typer.Option("--at", help="A place, as L3.MLP or L3.z; the last by default.")] = None,
    group: Annotated[int, typer.Option(min=0, help="Which head's codebook, at z.")] = 0,
    code: Annotated[list[int] | None, typer.Option("--code", help="A code to see closely; repeatable.")] = None,
    regex: Annotated[str | None, typer.Option(help="Find codes that tell where this pattern matches.")] = None,
    corpus: Corpus = "foldoc",
    text: Annotated[list[str] | None, typer.Option("--text", help="A text to read instead; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 4096,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    device: o.Device = None,
    threads: o.Threads = None,
) -> None:
    """Which codes are used, on which words; or, for a pattern, which code means it (precision and recall)."""
    from vesalius.features.codebooks import Codebooks, chosen, fit, pattern_labels, texts_of
    from vesalius.features.codebooks.books import identity
    from vesalius.features.codebooks.reading import commonest
    from vesalius.features.dictionaries import corpus_rows, place_name, prompt_rows

    screen = Screen(as_json)
    set_threads(threads)
    folder = _folder(codebook)
    model, books = Codebooks.load(folder, device=device)
    place = place_name(books.sites[-1]) if at is None else at
    book = books.book(place)
    if group >= book.groups or any(c < 0 or c >= book.size for c in code or []):
        raise VesaliusError(f"{place} has groups 0 to {book.groups - 1} of codes 0 to {book.size - 1}")
    with screen.step("reading text") as tell:
        if text:
            rows = prompt_rows(model, text)
        else:
            names = o.listed(corpus)
            rows = corpus_rows(model, names, 1, held_out_tokens=tokens, tell=tell).held_out
    request = {
        "command": "codebook-show",
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "codebooks": identity(folder),
        "place": place,
        "group": group,
        "codes": code or [],
        "regex": regex,
        "text": rows.what,
        "data": rows.fingerprint,
        "seed": seed,
    }
    command = typed()
    with Run.start(request, out, fresh, command) as run:
        if not run.done:
            with screen.step("choosing codes"):
                found = chosen(model, books, rows)
            used = commonest(model, rows, found, place, group)
            run.save_table("used", used)
            closely = list(code or [])
            alive = len(set(found.codes[place][:, group].ravel().tolist()))
            lead = f"At {place} {alive:,} of {book.size:,} codes are used."
            if regex is not None:
                table = fit(found, pattern_labels(model, rows, found, regex)).head(30)
                run.save_table("fit", table)
                if len(table):
                    best = table.iloc[0]
                    lead += (
                        f" Code {best['code']} at {best['place']} (group {best['group']}) tells “{regex}” best: "
                        f"precision {best['precision']:.2f}, recall {best['recall']:.2f}."
                    )
            closely = closely or [int(c) for c in used["code"][:4]]
            pages = [
                {"code": c, "texts": texts_of(model, rows, found, place, group, c).to_dict("records")} for c in closely
            ]
            run.save_json("codes", pages)
            summary = {"model": model.name, "place": place, "lead": lead, "notes": [], "command": command}
            run.save_json("summary", summary)
    drawn(screen, run)
    lines: list[Any] = [run.table("fit").head(10) if run.has("fit.parquet") else run.table("used")]
    for page in run.json("codes"):
        lines.append(f"\ncode {page['code']}")
        lines += ["  " + " ".join(f"{t['before']}[{t['token']}]{t['after']}".split()) for t in page["texts"][:5]]
    conclude(screen, run, *lines, codes=run.json("codes"), used=run.table("used").to_dict("records"))


def steer(
    codebook: Folder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model goes on with.")],
    code: Annotated[list[str], typer.Option("--code", help="PLACE:CODE, or PLACE:GROUP:CODE at z; repeatable.")],
    how: Annotated[str, typer.Option(help="all: in the place of all k codes; lowest: of the least similar.")] = "all",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 30,
    seed: o.Seed = 0,
    out: o.Out = None,
    as_json: o.AsJson = False,
    fresh: o.Fresh = False,
    device: o.Device = None,
    threads: o.Threads = None,
) -> None:
    """Let the model go on from a prompt with some codes forced at every token, beside what it writes without."""
    from contextlib import ExitStack

    from vesalius.features.codebooks import Codebooks
    from vesalius.features.codebooks.books import identity
    from vesalius.features.dictionaries import prompt_rows
    from vesalius.features.dictionaries.using import written

    screen = Screen(as_json)
    set_threads(threads)
    folder = _folder(codebook)
    wanted = [_code(c) for c in code]
    model, books = Codebooks.load(folder, device=device)
    by_place: dict[str, dict[int, int]] = {}
    for place, group, number in wanted:
        books.book(place)
        if by_place.setdefault(place, {}).setdefault(group, number) != number:
            raise VesaliusError(f"two codes cannot be forced at once at {place}, group {group}; give one of them")
    request = {
        "command": "codebook-steer",
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "codebooks": identity(folder),
        "prompt": prompt,
        "codes": code,
        "how": how,
        "tokens": tokens,
        "seed": seed,
    }
    command = typed()
    with Run.start(request, out, fresh, command) as run:
        if not run.done:
            ids = prompt_rows(model, [prompt]).ids[0][None].to(model.device)
            texts = []
            with books.attached(model), screen.step("writing"):
                texts.append(written(model, ids, tokens))
                with ExitStack() as stack:
                    for place, codes in by_place.items():
                        stack.enter_context(books.forcing(place, codes, how))  # type: ignore[arg-type]
                    texts.append(written(model, ids, tokens))
            lead = f"With {', '.join(code)} forced ({how}) it writes “{' '.join(texts[1].split())}”."
            summary = {
                "model": model.name,
                "prompt": prompt,
                "texts": texts,
                "lead": lead,
                "notes": [],
                "command": command,
            }
            run.save_json("summary", summary)
    drawn(screen, run)
    texts = run.json("summary")["texts"]
    conclude(screen, run, f"without  {' '.join(texts[0].split())}", f"forced   {' '.join(texts[1].split())}")


def _code(text: str) -> tuple[str, int, int]:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(p.strip().isdecimal() for p in parts[1:]):
        raise VesaliusError(f"'{text}' names no code; give PLACE:CODE as L3.MLP:17, or PLACE:HEAD:CODE as L3.z:0:17")
    return parts[0].strip(), int(parts[1]) if len(parts) == 3 else 0, int(parts[-1])


def _folder(name: str) -> Path:
    from vesalius.features.codebooks.books import NOTE
    from vesalius.run_index import find_folder

    return find_folder(name, NOTE)
