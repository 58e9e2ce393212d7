"""Pruning SmolLM2-135M: which ranking leaves most, at three ratios; what recovery wins back; how much faster it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from _page import changed, run, table, write
from _runs import is_quick

MODEL = "smollm2-135m"
NAME = "change-pruning"


@dataclass(frozen=True)
class Size:
    """How large the study is: ratios, rankings, seeds of chance, rows of text, tokens of recovery."""

    ratios: tuple[float, ...]
    ways: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: int
    tokens: int


FULL = Size((0.1, 0.2, 0.3), ("amp", "amp-out", "relp", "magnitude", "amp-reversed"), (0, 1, 2), 32, 60_000)
QUICK = Size((0.1,), ("amp",), (0,), 2, 0)


def pruned(by: str, ratio: float, size: Size, more: str = "", seed: int = 0) -> pd.DataFrame:
    """The card of one pruning, by model and metric."""
    told = run(
        f"prune --model {MODEL} --by {by} --ratio {ratio:g} --card-rows {size.rows} --card-n 64 --rows 50 "
        f"--seed {seed} --no-time --no-control {more}"
    )
    return pd.DataFrame(told["card"]).set_index(["model", "metric"])


def cell(card: pd.DataFrame, model: str, metric: str, digits: int = 1) -> str:
    """After, with the interval of the change for ratios."""
    row = card.loc[(model, metric)]
    if metric == "perplexity":
        return f"{row['after']:.{digits}f} (x {row['change']:.2f} [{row['low']:.2f}, {row['high']:.2f}])"
    return f"{row['after']:.2f}"


def rankings(size: Size) -> tuple[str, list[list[str]]]:
    """Perplexity, divergence and tasks by ranking and ratio; the claims."""
    circuit = run(f"circuit --model {MODEL} --task ioi --n 16 --prove-n 16 --compare none")["run"]
    rows, found = [], {}
    for ratio in size.ratios:
        for way in (*size.ways, circuit):
            card = pruned(way, ratio, size)
            name = "IOI circuit's scores, neurons by amp" if way == circuit else way
            found[name, ratio] = float(card.loc[("pruned", "perplexity"), "after"])
            rows.append([f"{ratio:.0%}", name, *(cell(card, "pruned", m) for m in METRICS)])
        for seed in size.seeds:
            card = pruned("random", ratio, size, seed=seed)
            found[f"random {seed}", ratio] = float(card.loc[("pruned", "perplexity"), "after"])
            rows.append([f"{ratio:.0%}", f"random, seed {seed}", *(cell(card, "pruned", m) for m in METRICS)])
    claims = []
    for ratio in size.ratios:
        random = [found[f"random {s}", ratio] for s in size.seeds]
        below = sum(found["amp", ratio] < r for r in random)
        claims.append(
            [f"{ratio:.0%}: AMP below random in every seed", f"{found['amp', ratio]:.1f} against "
             + ", ".join(f"{r:.1f}" for r in random), "holds" if below == len(random) else "does not hold"]
        )  # fmt: skip
        if ("amp-reversed", ratio) in found:
            times = found["amp-reversed", ratio] / found["amp", ratio]
            claims.append([f"{ratio:.0%}: the reverse order is five times worse", f"x {times:.3g}",
                           "holds" if times >= 5 else "does not hold"])  # fmt: skip
    return table(["of the blocks", "by", *METRICS], rows), claims


METRICS = ("perplexity", "divergence", "ioi accuracy", "capital accuracy")


def recovery(size: Size) -> tuple[str, list[list[str]]]:
    """LoRA on plain text after a fifth was taken out, by AMP and by chance."""
    more = f"--recover foldoc --tokens {size.tokens}"
    rows, gaps = [], {}
    for way in ("amp", "random"):
        card = pruned(way, 0.2, size, more)
        was, then, now = (
            np.log(card.loc[key, column])
            for key, column in (
                (("pruned", "perplexity"), "before"), (("pruned", "perplexity"), "after"),
                (("recovered", "perplexity"), "after"),
            )
        )  # fmt: skip
        gaps[way] = ((then - now) / (then - was), now)
        rows.append(
            [way, cell(card, "pruned", "perplexity"), cell(card, "recovered", "perplexity"), f"{gaps[way][0]:.0%}"]
        )
    claims = [
        [f"{size.tokens:,} tokens of LoRA close 40 % of the gap in log-perplexity or more", f"{gaps['amp'][0]:.0%}",
         "holds" if gaps["amp"][0] >= 0.4 else "does not hold"],
        ["as much recovery after random pruning stays worse", f"{np.exp(gaps['random'][1]):.1f} against "
         f"{np.exp(gaps['amp'][1]):.1f}", "holds" if gaps["random"][1] > gaps["amp"][1] else "does not hold"],
    ]  # fmt: skip
    return table(["by", "pruned", "recovered", "of the gap closed"], rows), claims


def speed(size: Size) -> tuple[str, list[list[str]]]:
    """Reading and writing times of the AMP-pruned models."""
    rows, claims = [], []
    for ratio in size.ratios:
        told: dict[str, Any] = run(
            f"prune --model {MODEL} --by amp --ratio {ratio:g} --card-rows 2 --card-n 4 --card-tasks ioi --rows 50 "
            "--no-control"
        )
        card = pd.DataFrame(told["card"]).set_index(["model", "metric"])
        prefill, decode, size_bytes = (card.loc[("pruned", m), "change"] for m in ("prefill", "decode", "bytes"))
        rows.append([f"{ratio:.0%}", f"x {prefill:.2f}", f"x {decode:.2f}", f"x {size_bytes:.2f}"])
        claims.append([f"{ratio:.0%}: reading falls by 0.6 of the ratio or more", f"by {1 - prefill:.0%}",
                       "holds" if 1 - prefill >= 0.6 * ratio else "does not hold"])  # fmt: skip
    return table(["of the blocks", "reading 256 tokens", "writing one", "bytes"], rows), claims


def main() -> None:
    """Runs everything and writes docs/results/change-pruning.md."""
    size = QUICK if is_quick(__doc__) else FULL
    first, claims = rankings(size)
    if size is QUICK:
        return
    second, more = recovery(size)
    third, most = speed(size)
    every = [*claims, *more, *most]
    write(
        NAME,
        "Change: pruning",
        "python studies/pruning.py",
        f"{MODEL}, whole blocks' weights taken out evenly; plain text of FOLDOC that no ranking has read, "
        f"{size.rows} rows of 128 tokens; 64 prompts of each task. Intervals are 95 %, of the change over rows.",
        table(["asked", "came out", ""], every),
        "## Which ranking",
        first,
        "## Recovery",
        second,
        "## Speed",
        third,
        seeds=f"seeds {', '.join(map(str, size.seeds))} of chance",
    )
    changed("AMP", every, "python studies/pruning.py", NAME)


if __name__ == "__main__":
    main()
