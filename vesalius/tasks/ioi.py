"""Indirect object identification: "When Mary and John went to the park, John gave a book to" -> " Mary".

The name that is not repeated (the indirect object, IO) follows; the repeated one (the subject, S) is wrong. Wang et
al., "Interpretability in the Wild", arXiv 2211.00593, section 2 and appendix E.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Words, fill, lines, token_after, wordlist


@generator()
def ioi(
    words: Words,
    rng: random.Random,
    order: Literal["both", "abba", "baba"] = "both",
    corruption: Literal["abc", "swap"] = "swap",
) -> Iterator[Example]:
    """Prompts with two people, one of whom is named again.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        order: "abba" (the IO is named first), "baba" (the subject is), or both by halves.
        corruption: "abc" puts three fresh, different names in the three places, so that nothing tells who receives
            (the paper's p_ABC); "swap" changes only the subject's second mention (S2) to the IO's name, so that the
            answer flips.

    Yields:
        Examples with positions IO, S1, S1+1 and S2; `group` is ABBA or BABA.
    """
    names = words("names", least=6)
    templates, places, objects = lines("ioi_templates"), wordlist("places"), wordlist("objects")
    while True:
        receiver, subject, *fresh = rng.sample(names, 5)
        kind = order if order != "both" else rng.choice(("abba", "baba"))
        people = {"first": receiver, "second": subject, "giver": subject}
        if kind == "baba":
            people |= {"first": subject, "second": receiver}
        template = rng.choice(templates)
        rest = {"place": rng.choice(places), "object": rng.choice(objects)}
        clean = fill(template, **people, **rest)
        if corruption == "abc":
            other = dict(zip(("first", "second", "giver"), fresh, strict=True))
        else:
            other = people | {"giver": receiver}
        at = clean.spans
        subject_first = at["second"] if kind == "abba" else at["first"]
        yield Example(
            clean.text,
            fill(template, **other, **rest).text,
            (f" {receiver}",),
            (f" {subject}",),
            {
                "IO": at["first"] if kind == "abba" else at["second"],
                "S1": subject_first,
                "S1+1": token_after(clean.text, subject_first),
                "S2": at["giver"],
            },
            kind.upper(),
        )
