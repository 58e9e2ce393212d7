"""The report of `vesalius bias`: associations, texts, suggestions, pronouns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vesalius.report import charts, tables
from vesalius.report.page import Page, Section, Table, record, warnings, write
from vesalius.report.words import number, percent
from vesalius.runs import Run

_LOOKS = {"weat": "associations", "corpora": "texts", "suggestions": "suggestions", "pronouns": "pronouns"}
SHOWN_WORDS = 16  # at each end of a corpus's list


def bias_report(run: Run) -> Path:
    """Draws a bias run as one offline HTML file in its folder.

    It reads `summary.json` (model, corpora, lead, notes) and, as far as they are there, the tables weat, profile,
    corpora, words, documents_means, documents_pairs, suggestions, suggestions_means, suggestions_pairs, pronouns.
    """
    summary = tables.summary(run, ["model", "lead"])
    names = [n for n in [summary["model"], *summary.get("corpora", [])] if n]
    sections = [
        _associations(tables.frame(run, "weat", ["test", "d", "p_holm"])),
        _profile(tables.frame(run, "profile", ["test", "layer", "d"])),
        *_corpora(run),
        _groups(run, "documents", "Texts side by side", "gendered words of each document"),
        _suggested(run),
        _pronouns(tables.frame(run, "pronouns", ["occupation", "preference"])),
    ]
    page = Page(
        kind="bias",
        title=f"Bias audit of {' and '.join(names)}",
        subtitle=" · ".join(what for name, what in _LOOKS.items() if run.has(f"{name}.parquet")),
        lead=str(summary["lead"]),
        warnings=warnings(run),
        sections=[s for s in sections if s.blocks],
        record=record(run, summary),
        notes=[str(n) for n in summary.get("notes") or []],
    )
    return write(run, page)


def _associations(found: pd.DataFrame | None) -> Section:
    title = "Associations of the model's vectors"
    if found is None:
        return Section(title, missing="no test was asked for.")
    shown = found.assign(
        label=[f"{r.test} {r.form} @ {r.reading}" for r in found.itertuples()],
        what=["after" if p < 0.05 else "control" for p in found["p_holm"]],
    )
    chart = charts.bars(shown, "d", "label", "Effect size d with 95 % interval; grey: not beyond chance", (-2, 2))
    columns = ["test", "what", "form", "reading", "d", "low", "high", "p", "p_holm", "n_x", "n_y", "n_a", "n_b"]
    read = (
        "where d is above 0, the first targets go with the first attributes (flowers with pleasant, men with career). "
        "p is one-sided, by permutation of the target words; intervals are over words; Holm over all rows."
    )
    return Section(title, [chart, tables.frame_table(found, columns)], read)


def _profile(found: pd.DataFrame | None) -> Section:
    title = "Over the layers"
    if found is None:
        return Section(title, missing="no layers were asked for.")
    shown = found.assign(what="test " + found["test"].astype(str))
    chart = charts.lines(shown, "layer", "d", ("layer", "d"), "Effect size by layer", "what")
    what = " · ".join(f"{t}: {w}" for t, w in found[["test", "what"]].drop_duplicates().itertuples(index=False))
    return Section(title, [chart], f"sentences around each word, mean over tokens after each block. {what}")


def _corpora(run: Run) -> list[Section]:
    found = tables.frame(run, "corpora", ["corpus", "score", "null"])
    words = tables.frame(run, "words", ["corpus", "word", "log_ratio"])
    if found is None or words is None:
        return []
    columns = ["corpus", "documents", "score", "low", "high", "null", "null_95", "p", "signed", "n_female", "n_male"]
    remark = "A mean of absolute values is above 0 by chance: compare the score with null, not with 0."
    read = (
        "the score is the mean |log ratio| of how often words stand near male and near female words; null is the "
        "same with genders shuffled over the corpus; above 0.30 is called moderate by GenBit's authors."
    )
    sections = [Section("GenBit score", [tables.frame_table(found, [*columns, "considered"])], read, remarks=[remark])]
    for name, mine in words.groupby("corpus", sort=False):
        ordered = mine.sort_values("log_ratio", ascending=False, kind="stable")
        ends = pd.concat([ordered.head(SHOWN_WORDS), ordered.tail(SHOWN_WORDS)]).drop_duplicates("word")
        shown = ends.assign(low=float("nan"), high=float("nan"), what="after")
        chart = charts.bars(shown, "log_ratio", "word", "log of male over female nearness", step=20)
        table = tables.frame_table(ordered, ["word", "log_ratio", "male", "female", "frequency"], shown=12)
        text = "words nearest to male words above, to female words below; counts are weighted by distance."
        sections.append(Section(f"Words of {name}", [chart, table], text))
    return sections


def _groups(run: Run, name: str, title: str, what: str) -> Section:
    means = tables.frame(run, f"{name}_means", ["group", "mean"])
    pairs = tables.frame(run, f"{name}_pairs", ["a", "b", "difference"])
    if means is None or pairs is None:
        return Section(title, missing="no groups were compared.")
    told = run.json(f"{name}_groups")
    chart = charts.bars(means.assign(what="after"), "mean", "group", f"Lean of the {what}", (-1, 1))
    columns = [
        "a",
        "b",
        "difference",
        "low",
        "high",
        "cohen_d",
        "p",
        "p_holm",
        "different",
        "p_equivalence",
        "equivalent",
    ]
    read = (
        "1 is all female, -1 all male. p tests a difference (Welch, Holm); p equivalence tests that it is smaller than "
        f"{number(told['bound'])} (two one-sided tests). Kruskal-Wallis over all groups: p = "
        f"{number(told['kruskal_p'])}."
    )
    return Section(title, [chart, tables.frame_table(pairs, columns)], read)


def _suggested(run: Run) -> Section:
    section = _groups(run, "suggestions", "What the model suggests", "gendered words suggested")
    found = tables.frame(run, "suggestions", ["kind", "female", "male"])
    if found is None or not section.blocks:
        return section
    splits = run.json("splits")
    rows: list[list[Any]] = []
    for kind, mine in found.groupby("kind", sort=False):
        rows.append([kind, len(mine), *(int(mine[c].sum()) for c in ("female", "male"))])
    heads = ["prompts", "how many", "female words suggested", "male words suggested"]
    table = Table.of(heads, rows, caption="What was counted; suggestions.parquet in the run's folder holds the texts")
    remark = (
        f"Neutral prompts, divided at random in halves {splits['splits']} times, differ by this measure in "
        f"{percent(splits['false_alarms'])} of cases: that is the audit's rate of false alarms."
    )
    return Section(section.title, [*section.blocks, table], section.read, remarks=[remark])


def _pronouns(found: pd.DataFrame | None) -> Section:
    title = "she and he by occupation"
    if found is None:
        return Section(title, missing="pronouns were not asked for.")
    blocks: list[Any] = []
    if "share_female" in found:
        known = found.dropna(subset=["share_female"])
        blocks.append(
            charts.dots(
                known, "share_female", "preference", ("share of women at work", "logit difference"), "occupation"
            )
        )
    blocks.append(
        charts.bars(found.assign(what="after"), "preference", "occupation", "logit of she minus logit of he", step=18)
    )
    read = "mean over three prompts; whiskers are the least and the largest of them, not an interval."
    return Section(title, blocks, read)
