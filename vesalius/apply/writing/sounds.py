"""How English words sound: syllables, stress, rhyme (the CMU pronouncing dictionary), and Metaphone.

A word that the dictionary lacks gets its syllables from a count of its vowel groups, and no stress and no rhyme. The
libraries `pronouncing` and `Metaphone` are the extra `writing`.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from vesalius.errors import VesaliusError

_VOWELS = re.compile(r"[aeiouy]+")


def library(name: str) -> Any:
    """A library of the extra `writing`.

    Raises:
        VesaliusError: with the line that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise VesaliusError(f"this rule needs '{name}'; install it with: pip install 'vesalius[writing]'") from None


@functools.cache
def dictionary() -> dict[str, tuple[str, ...]]:
    """Words of letters and apostrophes, and their pronunciations (ARPAbet with stress marks).

    The names of single letters, which it has too, are left out: `s` would be what stands after an apostrophe.
    """
    pronouncing = library("pronouncing")
    pronouncing.init_cmu()
    words = re.compile(r"[a-z]+(?:'[a-z]+)*'?")
    named = {w: tuple(p) for w, p in pronouncing.lookup.items() if words.fullmatch(w)}
    return {
        w: p for w, p in named.items() if len(w.split("'")[0]) > 1 or w in ("a", "i", "o", "i'm", "i'd", "i'll", "i've")
    }


def phones(word: str) -> tuple[str, ...]:
    """The pronunciations of a word in lower case; none if the dictionary lacks it."""
    return dictionary().get(word.replace("\u2019", "'"), ())


def _stress(pronunciation: str) -> str:
    """`1` for a stressed syllable, primary or secondary, `0` for another."""
    return "".join("0" if c == "0" else "1" for c in pronunciation if c.isdigit())


def syllables(word: str) -> tuple[int, ...]:
    """The counts of syllables a word can have; one guess from its spelling where the dictionary lacks it."""
    known = phones(word)
    if known:
        return tuple(sorted({len(_stress(p)) for p in known}))
    return (guessed_syllables(word),)


def guessed_syllables(word: str) -> int:
    """Groups of vowels, without a silent e at the end; 0 for what has no letter."""
    plain = re.sub(r"[^a-z]", "", word)
    if not plain:
        return 0
    count = len(_VOWELS.findall(plain))
    if re.search(r"[^aeiouy]e$", plain) and not re.search(r"[^aeiouy]le$", plain):
        count -= 1
    if re.search(r"[^aeiouytd]ed$", plain):
        count -= 1
    return max(1, count)


def stresses(word: str) -> tuple[str, ...]:
    """The stress patterns a word can have, such as `10` for water; a word of one syllable fits both."""
    found = {_stress(p) for p in phones(word)}
    return tuple(sorted(found | ({"0", "1"} if found & {"0", "1"} else set())))


def rhymes(word: str) -> frozenset[str]:
    """The sounds a word can be rhymed by: from its last stressed vowel on."""
    pronouncing = library("pronouncing")
    return frozenset(pronouncing.rhyming_part(p) for p in phones(word))


def metaphones(word: str) -> frozenset[str]:
    """Philips' double metaphone codes."""
    return frozenset(c for c in library("metaphone").doublemetaphone(word) if c)
