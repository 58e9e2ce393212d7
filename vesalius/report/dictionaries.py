"""Reports of `vesalius sae` and `vesalius codes`.

What is read of a run, beside `summary.json` (`model`, `lead`, `notes`, `command`):

- `sae-train`, `sae-show`: `quality.json`, `density.parquet` (feature, density, largest); `log.parquet` of training;
  `features.json` (`Meaning.to_json`). Summary: `place`, `architecture`, `features`, `text`.
- `sae-use`: `next.parquet` (token, before, after), `active.parquet`. Summary: `place`, `prompt`, `texts`.
- `codes`: Scores `scores` and `baseline`, `codes.parquet` (part, code, positives, negatives, new), `prompts.json`,
  `seen.npz`. Summary: `task`, `n`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from vesalius.parts import parse_part
from vesalius.report import charts, tables
from vesalius.report.page import Cell, Drawing, Page, Section, Table, record, warnings, write
from vesalius.report.words import number, percent, token
from vesalius.runs import Run

CLOSELY = 8  # heads whose codes are shown prompt by prompt
SHARES = 10  # bins of a decade in the histogram of densities


def sae_report(run: Run) -> Path:
    """Draws a run of any `vesalius sae` command as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "lead", "place"])
    used = run.request["command"] == "sae-use"
    if used:
        title, subtitle = "Features changed", f"{summary['model']} · {summary['place']} · “{summary['prompt']}”"
        sections = [_next(run), _written(summary), _active(run)]
    else:
        title = f"A sparse autoencoder of {summary['place']}"
        subtitle = (
            f"{summary['model']} · {summary['architecture']}, {summary['features']:,} features · on {summary['text']}"
        )
        sections = [_density(run), *_features(run), *_training(run)]
    page = Page(
        kind=str(run.request["command"]).replace("-", " "),
        title=title,
        subtitle=subtitle,
        lead=str(summary["lead"]),
        facts=[] if used else _facts(summary["quality"]),
        warnings=warnings(run),
        sections=sections,
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _facts(q: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    facts = [
        ("variance explained", percent(q["explained"]), f"on {q['tokens']:,} held-out tokens; FVU {number(q['fvu'])}"),
        ("on at once", number(q["l0"]), "features a token, on average (L0)"),
        ("dead", percent(q["dead"]), "fire on none of these tokens"),
    ]
    if "recovered_mean" in q:
        mean, zero = q["recovered_mean"], q["recovered_zero"]
        small = f"95 % {percent(mean['low'])} to {percent(mean['high'])}; against zero ablation {percent(zero['mean'])}"
        if mean["mean"] is None:
            small = "which costs this model nothing on this text"
        facts.append(("loss recovered", percent(mean["mean"]), f"against mean ablation; {small}"))
        small = f"as it is {number(q['ce_clean'])}, mean-ablated {number(q['ce_mean'])} nats"
        facts.append(("loss with it in place", number(q["ce_spliced"]), small))
    return facts


def _density(run: Run) -> Section:
    title = "How often features fire"
    found = tables.frame(run, "density", ["feature", "density"])
    if found is None or not (found["density"] > 0).any():
        return Section(title, missing="no feature fired.")
    alive = np.log10(found.loc[found["density"] > 0, "density"].to_numpy(float))
    edges = np.arange(np.floor(alive.min() * SHARES) / SHARES, 0.1, 1 / SHARES)
    counts, _ = np.histogram(alive, np.append(edges, edges[-1] + 1 / SHARES))
    table = pd.DataFrame({"share": 10 ** (edges + 0.5 / SHARES), "features": counts})
    chart = charts.shares(table, "share", "features", ("share of tokens it fires on", "features"), title)
    dead = int((found["density"] == 0).sum())
    read = (
        f"{dead:,} of {len(found):,} features fire on none of these tokens and are left "
        "out. A bump far to the right is of features that are on nearly everywhere and say little."
    )
    return Section(title, [chart], read)


def _features(run: Run) -> list[Section]:
    if not run.has("features.json"):
        return []
    sections = []
    for one in run.json("features"):
        blocks: list[Any] = [_texts(one["texts"])] if one["texts"] else []
        if one["tokens"]:
            rows = [[token(t["token"]), t["value"], t["count"]] for t in one["tokens"]]
            blocks.append(Table.of(["token it fires on", "mean value", "times"], rows))
        if one["up"]:
            rows = [[token(a), x, token(b), y] for (a, x), (b, y) in zip(one["up"], one["down"], strict=True)]
            blocks.append(Table.of(["makes likelier", "logit a unit", "less likely", "logit a unit"], rows))
        title = f"Feature {one['number']}"
        read = f"fires on {percent(one['density'])} of the tokens, at most {number(one['largest'])}."
        if blocks:
            sections.append(Section(title, blocks, read))
        else:
            sections.append(Section(title, missing="it fires on none of these tokens."))
    return sections


def _texts(rows: list[dict[str, Any]]) -> Table:
    cells = []
    for row in rows:
        before, it, after = (" ".join(str(row[k]).split("\n")) for k in ("before", "token", "after"))
        shown = Markup("{}<mark>{}</mark>{}").format(before, it, after)
        cells.append(
            [Cell(number(row["value"], pad=True), float(row["value"]), "num"), Cell(shown, str(row["token"]), "text")]
        )
    return Table(["value", "where it fires most"], cells)


def _training(run: Run) -> list[Section]:
    log = tables.frame(run, "log", ["step", "error", "l0"])
    if log is None:
        return []
    thin = log.iloc[:: max(1, len(log) // 300)]
    error = charts.lines(thin, "step", "error", ("step", "squared error"), "Error", points=False)
    read = "squared error of vectors scaled to a mean distance of √d from their mean, which alone leaves about 1."
    return [Section("Training", [error], read)]


def _next(run: Run) -> Section:
    found = tables.frame(run, "next", ["token", "before", "after"])
    if found is None:
        return Section("The next token", missing="nothing was read.")
    rows = [[token(t), a, b] for t, a, b in zip(found["token"], found["before"], found["after"], strict=True)]
    return Section("The next token", [Table.of(["token", "as it is", "changed"], rows)], "probabilities.")


def _written(summary: Mapping[str, Any]) -> Section:
    rows = [[name, text] for name, text in zip(("as it is", "changed"), summary["texts"], strict=True)]
    return Section("What it writes", [Table.of(["", "the likeliest token each time"], rows)])


def _active(run: Run) -> Section:
    found = tables.frame(run, "active", ["feature", "largest"])
    title = "Features that are on in the prompt"
    if found is None:
        return Section(title, missing="none is.")
    shown = found.drop(columns=["low", "high"]).assign(on=[token(t) for t in found["on"]])
    return Section(title, [tables.frame_table(shown)], "on: the token on which the feature is largest.")


# -- codes


def codes_report(run: Run) -> Path:
    """Draws a codes run as one offline HTML file in its folder."""
    summary = tables.summary(run, ["model", "task", "n", "lead"])
    scores, plain = run.scores("scores"), run.scores("baseline")
    frame = scores.to_frame()
    limit = float(np.abs(scores.values).max()) or 1.0
    drawn = charts.heatmap(charts.cells(frame, {}), "share of prompts", limit, "Every head")
    other = plain.to_frame()
    rivals = pd.DataFrame({"part": frame["part"], "codes": frame["score"], "plain": other["score"].to_numpy()})
    against = charts.dots(rivals, "plain", "codes", ("difference of outputs", "new codes"), "part")
    sections = [
        Section(
            "Heads with codes that are new",
            [drawn],
            "the share of prompts that can be solved on which the head's code is one it never shows on the others; "
            "mean over the autoencoders.",
        ),
        Section(
            "Against the plain difference",
            [against],
            "right: how far the head's output moves between the two prompts of a pair, as a share of its length. Where "
            "dots lie along a rising line the autoencoder adds nothing.",
        ),
        _codes(run, [str(p) for p in scores.top(CLOSELY).parts]),
        Section("All heads", [_heads(frame, other)], "intervals over prompts; codes is how many a head was seen with."),
    ]
    page = Page(
        kind="codes",
        title=f"Codes of heads on {Path(str(summary['task'])).name}",
        subtitle=f"{summary['model']} · {summary['n']} prompts that can be solved, {summary['n']} that cannot",
        lead=str(summary["lead"]),
        warnings=warnings(run),
        sections=sections,
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _heads(frame: pd.DataFrame, plain: pd.DataFrame) -> Table:
    shown = frame.assign(difference=plain["score"].to_numpy()).sort_values("score", ascending=False, kind="stable")
    return tables.frame_table(shown, ["part", "score", "low", "high", "codes", "difference"])


def _codes(run: Run, heads: list[str]) -> Section:
    title = "The codes, prompt by prompt"
    if not run.has("seen.npz") or not run.has("codes.parquet"):
        return Section(title, missing="they were not stored.")
    seen, names = run.array("seen"), list(dict.fromkeys(run.table("codes")["part"]))
    prompts = run.json("prompts")
    rows = []
    for head in heads:
        at = names.index(str(parse_part(head)))
        positive, negative = seen["positive"][:, at].tolist(), seen["negative"][:, at].tolist()
        rows.append(Markup("<tr><td class='part'>{}</td><td>{}</td><td>{}</td></tr>").format(
            head, _line(positive, set(negative)), _line(negative, set(positive))))  # fmt: skip
    head = Markup("<tr><th>head</th><th>where it can be solved</th><th>where it cannot</th></tr>")
    table = Markup('<div class="scroll"><table><thead>{}</thead><tbody>{}</tbody></table></div>')
    drawing = Drawing(table.format(head, Markup("").join(rows)))
    texts = [[a, b] for a, b in zip(prompts["positive"], prompts["negative"], strict=True)]
    blocks: list[Any] = [drawing]
    if texts:
        blocks.append(Table.of(["can be solved", "cannot"], texts, shown=4))
    read = (
        "one number a prompt, of the first autoencoder; – is a head with no feature on. Marked codes are seen on that "
        "side alone. The numbers mean nothing by themselves; equal ones are the same feature, also across heads."
    )
    return Section(title, blocks, read)


def _line(codes: list[int], others: set[int]) -> Markup:
    cells = [escape("–") if c < 0 else escape(c) if c in others else Markup("<mark>{}</mark>").format(c) for c in codes]
    return Markup(" ").join(cells)
