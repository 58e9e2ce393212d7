r"""Arithmetic: "2 + 5 = 7\n3 + 4 =" -> " 7"; the corrupted prompt changes one operand.

Sums as in Stolfo et al., "A Mechanistic Interpretation of Arithmetic Reasoning in Language Models using Causal
Mediation Analysis", arXiv 2305.15054.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from vesalius.errors import TaskError
from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Words, fill

# How a sum ends and its result begins: the first in which results are one token is taken. Vocabularies with number
# tokens that hold their space take the first; those that split off the space and every digit take the second.
_ENDS = (("{a} {sign} {b} =", " "), ("{a} {sign} {b} = ", ""), ("{a}{sign}{b}=", ""))


@generator()
def arithmetic(
    words: Words,
    rng: random.Random,
    operation: Literal["add", "subtract"] = "add",
    max_operand: int = 9,
    max_result: int = 9,
    shots: int = 2,
) -> Iterator[Example]:
    """Sums (or differences) of whole numbers, after a few solved ones.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        operation: add or subtract (results are never negative).
        max_operand: largest operand; the smallest is 1.
        max_result: largest result. Results of two digits are several tokens where the tokenizer splits digits, and
            are then scored as whole continuations.
        shots: solved lines before the asked one, from 0 to 8; their operands differ from the asked pair.

    Yields:
        Examples whose wrong answer is the corrupted prompt's result. Positions: "a", "sign", "b" of the asked line;
        `group` says which operand was changed.
    """
    if max_operand < 2 or max_result < 3 or not 0 <= shots <= 8:
        raise TaskError(
            f"task 'arithmetic': max_operand={max_operand} (at least 2), max_result={max_result} (at least 3), "
            f"shots={shots} (0 to 8)"
        )
    sign = "+" if operation == "add" else "-"

    def result(a: int, b: int) -> int:
        return a + b if operation == "add" else a - b

    numbers = range(1, max_operand + 1)
    pairs = [(a, b) for a in numbers for b in numbers if 0 <= result(a, b) <= max_result]
    shots = min(shots, len(pairs) - 1)
    probe = [str(result(a, b)) for a, b in pairs if result(a, b) < 10]
    template, space = _ENDS[-1]
    for template, space in _ENDS:
        asked = template.format(a=3, sign=sign, b=2)
        if all(words.is_single(asked, space + r) for r in probe):
            break
    words.note(f"sums are written {template.format(a=3, sign=sign, b=2)!r}, answers {space + '5'!r}")
    while True:
        a, b = rng.choice(pairs)
        which = rng.choice("ab")
        others = [
            (x, y)
            for x, y in pairs
            if (y == b if which == "a" else x == a) and (x, y) != (a, b) and len(f"{x}{y}") == len(f"{a}{b}")
        ]
        if not others:
            continue
        other = rng.choice(others)
        solved = rng.sample([p for p in pairs if p not in ((a, b), other)], min(shots, len(pairs) - 2))
        lead = "".join(template.format(a=x, sign=sign, b=y) + f"{space}{result(x, y)}\n" for x, y in solved)
        clean = fill(template, a=a, sign=sign, b=b)
        yield Example(
            lead + clean.text,
            lead + fill(template, a=other[0], sign=sign, b=other[1]).text,
            (f"{space}{result(a, b)}",),
            (f"{space}{result(*other)}",),
            {key: (low + len(lead), high + len(lead)) for key, (low, high) in clean.spans.items()},
            which,
        )
