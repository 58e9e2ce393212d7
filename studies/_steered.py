"""Steered text and its judges: a lexicon, perplexity, variety. Shared by studies of steering."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vesalius.features import AxisGuard, direction
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


def written(writer: Model, prompts: Sequence[str], tokens: int, guard: AxisGuard | None = None) -> list[str]:
    """What the model writes after each prompt, in batches; the same seeds whatever steers."""
    out: list[str] = []
    processors = [guard] if guard is not None else None
    for begin in range(0, len(prompts), 30):
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
