"""What a run stored, checked against the contract in `vesalius.report`, and the tables shown as tables."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from vesalius.errors import RunError
from vesalius.report.page import Cell, Drawing, Table, cell
from vesalius.report.words import number
from vesalius.runs import Run


def frame(run: Run, name: str, columns: Sequence[str]) -> pd.DataFrame | None:
    """The table of that name, or None if it was not stored (or is empty).

    Raises:
        RunError: if it lacks one of the columns.
    """
    if not run.has(f"{name}.parquet"):
        return None
    found = run.table(name)
    lacking = [c for c in columns if c not in found]
    if lacking:
        has = ", ".join(map(str, found.columns))
        raise RunError(f"{run.folder}/{name}.parquet lacks column {', '.join(lacking)} (it has {has})")
    for column in ("low", "high"):
        if column not in found:
            found[column] = float("nan")
    return found if len(found) else None


def summary(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    """The run's `summary.json`.

    Raises:
        RunError: if it is missing or lacks one of the keys.
    """
    if not run.has("summary.json"):
        raise RunError(f"{run.folder} holds no summary yet ({run.state}); run its command to the end first")
    found: dict[str, Any] = run.json("summary")
    lacking = [k for k in keys if k not in found]
    if lacking:
        raise RunError(f"{run.folder}/summary.json lacks {', '.join(lacking)}")
    return found


def circuit(run: Run, name: str = "circuit") -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """Members and edges of a stored circuit, or None."""
    if not run.has(f"{name}.json"):
        return None
    found = run.json(name)
    return list(found.get("parts") or []), list(found.get("edges") or [])


def signed(value: Any) -> Cell:
    """A cell whose colour says whether the part helps or hurts."""
    plain = cell(value)
    if plain.key is None:
        return plain
    return Cell(plain.text, plain.key, "pos" if float(plain.key) >= 0 else "neg")


_LABELS = {
    "sign_stability": "sign kept",
    "place_stability": "place kept",
    "verified": "measured",
    "top10_overlap": "top 10 shared",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


def scores_table(scores: pd.DataFrame, members: Mapping[str, Any] | None) -> Table:
    """All scores, the largest first."""
    columns = [c for c in ("position", "low", "high", "sign_stability", "place_stability", "verified") if c in scores]
    columns = [c for c in columns if scores[c].notna().any()]
    roles = any(m.get("role") for m in (members or {}).values())
    heads = ["part", "kind", "score", *(_LABELS.get(c, c) for c in columns)]
    heads += ["in circuit"] * (members is not None) + ["role"] * roles
    rows = []
    order = scores["score"].abs().sort_values(ascending=False, kind="stable").index
    for row in scores.loc[order].to_dict("records"):
        name = str(row["part"])
        cells = [Cell(name, name, "part"), cell(row.get("kind")), signed(row["score"])]
        for column in columns:
            value = row[column]
            cells.append(cell(bool(value)) if column == "verified" and not pd.isna(value) else cell(value))
        if members is not None:
            cells.append(cell(name in members))
        if roles:
            cells.append(cell((members or {}).get(name, {}).get("role")))
        rows.append(cells)
    return Table(heads, rows)


def edges_table(edges: Sequence[Mapping[str, Any]]) -> Table:
    """All edges of a circuit, the strongest first."""
    ordered = sorted(edges, key=lambda e: -abs(e.get("score") or 0.0))
    rows = [
        [Cell(str(e["sender"]), str(e["sender"]), "part"), Cell(str(e["receiver"]), str(e["receiver"]), "part"),
         signed(e.get("score"))]
        for e in ordered
    ]  # fmt: skip
    return Table(["from", "to", "score"], rows, shown=15)


def frame_table(
    found: pd.DataFrame,
    columns: Sequence[str] | None = None,
    shown: int = 25,
    labels: Mapping[str, str] | None = None,
) -> Table:
    """A table as it was stored, empty columns left out; headings as in `labels`, or the columns' names."""
    kept = [c for c in (columns or found.columns) if c in found and found[c].notna().any()]
    rows = [[cell(row[c]) for c in kept] for row in found.to_dict("records")]
    return Table([(labels or {}).get(c, _LABELS.get(c, c.replace("_", " "))) for c in kept], rows, shown)


def example_table(examples: Sequence[Mapping[str, Any]]) -> Table:
    """Prompts with their counterfactuals; the words in which they differ are marked."""
    heads = ["clean prompt", "corrupted prompt", "answer", "wrong", "logit difference"]
    rows = []
    for e in examples:
        clean, corrupted = str(e.get("clean", "")), str(e.get("corrupted") or "")
        a, b = _marked(clean, corrupted)
        answers = [_choices(e.get(k)) for k in ("answer", "wrong")]
        words = [Cell(t, t, "word" if len(t) < 25 else "") for t in answers]
        rows.append([Cell(a, clean, "text"), Cell(b, corrupted, "text"), *words, cell(e.get("logit_diff"))])
    keep = [i for i in range(5) if any(r[i].text not in ("", "–") for r in rows)]
    return Table([heads[i] for i in keep], [[r[i] for i in keep] for r in rows], shown=6)


def _choices(value: Any) -> str:
    texts = value if isinstance(value, list) else [] if value is None else [value]
    shown = [str(t).strip() or repr(t) for t in texts]
    return " / ".join(shown[:6]) + (f" … ({len(shown)})" if len(shown) > 6 else "")


def _marked(clean: str, corrupted: str) -> tuple[Markup, Markup]:
    a, b = (re.findall(r"\w+|\s+|[^\w\s]", t) for t in (clean, corrupted))
    if not b:
        return escape(clean), Markup("")
    left: list[Markup] = []
    right: list[Markup] = []
    for op, i, j, k, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for words, out in ((a[i:j], left), (b[k:n], right)):
            text = escape("".join(words))
            out.append(Markup("<mark>{}</mark>").format(text) if op != "equal" and text.strip() else text)
    return Markup("").join(left), Markup("").join(right)


def side_by_side(columns: Sequence[tuple[str, Sequence[tuple[str, float | None]]]], common: set[str]) -> Drawing:
    """Ranked parts of several tables in columns; those in all of them are marked."""
    depth = max((len(rows) for _, rows in columns), default=0)
    head = Markup("").join(Markup('<th scope="col">{}</th><th></th>').format(name) for name, _ in columns)
    body = []
    for i in range(depth):
        line = Markup("<td>{}</td>").format(i + 1)
        for _, rows in columns:
            if i >= len(rows):
                line += Markup("<td></td><td></td>")
                continue
            part, score = rows[i]
            shown = Markup("<mark>{}</mark>").format(part) if part in common else escape(part)
            style = "pos" if (score or 0) >= 0 else "neg"
            line += Markup('<td class="part">{}</td><td class="{}">{}</td>').format(
                shown, style, number(score, pad=True)
            )
        body.append(Markup("<tr>{}</tr>").format(line))
    table = '<table><thead><tr><th scope="col">rank</th>{}</tr></thead><tbody>{}</tbody></table>'
    return Drawing(Markup(f'<div class="scroll">{table}</div>').format(head, Markup("").join(body)))
