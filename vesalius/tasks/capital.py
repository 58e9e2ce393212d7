"""Capitals: "The capital of France is" -> " Paris"; the corrupted prompt names another country.

A small set of factual recall, as studied with activation patching by Meng et al., "Locating and Editing Factual
Associations in GPT", arXiv 2202.05262.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Words, fill, lines


@generator()
def capital(words: Words, rng: random.Random, multi_token: bool = False) -> Iterator[Example]:
    """Countries and their capitals, in several templates; every pair in every template once, in random order.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        multi_token: also countries and capitals of several tokens, answers then scored as whole continuations. The
            corrupted prompt's country has as many tokens as the clean one's.

    Yields:
        Examples whose wrong answer is the other country's capital. Position: "country"; `group` is the template's
        number, from 1.
    """
    pairs = {country: city for country, city in (line.split(": ") for line in lines("capitals"))}
    if not multi_token:
        countries = set(words.single(list(pairs), 4, "the countries of the list 'capitals'"))
        cities = set(words.single([c for k, c in pairs.items() if k in countries], 4, "the list 'capitals'"))
        pairs = {k: c for k, c in pairs.items() if k in countries and c in cities}
    length = {country: words.length(country) for country in pairs}
    templates = lines("capital_templates")
    draws = [(number, country) for number in range(len(templates)) for country in pairs]
    rng.shuffle(draws)
    for number, country in draws:
        others = [c for c in pairs if c != country and length[c] == length[country]]
        if not others:
            continue
        other = rng.choice(others)
        clean = fill(templates[number], country=country)
        yield Example(
            clean.text,
            fill(templates[number], country=other).text,
            (f" {pairs[country]}",),
            (f" {pairs[other]}",),
            {"country": clean.spans["country"]},
            str(number + 1),
        )
