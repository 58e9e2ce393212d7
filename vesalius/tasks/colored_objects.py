r"""Colored Objects: which of three colours has the object asked for, after one worked example.

    Q: On the desk, there is a red cup, a blue pen, and a green ball. What color is the pen?\nA: Blue

Merullo et al., "Circuit Component Reuse Across Tasks in Transformer Language Models", arXiv 2310.08744, section 3; the
objects come from BIG-bench's reasoning about colored objects (arXiv 2206.04615).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Filled, Words, fill, wordlist

QUESTION = (
    "Q: On the {place}, {verb} {a1} {color1} {object1}, {a2} {color2} {object2}, and {a3} {color3} {object3}. "
    "What color is the {query}?\nA:"
)


class _Scene(NamedTuple):
    place: str
    verb: str
    colors: list[str]
    objects: list[str]

    def ask(self, query: int) -> Filled:
        fields: dict[str, str] = {"place": self.place, "verb": self.verb, "query": self.objects[query]}
        for i, (color, thing) in enumerate(zip(self.colors, self.objects, strict=True), 1):
            fields |= {f"a{i}": "an" if color[0] in "aeiou" else "a", f"color{i}": color, f"object{i}": thing}
        return fill(QUESTION, **fields)


@generator()
def colored_objects(words: Words, rng: random.Random) -> Iterator[Example]:
    """One-shot questions for the colour of one of three objects; the corrupted prompt asks for another of the three.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.

    Yields:
        Examples whose `options` are the three colours (chance is a third) and whose wrong answer is the colour that
        the corrupted prompt asks for. Positions, all in the second question: "query" (the object asked for),
        "right-color", "wrong-color", "other-color", "right-object", "wrong-object"; `group` is the right colour's place
        in the list, 1 to 3.
    """
    capitals = words.single([c.capitalize() for c in wordlist("colors")], 3, "the word list 'colors', capitalised,")
    colors = [c.lower() for c in capitals]
    objects = words("colored_objects", least=4)

    def scene() -> _Scene:
        verb = rng.choice(("there is", "you see", "I see"))
        return _Scene(rng.choice(("table", "desk", "floor")), verb, rng.sample(colors, 3), rng.sample(objects, 3))

    while True:
        shot, shown = scene(), rng.randrange(3)
        first = f"{shot.ask(shown).text} {shot.colors[shown].capitalize()}\n\n"
        asked = scene()
        right, wrong, other = rng.sample(range(3), 3)
        question = asked.ask(right)
        at = {key: (a + len(first), b + len(first)) for key, (a, b) in question.spans.items()}
        answers = [f" {c.capitalize()}" for c in asked.colors]
        yield Example(
            first + question.text,
            first + asked.ask(wrong).text,
            (answers[right],),
            (answers[wrong],),
            {
                "query": at["query"],
                "right-color": at[f"color{right + 1}"],
                "wrong-color": at[f"color{wrong + 1}"],
                "other-color": at[f"color{other + 1}"],
                "right-object": at[f"object{right + 1}"],
                "wrong-object": at[f"object{wrong + 1}"],
            },
            str(right + 1),
            tuple(answers),
        )
