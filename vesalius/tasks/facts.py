"""Facts: "The capital of France is" -> " Paris"; the corrupted prompt names another topic.

Relations are `capital`, `language` and `currency`, each in several templates; 15 for capitals, after the form of the
prompts of Lv et al., "Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
arXiv 2403.19521. Accuracy is over the answers of the whole relation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from vesalius.errors import UnknownName
from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Words, fill, lines

_LISTS = {"capital": "capitals", "language": "languages", "currency": "currencies"}
_WORD = re.compile(r"[a-z]{5,}")  # shorter ones are of all relations


@dataclass(frozen=True)
class Relation:
    """Topics with one answer each, and ways to ask.

    Attributes:
        name: of the relation. answers: by topic. templates: with `{topic}`; the answer follows after a space.
    """

    name: str
    answers: Mapping[str, str]
    templates: tuple[str, ...]

    @property
    def cues(self) -> set[str]:
        """Words that stand in these templates and in no other relation's."""
        others = {w for r in relations().values() if r.name != self.name for t in r.templates for w in _words(t)}
        return {w for t in self.templates for w in _words(t)} - others


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.replace("{topic}", " ").lower()))


@cache
def relations() -> dict[str, Relation]:
    """Every relation by name."""
    asked = [line.partition(": ") for line in lines("fact_templates")]
    found = {}
    for name, list_ in _LISTS.items():
        pairs = dict(line.split(": ") for line in lines(list_))
        found[name] = Relation(name, pairs, tuple(t for r, _, t in asked if r == name))
    return found


def relation_of(prompt: str) -> Relation | None:
    """The relation whose own words the prompt uses most; None if it uses none of any."""
    used = {name: len(_words(prompt) & r.cues) for name, r in relations().items()}
    best = max(used, key=lambda name: used[name])
    return relations()[best] if used[best] else None


def examples(
    answers: Mapping[str, str], asked: Sequence[tuple[str, str]], length: Mapping[str, int], rng: random.Random
) -> Iterator[Example]:
    """One example for each (template, topic), its counterfactual another topic of as many tokens.

    Args:
        answers: by topic. asked: templates with `{topic}`, and the topic asked about. length: tokens of each topic.
        rng: chooses counterfactuals.
    """
    every = tuple(dict.fromkeys(f" {a}" for a in answers.values()))
    for template, topic in asked:
        others = [t for t in answers if answers[t] != answers[topic] and length[t] == length[topic]]
        if not others:
            continue
        other = rng.choice(others)
        clean = fill(template, topic=topic)
        yield Example(
            clean.text,
            fill(template, topic=other).text,
            (f" {answers[topic]}",),
            (f" {answers[other]}",),
            {"topic": clean.spans["topic"]},
            template,
            every,
        )


def single(words: Words, answers: Mapping[str, str]) -> dict[str, str]:
    """Topics and answers that are single tokens after a space."""
    return {t: a for t, a in answers.items() if words.length(t) == words.length(a) == 1}


@generator()
def facts(words: Words, rng: random.Random, relation: str = "capital", templates: int = 0) -> Iterator[Example]:
    """Topics and answers of one relation, in every template once, in random order.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        relation: capital, language or currency.
        templates: how many of the relation's templates are used, from the first on; 0 for all.

    Yields:
        Examples whose wrong answer is the other topic's. Position: "topic"; `group` is the template.
    """
    if relation not in relations():
        raise UnknownName("relation", relation, relations())
    it = relations()[relation]
    topics = words.single(list(it.answers), 4, f"the topics of '{relation}'")
    words.single([it.answers[t] for t in topics], 4, f"the answers of '{relation}'")
    known = single(words, it.answers)
    asked = [(t, topic) for t in it.templates[: templates or None] for topic in known]
    rng.shuffle(asked)
    yield from examples(known, asked, dict.fromkeys(known, 1), rng)
