"""Laundry list: which item of a list is missing when the list is read again?

    The shopping list says pencil, drum, lamp and coat. We already have the pencil, drum and coat. The only thing still
    missing is the" -> " lamp"

After the task of Merullo et al. 2024 (arXiv 2406.09519, sec. 6), where accuracy falls with the list's length and
depends on where in the list the missing item stands; templates and items are our own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from vesalius.errors import TaskError
from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Span, Words, lines, wordlist


@generator()
def laundry_list(words: Words, rng: random.Random, items: int = 4, missing: int = 0) -> Iterator[Example]:
    """Lists of things, read again without one of them.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        items: how many things are listed, 3 to 20.
        missing: the missing one's place in the list, from 1; 0 for any place, each equally often.

    Yields:
        Examples whose `options` are all items (chance is one in `items`). In the corrupted prompt the list is the same
        and another item is missing: the wrong answer. Positions: "missing" and "wrong" (in the first list), "again"
        (the wrong item in the second), and "item1", "item2", ... (first list); `group` is the missing item's place.
    """
    if not 3 <= items <= 20:
        raise TaskError(f"task 'laundry-list': items={items}; lists hold 3 to 20 things")
    if not 0 <= missing <= items:
        raise TaskError(
            f"task 'laundry-list': missing={missing} is no place in a list of {items}; give 1 to {items}, or 0"
        )
    things = words.single(
        list(dict.fromkeys([*wordlist("objects"), *wordlist("colored_objects")])), items + 1, "the things to list"
    )
    templates = lines("laundry_templates")
    while True:
        listed = rng.sample(things, items)
        at = missing - 1 if missing else rng.randrange(items)
        other = rng.choice([i for i in range(items) if i != at])
        had = [thing for i, thing in enumerate(listed) if i != at]
        template = rng.choice(templates)
        clean, spans, again = _fill(template, listed, had)
        swapped = [listed[at] if thing == listed[other] else thing for thing in had]
        corrupted, _, _ = _fill(template, listed, swapped)
        positions = {f"item{i + 1}": spans[i] for i in range(items)}
        yield Example(
            clean,
            corrupted,
            (f" {listed[at]}",),
            (f" {listed[other]}",),
            {"missing": spans[at], "wrong": spans[other], "again": again[had.index(listed[other])], **positions},
            str(at + 1),
            tuple(f" {thing}" for thing in listed),
        )


def _fill(template: str, listed: Sequence[str], had: Sequence[str]) -> tuple[str, list[Span], list[Span]]:
    """The prompt, and where the things of both lists stand in it."""
    text, found = "", []
    start, rest = template.split("{listed}")
    middle, end = rest.split("{had}")
    for before, things in ((start, listed), (middle, had)):
        text += before
        spans = []
        for i, thing in enumerate(things):
            text += "" if i == 0 else " and " if i == len(things) - 1 else ", "
            spans.append((len(text), len(text) + len(thing)))
            text += thing
        found.append(spans)
    return text + end, found[0], found[1]
