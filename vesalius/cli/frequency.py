"""`vesalius frequency`: units that follow sentences and phrases in a steady stream of words."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vesalius.cli import groups as g
from vesalius.cli import options as o
from vesalius.cli.console import Screen, conclude, drawn, records_of, stored_tables, typed
from vesalius.errors import UnknownName, VesaliusError
from vesalius.runs import Run

_ONLY = {f"{raw}{rate}": f"{raw}{rate} only" for raw in ("", "raw_") for rate in ("sentence", "phrase")}
CLOSELY = 12  # units whose activation at the places of a sentence is shown


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("frequency")(g.expanded(frequency))


def frequency(
    model: o.ModelName = o.MODEL_DEFAULT,
    sentences: Annotated[
        Path | None, typer.Option("--sentences", help="A text file, a sentence a line, all of as many words.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="Take sentences of --words words from a corpus, a file or a folder.")
    ] = None,
    words: Annotated[int, typer.Option(min=3, max=40, help="With --corpus: words in a sentence.")] = 8,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Sentences; 64 by default, or all of a file.")] = None,
    orders: Annotated[int, typer.Option(min=2, max=1000, help="Random orders in which they are read.")] = 20,
    controls: Annotated[
        str, typer.Option("--controls", help="shuffled, exchanged, untrained: a list, all, or none.")
    ] = "all",
    permutations: Annotated[int, typer.Option(min=0, max=100_000, help="Shuffles of time, for p.")] = 1000,
    recordings: Annotated[
        Path | None, typer.Option("--recordings", help="A .npz or .h5 file of recordings to the same sentences.")
    ] = None,
    units: Annotated[
        str, typer.Option("--units", help="With --recordings: compare all units, or those of sentence, phrase.")
    ] = "all",
    *,
    where: g.RunOptions,
    machine: g.Opening,
) -> None:
    """Which MLP units follow sentences and phrases in a steady stream of words.

    Sentences of one length follow each other without a mark; a unit whose activation comes and goes at the rate of
    sentences, or of phrases, follows their structure. Beside the counts stand those for shuffled sentences, for
    sentences with exchanged words, and for the same model before training. With --recordings each layer is compared
    with a brain's responses to the same sentences.
    """
    from vesalius.features.frequency.similarity import check_stimuli, read_recordings
    from vesalius.features.frequency.tagging import CONDITIONS, fitting

    screen = machine.screen(where.as_json)
    chosen = {"all": list(CONDITIONS), "none": []}.get(controls, list(dict.fromkeys(o.listed(controls))))
    for name in chosen:
        if name not in CONDITIONS:
            raise UnknownName("control", name, CONDITIONS)
    if units not in ("all", "sentence", "phrase"):
        raise UnknownName("units", units, ("all", "sentence", "phrase"))
    rows, source = _sentences(sentences, corpus, words, n, where.seed)
    kept = fitting(rows)
    heard = None
    if recordings is not None:
        heard = read_recordings(recordings)
        check_stimuli(heard, kept)
    elif units != "all":
        raise VesaliusError("--units chooses what is compared with recordings; give --recordings too")
    opened = machine.opened(screen, model)
    request = {
        "command": "frequency",
        "model": opened.name,
        "model_fingerprint": opened.fingerprint,
        "task": source,
        "sentences": _digest(kept),
        "orders": orders,
        "controls": chosen,
        "permutations": permutations,
        "recordings": None if recordings is None else hashlib.sha256(recordings.read_bytes()).hexdigest()[:16],
        "units": units,
        "seed": where.seed,
        "dtype": machine.dtype,
    }
    command = typed()
    with Run.start(request, where.out, where.fresh, command) as run:
        if not run.done:
            _work(screen, run, opened, rows, heard, request, source, command)
    drawn(screen, run)
    _show(screen, run)


def _sentences(path: Path | None, corpus: str | None, words: int, n: int | None, seed: int) -> tuple[Any, str]:
    """The sentences, and what they are called."""
    from vesalius.corpus import documents
    from vesalius.features.frequency import made_sentences, natural_sentences, read_sentences

    if path is not None and corpus is not None:
        raise VesaliusError("--sentences and --corpus both say where sentences come from; give one of them")
    if path is not None:
        return read_sentences(path)[:n], path.stem
    if corpus is not None:
        found = natural_sentences((d.text for d in documents(corpus)), words, n or 64)
        return found, f"{Path(corpus).stem}-{words}-words"
    return made_sentences(64 if n is None else n, seed), "made"


def _digest(sentences: Any) -> str:
    return hashlib.sha256("\n".join(" ".join(s) for s in sentences).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _work(
    screen: Screen, run: Run, opened: Any, rows: Any, heard: Any, request: Any, source: str, command: str
) -> None:
    from vesalius.features.frequency import frequency_tagging, similarity

    with run.stage("streams", 1), screen.step("reading streams of sentences") as progress:
        found = frequency_tagging(
            opened,
            rows,
            orders=request["orders"],
            controls=request["controls"],
            permutations=request["permutations"],
            seed=request["seed"],
            progress=progress,
        )
    run.save_scores("scores", found.scores())
    run.save_table("units", found.units[found.units["set"] != ""].reset_index(drop=True))
    run.save_table("conditions", found.conditions)
    run.save_table("profile", found.profile)
    run.save_table("spectrum", found.spectrum)
    run.save_table("places", _places(found))
    told = dict(found.info) | {"example": [" ".join(s) for s in found.series.sentences[:4]], "source": source}
    lines = notes(found)
    if heard is not None:
        with run.stage("recordings", 1), screen.step("comparing with the recordings"):
            layers, channels = similarity(found, heard, request["units"], request["seed"])
        run.save_table("similarity", layers)
        run.save_table("channels", channels)
        told["compared"] = request["units"]
    text = lead(found)
    if heard is not None:
        best = layers.iloc[int(layers["score"].fillna(-1).to_numpy().argmax())]
        text += (
            f" Nearest to the recordings is layer {best['layer']:.0f}: rank correlation of distances "
            f"{best['score']:.2f}, by chance below {best['null_high']:.2f} (p = {best['p']:.3f})."
        )
    run.save_json("summary", told | {"lead": text, "notes": lines, "command": command})


def _places(found: Any) -> pd.DataFrame:
    """The clearest units of each set with their mean activation at the places of a sentence."""
    rows = []
    for name in ("sentence", "phrase", "both"):
        mine = found.units[found.units["set"] == name]
        rate = "phrase" if name == "phrase" else "sentence"
        for row in mine.nlargest(CLOSELY, f"share_{rate}").to_dict("records"):
            at = found.places[list(found.series.layers).index(row["layer"]), row["unit"]]
            places = {f"word {i + 1}": float(v) for i, v in enumerate(at)}
            part = f"L{row['layer']}.N{row['unit']}"
            rows.append({"part": part, "set": name, "share": row[f"share_{rate}"], **places})
    return pd.DataFrame(rows, columns=None if rows else ["part", "set", "share"])


def lead(found: Any) -> str:
    """What was found, in a sentence or three."""
    table = found.conditions.set_index("condition")
    total = int(table.loc["sentences", "units"])

    def count(name: str) -> int:
        return int(table.loc[name, ["sentence", "both"]].sum())

    mine = count("sentences")
    text = f"{mine:,} of {total:,} units follow the sentences ({mine / total:.1%})"
    told = {"shuffled": "with the words inside them shuffled", "untrained": "in the model before training"}
    told["exchanged"] = "with words exchanged between them"
    others = [f"{count(k):,} {told[k]}" for k in found.info["controls"]]
    text += f"; {', '.join(others)}." if others else "."
    phrases = int(table.loc["sentences", ["phrase", "both"]].sum())
    text += f" {phrases:,} follow phrases. Most are found about layer {found.info['peak_layer']}."
    return text


def notes(found: Any) -> list[str]:
    """What a reader must know before believing the numbers."""
    info, lines = found.info, []
    if info["repeated_words"]:
        lines.append("some words stand in several sentences: their own activation may pass for a rhythm")
    if info["left_out"]:
        lines.append(f"{info['left_out']} sentences were left out, so that every rate falls on one frequency")
    if "shuffled" not in info["controls"] or "untrained" not in info["controls"]:
        lines.append("without the controls shuffled and untrained nothing tells structure from differences of words")
    if "exchanged" in info["controls"]:
        table = found.conditions.set_index("condition")[["sentence", "both"]].sum(axis=1)
        if table["exchanged"] > 0.5 * table["sentences"]:
            lines.append(
                "most of the rhythm is that of parts of speech: it stays when words are exchanged between sentences"
            )
    split = info["split_orders"]["jaccard"]
    if np.isfinite(split) and split < 0.4:
        lines.append(f"the sets of the two halves of the orders share only {split:.0%}: give more orders")
    return lines


def _show(screen: Screen, run: Run) -> None:
    found = stored_tables(run, ("conditions", "profile", "similarity"))
    profile = found["profile"][["layer", "sentence", "phrase", "both", "share", "low", "high"]]
    nearest = ["", found["similarity"]] if "similarity" in found else []
    shown = [table.rename(columns=_ONLY) for table in (found["conditions"], profile)]
    conclude(screen, run, shown[0], "", shown[1], *nearest, **records_of(found))
