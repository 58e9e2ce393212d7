"""`vesalius probe`: what a linear map reads off each layer, against labels that mean nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, typed
from vesalius.errors import UnknownName, VesaliusError
from vesalius.runs import Run


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("probe")(g.expanded(probe))


def probe(
    labels: Annotated[
        str,
        typer.Option("--labels", help="A .csv/.jsonl file with text, label (and word, group), or a concept's name."),
    ],
    model: o.ModelName = o.MODEL_DEFAULT,
    site: Annotated[
        str, typer.Option("--site", help="resid_post, mlp_out, attn_out, neurons, z, ..., or head for each head apart.")
    ] = "resid_post",
    layers: Annotated[str, typer.Option("--layers", help="all, or blocks such as 0,10,-1.")] = "all",
    pool: Annotated[
        str | None,
        typer.Option(help="mean, last or word; by default word if there is one, else last (encoders: mean)."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, max=50, help="Folds of the cross-validation.")] = 5,
    balance: Annotated[
        bool, typer.Option("--balance", help="Draw as many examples of each label as the rarest has.")
    ] = (False),
    mdl: Annotated[bool, typer.Option("--mdl", help="Measure the online code length too.")] = False,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Fit a linear probe at every layer (or head), beside the commonest label and control labels.

    Accuracy is of examples that were left out; examples of one group (column group) are never divided. Control labels
    are drawn once for each word (or text), so that what a probe merely learnt by heart shows (Hewitt & Liang 2019).
    """
    from vesalius.features.probes import probe as run_probe
    from vesalius.features.vectors import SITES

    screen = machine.screen(where.as_json)
    if site not in (*SITES, "head"):
        raise UnknownName("site", site, (*SITES, "head"))
    if pool not in (None, "mean", "last", "word"):
        raise UnknownName("way to pool tokens", str(pool), ("mean", "last", "word"))
    data = read_labels(labels)
    chosen = _layers(layers)
    opened = machine.opened(screen, model)
    request = {
        "command": "probe",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "task": Path(labels).stem,
        "examples": hashlib.sha256(repr(data).encode()).hexdigest()[:16],
        "site": site,
        "layers": chosen,
        "pool": pool,
        "folds": folds,
        "balance": balance,
        "mdl": mdl,
        "seed": where.seed,
        "dtype": machine.dtype,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            with run.stage("probes", 1), screen.step("probing") as progress:
                found = run_probe(
                    opened,
                    data["text"],
                    data["label"],
                    words=data["word"],
                    groups=data["group"],
                    site=site,
                    layers=chosen,
                    pool=pool,  # type: ignore[arg-type]
                    folds=folds,
                    balance=balance,
                    mdl=mdl,
                    seed=where.seed,
                    progress=progress,
                )
            run.save_table("probes", found.table)
            run.save_scores("scores", found.scores())
            told = {k: v for k, v in found.info.items() if k != "parts"}
            told |= {"labels": list(found.labels), "measure": found.measure, "what": Path(labels).stem}
            lines = notes(found)
            run.save_json("summary", told | {"lead": lead(found), "notes": lines, "command": command})
    drawn(screen, run)
    _show(screen, run)


def read_labels(name: str) -> dict[str, Any]:
    """Texts, labels, words and groups (None where there are none) of a file, or of a concept's phrases."""
    from vesalius.features.concepts import concept, concepts, rows

    if name in concepts():
        it = concept(name)
        labels = [it.poles[0]] * len(it.positive) + [it.poles[1]] * len(it.negative)
        groups = list(it.held_together) if it.paired else None
        return {"text": list(it.phrases), "label": labels, "word": None, "group": groups}
    if Path(name).suffix not in (".csv", ".jsonl"):
        raise UnknownName("concept", name, concepts(), "or give a .csv or .jsonl file with text and label")
    found = rows(Path(name), ["text", "label"])
    data: dict[str, Any] = {"text": [str(r["text"]) for r in found]}
    data["label"] = [_number(r["label"]) for r in found]
    if not all(isinstance(v, float) for v in data["label"]):
        data["label"] = [str(r["label"]) for r in found]
    for key in ("word", "group"):
        given = [r.get(key) for r in found]
        some = [v not in (None, "") for v in given]
        if any(some) and not all(some):
            raise VesaliusError(
                f"{found[some.index(False)]['where']}: no '{key}', and other rows have one; give it to all"
            )
        data[key] = [str(v) for v in given] if all(some) else None
    return data


def _number(label: Any) -> Any:
    """A label as a number where it is one with a fraction; whole numbers stay names."""
    if isinstance(label, float):
        return label
    try:
        return float(label) if isinstance(label, str) and "." in label else label
    except ValueError:
        return label


def _layers(text: str) -> str | list[int]:
    if text == "all":
        return "all"
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise VesaliusError(f"--layers {text}: write all, or numbers of blocks such as 0,10,-1") from None


def lead(found: Any) -> str:
    """Where the property is read best, and what that is worth."""
    best = found.best()
    text = (
        f"Best at {best['part']}: {found.measure} {best[found.measure]:.2f} ({best['low']:.2f} to {best['high']:.2f}) "
    )
    text += f"on {found.n} examples left out"
    if found.labels:
        text += f", where always guessing the commonest label gives {best['baseline']:.2f}"
    return text + f" and the same probe on control labels {best['control']:.2f}: selectivity {best['selectivity']:.2f}."


def notes(found: Any) -> list[str]:
    """What a reader must know before believing the numbers."""
    lines = []
    if len(found.table) > 1:
        lines.append("the best of many places is chosen after the fact; its interval does not know that")
    if found.info["types"] == found.info["n"]:
        lines.append("no word or text repeats, so control labels can only be guessed: they show no memorising here")
    if found.info["left_out"]:
        lines.append(f"{found.info['left_out']} examples were left out to balance the labels")
    return lines


def _show(screen: Screen, run: Run) -> None:
    summary, table = run.json("summary"), run.table("probes")
    place = {"run": str(run.folder), "report": str(run.folder / "report.html")}
    shown = table if len(table) <= 40 else table.nlargest(20, summary["measure"])
    wanted = [c for c in shown if c != "layer"]
    head = "" if len(shown) == len(table) else f"the 20 best of {len(table)}"
    lines = [head, shown[wanted], f"\n{summary['lead']}", *[f"note: {n}" for n in summary["notes"]]]
    lines += [f"\nrun     {run.folder}", f"report  {place['report']}"]
    screen.show(summary | {"probes": table.to_dict("records")} | place, *lines)
