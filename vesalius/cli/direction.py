"""`vesalius direction`: the axis of a concept, found, judged, used to score phrases and to steer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, typed
from vesalius.errors import VesaliusError
from vesalius.runs import Run

DEFAULT_MODEL, DEFAULT_METHOD = "minilm", "pca"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("direction")(g.expanded(direction))


def direction(
    concept: Annotated[
        str,
        typer.Argument(
            help="moral, politeness, formality, sentiment, a .csv/.jsonl file with text and label, or a saved axis."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help=f"Where to find it; {DEFAULT_MODEL}, or a saved axis's own model."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="The axis that scores: pca, mean-difference, lda, logistic, random.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Read the mean over tokens after this block (language models).")
    ] = None,
    reading: Annotated[
        str | None, typer.Option(help="sentence, table, mean@12, last@-1, word@6:mlp_out; not with --layer.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Read phrases as they stand, without the concept's templates.")
    ] = False,
    score: Annotated[list[str] | None, typer.Option("--score", help="A phrase to score; repeatable.")] = None,
    steer: Annotated[
        list[str] | None, typer.Option("--steer", help="A prompt to go on with; repeatable; implies --raw.")
    ] = None,
    writer: Annotated[
        str | None, typer.Option("--with", help="The language model that writes; --model's own if it is one.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="With --steer: least score of a continuation.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=1, help="With --steer: candidates for each next token.")] = 20,
    push: Annotated[
        float | None, typer.Option(help="With --steer: add the axis to the residual stream, times this, instead.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="With --steer: how many tokens to write.")] = 30,
    show_texts: Annotated[
        bool, typer.Option("--show-texts", help="Print what was written too; a model may write offensive things.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Keep the axis as PATH.safetensors and PATH.json.")] = None,
    permutations: Annotated[int, typer.Option(min=0, max=100_000, help="Shuffles of the labels, for p.")] = 200,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Find the direction of a concept, say how good it is, and use it.

    The axis comes from labelled phrases by principal components, the difference of means, LDA or logistic regression;
    all are judged on phrases left out, shuffled labels and rated held-out phrases. It scores any phrase, and steers a
    language model: by dropping next tokens that lead below a threshold, or by pushing its states (--push). A saved axis
    (--save) is used again by giving its file for the concept.
    """
    from vesalius.features.concepts import concept as concept_of
    from vesalius.features.directions import AXES, Axis
    from vesalius.features.vectors import Reading, default_reading, layer_of

    screen = machine.screen(where.as_json)
    AXES.entry(method or DEFAULT_METHOD)
    if layer is not None and reading is not None:
        raise VesaliusError("--layer and --reading both say where to read; give one of them")
    wanted = Reading("mean", layer) if layer is not None else None if reading is None else Reading.parse(reading)
    known = Axis.load(concept) if Path(concept).suffix in (".json", ".safetensors") else None
    found = None if known else concept_of(concept)
    if known is not None:
        for name, given in (("--method", method), ("--layer", layer), ("--reading", reading), ("--raw", raw or None)):
            if given is not None:
                raise VesaliusError(f"{concept} is an axis that was found already; leave out {name}")
    if known is not None and steer and known.templates:
        raise VesaliusError(f"{concept} was found with templates, and running text has none; find it again with --raw")
    opened = machine.opened(screen, model or (known.model if known else DEFAULT_MODEL))
    if known is not None:
        known.check(opened)
    at = known.reading if known else wanted or default_reading(opened)
    if at.layer is not None:
        layer_of(opened, at.layer)
    author = _writer(screen, opened, steer, writer, push)
    request = {
        "command": "direction",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "task": known.concept if known else found.name,  # type: ignore[union-attr]
        "axis": _digest(known) if known else None,
        "phrases": hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else None,
        "templates": [] if raw or steer or found is None else list(found.templates),
        "method": known.method if known else method or DEFAULT_METHOD,
        "reading": str(at),
        "score": score or [],
        "steer": None
        if not steer
        else {
            "prompts": steer,
            "with": author.fingerprint,
            "threshold": threshold,
            "top_k": top_k,
            "push": push,
            "tokens": tokens,
        },
        "permutations": permutations,
        "seed": where.seed,
        "dtype": machine.dtype,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            axis = known or _found(screen, run, opened, found, request)
            if known is not None:
                run.save_table("axes", pd.DataFrame([_row(known)]))
            _used(screen, run, opened, author, axis, request)
            for suffix, content in axis.files().items():
                run.save_file(f"axis{suffix}", content)
            told = {"lead": lead(axis), "notes": notes(axis), "command": command}
            run.save_json("summary", axis.told() | told)
    if save is not None:
        Axis.load(run.folder / "axis").save(save)
    drawn(screen, run)
    _show(screen, run, save, show_texts)


def _writer(screen: Screen, opened: Any, steer: list[str] | None, writer: str | None, push: float | None) -> Any:
    """The model that is steered; None if none is."""
    if not steer:
        for name, value in (("--with", writer), ("--push", push)):
            if value is not None:
                raise VesaliusError(f"{name} steers a model, and there is no prompt to go on with; give --steer PROMPT")
        return None
    if push is not None and writer is not None:
        raise VesaliusError("--push adds the axis to the model it was found in; leave out --with")
    author = opened if writer is None else o.opened(screen, writer, None, None, None, False)
    if author.kind != "causal":
        remedy = "name a language model with --with, such as --with smollm2-135m"
        raise VesaliusError(f"{author.name} is {author.kind} and writes no text; {remedy}")
    return author


def _digest(axis: Any) -> str:
    return hashlib.sha256(b"".join(axis.files().values())).hexdigest()[:16]


def _found(screen: Screen, run: Run, opened: Any, concept: Any, request: Any) -> Any:
    """Finds the axis by every method, keeps the tables, and returns the one that was asked for."""
    from vesalius.features.directions import AXES, cosines, directions

    method = request["method"]
    order = [e.name for e in sorted(AXES, key=lambda e: e.info.get("place", 99))]
    with run.stage("axes", 1), screen.step(f"reading {len(concept.phrases)} phrases") as progress:
        every = directions(
            opened,
            concept,
            [method, *(m for m in order if m != method)],
            request["reading"],
            templates=request["templates"],
            permutations=request["permutations"],
            seed=request["seed"],
            progress=progress,
        )
    run.save_table("phrases", every[0].phrases)
    run.save_table("axes", pd.DataFrame([_row(a) for a, _ in every]))
    run.save_table("cosines", cosines([a for a, _ in every]))
    return every[0].axis


def _used(screen: Screen, run: Run, opened: Any, author: Any, axis: Any, request: Any) -> None:
    if request["score"]:
        values = axis.score(opened, request["score"])
        run.save_table("scored", pd.DataFrame({"phrase": request["score"], "score": values}))
    if request["steer"]:
        with run.stage("steering", 1), screen.step("writing"):
            steered, count = _steered(opened, author, axis, request)
        run.save_table("steered", steered)
        run.save_json("steering", count)


def _row(axis: Any) -> dict[str, Any]:
    q = axis.quality
    keys = ("sign_accuracy", "low", "high", "cross_validated", "p", "null_mean", "label_correlation", "explained")
    row = {"method": axis.method, **{k: q[k] for k in keys}}
    row["stability"] = (q["stability"] or {}).get("median")
    row["graded_spearman"] = q.get("graded_spearman", np.nan)
    row["pairs_right"] = q.get("pairs_right", np.nan)
    return row


def _steered(opened: Any, author: Any, axis: Any, request: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    import torch

    from vesalius.features.bias import continuations
    from vesalius.features.steer import AxisGuard, pushed

    asked = request["steer"]
    prompts, seed = asked["prompts"], request["seed"]
    plain = continuations(author, prompts, asked["tokens"], seed)
    count: dict[str, Any] = {"by": "push" if asked["push"] is not None else "guard", "with": author.name}
    if asked["push"] is not None:
        with pushed(author, axis, asked["push"]):
            changed = continuations(author, prompts, asked["tokens"], seed)
    else:
        guard = AxisGuard(
            axis,
            opened,
            author.tokenizer,
            threshold=asked["threshold"],
            top_k=asked["top_k"],
            draw=torch.Generator().manual_seed(seed),
        )
        changed = continuations(author, prompts, asked["tokens"], seed, logits_processor=[guard])
        count |= {"candidates": guard.candidates, "dropped": guard.dropped, "rescued": guard.rescued}
    table = pd.DataFrame({"prompt": prompts, "unsteered": plain, "steered": changed})
    for name in ("unsteered", "steered"):
        texts = [f"{p}{t}".strip() for p, t in zip(prompts, table[name], strict=True)]
        table[f"score_{name}"] = axis.score(opened, texts)
    return table, count


def lead(axis: Any) -> str:
    """What was found, in a sentence or three."""
    q = axis.quality
    text = (
        f"The {axis.method} axis of '{axis.concept}' in {axis.model} puts {q['sign_accuracy']:.0%} of {q['n']} "
        f"phrases, each left out, on the right side (95 % interval {q['low']:.0%} to {q['high']:.0%})"
    )
    if q["p"] is not None:
        text += f"; with shuffled labels {q['null_mean']:.0%} (p = {q['p']:.3f})"
    text += f". It carries {q['explained']:.1%} of their variance."
    if "graded_spearman" in q:
        text += (
            f" With the ratings of {q['graded_n']} other phrases it correlates by {q['graded_spearman']:.2f} (ranks)."
        )
    if "pairs_right" in q:
        text += f" It tells {q['pairs_right']} of {q['pairs_n']} held-out pairs apart."
    return text


def notes(axis: Any) -> list[str]:
    """What a reader must know before using the axis."""
    found, q = [], axis.quality
    if q["p"] is not None and q["p"] > 0.05:
        found.append(f"shuffled labels do as well (p = {q['p']:.2f}): this axis is not the concept's")
    if axis.method == "pca" and q["component_correlations"]:
        best = int(np.argmax(q["component_correlations"]))
        if q["component_correlations"][best] > q["component_correlations"][0] + 0.05:
            found.append(
                f"component {best + 1} follows the labels more closely than the first "
                f"({q['component_correlations'][best]:.2f} against {q['component_correlations'][0]:.2f}); "
                "the largest difference among these phrases is another one: use --method mean-difference"
            )
    if q["stability"] and q["stability"]["low"] < 0.5:
        found.append(
            f"the axis turns when phrases are resampled (cosine down to {q['stability']['low']:.2f}): add phrases"
        )
    return found


def _show(screen: Screen, run: Run, save: Path | None, show_texts: bool) -> None:
    summary = run.json("summary")
    place = {"run": str(run.folder), "report": str(run.folder / "report.html")}
    axes = run.table("axes")
    wanted = ["method", "sign_accuracy", "low", "high", "p", "label_correlation", "explained"]
    wanted += [c for c in ("graded_spearman", "pairs_right") if axes[c].notna().any()]
    lines: list[Any] = ["", axes[wanted]]
    result = summary | {"axes": axes.to_dict("records")} | place
    if run.has("scored.parquet"):
        scored = run.table("scored").sort_values("score", ascending=False, ignore_index=True)
        lines += ["", scored]
        result["scored"] = scored.to_dict("records")
    if run.has("steered.parquet"):
        steered = run.table("steered")
        columns = ["prompt", "score_unsteered", "score_steered"]
        told = {"steering": run.json("steering")}
        lines += ["", steered[columns], ""]
        if show_texts:
            for row in steered.to_dict("records"):
                for name in ("unsteered", "steered"):
                    lines.append(f"{name:9}  {row['prompt']}{row[name]}".replace("\n", " "))
        else:
            lines.append(f"The texts are in {run.folder / 'steered.parquet'}; --show-texts prints them.")
        result |= told | {"steered": (steered if show_texts else steered[columns]).to_dict("records")}
    lines += [f"\n{summary['lead']}", *[f"note: {n}" for n in summary["notes"]]]
    if save is not None:
        result["saved"] = str(save)
        lines.append(f"\naxis    {save}")
    lines += [f"\nrun     {run.folder}", f"report  {place['report']}"]
    screen.show(result, *lines)
