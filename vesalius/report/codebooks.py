"""Reports of `vesalius codebook`.

What is read of a run, beside `summary.json` (`model`, `lead`, `notes`, `command`):

- `codebook-train`: `log.parquet`. Summary: `places`, `size`, `k`, `text`, `losses` {what: nats}.
- `codebook-show`: `used.parquet` (code, tokens, share, words, commonest words), `fit.parquet` (place, group, code,
  precision, recall, tokens, f1), `codes.json` [{"code", "texts"}]. Summary: `place`.
- `codebook-steer`: summary: `prompt`, `texts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from vesalius.report import charts, tables
from vesalius.report.page import Cell, Page, Section, Table, record, warnings, write
from vesalius.report.words import number
from vesalius.runs import Run


def codebook_report(run: Run) -> Path:
    """Draws a run of any `vesalius codebook` command as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "lead"])
    command = str(run.request["command"])
    if command == "codebook-train":
        title = f"Codebooks in {summary['model']}"
        subtitle = f"{summary['size']:,} codes, {summary['k']} at a time, at {', '.join(summary['places'])}"
        sections = [_losses(summary), *_training(run)]
    elif command == "codebook-steer":
        title, subtitle = "Codes forced", f"{summary['model']} · “{summary['prompt']}”"
        rows = [[name, text] for name, text in zip(("as it is", "forced"), summary["texts"], strict=True)]
        sections = [Section("What it writes", [Table.of(["", "the likeliest token each time"], rows)])]
    else:
        title, subtitle = f"Codes of {summary['place']}", str(summary["model"])
        sections = [*_fit(run), _used(run), *_codes(run)]
    page = Page(
        kind=command.replace("-", " "),
        title=title,
        subtitle=subtitle,
        lead=str(summary["lead"]),
        facts=_facts(summary) if command == "codebook-train" else [],
        warnings=warnings(run),
        sections=sections,
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    losses = summary["losses"]
    before = losses["model"]
    return [
        (
            "loss with codes",
            number(losses["with codes"]),
            f"{losses['with codes'] - before:+.3f} nats on held-out text",
        ),
        ("put in only", number(losses["codes put in"]), f"{losses['codes put in'] - before:+.3f}; no training"),
        ("as it was", number(before), "nats a token"),
    ]


def _losses(summary: dict[str, Any]) -> Section:
    found = summary["losses"]
    rows = pd.DataFrame({"what": list(found), "loss": list(found.values())})
    rows["low"] = rows["high"] = rows["loss"]
    chart = charts.bars(rows.rename(columns={"what": "name"}).assign(what="after"), "loss", "name", "nats a token")
    read = "held-out text. “without, after” is the fine-tuned model with its codebooks taken out."
    return Section("What the codes cost", [chart], read)


def _training(run: Run) -> list[Section]:
    log = tables.frame(run, "log", ["step", "nll", "missed"])
    if log is None:
        return []
    thin = log.iloc[:: max(1, len(log) // 300)]
    loss = charts.lines(thin, "step", "nll", ("step", "nats a token"), "Loss", points=False)
    missed = charts.lines(
        thin, "step", "missed", ("step", "share of the square"), "Distance to the codes", points=False
    )
    return [
        Section("Training", [loss, missed], "the distance is a share of the activations' mean square at the start.")
    ]


def _fit(run: Run) -> list[Section]:
    found = tables.frame(run, "fit", ["place", "code", "precision", "recall"])
    if found is None:
        return []
    table = tables.frame_table(found, ["place", "group", "code", "precision", "recall", "f1", "tokens"], shown=12)
    pattern = run.request["regex"]
    read = f"codes that tell where “{pattern}” matches: precision is of the code's tokens, recall of the pattern's."
    return [Section("Codes that mean the pattern", [table], read)]


def _used(run: Run) -> Section:
    found = tables.frame(run, "used", ["code", "tokens"])
    if found is None:
        return Section("Codes that are used most", missing="no code was chosen.")
    table = tables.frame_table(found, ["code", "tokens", "share", "words", "commonest words"])
    return Section("Codes that are used most", [table], "words: on how many different tokens.")


def _codes(run: Run) -> list[Section]:
    sections = []
    for one in run.json("codes"):
        cells = []
        for row in one["texts"]:
            before, it, after = (" ".join(str(row[k]).split("\n")) for k in ("before", "token", "after"))
            cells.append([Cell(Markup("{}<mark>{}</mark>{}").format(before, it, after), str(row["token"]), "text")])
        title = f"Code {one['code']}"
        if cells:
            sections.append(Section(title, [Table(["where it is chosen"], cells)]))
        else:
            sections.append(Section(title, missing="it is chosen nowhere in this text."))
    return sections
