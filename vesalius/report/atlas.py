"""The atlas of a model: one Markdown page put together from recorded runs, each part under the command that made it.

Every number on the page is read from a run; nothing is measured here. Chance levels of shared heads are those of the
hypergeometric distribution: of N heads, a found by one method and b by another, a * b / N are shared by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from vesalius.errors import VesaliusError
from vesalius.parts import parse_part
from vesalius.prove.overlap import node_auroc
from vesalius.runs import Run
from vesalius.scores import Scores

LETTERS = {
    "previous-token": "P",
    "duplicate-token": "D",
    "induction": "I",
    "successor": "S",
    "arithmetic": "A",
    "retrieval": "R",
    "mover": "M",
    "negative-mover": "N",
    "inhibition": "H",
}
NAMED = 5  # heads named for each role
CLOSELY = 12  # heads told one by one


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading. commands: what measured it, as typed. body: Markdown.
    """

    title: str
    commands: Sequence[str]
    body: str

    def __str__(self) -> str:
        lines = "\n".join(self.commands)
        return f"## {self.title}\n\n```\n{lines}\n```\n\n{self.body.strip()}\n"


def page(title: str, opening: str, sections: Sequence[Section], made_by: str) -> str:
    """The whole page."""
    return "\n".join([f"# {title}\n", opening.strip() + f"\n\nMade by `{made_by}`.\n", *map(str, sections)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def roles(summary: Mapping[str, Any], scores: pd.DataFrame, leading: pd.DataFrame) -> str:
    """Which heads play which role: a table by role, and a map of all heads by layer."""
    rows = []
    for name in summary["detectors"]:
        mine = scores[(scores["detector"] == name) & scores["found"]].nlargest(NAMED, "score")
        named = ", ".join(f"{r.part} {r.score:.2f}" for r in mine.itertuples())
        chance = scores.loc[scores["detector"] == name, "null"].median()
        count = int(((scores["detector"] == name) & scores["found"]).sum())
        what = summary["detectors"][name]["what"]
        rows.append([f"**{name}**", what, count, named or "none", f"{max(chance, 0.0):.3f}"])
    table = markdown(["role", "the head ...", "heads", "the strongest, with score", "by chance, median"], rows)
    return f"{summary['lead']}\n\n{table}\n{head_map(leading)}"


def head_map(leading: pd.DataFrame) -> str:
    """Layers down, heads across, one letter for the leading role."""
    width = int(leading["index"].max()) + 1
    cells = {
        (layer, index): LETTERS.get(role, "?") if role else "."
        for layer, index, role in zip(leading["layer"], leading["index"], leading["role"], strict=True)
    }
    lines = ["      " + " ".join(f"{i:>2}" for i in range(width))]
    for layer in range(int(leading["layer"].max()) + 1):
        lines.append(f"L{layer:<4} " + " ".join(f"{cells.get((layer, i), ''):>2}" for i in range(width)))
    used = [r for r in LETTERS if r in set(leading["role"])]
    key = ", ".join(f"{LETTERS[r]} {r}" for r in used)
    return f"Every head by its leading role ({key}; a dot for none):\n\n```\n" + "\n".join(lines) + "\n```\n"


@dataclass(frozen=True)
class Needed:
    """What a task's circuit needs.

    Attributes:
        task: its name. summary: of the run. heads: exact effects of the circuit's heads, the largest first.
    """

    task: str
    summary: Mapping[str, Any]
    heads: Mapping[str, float]


def needed(task: str, run: Run) -> Needed:
    """Reads a circuit run."""
    parts = run.json("circuit")["parts"]
    heads = {p["part"]: float(p["score"]) for p in parts if parse_part(p["part"]).kind == "head"}
    return Needed(task, run.json("summary"), dict(sorted(heads.items(), key=lambda kv: -abs(kv[1]))))


def circuits(found: Sequence[Needed], refused: Mapping[str, str], leading: Mapping[str, str]) -> str:
    """What circuits need, task by task, and how many of their heads have a role."""
    rows = []
    for it in found:
        s, kept = it.summary, it.summary["faithfulness"]
        random = s.get("random_faithfulness") or s.get("random") or {}
        strong = ", ".join(f"{h} {v:+.2f}" for h, v in list(it.heads.items())[:NAMED])
        with_role = sum(bool(leading.get(h)) for h in it.heads)
        rows.append(
            [
                it.task,
                f"{s['accuracy']:.2f} ({s['chance']:.2f})",
                f"{s['size']['heads']} of {s['total']['heads']}",
                f"{kept['mean']:.2f} [{kept['low']:.2f}, {kept['high']:.2f}]",
                f"{random['mean']:.2f}" if random.get("mean") is not None else "-",
                f"{with_role} of {len(it.heads)}",
                f"{strong} ({s['unit']})" if s.get("unit") else strong,
            ]
        )
    header = ["task", "accuracy (chance)", "heads needed", "faithfulness, held out", "random circuits"]
    table = markdown([*header, "with a role", "the strongest, exact effect"], rows)
    left = "\n".join(f"- {task}: {why}" for task, why in refused.items())
    return table + (f"\nNot taken apart:\n\n{left}\n" if left else "")


def agreement(
    exact: Scores, circuit: Sequence[str], others: Mapping[str, Scores], found: Mapping[str, Sequence[str]]
) -> str:
    """How other methods and the detectors agree with the circuit that exact patching found, beside chance.

    Args:
        exact: exact effects of all heads. circuit: heads of its circuit.
        others: scores of other methods; their largest k are compared, k the circuit's size.
        found: heads by detector.
    """
    heads, members = [str(p) for p in exact.parts], set(circuit)
    n, k = len(heads), len(members)
    rows = []

    def row(name: str, chosen: Sequence[str], auroc: str, correlation: str) -> None:
        mine = set(chosen)
        shared = len(mine & members)
        chance = len(mine) * k / n
        p = float(stats.hypergeom.sf(shared - 1, n, k, len(mine))) if mine else float("nan")
        rows.append([name, len(mine), shared, f"{chance:.1f}", "-" if np.isnan(p) else f"{p:.1g}", auroc, correlation])

    for name, scores in others.items():
        mine = scores.kind("head")
        order = np.argsort(-np.abs(np.asarray(mine.values, dtype=float)), kind="stable")
        try:
            near = f"{mine.correlation(exact, 'spearman'):.2f}"
        except VesaliusError:
            near = "-"
        row(
            f"{name}, its {k} largest",
            [str(mine.parts[i]) for i in order[:k]],
            f"{node_auroc(mine, circuit):.2f}",
            near,
        )
    for name, chosen in found.items():
        row(f"{name} heads", chosen, "", "")
    header = ["chosen by", "heads", "in the circuit", "by chance", "p", "AUROC", "Spearman with exact effects"]
    return f"The circuit of exact patching holds {k} of {n} heads.\n\n" + markdown(header, rows)


def closely(found: Sequence[Needed], scores: pd.DataFrame, leading: pd.DataFrame) -> str:
    """The heads that most circuits need, each in a line: its roles with scores, and its effect in every task."""
    total: dict[str, float] = {}
    for it in found:
        largest = max((abs(v) for v in it.heads.values()), default=1.0)
        for head, value in it.heads.items():
            total[head] = total.get(head, 0.0) + abs(value) / largest
    role = dict(zip(leading["part"], leading["role"], strict=True))
    rows = []
    for head in sorted(total, key=lambda h: -total[h])[:CLOSELY]:
        mine = scores[(scores["part"] == head) & scores["found"]].sort_values("score", ascending=False)
        seen = ", ".join(f"{r.detector} {r.score:.2f}" for r in mine.itertuples()) or "none"
        effects = ", ".join(f"{it.task} {it.heads[head]:+.2f}" for it in found if head in it.heads)
        rows.append([f"**{head}**", role.get(head) or "-", seen, effects])
    return markdown(["head", "leading role", "found by", "exact effect in the circuits that hold it"], rows)
