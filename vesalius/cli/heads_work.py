"""What `vesalius heads` does: detectors asked, some heads looked at closely, all of it stored and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.cli.console import Screen, convert
from vesalius.errors import UnknownName, VesaliusError
from vesalius.find.detectors.base import (
    DETECTORS,
    MARGIN,
    Heads,
    Keep,
    Make,
    detector_parameters,
    of_head,
)
from vesalius.find.detectors.portrait import portraits
from vesalius.find.detectors.significance import ALPHA
from vesalius.model import Model
from vesalius.parts import Part, parse_part
from vesalius.report.heads import described, page_of
from vesalius.report.words import token
from vesalius.runs import Run
from vesalius.scores import Scores

CLOSELY = 6  # heads drawn closely where none is named
SHOWN = 15  # heads in the terminal's table
CONTEXT = 60  # characters of a prompt before the place that is shown


def options(items: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`DETECTOR.KEY=VALUE` by detector, values of the types of their defaults."""
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        key, sign, text = item.partition("=")
        name, dot, parameter = key.strip().partition(".")
        if not (sign and dot):
            raise VesaliusError(f"'{item}' is not of the form DETECTOR.KEY=VALUE, such as retrieval.needles=20")
        if name not in names:
            raise UnknownName("detector asked for", name, names)
        known, parameter = detector_parameters(name), parameter.replace("-", "_")
        if parameter not in known:
            raise UnknownName(f"parameter of {name}", parameter, known)
        found.setdefault(name, {})[parameter] = convert(text.strip(), known[parameter].default, key)
    return found


def kept(run: Run, screen: Screen, total: int) -> Keep:
    """Measures a detector, or reads what an earlier sitting stored of it."""
    done = 0

    def keep(name: str, make: Make) -> Scores:
        nonlocal done
        done += 1
        stored = f"scores-{name}"
        if not (run.has(f"{stored}.json") and run.has(f"{stored}.parquet")):
            with run.stage(name), screen.step(f"{name} ({done} of {total})") as progress:
                run.save_scores(stored, make(progress))
        return run.scores(stored)

    return keep


def store(run: Run, screen: Screen, model: Model, found: Heads, seed: int, command: str) -> None:
    """The tables, the strongest heads' portraits and the summary."""
    leading = found.leading()
    run.save_table("heads", found.to_frame())
    run.save_table("leading", leading)
    if not run.has("portraits.json"):
        with run.stage("portraits"), screen.step("looking at some heads closely"):
            run.save_json("portraits", [p.to_json() for p in portraits(model, _first(leading), seed)])
    roles = [name for name in found.scores if DETECTORS.entry(name).info.get("role")]
    summary = {
        "model": model.name,
        "task": found.info.get("task", ""),
        "seed": seed,
        "heads": len(found.parts),
        "detectors": {name: _about(name, scores) for name, scores in found.scores.items()},
        "roles": roles,
        "found": {name: [str(p) for p in found.heads(name, margin=MARGIN)] for name in found.scores},
        "leading": leading[leading["role"] != ""].set_index("part")["role"].to_dict(),
        "skipped": dict(found.skipped),
        "lead": lead(leading),
        "notes": [f"{name} was not asked: {why}" for name, why in found.skipped.items()],
        "command": command,
    }
    run.save_json("summary", summary)


def portray(run: Run, screen: Screen, model: Model, wanted: Sequence[Part], seed: int) -> None:
    """Portraits of the heads that were named, as far as the run does not hold them."""
    new = [p for p in wanted if not run.has(f"portrait-{p}.json")]
    if new:
        with run.stage("named heads"), screen.step(f"looking at {', '.join(map(str, new))} closely"):
            for portrait in portraits(model, new, seed):
                run.save_json(f"portrait-{portrait.head}", portrait.to_json())


def _about(name: str, scores: Scores) -> dict[str, Any]:
    entry = DETECTORS.entry(name)
    return {
        "what": entry.summary,
        "paper": entry.paper,
        "unit": scores.unit,
        "null_is": scores.info.get("null_is", ""),
        "n": scores.info.get("n"),
        "options": scores.info.get("options", {}),
    }


def _first(leading: pd.DataFrame) -> list[Part]:
    """The strongest head of each role, the strongest first."""
    there = leading[leading["role"] != ""].sort_values("excess", ascending=False, kind="stable")
    best = there.drop_duplicates("role").head(CLOSELY)
    return [parse_part(p) for p in best["part"]]


def lead(leading: pd.DataFrame) -> str:
    """What was found, in a sentence or two."""
    there = leading[leading["role"] != ""]
    if there.empty:
        return f"None of {len(leading)} heads has one of these roles by more than chance and {MARGIN:g}."
    counts = there["role"].value_counts()
    said = [
        f"{n} {role} ({', '.join(there[there['role'] == role].nlargest(2, 'excess')['part'])})"
        for role, n in counts.items()
    ]
    text = ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1]
    return f"{len(there)} of {len(leading)} heads have a leading role: {text}."


def show(screen: Screen, run: Run, report: Path, wanted: Sequence[str]) -> None:
    """Prints what was found; of some heads, each closely."""
    summary, scores = run.json("summary"), run.table("heads")
    rows = {"scores": scores.to_dict("records"), "run": str(run.folder), "report": str(report)}
    if not wanted:
        screen.show(summary | rows, *_everything(summary, scores, run.table("leading")), *_places(run, report))
        return
    lines: list[Any] = []
    closely = {}
    for head in wanted:
        mine, portrait, page = of_head(scores, head), run.json(f"portrait-{head}"), report.with_name(page_of(head))
        lines += [f"\n{described(mine, summary['heads'])}\n", _row_by_detector(mine), ""]
        lines += [_examples(portrait), f"\npage    {page}"]
        closely[head] = {"scores": mine.to_dict("records"), "portrait": portrait, "page": str(page)}
    screen.show(summary | rows | {"closely": closely}, *lines, *_places(run, report))


def _places(run: Run, report: Path) -> list[str]:
    return [f"run     {run.folder}", f"report  {report}"]


def _everything(summary: Mapping[str, Any], scores: pd.DataFrame, leading: pd.DataFrame) -> list[Any]:
    """Whom each detector finds, and the heads with the clearest roles."""
    names = list(summary["detectors"])
    best = leading.sort_values("excess", ascending=False, kind="stable").head(SHOWN)
    kinds = pd.DataFrame(
        {
            "detector": names,
            "heads": [len(summary["found"][n]) for n in names],
            "strongest": [", ".join(summary["found"][n][:5]) or _nearest(scores, n) for n in names],
        }
    )
    table = pd.DataFrame(
        [
            {"head": h["part"], "leading role": h["role"] or "-", "score": f"{h['score']:.2f}", "also found by": also}
            for h in best.to_dict("records")
            if (also := _also(scores, h["part"], h["role"])) or h["role"]
        ]
    )
    said = (
        f"\nfound: more than chance, q < {ALPHA:g} over {summary['heads']} heads, and by {MARGIN:g}; the furthest "
        "above chance first"
    )
    return ["", kinds, said, table, f"\n{summary['lead']}", *[f"note: {n}" for n in summary["notes"]], ""]


def _also(scores: pd.DataFrame, part: str, role: str) -> str:
    """The other detectors that find a head, with its scores, the largest first."""
    rows = scores[(scores["part"] == part) & scores["found"] & (scores["detector"] != role)]
    best = rows.sort_values("score", ascending=False, kind="stable").to_dict("records")
    return ", ".join(f"{r['detector']} {r['score']:.2f}" for r in best)


def _nearest(scores: pd.DataFrame, name: str) -> str:
    """Where a detector finds no head: the one that comes nearest."""
    best = scores[scores["detector"] == name].nlargest(1, "score").iloc[0]
    return f"none; the largest score is {best['score']:.2f}, {best['part']}"


def _row_by_detector(mine: pd.DataFrame) -> pd.DataFrame:
    """One head's scores for the terminal."""
    return pd.DataFrame(
        {
            "detector": mine["detector"],
            "score": [f"{x:.2f}" for x in mine["score"]],
            "95 %": [f"{a:.2f} to {b:.2f}" if a == a else "-" for a, b in zip(mine["low"], mine["high"], strict=True)],
            "chance": [f"{x:.2f}" for x in mine["null"]],
            "q": mine["q"],
            "place": mine["place"],
            "found": mine["found"],
        }
    )


def _examples(portrait: Mapping[str, Any]) -> pd.DataFrame:
    """Where a head writes most in some prompts, for the terminal."""
    rows = []
    for one in portrait["examples"]:
        words = [token(t) for t in one["tokens"]]
        most = sorted(range(1, len(words)), key=lambda i: -one["attention"][i])[:2]
        rows.append(
            {
                "in": one["source"],
                "at": "".join(one["tokens"]).replace("\n", "⏎")[-CONTEXT:],
                "looks at": ", ".join(f"{words[i]} {one['attention'][i]:.2f}" for i in most),
                "raises": ", ".join(token(t) for t in one["raised"]),
            }
        )
    return pd.DataFrame(rows)
