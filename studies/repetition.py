"""Loops of greedy decoding: how a repeat feeds on itself, and what a short training against it leaves of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from _page import changed, run, table, write
from _runs import is_quick
from transformers import RepetitionPenaltyLogitsProcessor

import vesalius
from vesalius.change.repetition import drawn_sentences, has_loop, reinforcement, sentences
from vesalius.cli.repair_work import PROMPT, SENTENCES, WRITTEN
from vesalius.corpus import plain_text
from vesalius.model.decode import decode
from vesalius.runs import Run

NAME, COMMAND = "change-repetition", "python studies/repetition.py"
MODELS = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma-3-270M"}
TEXTS = 64  # rows trained on; what is asked comes after them


class Size(NamedTuple):
    """How large the study is: sentences asked, steps of training, whether loops are broken at all."""

    sentences: int
    steps: int


FULL, QUICK = Size(SENTENCES, 60), Size(3, 0)
Claims = list[list[Any]]


def diagnosed(spec: str, size: Size) -> tuple[pd.DataFrame, Claims]:
    """TP, IP and WR of sentences, and of tokens drawn by chance."""
    model = vesalius.open(spec)
    asked = sentences(model, plain_text(model, "foldoc", 2 * size.sentences, 64), size.sentences)
    drawn = drawn_sentences(int(model.hf.config.vocab_size), size.sentences)
    found = {k: reinforcement(model, v) for k, v in (("sentences", asked), ("random tokens", drawn))}
    ratio = {k: float(t["TP"].iloc[-1] / t["TP"].iloc[0]) for k, t in found.items()}
    rose = {k: float(t["IP"].mean()) for k, t in found.items()}
    tp = found["sentences"]["TP"]
    claims = [
        [f"{MODELS[spec]}: the tokens of a tenth repeat at least twice as probable as at first",
         f"{tp.iloc[0]:.2f} to {tp.iloc[-1]:.2f} (x {ratio['sentences']:.1f})", verdict(ratio["sentences"] >= 2)],
        [f"{MODELS[spec]}: at a repeat 80 % of tokens are more probable than a repeat before (mean of repeats 2 to 10)",
         f"{rose['sentences']:.0%}", verdict(rose["sentences"] >= 0.8)],
        [f"{MODELS[spec]}: random tokens show it less", f"TP at the tenth {found['random tokens']['TP'].iloc[-1]:.2f} "
         f"against {tp.iloc[-1]:.2f}; rose {rose['random tokens']:.0%} against {rose['sentences']:.0%}",
         verdict(rose["random tokens"] < rose["sentences"])],
    ]  # fmt: skip
    both = [t.assign(model=MODELS[spec], of=k) for k, t in found.items()]
    return pd.concat(both, ignore_index=True), claims


def penalised(spec: str) -> tuple[float, float]:
    """Loops and distinct groups of four under a repetition penalty of 1.2, the same prompts."""
    model = vesalius.open(spec)
    rows = plain_text(model, "foldoc", SENTENCES, 64, TEXTS)[:, :PROMPT]
    lines = decode(model, rows.tolist(), WRITTEN, [RepetitionPenaltyLogitsProcessor(1.2)])
    tokenizer: Any = model.tokenizer
    looped = [has_loop(tokenizer.decode(line.tokens, skip_special_tokens=True)) for line in lines]
    fours = [[tuple(x.tokens[i : i + 4]) for i in range(len(x.tokens) - 3)] for x in lines]
    return float(np.mean(looped)), float(np.mean([len(set(f)) / len(f) for f in fours]))


def repaired(spec: str, size: Size) -> tuple[list[str], Claims]:
    """Loops before and after, beside plain text learnt as long and a repetition penalty."""
    told = run(f"repair --model {spec} --loops --steps {size.steps} --keep foldoc --keep-rows {TEXTS} --card-rows 24")
    found = Run.open(told["run"])
    loops = found.table("loops").set_index("model")
    curves = found.table("curves").set_index(["model", "repeat"])
    card = pd.DataFrame(told["card"]).set_index(["model", "metric"])
    rate, distinct = penalised(spec)
    before, after, text = (float(loops.loc[k, "loops"]) for k in ("before", "repaired", "plain text"))
    fall, other = ((before - x) / before if before else 0.0 for x in (after, text))
    tp = curves.loc["repaired", "TP"]
    slope = float(np.polyfit(tp.index[1:], tp.to_numpy()[1:], 1)[0])
    tokens = size.steps * 8 * 64
    cost = card.loc[("repaired", "perplexity"), "change"] - 1
    claims = [
        [f"{MODELS[spec]}, {tokens:,} tokens: continuations with a sentence that follows on itself fall by half",
         f"{before:.0%} to {after:.0%}", verdict(fall >= 0.5)],
        ["held-out perplexity at most 3 % up", f"{cost:+.1%}", verdict(cost <= 0.03)],
        ["as much plain text reduces them by less than a third as much", f"to {text:.0%}", verdict(other < fall / 3)],
        ["TP over repeats 2 to 10 flat or falling", f"{slope:+.4f} a repeat", verdict(slope <= 0)],
    ]  # fmt: skip
    rows = [[k, f"{r['loops']:.0%}", f"{r['distinct_4']:.2f}"] for k, r in loops.iterrows()]
    rows.append(["before, with a repetition penalty of 1.2", f"{rate:.0%}", f"{distinct:.2f}"])
    costs = {k: f"x {card.loc[(k, 'perplexity'), 'change']:.3f}" for k in ("repaired", "plain text")}
    rows = [[*r, costs.get(r[0], "x 1")] for r in rows]
    body = [
        f"## {MODELS[spec]} trained against loops",
        f"`vesalius repair --loops --steps {size.steps}`: {tokens:,} tokens of FOLDOC; {SENTENCES} greedy "
        f"continuations of {WRITTEN} tokens after {PROMPT} tokens of other texts.",
        table(["", "loops", "distinct groups of four", "perplexity of plain text"], rows),
        table(["repeat", *map(str, tp.index)], [
            [k, *(f"{curves.loc[(k, i), 'TP']:.2f}" for i in tp.index)] for k in ("before", "plain text", "repaired")
        ]),
    ]  # fmt: skip
    return body, claims


def verdict(held: bool) -> str:
    """In words."""
    return "holds" if held else "does not hold"


def main() -> None:
    """Runs everything and writes docs/results/change-repetition.md."""
    size = QUICK if is_quick(__doc__) else FULL
    curves, claims = [], list[list[Any]]()
    for spec in MODELS:
        curve, told = diagnosed(spec, size)
        curves.append(curve)
        claims += told
    if size is QUICK:
        return
    body, told = repaired("smollm2-135m", size)
    claims += told
    every = pd.concat(curves)
    rows = [
        [name, of, *(f"{x:.2f}" for x in mine["TP"]), f"{mine['IP'].mean():.0%}", f"{mine['WR'].iloc[-1]:.0%}"]
        for (name, of), mine in every.groupby(["model", "of"], sort=False)
    ]
    heads = ["model", "repeated", *map(str, range(1, 1 + int(every["repeat"].max()))), "IP, mean", "WR at the last"]
    write(
        NAME,
        "Change: loops",
        COMMAND,
        table(["asked", "came out", ""], claims),
        "## How a repeat feeds on itself",
        f"{size.sentences} sentences of FOLDOC after the sentence before them, each ten times; mean probability of "
        "their tokens (TP) by repeat. IP: share of tokens that rose; WR: share that is the likeliest token.",
        table(heads, rows),
        *body,
    )
    changed("DITTO", claims, COMMAND, NAME)


if __name__ == "__main__":
    main()
