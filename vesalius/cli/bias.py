"""`vesalius bias`: associations in a model's vectors, gender in what it suggests, gender in texts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, drawn, typed
from vesalius.errors import UnknownName, VesaliusError
from vesalius.runs import Run

DEFAULT_TESTS = "1,6,7,8"
DOCUMENT_BOUND = 0.1  # of the mean lean of texts, from -1 to 1, below which groups count as alike


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("bias")(g.expanded(bias))


def bias(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Whose vectors and suggestions are audited; the default model if no corpus."
        ),
    ] = None,
    weat: Annotated[
        str | None, typer.Option("--weat", help=f"Association tests: numbers, all or none; {DEFAULT_TESTS} by default.")
    ] = None,
    words: Annotated[
        Path | None, typer.Option("--words", help="A .yaml file with word sets and tests of your own.")
    ] = (None),
    reading: Annotated[
        str | None, typer.Option(help="Where vectors are read: sentence, table, mean@12, ...; the model's default.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile/--no-profile", help="The tests at every block too.")] = True,
    corpus: Annotated[
        list[str] | None,
        typer.Option("--corpus", help="Text: a file, a folder, a corpus's name, or GROUP=one of these; repeatable."),
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Read this many documents of each corpus at most.")] = (
        None
    ),
    window: Annotated[str, typer.Option(help="Context of a gendered word: tokens to either side, or infinite.")] = "5",
    percentile: Annotated[
        float, typer.Option(help="Leave out words with fewer co-occurrences than this share has.")
    ] = (80.0),
    suggestions: Annotated[
        int | None,
        typer.Option("--suggestions", help="Let the model go on with this many neutral prompts, and cued ones."),
    ] = None,
    pronouns: Annotated[bool, typer.Option("--pronouns", help="she against he after each of 64 occupations.")] = False,
    statistics: Annotated[
        Path | None, typer.Option(help="With --pronouns: a .csv/.jsonl file with occupation, share_female.")
    ] = None,
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Audit a model, its suggestions and texts for bias.

    Association tests (WEAT on words, SEAT on bland sentences) with effect sizes, intervals and permutation tests,
    Holm-corrected; a GenBit score of each corpus beside what chance gives; suggestions for neutral prompts and prompts
    that name a woman or a man; groups compared with tests of difference and of equivalence.
    """
    from vesalius.features.bias import labour_statistics, tests
    from vesalius.features.vectors import Reading

    screen = machine.screen(where.as_json)
    known = tests(words)
    chosen = _tests(weat, known, words is not None, model is not None or not corpus)
    wants_model = bool(chosen) or suggestions is not None or pronouns
    if reading is not None:
        Reading.parse(reading)
    if suggestions is not None and suggestions < 20:
        raise VesaliusError(f"--suggestions {suggestions} prompts are too few to compare; give 20 or more")
    if statistics is not None and not pronouns:
        raise VesaliusError("--statistics is set beside the pronouns; give --pronouns too")
    if not 0 <= percentile < 100:
        raise VesaliusError(f"--percentile {percentile:g} leaves no word; give 0 to 99")
    asked = {n: known[n] for n in chosen}
    context = _window(window)
    shares = None if statistics is None else labour_statistics(statistics)
    texts = _texts(corpus or [], documents)
    if not wants_model and not texts:
        raise VesaliusError("there is nothing to audit; give --weat, --corpus, --suggestions or --pronouns")
    opened = None
    if wants_model:
        opened = machine.opened(screen, model or o.MODEL_DEFAULT)
    request = {
        "command": "bias",
        "model": opened.name if opened else None,
        "model_fingerprint": opened.fingerprint if opened else None,
        "weat": {n: _digest([w for s in (t.x, t.y, t.a, t.b) for w in (s.kind, *s.words)]) for n, t in asked.items()},
        "reading": reading,
        "profile": profile and bool(chosen),
        "corpus": {name: _digest(found) for name, found in texts.items()},
        "window": window,
        "percentile": percentile,
        "suggestions": suggestions,
        "pronouns": pronouns,
        "statistics": shares,
        "seed": where.seed,
        "dtype": machine.dtype,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            lines: list[str] = []
            if chosen:
                _associations(screen, run, opened, list(asked.values()), reading, profile, where.seed, lines)
            if texts:
                _corpora(screen, run, texts, context, percentile, where.seed, lines)
            if suggestions is not None:
                _suggestions(screen, run, opened, suggestions, where.seed, lines)
            if pronouns:
                _pronouns(screen, run, opened, shares, lines)
            told = {"model": request["model"], "lead": " ".join(lines), "notes": _notes(run), "command": command}
            run.save_json("summary", told | {"corpora": list(texts)})
    drawn(screen, run)
    _show(screen, run)


def _tests(text: str | None, known: dict[str, Any], own: bool, wanted: bool) -> list[str]:
    if text == "none" or (text is None and not wanted and not own):
        return []
    if text == "all" or (text is None and own):
        return list(known)
    names = o.listed(text or DEFAULT_TESTS)
    for name in names:
        if name not in known:
            raise UnknownName("association test", name, known)
    return names


def _window(text: str) -> dict[str, Any]:
    if text == "infinite":
        return {"context": "infinite"}
    if not text.isdecimal() or int(text) < 1:
        raise VesaliusError(f"--window {text}: write a number of tokens from 1 on, or infinite")
    return {"context": "window", "window": int(text)}


def _texts(given: list[str], limit: int | None) -> dict[str, list[str]]:
    """Documents by group. A group with an = sign before a file or corpus is named so."""
    from vesalius.corpus import documents

    found: dict[str, list[str]] = {}
    for item in given:
        group, sign, what = item.partition("=")
        if not sign or Path(item).exists():
            group, what = Path(item).stem, item
        if group in found:
            raise VesaliusError(f"two corpora are called '{group}'; name them apart with GROUP={what}")
        found[group] = [d.text for d in islice(documents(what), limit) if d.text.strip()]
        if not found[group]:
            raise VesaliusError(f"'{what}' holds no text; give one with documents")
    return found


def _digest(texts: list[str]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _associations(
    screen: Screen, run: Run, opened: Any, chosen: Any, reading: Any, profile: bool, seed: int, lines: list[str]
) -> None:
    from vesalius.features import bias as b

    with run.stage("associations", 1), screen.step("association tests") as progress:
        tables = [
            b.audit(opened, chosen, reading=reading, form=form, seed=seed, progress=progress)
            for form in ("words", "sentences")
        ]
        if opened.kind != "encoder" and reading is None:
            tables.insert(0, b.audit(opened, chosen, reading="table", seed=seed, progress=progress))
        table = pd.concat(tables, ignore_index=True)
        table["p_holm"] = b.holm(table["p"].to_numpy(float))
        run.save_table("weat", table)
        if profile:
            run.save_table("profile", b.profile(opened, chosen, seed=seed, progress=progress))
    strong = table[table["p_holm"] < 0.05]
    text = f"{opened.name}: {len(strong)} of {len(table)} association tests are beyond chance (Holm, 5 %)"
    if len(strong):
        top = strong.nlargest(1, "d").iloc[0]
        text += f", the strongest {top['what']} ({top['form']}, read at {top['reading']}), d {top['d']:.2f}"
    lines.append(text + ".")


def _corpora(
    screen: Screen, run: Run, texts: dict[str, list[str]], context: Any, percentile: float, seed: int, lines: list[str]
) -> None:
    from vesalius.features.bias import LEANS, Corpus, compare, genbit, leans, word_bias

    rows, every, ratios = [], [], []
    with run.stage("corpora", len(texts)), screen.step("reading texts") as progress:
        for i, (name, documents) in enumerate(texts.items()):
            corpus = Corpus(documents)
            found = genbit(corpus, percentile=percentile, seed=seed, **context)
            rows.append({"corpus": name, **{k: v for k, v in found.__dict__.items() if k not in ("words", "notes")}})
            every.append(found.words.assign(corpus=name))
            bias = word_bias(corpus.count(corpus.near(**context)))
            ratios.append(bias[bias["frequency"] >= 5].head(200).assign(corpus=name))
            lines.append(
                f"{name}: GenBit {found.score:.2f} [{found.low:.2f}, {found.high:.2f}], by chance {found.null:.2f} "
                f"(p = {found.p:.2f})."
            )
            progress(i + 1, len(texts))
    run.save_table("corpora", pd.DataFrame(rows))
    run.save_table("words", pd.concat(every, ignore_index=True))
    run.save_table("word_bias", pd.concat(ratios, ignore_index=True))
    if len(texts) > 1:
        compared = compare({n: leans(t) for n, t in texts.items()}, bound=DOCUMENT_BOUND, limits=LEANS)
        _save_groups(run, "documents", compared)


def _save_groups(run: Run, name: str, found: Any) -> None:
    run.save_table(f"{name}_means", found.means)
    run.save_table(f"{name}_pairs", found.pairs)
    run.save_json(f"{name}_groups", {"kruskal": found.kruskal, "kruskal_p": found.kruskal_p, "bound": found.bound})


def _suggestions(screen: Screen, run: Run, opened: Any, n: int, seed: int, lines: list[str]) -> None:
    from vesalius.features.bias import suggest

    with run.stage("suggestions", n), screen.step("suggestions") as progress:
        found = suggest(opened, n, seed=seed, progress=progress)
    run.save_table("suggestions", found.table)
    _save_groups(run, "suggestions", found.comparison)
    run.save_json("splits", {"false_alarms": found.false_alarms, "splits": found.splits})
    means = found.comparison.means.set_index("group")["mean"]
    lines.append(
        f"Gendered words in suggestions lean {means['neutral']:+.2f} after neutral prompts, {means['female']:+.2f} "
        f"after prompts that name a woman, {means['male']:+.2f} after ones that name a man (1 all female, -1 all male)."
    )


def _pronouns(screen: Screen, run: Run, opened: Any, shares: dict[str, float] | None, lines: list[str]) -> None:
    from vesalius.features.bias import pronoun_preference, with_statistics

    with run.stage("pronouns", 1), screen.step("pronouns") as progress:
        table = pronoun_preference(opened, progress=progress)
    top, last = table.iloc[0], table.iloc[-1]
    text = (
        f"she against he: from {last['preference']:+.2f} ({last['occupation']}) to {top['preference']:+.2f} logits "
        f"({top['occupation']})"
    )
    if shares is not None:
        table, result = with_statistics(table, shares)
        run.save_json("statistics", result)
        text += (
            f"; with the share of women at work it correlates by {result['spearman']:.2f} (ranks, n {result['n']:.0f})"
        )
    run.save_table("pronouns", table)
    lines.append(text + ".")


def _notes(run: Run) -> list[str]:
    from vesalius.features.bias.cooccurrence import ADVISED

    found = []
    if run.has("corpora.parquet"):
        for row in run.table("corpora").to_dict("records"):
            if row["documents"] < ADVISED:
                found.append(
                    f"{row['corpus']} has {row['documents']} documents; {ADVISED} or more are advised for GenBit"
                )
            if row["p"] > 0.05:
                found.append(f"{row['corpus']}: shuffled genders give as high a GenBit score; it is no sign of bias")
    for name in ("documents", "suggestions"):
        if run.has(f"{name}_pairs.parquet"):
            for row in run.table(f"{name}_pairs").to_dict("records"):
                if row["p_holm"] >= 0.05 and not row["equivalent"]:
                    found.append(
                        f"{row['a']} and {row['b']} are neither shown to differ nor shown to be alike within "
                        f"{row['bound']:g}: too few {name}"
                    )
    return found


def _show(screen: Screen, run: Run) -> None:
    summary = run.json("summary")
    place = {"run": str(run.folder), "report": str(run.folder / "report.html")}
    lines: list[Any] = []
    result = dict(summary)
    shown = {
        "weat": ["test", "what", "form", "reading", "d", "low", "high", "p", "p_holm"],
        "corpora": ["corpus", "documents", "score", "low", "high", "null", "null_95", "p", "signed"],
        "documents_means": None,
        "documents_pairs": ["a", "b", "difference", "low", "high", "cohen_d", "p_holm", "different", "equivalent"],
        "suggestions_means": None,
        "suggestions_pairs": ["a", "b", "difference", "low", "high", "cohen_d", "p_holm", "different", "equivalent"],
        "pronouns": None,
    }
    for name, columns in shown.items():
        if run.has(f"{name}.parquet"):
            table = run.table(name)
            result[name] = table.replace({np.nan: None}).to_dict("records")
            if name == "pronouns" and len(table) > 12:
                table = pd.concat([table.head(6), table.tail(6)])
            lines += ["", name.replace("_", ", "), table[columns] if columns else table]
    for name in ("profile", "splits", "statistics", "documents_groups", "suggestions_groups"):
        if run.has(f"{name}.parquet"):
            result[name] = run.table(name).to_dict("records")
        elif run.has(f"{name}.json"):
            result[name] = run.json(name)
    lines += [f"\n{summary['lead']}", *[f"note: {n}" for n in summary["notes"]]]
    lines += [f"\nrun     {run.folder}", f"report  {place['report']}"]
    screen.show(result | place, *lines)
