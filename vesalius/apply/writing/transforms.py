"""What is done to a text before filters see it: the 12 transforms, in the order they are named.

The default, `strip lower unaccent`, makes " Écoute" the text "ecoute": an accented e counts as an e. What filters
see is not what is written: nothing here changes the text itself.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence

from vesalius.registry import Registry

TRANSFORMS: Registry[Callable[[str], str]] = Registry("transform")
DEFAULT = ("strip", "lower", "unaccent")


@TRANSFORMS.register("unaccent", "letters without their accents (Unicode NFKD): é is e")
def unaccent(text: str) -> str:
    """Compatibility decomposition without combining marks."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


@TRANSFORMS.register("letters", "letters alone")
def letters(text: str) -> str:
    """Without everything that is no letter."""
    return "".join(c for c in text if c.isalpha())


@TRANSFORMS.register("no-spaces", "without any white space")
def no_spaces(text: str) -> str:
    """Without white space."""
    return "".join(text.split())


@TRANSFORMS.register("reverse", "backwards")
def reverse(text: str) -> str:
    """From the last character to the first."""
    return text[::-1]


for _name, _function, _summary in (
    ("upper", str.upper, "upper case"),
    ("lower", str.lower, "lower case"),
    ("capitalise", str.capitalize, "the first letter in upper case, the others in lower"),
    ("title", str.title, "each word's first letter in upper case"),
    ("swap-case", str.swapcase, "upper case for lower, lower for upper"),
    ("strip", str.strip, "without white space at both ends"),
    ("strip-left", str.lstrip, "without white space on the left"),
    ("strip-right", str.rstrip, "without white space on the right"),
):
    TRANSFORMS.add(_name, _function, _summary)


def transformed(names: Sequence[str]) -> Callable[[str], str]:
    """One function that applies transforms in order."""
    steps = [TRANSFORMS.get(n) for n in names]
    return lambda text: functools.reduce(lambda t, f: f(t), steps, text)


@functools.lru_cache(maxsize=4096)
def folded(char: str, accents: bool = False) -> str:
    """A character as words are compared by: lower case, without accents unless they count. May be empty or several."""
    return char.lower() if accents else unaccent(char.lower())
