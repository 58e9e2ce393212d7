"""Successor: "In order: Monday, Tuesday, Wednesday," -> " Thursday".

Gould et al., "Successor Heads: Recurring, Interpretable Attention Heads In The Wild", arXiv 2312.09230.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from vesalius.errors import TaskError
from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Words, fill, lines, wordlist

_ROUND = ("days", "months")  # these begin again after the last


def _windows(items: list[str], usable: set[str], length: int, around: bool) -> list[list[str]]:
    """All runs of `length` items and the one after, in which every item is usable."""
    last = len(items) if around else len(items) - length
    runs = [[items[(i + k) % len(items)] for k in range(length + 1)] for i in range(max(0, last))]
    return [run for run in runs if set(run) <= usable]


@generator()
def successor(
    words: Words,
    rng: random.Random,
    kind: Literal["days", "months", "numbers", "letters", "all"] = "all",
    shortest: int = 3,
    longest: int = 5,
) -> Iterator[Example]:
    """Runs of an ordered series; the corrupted prompt begins the same series elsewhere.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        kind: the series: days, months (both begin again after the last), number words to twenty, letters, or all.
        shortest: fewest items shown.
        longest: most items shown, at most 6.

    Yields:
        Every run in every frame once, in random order; the wrong answer is what follows in the corrupted prompt.
        Positions: "last" (the last item) and "last-1"; `group` is the series.
    """
    if not 2 <= shortest <= longest <= 6:
        raise TaskError(
            f"task 'successor': shortest={shortest}, longest={longest}; they must be from 2 to 6, shortest first"
        )
    kinds = ("days", "months", "numbers", "letters") if kind == "all" else (kind,)
    draws: list[tuple[str, str, list[str], list[list[str]]]] = []
    for series in kinds:
        usable = set(words(series, least=0 if kind == "all" else shortest + 2))
        for length in range(shortest, longest + 1):
            runs = _windows(wordlist(series), usable, length, series in _ROUND)
            if len(runs) > 1:
                draws += [(series, frame, run, runs) for frame in lines("successor_frames") for run in runs]
    rng.shuffle(draws)
    for series, frame, run, runs in draws:
        other = rng.choice([r for r in runs if r != run])
        listed = fill(", ".join(f"{{i{k}}}" for k in range(len(run) - 1)), **{f"i{k}": w for k, w in enumerate(run)})
        clean = fill(frame, sequence=listed.text)
        start = clean.spans["sequence"][0]
        spans = [(a + start, b + start) for a, b in listed.spans.values()]
        yield Example(
            clean.text,
            fill(frame, sequence=", ".join(other[:-1])).text,
            (f" {run[-1]}",),
            (f" {other[-1]}",),
            {"last": spans[-1], "last-1": spans[-2]},
            series,
        )
