"""`vesalius write`: text under rules that cannot be broken; and the studio, in which a person writes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli import writing as w
from vesalius.cli.console import Screen, set_threads, typed
from vesalius.errors import VesaliusError
from vesalius.runs import Run

RULE_PANEL = "Rules"
STUDIO_PANEL = "Studio"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("write")(g.expanded(write))


def write(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to go on from; several are written side by side.")
    ] = None,
    model: o.ModelName = o.MODEL_DEFAULT,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            "-r",
            help="A rule, such as 'no letter e' or '8 syllables'; repeatable.",
            rich_help_panel=RULE_PANEL,
        ),
    ] = None,
    rules: Annotated[
        bool, typer.Option("--rules", help="List all rules, and stop.", rich_help_panel=RULE_PANEL)
    ] = False,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="word: looks ahead and judges whole words; token: each token alone.",
            rich_help_panel=RULE_PANEL,
        ),
    ] = "word",
    lines: Annotated[
        int, typer.Option("--lines", min=1, help="Lines to write, with rules about lines.", rich_help_panel=RULE_PANEL)
    ] = 1,
    words: Annotated[
        Path | None,
        typer.Option("--words", help="A text file with the words that may be written.", rich_help_panel=RULE_PANEL),
    ] = None,
    transforms: Annotated[
        str,
        typer.Option(
            "--transforms", help="Done to a token before filters see it (token mode).", rich_help_panel=RULE_PANEL
        ),
    ] = "strip,lower,unaccent",
    accents: Annotated[
        bool, typer.Option("--accents", help="An accented letter is another letter.", rich_help_panel=RULE_PANEL)
    ] = False,
    tries: Annotated[
        int,
        typer.Option(
            "--tries", min=0, help="Times a text may go back a word at a dead end.", rich_help_panel=RULE_PANEL
        ),
    ] = 20,
    tokens: w.Tokens = 60,
    n: w.Number = 1,
    temperature: w.Temperature = 0.8,
    top_k: w.TopK = 0,
    top_p: w.TopP = 0.95,
    studio: Annotated[
        bool, typer.Option("--studio", help="Open a page to write on, under these rules.", rich_help_panel=STUDIO_PANEL)
    ] = False,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Of the page.", rich_help_panel=STUDIO_PANEL)
    ] = 8765,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Write under rules: every word keeps them, by construction.

    Rules are about words (21 filters: letters, lengths, syllables, stress, rhyme, anagrams ...) or about lines
    (syllables, words, meter, rhyme); `--rules` lists them. Tokens that would break a rule, or lead where it
    must be broken, cannot come. The report shows the texts, how much was allowed at each step, and why likely
    tokens were barred.
    """
    from vesalius.apply.writing import TRANSFORMS, drawing, known_rules, parse, writer
    from vesalius.apply.writing.studio import free, serve
    from vesalius.apply.writing.write import Mode, Writer, read_words

    screen = Screen(where.as_json)
    if rules:
        table = known_rules()
        screen.show(table.to_dict("records"), table)
        return
    set_threads(machine.threads)
    if mode not in ("word", "token"):
        raise VesaliusError(f"--mode {mode} is neither word nor token")
    names = o.listed(transforms)
    for name in names:
        TRANSFORMS.entry(name)
    drawing(temperature, top_k, top_p, where.seed)
    parse(rule or [], lambda text: None)
    lexicon = None if words is None else read_words(words)
    if not prompts and not studio:
        raise VesaliusError("there is nothing to go on from; give a PROMPT, or --studio to write yourself")
    if studio:
        free(port)
    opened = w.causal(machine.opened(screen, model))

    def under(rules: Sequence[str], mode: Mode) -> Writer:
        return writer(opened, rules, mode=mode, words=lexicon, lines=lines, transforms=names, accents=accents)

    with screen.step("reading the rules"):
        made = under(rule or [], mode)  # type: ignore[arg-type]
    if studio:
        screen.note(f"the studio is at http://127.0.0.1:{port}/ (Ctrl-C closes it)")
        serve(made, (prompts or [""])[0], rule or [], port, under)
        return
    request = {
        "command": "write", "model": opened.name, "model_fingerprint": opened.fingerprint,
        "task": "+".join(rule or ["free"]),
        "prompts": prompts, "rules": rule or [], "mode": mode, "lines": lines,
        "words": None if lexicon is None else hashlib.sha256(repr(lexicon).encode()).hexdigest()[:16],
        "transforms": names, "accents": accents, "tries": tries, "tokens": tokens, "n": n, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "seed": where.seed, "dtype": machine.dtype,
    }  # fmt: skip
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            _work(screen, run, made, request, command)
    w.finish(screen, run)


def _work(screen: Screen, run: Run, made: Any, request: dict[str, Any], command: str) -> None:
    from vesalius.apply.writing import as_table, drawing, written

    recorder = w.Recorder(made.vocabulary)
    prompts = [p for p in request["prompts"] for _ in range(request["n"])]
    draw = drawing(request["temperature"], request["top_k"], request["top_p"], request["seed"])
    with run.stage("write", 1), screen.step("writing") as tell:
        texts = written(made, prompts, request["tokens"], draw, tries=request["tries"], progress=tell, seen=recorder)
    table = as_table(texts)
    run.save_table("texts", table)
    run.save_table("steps", w.steps_table(texts, len(made.vocabulary)))
    run.save_table("barred", recorder.table())
    allowed = w.middle([n for t in texts for n in t.line.allowed])
    notes = [f"{count:,} words of the lexicon were left out: {why}" for why, count in made.dropped.items() if count]
    dead = int((table["stop"] == "dead end").sum())
    if dead:
        notes.append(
            f"{dead} of {len(texts)} texts ended where no token was left, after going back {request['tries']} times"
        )
    cut = int((table["cut"] != "").sum())
    if cut:
        notes.append(f"{cut} of {len(texts)} texts ran out of tokens within a word, which was taken off the end")
    rules = " · ".join(request["rules"]) or "no rule"
    told = {
        "model": request["model"], "title": rules, "rules": request["rules"], "notes": notes, "command": command,
        "lead": f"{request['model']} wrote {len(texts)} text{'s' * (len(texts) > 1)} under '{rules}' in "
        f"{request['mode']} mode. At the median step {allowed:,.0f} of {len(made.vocabulary):,} tokens were "
        f"allowed; perplexity under the model alone is {w.middle(table['perplexity'].tolist()):.1f} (median).",
        "facts": [
            ["texts", str(len(texts)), f"{int((table['stop'] == 'whole').sum())} whole, {dead} at a dead end"],
            ["allowed", f"{allowed / len(made.vocabulary):.1%}", "of the vocabulary, median over steps"],
            ["perplexity", f"{w.middle(table['perplexity'].tolist()):.1f}", "under the model alone, median"],
        ],
    }  # fmt: skip
    run.save_json("summary", told)
