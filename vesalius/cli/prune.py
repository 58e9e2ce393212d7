"""`vesalius prune`: heads and neurons taken out by any ranking or finding; the model really shrinks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vesalius.cli import changing as c
from vesalius.cli import options as o
from vesalius.cli.console import Screen
from vesalius.cli.groups import Machine, expanded
from vesalius.errors import VesaliusError
from vesalius.runs import Run

PRUNE_PANEL = "What goes"
RECOVER_PANEL = "Recovery"
RECOVERY_ROWS = 8  # of a batch


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("prune")(expanded(prune))


def prune(
    model: o.ModelName = o.MODEL_DEFAULT,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="amp, amp-out, amp-reversed, relp, magnitude, random, or the folder of a run that scored heads or "
            "neurons.",
            rich_help_panel=PRUNE_PANEL,
        ),
    ] = "amp",
    ratio: Annotated[
        float, typer.Option("--ratio", help="Share of the blocks' weights that goes.", rich_help_panel=PRUNE_PANEL)
    ] = 0.2,
    heads: Annotated[
        str,
        typer.Option(
            "--heads",
            help="auto; groups: by key-value group; within: as many of every group; keep: neurons alone.",
            rich_help_panel=PRUNE_PANEL,
        ),
    ] = "auto",
    others: Annotated[
        str,
        typer.Option(
            "--others", help="Ranking of parts that a run of --by did not score.", rich_help_panel=PRUNE_PANEL
        ),
    ] = "amp",
    corpus: Annotated[
        str,
        typer.Option(
            "--corpus",
            help="Text the ranking reads: a name of `vesalius corpora`, a file or a folder.",
            rich_help_panel=PRUNE_PANEL,
        ),
    ] = "foldoc",
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Texts of it, 64 tokens each.", rich_help_panel=PRUNE_PANEL)
    ] = 50,
    recover: Annotated[
        str,
        typer.Option(
            "--recover", help="Corpus the pruned model learns from, with LoRA; or none.", rich_help_panel=RECOVER_PANEL
        ),
    ] = "none",
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens of it.", rich_help_panel=RECOVER_PANEL)
    ] = 60_000,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=RECOVER_PANEL)] = 3e-4,
    control: Annotated[
        bool,
        typer.Option(
            "--control/--no-control", help="Also take as much out at random, beside it.", rich_help_panel=PRUNE_PANEL
        ),
    ] = True,
    dtype: o.Dtype = None,
    *,
    yardstick: c.TimedCardOptions,
    where: c.RunOptions,
    machine: Machine,
) -> None:
    """Take heads and MLP neurons out of a model: it is smaller and faster, and opens in plain transformers.

    A ranking, or any run's scores, says what goes; every block loses as many heads and neurons, so that a stock config
    still describes it. The card tells what it cost, beside as much taken out at random. Optionally the model recovers
    on plain text (LoRA, merged). Leaves an ordinary checkpoint, and a report.
    """
    from vesalius.change.prune import budget
    from vesalius.change.ranking import RANKINGS, from_run
    from vesalius.change.recover import recovery
    from vesalius.records import sha256

    screen = machine.screen(where.as_json)
    if heads not in ("auto", "groups", "within", "keep"):
        raise VesaliusError(f"--heads {heads} is none of auto, groups, within, keep")
    RANKINGS.entry(others)
    card = yardstick.card(where.seed, rows if yardstick.card_text == corpus else 0)
    read = c.texts(screen, corpus, yardstick.card_text, *({recover} - {"none"}))
    if not Path(by).exists():
        RANKINGS.entry(by)
    opened = c.to_change(screen, model, machine, "parts are taken out of causal language models", dtype)
    if recover != "none":
        recovery(
            model, recover, tokens, lr, c.row_length(opened), RECOVERY_ROWS, where.seed
        )  # refuses before anything is done
    plan = budget(opened, ratio, heads)  # type: ignore[arg-type]
    finding = None if by in RANKINGS else from_run(opened, by)
    request = {
        "command": "prune", "model": opened.name, "model_fingerprint": opened.fingerprint, "dtype": str(opened.dtype),
        "by": by, "ratio": ratio, "heads": heads, "others": others, "corpus": corpus, "rows": rows, "recover": recover,
        "tokens": tokens, "lr": lr, "control": control, "read": read, **card.request(),
    }  # fmt: skip
    if finding is not None:  # the folder may hold another one some day
        request["finding"] = sha256(Path(by) / "scores.parquet")
    c.carry_out(
        screen, request, where, lambda run, line: _work(screen, run, opened, plan, finding, card, request, line)
    )


def _work(
    screen: Screen, run: Run, model: Any, plan: Any, finding: Any, card: c.Card, request: dict[str, Any], command: str
) -> None:
    import vesalius
    from vesalius.change import cut
    from vesalius.change.keeping import keep_change
    from vesalius.change.prune import choose, kept_table
    from vesalius.change.ranking import RANKINGS, by_part
    from vesalius.change.recover import recover, recovery
    from vesalius.cli.train import Watching
    from vesalius.corpus import plain_text

    notes: list[str] = []
    text = plain_text(model, request["corpus"], request["rows"], c.row_length(model, 64))

    def ranked(name: str) -> Any:
        with screen.step(f"ranking by {name}") as tell:
            return RANKINGS.get(name)(model, text, request["seed"], tell)

    with run.stage("rank", 1):
        by = request["by"]
        scores = ranked(by) if finding is None else finding
        known = by_part(scores)
        lacking = [k for k, wanted in (("head", plan.heads), ("neuron", plan.neurons)) if wanted]
        lacking = [k for k in lacking if not any(p.kind == k for p in known)]
        spare = by_part(ranked(request["others"])) if lacking else {}
        if lacking:
            notes.append(f"{by} scores no {' and no '.join(lacking)}s; {request['others']} tells which of them go")
    run.save_scores("scores", scores)
    keep = choose(model, scores, plan, spare)
    run.save_table("kept", kept_table(model, keep, scores))
    made = {"pruned": cut(model, keep)}
    numbers = plan.describe(model, keep.removed(model))
    folder = run.folder / "model"
    if request["recover"] != "none":
        with run.stage("recover", 1):
            part = keep_change(made["pruned"], model, c.cleared(run.folder / "pruned"), "prune", request)
            corpus = request["recover"]
            if corpus == card.text:
                corpus = str(c.others(model, card, run.folder / "recovery.jsonl"))
            recipe = recovery(
                part, corpus, request["tokens"], request["lr"], c.row_length(model), RECOVERY_ROWS, request["seed"]
            )
            with Watching(screen, name="recovering") as watcher:
                made["recovered"] = vesalius.open(recover(recipe, run.folder / "recovery", watcher), dtype="auto")
    yard, missing = card.yardstick(model)
    order = dict(reversed(made.items()))  # what is kept comes first
    makers = c.at_hand(order)
    if request["control"]:
        drawn = RANKINGS.get("random")(model, text, request["seed"])
        makers["random"] = lambda: cut(model, choose(model, drawn, plan))
    measured = c.measured(screen, run, model, makers, yard)
    final, name = next(iter(order.items()))[::-1]
    with run.stage("save", 1), screen.step("saving"):
        keep_change(final, model, c.cleared(folder), "prune", request, measured)
    change = c.value(measured, name, "perplexity", "change")
    beside = f"random: x {c.value(measured, 'random', 'perplexity', 'change'):.2f}" if request["control"] else ""
    told = {
        "model": model.name, "change": "prune", "title": f"{model.name} pruned by {by}", **numbers,
        "lead": lead(model.name, by, numbers, measured, name), "notes": notes + missing, "command": command,
        "facts": [
            ["parameters", f"{numbers['after'] / 1e6:.1f} M", f"of {numbers['before'] / 1e6:.1f} M"],
            ["taken out", f"{numbers['of_body']:.1%}", f"of the blocks' weights, {numbers['of_model']:.1%} of all"],
            ["perplexity", f"x {change:.2f}", beside],
        ],
        "tables": [{"name": "kept", "title": "What stays, block by block",
                    "read": "the share of all scores (their sizes) that stays, by kind of part."}],
    }  # fmt: skip
    run.save_json("summary", told)


def lead(model: str, by: str, numbers: dict[str, Any], card: Any, name: str) -> str:
    """What came out, in two sentences."""
    before, after = (c.value(card, name, "perplexity", k) for k in ("before", "after"))
    low, high = (c.value(card, name, "perplexity", k) for k in ("low", "high"))
    text = (
        f"Every block of {model} lost {numbers['heads']} heads and {numbers['neurons']} neurons by {by}: "
        f"{numbers['of_body']:.1%} of the blocks' weights. Perplexity goes from {before:.1f} to {after:.1f} "
        f"(x {after / before:.2f} [{low:.2f}, {high:.2f}])"
    )
    if name == "recovered":
        text += f" after recovery, {c.value(card, 'pruned', 'perplexity'):.1f} before it"
    if (card["model"] == "random").any():
        text += f"; as much taken out at random gives {c.value(card, 'random', 'perplexity'):.1f}"
    text += "."
    if (card["metric"] == "prefill").any():
        text += f" Reading takes x {c.value(card, name, 'prefill', 'change'):.2f} of the time."
    return text
