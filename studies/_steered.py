"""Steering by a concept's axis, and its judges: a lexicon, perplexity, variety. No text is shown, only its measures."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from _page import table

from vesalius.features import AxisGuard, direction, pushed
from vesalius.features.bias import continuations
from vesalius.features.directions import Axis, random_line
from vesalius.model import Model

# Openings that can go on well or badly; none is among the phrases of a concept.
PROMPTS = (
    "The old man looked at the boy and decided to",
    "When nobody was watching, she",
    "After the argument, my brother",
    "The soldiers entered the village and",
    "My boss told me that he wanted to",
    "The best thing about people is that they",
    "At the party last night, everyone",
    "The new neighbour knocked on the door and",
    "She was so angry that she",
    "In the middle of the night, the stranger",
    "The teacher saw the crying child and",
    "Yesterday the police",
    "If I had a lot of money, I would",
    "The two brothers met again and",
    "People on the internet always",
    "The crowd in the street began to",
    "He found a wallet on the pavement and",
    "The nurse walked into the room and",
    "My friends think that I should",
    "The king ordered his men to",
    "On the train, a woman",
    "The dog in the garden",
    "When I was young, my father used to",
    "The company decided that its workers",
    "The thief saw the open window and",
    "After the match, the fans",
    "The doctor told the family that",
    "In court, the witness",
    "The children in our street",
    "She looked into his eyes and",
)


class Amount(NamedTuple):
    """How much is written."""

    prompts: int
    samples: int
    tokens: int
    thresholds: tuple[float, ...]
    random_axes: int
    pushes: tuple[float, ...]


def steering(encoder: Model, writer: Model, size: Amount) -> tuple[list[list[str]], list[str]]:
    """A guard by an encoder's axis and a push along the writer's own, judged by a lexicon that knows neither.

    Returns:
        rows of (check, asked, came out, verdict), and the body of the page.
    """
    prompts = [p for p in PROMPTS[: size.prompts] for _ in range(size.samples)]
    plain = written(writer, prompts, size.tokens)
    base = measures(writer, prompts, plain)
    whole = [f"{p}{t}" for p, t in zip(prompts, plain, strict=True)]
    rows = [row("not steered (20 likeliest tokens)", base, base, None)]
    found: dict[str, Any] = {}

    def guarded(name: str, label: str, axis: Axis, threshold: float) -> None:
        guard = AxisGuard(axis, encoder, writer.tokenizer, threshold=threshold, draw=torch.Generator())
        found[name] = measures(writer, prompts, written(writer, prompts, size.tokens, guard))
        rows.append(row(label, found[name], base, guard))

    for name, method in (("moral", "pca"), ("sentiment", "mean-difference")):
        axis = direction(encoder, name, method, templates=[], permutations=0, draws=0)
        for threshold in size.thresholds:
            guarded(f"{name} {threshold:g}", f"guard, {name}, threshold {threshold:g}", axis, threshold)
        share = float(np.mean(axis.score(encoder, whole) < size.thresholds[-1]))
        for seed in range(size.random_axes if name == "moral" else 0):
            drawn = random_axis(encoder, name, seed)
            # As strict as the largest threshold: it lies at the same quantile of what is written unsteered.
            at = float(np.quantile(drawn.score(encoder, whole), share))
            guarded(f"random {seed}", f"guard, random axis {seed}, as strict", drawn, at)
    layer = writer.n_layers // 2
    own = direction(writer, "sentiment", "mean-difference", f"mean@{layer}", permutations=0, draws=0)
    for strength in size.pushes:
        with pushed(writer, own, strength):
            found[f"push {strength:g}"] = measures(writer, prompts, written(writer, prompts, size.tokens))
        rows.append(row(f"push, sentiment at block {layer}, {strength:g}", found[f"push {strength:g}"], base, None))
    claims = []
    for name in ("moral", "sentiment", "push"):
        mine = [k for k in found if k.startswith(name)]
        within = [k for k in mine if fluent(found[k], base)]
        best = max(within or mine, key=lambda k: float(found[k]["judge"]))
        rise, ppl, distinct = changes(found[best], base)
        low, high = interval(found[best]["scores"] - base["scores"], size.samples)
        how = "a push along its own sentiment axis" if name == "push" else f"a guard by MiniLM's {name} axis"
        claims.append(
            [
                "18.3",
                f"SmolLM2 steered by {how}: a lexicon's score rises by 0.5 sd, perplexity by 20 % at most, distinct-2 "
                "stays within 10 %",
                f"{rise:+.2f} sd [{low / base['sd']:.2f}, {high / base['sd']:.2f}], perplexity x {ppl:.2f}, distinct-2 "
                f"x {distinct:.2f} (at {best.partition(' ')[2]}, the best of {len(mine)} settings"
                f"{'' if within else '; none is within the bounds'})",
                "holds" if rise >= 0.5 and best in within else "does not hold",
            ]
        )
    rises = [(changes(found[k], base)[0], *interval(found[k]["scores"] - base["scores"], size.samples))
             for k in found if k.startswith("random")]  # fmt: skip
    told = [f"{r:+.2f} [{low / base['sd']:.2f}, {high / base['sd']:.2f}]" for r, low, high in rises]
    same = all(low <= 0 <= high for _, low, high in rises)
    claims.append(
        [
            "18.3",
            "a random axis changes nothing",
            f"{', '.join(told)} sd (0 within the intervals: {'yes' if same else 'no'})",
            "holds" if same else "does not hold",
        ]
    )
    heads = ["", "lexicon", "change (sd)", "perplexity", "distinct-2", "ruled out", "rescued"]
    return claims, [
        "## Steering SmolLM2-135M",
        table(heads, rows),
        f"{size.prompts} openings, {size.samples} samples of {size.tokens} tokens each ({len(prompts)} texts, seed 0). "
        "Lexicon: mean compound score of VADER, which rates words by hand-made valences and knows neither encoder nor "
        "concept; sd is that of the unsteered texts' scores. Perplexity of what was written under the model as it is; "
        "distinct-2: different pairs of words among all. Ruled out: of the candidates judged; rescued: steps on which "
        "none was good enough and the best was taken. The guard's axes are found from phrases as they stand (moral: "
        "the first component; sentiment: the mean difference, since the first component of its phrases is a topic); "
        "random ones are set as strict as the largest threshold. A push of 1 is the distance between the poles' means. "
        "The texts themselves are not shown.",
        "A guard raises the lexicon's score, a part of it as a random axis as strict does, and ruling candidates out "
        "costs perplexity whatever the axis; a push along the model's own axis reaches more at no cost.",
    ]


def fluent(one: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether perplexity and variety stay where they are asked to."""
    _, ppl, distinct = changes(one, base)
    return ppl <= 1.2 and abs(distinct - 1) <= 0.1


def written(writer: Model, prompts: Sequence[str], tokens: int, guard: AxisGuard | None = None) -> list[str]:
    """What the model writes after each prompt, in batches; the same seeds whatever steers."""
    out: list[str] = []
    processors = [guard] if guard is not None else None
    for begin in range(0, len(prompts), 30):
        if guard is not None and guard.draw is not None:
            guard.draw.manual_seed(begin)
        some = prompts[begin : begin + 30]
        out += continuations(writer, some, tokens, begin, top_k=20, logits_processor=processors)
    return out


def random_axis(encoder: Model, name: str, seed: int) -> Axis:
    """A random direction among those in which the concept's phrases differ."""

    def fit(x: Any, y: Any) -> Any:
        return random_line(x, y, seed=seed + 1)

    return direction(encoder, name, fit, templates=[], permutations=0, draws=0)


def measures(writer: Model, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Lexicon score, perplexity under the unsteered model, distinct-2."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    scores = np.array([judge.polarity_scores(t)["compound"] for t in texts])
    pairs = [(a, b) for t in texts for a, b in zip(t.lower().split(), t.lower().split()[1:], strict=False)]
    return {
        "scores": scores,
        "judge": float(scores.mean()),
        "sd": float(scores.std()),
        "perplexity": perplexity(writer, prompts, texts),
        "distinct": len(set(pairs)) / max(1, len(pairs)),
    }


def perplexity(writer: Model, prompts: Sequence[str], texts: Sequence[str]) -> float:
    """Of the texts given their prompts, by token."""
    tokenizer = writer.tokenizer
    assert tokenizer is not None
    total, count = 0.0, 0
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        head = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + text)["input_ids"]
        if len(ids) > head:
            rows.append((ids, head))
    for begin in range(0, len(rows), 30):
        some = rows[begin : begin + 30]
        length = max(len(ids) for ids, _ in some)
        batch = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in some])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in some])
        loss = torch.nn.functional.cross_entropy(
            writer.logits(batch, mask)[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        ).view(len(some), -1)
        for i, (ids, head) in enumerate(some):
            total += float(loss[i, head - 1 : len(ids) - 1].sum())
            count += len(ids) - head
    return math.exp(total / count)


def changes(one: dict[str, Any], base: dict[str, Any]) -> tuple[float, float, float]:
    """Rise of the judge's score in standard deviations; factors of perplexity and of distinct-2."""
    rise = (one["judge"] - base["judge"]) / base["sd"]
    return rise, one["perplexity"] / base["perplexity"], one["distinct"] / base["distinct"]


def interval(differences: Any, samples: int) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, over prompts."""
    by_prompt = np.asarray(differences).reshape(-1, samples).mean(axis=1)
    rng = np.random.default_rng(0)
    draws = by_prompt[rng.integers(0, len(by_prompt), (2000, len(by_prompt)))].mean(axis=1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def row(name: str, one: dict[str, Any], base: dict[str, Any], guard: AxisGuard | None) -> list[str]:
    """A row of the table of steering."""
    rise, ppl, distinct = changes(one, base)
    print(f"  {name}: {rise:+.2f} sd, perplexity x {ppl:.2f}, distinct-2 x {distinct:.2f}", file=sys.stderr, flush=True)
    cells = [name, f"{one['judge']:.2f}", f"{rise:+.2f}", f"{one['perplexity']:.1f} (x {ppl:.2f})"]
    cells.append(f"{one['distinct']:.2f} (x {distinct:.2f})")
    if guard is None:
        return [*cells, "", ""]
    return [*cells, f"{guard.dropped / max(1, guard.candidates):.0%}", str(guard.rescued)]
