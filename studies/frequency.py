"""Frequency tagging: planted rhythms, SmolLM2 beside its controls, and a recording mixed from one of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from _page import look_inside, run, table, write
from _runs import is_quick, verdict

import vesalius
from vesalius.features.frequency import Recordings, Tagged, frequency_tagging, made_sentences, similarity
from vesalius.features.frequency.spectrum import measured, sets

MODEL = "smollm2-135m"
MIXED = 12  # the layer that recordings are mixed from


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    orders: int
    others: tuple[str, ...]  # options of further runs
    planted: int  # seeds of the planted series
    mixes: int


FULL = Size(20, ("--seed 1 --orders 4", "--corpus bible-web --words 8 --orders 6 --n 63"), 10, 10)
QUICK = Size(2, (), 2, 2)


def planted(seeds: int) -> tuple[list[str], list[list[Any]]]:
    """Sinusoids at -5 dB in 20 of 1000 series."""
    rows, recall, false, raw = [], [], [], []
    power, time = 10 ** (-5 / 10), np.arange(256)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((1000, 256))
        x[:10] += np.sqrt(2 * power) * np.cos(2 * np.pi * time / 4 + rng.uniform(0, 2 * np.pi, (10, 1)))
        x[10:20] += np.sqrt(power) * np.cos(np.pi * time)
        found = measured(x, 4, 1000, seed)
        held = sets(found, x, 4)
        hits = np.concatenate([held[:10] == "sentence", held[10:20] == "phrase"])
        recall.append(float(hits.mean()))
        false.append(float((held[20:] != "").mean()))
        raw.append([float((found[f"p_{k}"][20:] < 0.05).mean()) for k in ("sentence", "phrase")])
        rows.append([seed, f"{recall[-1]:.2f}", f"{false[-1]:.3f}", *[f"{v:.3f}" for v in raw[-1]]])
    claims = [
        ["planted at -5 dB: recall ≥ 0.95", f"{min(recall):.2f} at least", verdict([r >= 0.95 for r in recall])],
        ["false positives after FDR ≤ 1 %", f"{max(false):.1%} at most", verdict([f <= 0.01 for f in false])],
        ["the raw 95 % rule lets about 5 % through", f"{np.mean(raw):.1%} at each rate", "shown"],
    ]
    return [
        "## Planted rhythms",
        "1000 series of 256 words, white noise; ten carry a sinusoid at 1 Hz and ten at 2 Hz, 5 dB below the noise. "
        "1000 shuffles of time.",
        table(["seed", "recall, right set", "false positives, FDR", "raw p < 0.05 at 1 Hz", "at 2 Hz"], rows),
    ], claims


def real(size: Size) -> tuple[list[str], list[list[Any]]]:
    """SmolLM2 and its controls."""
    body, first = ["## SmolLM2-135M beside its controls"], None
    for options in (f"--orders {size.orders}", *size.others):
        command = f"frequency --model {MODEL} {options}"
        found = run(command)
        first = first or found
        rows = [
            [r["condition"], *[f"{r[k]:,}" for k in ("sentence", "phrase", "both")],
             *[f"{r[f'raw_{k}']:,}" for k in ("sentence", "phrase", "both")]]
            for r in found["conditions"]
        ]  # fmt: skip
        split = found["split_sentences"]
        body += [
            f"`vesalius {command}`: {found['sentences']} sentences of {found['words']} words, such as "
            f'"{found["example"][0]}". {found["lead"]}',
            table(["condition", "sentence", "phrase", "both", "raw sentence", "raw phrase", "raw both"], rows),
            f"Sentence sets of the two halves of the orders: Jaccard {found['split_orders']['jaccard']:.2f} (Dice "
            f"{found['split_orders']['dice']:.2f}, by chance {found['split_orders']['dice_chance']:.2f})"
            + (f"; of the two halves of the sentences {split['jaccard']:.2f}." if split else ".")
            + f" Between layers, by the units' numbers: Dice {found['layers_dice']:.2f}, by chance "
            f"{found['layers_dice_chance']:.2f}.",
        ]
    assert first is not None
    profile = [
        [r["layer"], f"{r['share']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
         f"{r['fitted']:.2f} [{r['fitted_low']:.2f}, {r['fitted_high']:.2f}]"]
        for r in first["profile"]
    ]  # fmt: skip
    body += [
        "Share of each layer's units that follow sentences, and the smoothed curve (lowess), first run; 95 % "
        "intervals by jackknife over tenths of the sentences. The curve is highest at layer "
        f"{first['peak_layer']} ({first['peak_low']} to {first['peak_high']} with tenths left out).",
        table(["layer", "share", "smoothed"], profile),
    ]
    counts = {r["condition"]: r["sentence"] + r["both"] for r in first["conditions"]}
    raw = {r["condition"]: r["raw_sentence"] + r["raw_both"] for r in first["conditions"]}
    shown = ", ".join(f"{k} {v:,}" for k, v in counts.items())
    jaccard = first["split_orders"]["jaccard"]
    claims = [
        ["SmolLM2: ≥ 3 × as many sentence units as shuffled and as untrained", shown,
         verdict([counts["sentences"] >= 3 * max(1, counts[k]) for k in ("shuffled", "untrained")]).replace(
             "seeds", "controls")],
        ["the same by the paper's own rule", ", ".join(f"{k} {v:,}" for k, v in raw.items()),
         verdict([raw["sentences"] >= 3 * max(1, raw[k]) for k in ("shuffled", "untrained")]).replace(
             "seeds", "controls")],
        ["split-half Jaccard ≥ 0.4 (halves of the orders)", f"{jaccard:.2f}",
         "holds" if jaccard >= 0.4 else "does not hold"],
        ["layer profile with interval", f"smoothed peak at layer {first['peak_layer']}", "shown"],
    ]  # fmt: skip
    return body, claims


def mix(found: Tagged, seed: int, channels: int = 100) -> Recordings:
    """Noisy linear mixes of one layer's standardised units; as much noise as signal."""
    rng = np.random.default_rng(seed)
    x = np.moveaxis(found.series.by_sentence[MIXED], 0, -1).astype(float)  # (stimulus, word, unit)
    z = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    out = z @ rng.standard_normal((x.shape[-1], channels))
    out += rng.standard_normal(out.shape) * out.std()
    return Recordings.of(found.series.sentences, np.moveaxis(out, 1, 2))


def recordings(size: Size) -> tuple[list[str], list[list[Any]]]:
    """A recording mixed from layer 12's units."""
    found = frequency_tagging(vesalius.open(MODEL), made_sentences(64), orders=4, permutations=0, controls=())
    rows, near = [], []
    for seed in range(size.mixes):
        line: list[Any] = [seed]
        for units in ("all", "sentence"):
            layers, _ = similarity(found, mix(found, seed), units)
            best = layers.loc[layers["score"].idxmax()]
            scores = layers.set_index("layer")["score"]
            line += [int(best["layer"]), f"{scores[MIXED]:.3f}", f"{scores.drop(MIXED).max():.3f}"]
            if units == "all":
                near.append(abs(int(best["layer"]) - MIXED) <= 1)
        rows.append(line)
    claims = [
        [f"recordings mixed from layer {MIXED}: layer {MIXED} ± 1 is nearest in ≥ 9 of 10 seeds",
         f"{sum(near)} of {len(near)}", "holds" if sum(near) >= 0.9 * len(near) else "does not hold"],
    ]  # fmt: skip
    return [
        "## Similarity with recordings",
        f"100 channels, each a random mix of the standardised units of layer {MIXED} with as much noise as signal.",
        table(
            ["seed", "nearest layer, all units", f"score of {MIXED}", "best other", "nearest, sentence units",
             f"score of {MIXED}", "best other"],
            rows,
        ),
        "No recording of a brain is at hand here: what is tested is that the comparison finds what was put in.",
    ], claims  # fmt: skip


def main() -> None:
    """Runs everything and writes docs/results/look-inside-frequency.md."""
    quick = is_quick(__doc__)
    size = QUICK if quick else FULL
    noise, first = planted(size.planted)
    found, second = real(size)
    mixed, third = recordings(size)
    claims = [*first, *second, *third]
    body = [table(["what was asked", "what came out", ""], claims), *noise, *found, *mixed]
    if quick:
        print("\n".join(body))
        return
    name, command = "look-inside-frequency", "python studies/frequency.py"
    write(name, "Frequency tagging", command, *body, seeds="seeds as named")
    look_inside("Frequency tagging", claims, command, name)


if __name__ == "__main__":
    main()
