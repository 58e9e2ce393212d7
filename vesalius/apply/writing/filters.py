"""The 21 filters of the Constrained Text Generation Studio: each accepts a text or says why not.

A text is a token's (token mode) or a whole word (word mode), after the transforms (`transforms`). Filters compose by
intersection: all must accept.

Some are *closed*: every beginning of an accepted text is accepted (no letter e; fewer than six letters; an isogram).
They can be read letter by letter (`first`, `step`), with states that few words share, and a word that is begun under
closed filters alone can always be ended. The others are known for whole words only, and need a lexicon to be looked
ahead in (`words`).

"Most Language Models can be Poets too", arXiv 2306.15926 (CAI2 workshop 2022); the filters' names are those of its
program. Its semantic similarity is by fastText vectors, here by any vectors (`Similar`); its `reverse isogram` is read
here as: at least one letter is repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vesalius.apply.writing import sounds
from vesalius.registry import Registry


class Filter:
    """Accepts everything."""

    closed = False  # every beginning of an accepted text is accepted

    def why(self, text: str) -> str | None:
        """Why a text is refused; None if it is accepted."""
        return None

    def first(self) -> Hashable:
        """Closed filters: the state before the first character."""
        return None

    def step(self, state: Hashable, char: str) -> Hashable | None:
        """Closed filters: the state after one more character of the text; None if it is refused now."""
        raise NotImplementedError


FILTERS: Registry[Any] = Registry("filter")
_PAPER = "arXiv 2306.15926"


def _listed(strings: tuple[str, ...]) -> str:
    return ", ".join(repr(s) for s in strings)


@FILTERS.register("any-banned", "holds none of some strings", _PAPER)
@dataclass(frozen=True)
class AnyBanned(Filter):
    """Refuses a text with any of some strings."""

    strings: tuple[str, ...]
    closed = True

    def why(self, text: str) -> str | None:
        found = [s for s in self.strings if s in text]
        return f"has {_listed(tuple(found))}" if found else None

    def first(self) -> Hashable:
        return ""

    def step(self, state: Hashable, char: str) -> Hashable | None:
        """The state is the longest end of the text that begins one of the strings."""
        text = f"{state}{char}"
        if any(text.endswith(s) for s in self.strings):
            return None
        longest = max(map(len, self.strings)) - 1
        ends = (text[i:] for i in range(max(0, len(text) - longest), len(text)))
        return next((e for e in ends if any(s.startswith(e) for s in self.strings)), "")


@FILTERS.register("all-banned", "does not hold all of some strings together", _PAPER)
@dataclass(frozen=True)
class AllBanned(Filter):
    """Refuses a text that has every one of some strings."""

    strings: tuple[str, ...]
    closed = True

    def why(self, text: str) -> str | None:
        return f"has all of {_listed(self.strings)}" if all(s in text for s in self.strings) else None

    def first(self) -> Hashable:
        return ""

    def step(self, state: Hashable, char: str) -> Hashable | None:
        text = f"{state}{char}"
        return None if self.why(text) else text


@FILTERS.register("all-required", "holds all of some strings", _PAPER)
@dataclass(frozen=True)
class AllRequired(Filter):
    """Refuses a text that lacks one of some strings."""

    strings: tuple[str, ...]

    def why(self, text: str) -> str | None:
        lacking = tuple(s for s in self.strings if s not in text)
        return f"lacks {_listed(lacking)}" if lacking else None


@FILTERS.register("any-required", "holds at least one of some strings", _PAPER)
@dataclass(frozen=True)
class AnyRequired(Filter):
    """Refuses a text that has none of some strings."""

    strings: tuple[str, ...]

    def why(self, text: str) -> str | None:
        return None if any(s in text for s in self.strings) else f"has none of {_listed(self.strings)}"


@FILTERS.register("string-at", "has a string at a place, counted from 1", _PAPER)
@dataclass(frozen=True)
class StringAt(Filter):
    """Refuses a text without a string at a place."""

    string: str
    place: int

    def why(self, text: str) -> str | None:
        at = self.place - 1
        return None if text[at : at + len(self.string)] == self.string else f"place {self.place} is not {self.string!r}"


@FILTERS.register("starts-with", "begins with a string", _PAPER)
@dataclass(frozen=True)
class StartsWith(Filter):
    """Refuses a text that begins otherwise."""

    string: str

    def why(self, text: str) -> str | None:
        return None if text.startswith(self.string) else f"does not start with {self.string!r}"


@FILTERS.register("ends-with", "ends with a string", _PAPER)
@dataclass(frozen=True)
class EndsWith(Filter):
    """Refuses a text that ends otherwise."""

    string: str

    def why(self, text: str) -> str | None:
        return None if text.endswith(self.string) else f"does not end with {self.string!r}"


@FILTERS.register("edit-distance", "is at most so many edits (Levenshtein) from a word", _PAPER)
@dataclass(frozen=True)
class EditDistance(Filter):
    """Refuses a text too far from a word."""

    word: str
    most: int

    def why(self, text: str) -> str | None:
        far = int(sounds.library("rapidfuzz.distance").Levenshtein.distance(text, self.word))
        return None if far <= self.most else f"is {far} edits from {self.word!r}, more than {self.most}"


@FILTERS.register("length", "has exactly so many characters", _PAPER)
@dataclass(frozen=True)
class Length(Filter):
    """Refuses a text of another length."""

    n: int

    def why(self, text: str) -> str | None:
        return None if len(text) == self.n else f"has {len(text)} letters, not {self.n}"


@FILTERS.register("longer", "has more characters than so many", _PAPER)
@dataclass(frozen=True)
class Longer(Filter):
    """Refuses a short text."""

    n: int

    def why(self, text: str) -> str | None:
        return None if len(text) > self.n else f"has {len(text)} letters, not more than {self.n}"


@FILTERS.register("shorter", "has fewer characters than so many", _PAPER)
@dataclass(frozen=True)
class Shorter(Filter):
    """Refuses a long text."""

    n: int
    closed = True

    def why(self, text: str) -> str | None:
        return None if len(text) < self.n else f"has {len(text)} letters, not fewer than {self.n}"

    def first(self) -> Hashable:
        return 0

    def step(self, state: Hashable, char: str) -> Hashable | None:
        count = int(state) + 1  # type: ignore[call-overload]
        return count if count < self.n else None


@FILTERS.register("sounds-like", "shares a double metaphone code with a word", _PAPER)
@dataclass(frozen=True)
class SoundsLike(Filter):
    """Refuses a text that sounds otherwise."""

    word: str

    def why(self, text: str) -> str | None:
        same = sounds.metaphones(text) & sounds.metaphones(self.word)
        return None if same else f"does not sound like {self.word!r}"


Vectors = Callable[[str], np.ndarray[Any, Any] | None]


@FILTERS.register("similar", "has a vector near that of a word (cosine)", _PAPER)
@dataclass(frozen=True)
class Similar(Filter):
    """Refuses a text whose vector is far from a word's.

    Attributes:
        vectors: text -> its vector, or None for what has none; see `language` for where they come from.
    """

    word: str
    least: float
    vectors: Vectors = field(compare=False)

    def why(self, text: str) -> str | None:
        mine, aim = self.vectors(text), self.vectors(self.word)
        if mine is None or aim is None:
            return f"has no vector to compare with {self.word!r}"
        near = float(mine @ aim / max(float(np.linalg.norm(mine) * np.linalg.norm(aim)), 1e-12))
        return None if near >= self.least else f"has cosine {near:.2f} with {self.word!r}, below {self.least:g}"


@FILTERS.register("syllables", "has so many syllables, in every pronunciation", _PAPER)
@dataclass(frozen=True)
class Syllables(Filter):
    """Refuses a word of another count, and one whose count is disputed."""

    n: int

    def why(self, text: str) -> str | None:
        counts = sounds.syllables(text)
        told = " or ".join(map(str, counts))
        return None if counts == (self.n,) else f"has {told} syllable{'s' * (counts != (1,))}, not {self.n}"


@FILTERS.register("meter", "has a stress pattern: 1 stressed, 0 unstressed", _PAPER)
@dataclass(frozen=True)
class Meter(Filter):
    """Refuses a word of another stress, and one whose stress is not known."""

    pattern: str

    def why(self, text: str) -> str | None:
        found = sounds.stresses(text)
        if not found:
            return "has a stress that is not known"
        return None if self.pattern in found else f"has stress {' or '.join(found)}, not {self.pattern}"


@FILTERS.register("rhyme", "rhymes with a word", _PAPER)
@dataclass(frozen=True)
class Rhyme(Filter):
    """Refuses a word that does not rhyme; a word does not rhyme with itself."""

    word: str

    def why(self, text: str) -> str | None:
        if text == self.word:
            return f"is {self.word!r} itself"
        return None if sounds.rhymes(text) & sounds.rhymes(self.word) else f"does not rhyme with {self.word!r}"


@FILTERS.register("palindrome", "reads the same backwards", _PAPER)
@dataclass(frozen=True)
class Palindrome(Filter):
    """Refuses what is no palindrome."""

    def why(self, text: str) -> str | None:
        return None if text == text[::-1] else "is no palindrome"


@FILTERS.register("anagram", "has exactly the letters of a word", _PAPER)
@dataclass(frozen=True)
class Anagram(Filter):
    """Refuses a text of other letters."""

    word: str

    def why(self, text: str) -> str | None:
        return None if Counter(text) == Counter(self.word) else f"is no anagram of {self.word!r}"


@FILTERS.register("partial-anagram", "is made of letters of a word, none more often than there", _PAPER)
@dataclass(frozen=True)
class PartialAnagram(Filter):
    """Refuses a text that needs a letter too many."""

    word: str
    closed = True

    def why(self, text: str) -> str | None:
        over = Counter(text) - Counter(self.word)
        return f"needs {_listed(tuple(sorted(over)))} beyond the letters of {self.word!r}" if over else None

    def first(self) -> Hashable:
        return "".join(sorted(self.word))

    def step(self, state: Hashable, char: str) -> Hashable | None:
        left = str(state)
        return left.replace(char, "", 1) if char in left else None


@FILTERS.register("isogram", "has no letter twice", _PAPER)
@dataclass(frozen=True)
class Isogram(Filter):
    """Refuses a text with a repeated letter."""

    closed = True

    def why(self, text: str) -> str | None:
        twice = tuple(sorted(c for c, n in Counter(text).items() if n > 1))
        return f"has {_listed(twice)} more than once" if twice else None

    def first(self) -> Hashable:
        return frozenset()

    def step(self, state: Hashable, char: str) -> Hashable | None:
        assert isinstance(state, frozenset)
        return None if char in state else state | {char}


@FILTERS.register("reverse-isogram", "has a letter more than once", _PAPER)
@dataclass(frozen=True)
class ReverseIsogram(Filter):
    """Refuses an isogram."""

    def why(self, text: str) -> str | None:
        return None if len(set(text)) < len(text) else "has no letter more than once"
