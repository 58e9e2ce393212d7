"""Induction: in a row of random words with "A B" somewhere and "A" at the end, B comes next.

Olsson et al., "In-context Learning and Induction Heads", arXiv 2209.11895.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from vesalius.errors import TaskError
from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Words, fill


@generator()
def induction(
    words: Words,
    rng: random.Random,
    length: int = 12,
    corruption: Literal["first", "second"] = "first",
    words_from: Literal["auto", "nouns", "vocabulary"] = "auto",
) -> Iterator[Example]:
    """Rows of different words of which only the last repeats one.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        length: words in the row, the repeated one included; at least 5.
        corruption: "first" replaces A's first mention by a fresh word, so that nothing repeats; "second" replaces B by
            a fresh word, which then is the answer and the wrong one.
        words_from: "nouns", a list; "vocabulary", the words of the tokenizer's own vocabulary, for small models;
            "auto", the list if enough of it are single tokens.

    Yields:
        Examples with positions "prev" (A's first mention, the token before B) and "first" (B). The wrong answer is, for
        "first", another word of the row.
    """
    if length < 5:
        raise TaskError(f"task 'induction': length must be at least 5 words, not {length}")
    least = length + 2
    if words_from == "auto":
        known = len(words("nouns", least=0)) >= least
        words_from = "nouns" if known else "vocabulary"
        if not known:
            words.note("words are the tokenizer's own: too few nouns are single tokens in it")
    nouns = words("nouns", least=least) if words_from == "nouns" else words.vocabulary(least)
    template = " ".join(f"{{w{i}}}" for i in range(length))
    while True:
        *row, fresh = rng.sample(nouns, length)
        # A is not the first word, which no space precedes, and B is not right before the repeated A.
        a = rng.randrange(1, length - 3)
        row.append(row[a])
        other = list(row)
        other[a if corruption == "first" else a + 1] = fresh
        others = [w for i, w in enumerate(row) if i not in (0, a, a + 1, length - 1)]
        wrong = fresh if corruption == "second" else rng.choice(others)
        clean = fill(template, **{f"w{i}": w for i, w in enumerate(row)})
        yield Example(
            clean.text,
            fill(template, **{f"w{i}": w for i, w in enumerate(other)}).text,
            (f" {row[a + 1]}",),
            (f" {wrong}",),
            {"prev": clean.spans[f"w{a}"], "first": clean.spans[f"w{a + 1}"]},
        )
