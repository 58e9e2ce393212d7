"""The rule language: one rule a sentence, such as `no letter e`, `2 syllables a word`, `8 syllables`.

A rule is about every word (one of the 21 filters) or about every line (how many syllables or words, which meter, what
it rhymes with). `KNOWN` lists all of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from vesalius.apply.writing import filters as f
from vesalius.apply.writing.transforms import unaccent
from vesalius.errors import VesaliusError


@dataclass(frozen=True)
class LineRule:
    """What every line must have.

    Attributes:
        kind: syllables, words, meter or rhyme. n: how many. text: the pattern, or the word to rhyme with.
    """

    kind: str
    n: int = 0
    text: str = ""

    def says(self) -> str:
        """The rule as a reason tells it."""
        return {
            "syllables": f"a line has {self.n} syllables",
            "words": f"a line has {self.n} words",
            "meter": f"a line has the stresses {self.text}",
            "rhyme": f"a line rhymes with {self.text!r}",
        }[self.kind]


class Rules(NamedTuple):
    """Parsed rules: filters and line rules, with the sentences they came from."""

    words: tuple[tuple[str, f.Filter], ...]
    lines: tuple[tuple[str, LineRule], ...]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in (*self.words, *self.lines)]


class Form(NamedTuple):
    """One sentence of the language."""

    name: str
    pattern: re.Pattern[str]
    example: str
    about: str
    make: Callable[..., f.Filter | LineRule]


def _form(name: str, pattern: str, example: str, about: str, make: Callable[..., Any]) -> Form:
    return Form(name, re.compile(pattern, re.I), example, about, make)


def _word(text: str) -> str:
    return unaccent(text.strip().strip("'\"").lower())


def _strings(text: str) -> tuple[str, ...]:
    """`e, a` or `"e" "a"`; lower case, without accents."""
    quoted = re.findall(r"\"([^\"]+)\"", text)
    found = tuple(_word(s) for s in (quoted or re.split(r"\s*,\s*|\s+and\s+|\s+or\s+", text)) if s.strip())
    if not found or any(not s or re.search(r"\s", s) for s in found):
        raise VesaliusError(f"'{text}' is no list of strings without spaces; write them with commas between: e, ing")
    return found


def _letters(text: str) -> tuple[str, ...]:
    found = _strings(text)
    if any(len(s) != 1 for s in found):
        raise VesaliusError(f"'{text}' holds more than single letters; write 'no string {text}' to bar whole strings")
    return found


def _meter(text: str) -> LineRule:
    feet = {"iambic": "01", "trochaic": "10", "anapestic": "001", "dactylic": "100"}
    counts = {"dimeter": 2, "trimeter": 3, "tetrameter": 4, "pentameter": 5, "hexameter": 6}
    foot, _, count = text.lower().partition(" ")
    return LineRule("meter", text=feet[foot] * counts[count])


_W = r"([^\W\d_][\w'-]*)"
KNOWN: tuple[Form, ...] = (
    _form("any-banned", r"no letters? (.+)", "no letter e", "word", lambda s: f.AnyBanned(_letters(s))),
    _form("any-banned", r"no strings? (.+)", "no string ing, th", "word", lambda s: f.AnyBanned(_strings(s))),
    _form("all-banned", r"not all of (.+)", "not all of a, b", "word", lambda s: f.AllBanned(_strings(s))),
    _form("any-required", r"(?:has )?any of (.+)", "any of a, o", "word", lambda s: f.AnyRequired(_strings(s))),
    _form("all-required", r"(?:has )?all of (.+)", "all of a, n", "word", lambda s: f.AllRequired(_strings(s))),
    _form("string-at", r"letter (\d+) is (\S+)", "letter 2 is a", "word", lambda n, s: f.StringAt(_word(s), int(n))),
    _form("starts-with", r"starts with (\S+)", "starts with s", "word", lambda s: f.StartsWith(_word(s))),
    _form("ends-with", r"ends with (\S+)", "ends with ing", "word", lambda s: f.EndsWith(_word(s))),
    _form("edit-distance", rf"within (\d+) edits? of {_W}", "within 2 edits of house", "word",
          lambda n, w: f.EditDistance(_word(w), int(n))),
    _form("length", r"(\d+) letters", "4 letters", "word", lambda n: f.Length(int(n))),
    _form("longer", r"more than (\d+) letters", "more than 3 letters", "word", lambda n: f.Longer(int(n))),
    _form("shorter", r"fewer than (\d+) letters", "fewer than 6 letters", "word", lambda n: f.Shorter(int(n))),
    _form("sounds-like", rf"sounds like {_W}", "sounds like night", "word", lambda w: f.SoundsLike(_word(w))),
    _form("similar", rf"similar to {_W} by (0?\.\d+|1|0)", "similar to ocean by 0.4", "word",
          lambda w, x: f.Similar(_word(w), float(x), lambda text: None)),
    _form("syllables", r"(\d+) syllables? (?:a|per|each) word", "2 syllables a word", "word",
          lambda n: f.Syllables(int(n))),
    _form("meter", r"stress ([01]+) (?:a|per|each) word", "stress 10 a word", "word", lambda p: f.Meter(p)),
    _form("rhyme", rf"(?:each word )?rhymes with {_W}", "rhymes with day", "word", lambda w: f.Rhyme(_word(w))),
    _form("palindrome", r"palindromes?", "palindromes", "word", lambda: f.Palindrome()),
    _form("anagram", rf"anagrams? of {_W}", "anagrams of listen", "word", lambda w: f.Anagram(_word(w))),
    _form("partial-anagram", rf"letters of {_W}", "letters of notebooks", "word", lambda w: f.PartialAnagram(_word(w))),
    _form("isogram", r"isograms?", "isograms", "word", lambda: f.Isogram()),
    _form("reverse-isogram", r"no isograms?", "no isograms", "word", lambda: f.ReverseIsogram()),
    _form("syllables", r"(\d+) syllables?", "8 syllables", "line", lambda n: LineRule("syllables", int(n))),
    _form("words", r"(\d+) words?", "5 words", "line", lambda n: LineRule("words", int(n))),
    _form("meter", r"meter ([01]+)", "meter 01010101", "line", lambda p: LineRule("meter", text=p)),
    _form("meter", r"((?:iambic|trochaic|anapestic|dactylic) (?:di|tri|tetra|penta|hexa)meter)", "iambic tetrameter",
          "line", _meter),
    _form("rhyme", rf"line rhymes with {_W}", "line rhymes with day", "line",
          lambda w: LineRule("rhyme", text=_word(w))),
)  # fmt: skip


def known_rules() -> pd.DataFrame:
    """Rule (an example), about (every word, or every line), what, filter."""
    says = {"syllables": "so many syllables in all", "words": "so many words", "meter": "the stresses of its syllables",
            "rhyme": "its last word rhymes"}  # fmt: skip
    rows = [
        {
            "rule": k.example, "about": f"every {k.about}",
            "what": f.FILTERS.entry(k.name).summary if k.about == "word" else says[k.name],
            "filter": k.name if k.about == "word" else "",
        }
        for k in KNOWN
    ]  # fmt: skip
    return pd.DataFrame(rows)


def parse(sentences: Sequence[str], vectors: f.Vectors | None = None) -> Rules:
    """Rules from sentences.

    Args:
        sentences: one rule each. vectors: what `similar to WORD by X` compares; needed by that rule alone.

    Raises:
        VesaliusError: for a sentence that is none, with the nearest that is; or a value that cannot be.

    Example:
        >>> parse(["no letter e", "8 syllables"]).names
        ['no letter e', '8 syllables']
    """
    words: list[tuple[str, f.Filter]] = []
    lines: list[tuple[str, LineRule]] = []
    for sentence in sentences:
        made = _made(" ".join(sentence.split()))
        if isinstance(made, LineRule):
            if any(rule.kind == made.kind for _, rule in lines):
                raise VesaliusError(f"two rules give a line's {made.kind}: '{sentence}' is the second; leave out one")
            _line_check(made, sentence)
            lines.append((sentence, made))
            continue
        if isinstance(made, f.Similar):
            if vectors is None:
                raise VesaliusError(f"'{sentence}' compares vectors, and there are none here; give vectors=")
            made = f.Similar(made.word, made.least, vectors)
        if isinstance(made, (f.Length, f.Shorter, f.Syllables)) and made.n < 1 + isinstance(made, f.Shorter):
            raise VesaliusError(f"'{sentence}' leaves no word; raise the number")
        words.append((sentence, made))
    return Rules(tuple(words), tuple(lines))


def _made(sentence: str) -> f.Filter | LineRule:
    for form in KNOWN:
        found = form.pattern.fullmatch(sentence)
        if found:
            return form.make(*found.groups())
    near = difflib.get_close_matches(sentence.lower(), [k.example for k in KNOWN], 1, 0.5)
    hint = f"did you mean something like '{near[0]}'? " if near else ""
    raise VesaliusError(f"'{sentence}' is no rule; {hint}all are listed by `vesalius write --rules`")


def _line_check(rule: LineRule, sentence: str) -> None:
    from vesalius.apply.writing import sounds

    if rule.kind in ("syllables", "words") and rule.n < 1:
        raise VesaliusError(f"'{sentence}' leaves no line; give 1 or more")
    if rule.kind == "rhyme" and not sounds.rhymes(rule.text):
        raise VesaliusError(f"'{rule.text}' is not in the pronouncing dictionary, so nothing is known to rhyme with it")
