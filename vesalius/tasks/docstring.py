r'''Docstring: which argument a Python docstring describes next.

    def move(self, table, stone, river, cloud):
        """engine of the garden

        :param table: the old winter
        :param stone: some letter
        :param            -> " river"

Heimersheim and Janiak, "A circuit for Python docstrings in a 4-layer attention-only transformer" (Alignment Forum,
2023).
'''

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from vesalius.errors import TaskError
from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Words, fill

_VERBS = ("load", "move", "save", "send", "read", "write", "open", "close", "find", "make")


@generator()
def docstring(
    words: Words,
    rng: random.Random,
    arguments: int = 5,
    described: int = 2,
    corruption: Literal["other", "shuffle"] = "other",
) -> Iterator[Example]:
    """Functions whose docstring has described the first arguments in order.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        arguments: how many arguments the function has besides self, at least 3.
        described: how many the docstring has described, from 1 to arguments - 1.
        corruption: "other" replaces every argument in the definition by fresh names, so that the next one cannot be
            known; "shuffle" puts the same names in another order, in which another one comes next.

    Yields:
        Examples whose wrong answers are all other arguments of the function. Positions: "previous-def" and
        "answer-def" (in the definition), "previous-doc" (the last name described).
    """
    if arguments < 3 or not 1 <= described < arguments:
        raise TaskError(
            f"task 'docstring': {arguments} arguments of which {described} are described; at least 3 arguments, and "
            "from 1 to all but one described"
        )
    nouns = words("nouns", least=2 * arguments + 2 * described + 2)
    names = [f"a{i}" for i in range(arguments)]
    template = "def {verb}(self, " + ", ".join(f"{{{n}}}" for n in names) + '):\n    """{what} {of}\n\n'
    template += "".join(f"    :param {{doc{i}}}: {{x{i}}} {{y{i}}}\n" for i in range(described)) + "    :param"
    while True:
        drawn = rng.sample(nouns, 2 * arguments + 2 * described + 2)
        given, fresh, rest = drawn[:arguments], drawn[arguments : 2 * arguments], drawn[2 * arguments :]
        fields = {"verb": rng.choice(_VERBS), "what": rest.pop(), "of": rest.pop()}
        for i in range(described):
            fields |= {f"doc{i}": given[i], f"x{i}": rest.pop(), f"y{i}": rest.pop()}
        other = fresh
        if corruption == "shuffle":
            # The name after the last described one must be another: that is what the prompt asks for.
            last, answer = given[described - 1], given[described]
            other = rng.sample(given, arguments)
            while other[-1] == last or other[other.index(last) + 1] == answer:
                other = rng.sample(given, arguments)
        clean = fill(template, **fields, **dict(zip(names, given, strict=True)))
        yield Example(
            clean.text,
            fill(template, **fields, **dict(zip(names, other, strict=True))).text,
            (f" {given[described]}",),
            tuple(f" {g}" for i, g in enumerate(given) if i != described),
            {
                "previous-def": clean.spans[f"a{described - 1}"],
                "answer-def": clean.spans[f"a{described}"],
                "previous-doc": clean.spans[f"doc{described - 1}"],
            },
        )
