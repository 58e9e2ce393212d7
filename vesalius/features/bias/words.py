"""Word sets of the audit: association tests, gendered words, prompts; and a lemmatiser kept plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vesalius.errors import UnknownName, VesaliusError


@cache
def _data(name: str) -> dict[str, Any]:
    path = resources.files("vesalius.features") / "data" / "bias" / f"{name}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return found


@dataclass(frozen=True)
class WordSet:
    """Words that belong together, and how they stand in a sentence (`kind`, a key of `sentences`)."""

    name: str
    words: tuple[str, ...]
    kind: str = "mixed"


@dataclass(frozen=True)
class Test:
    """An association test: are targets x closer to attributes a, and targets y to b, than the other way round?"""

    __test__ = False  # not a test of pytest's

    name: str
    what: str
    x: WordSet
    y: WordSet
    a: WordSet
    b: WordSet

    def __post_init__(self) -> None:
        for it in (self.x, self.y, self.a, self.b):
            if len(it.words) < 2:
                raise VesaliusError(
                    f"test {self.name}: set '{it.name}' has {len(it.words)} words; 2 or more are needed"
                )
        both = sorted(set(self.x.words) & set(self.y.words))
        if both:
            raise VesaliusError(f"test {self.name}: '{both[0]}' is in both '{self.x.name}' and '{self.y.name}'")


def tests(path: Path | str | None = None) -> dict[str, Test]:
    """The published tests by number, or those of a user's `.yaml` file of the same form (`sets`, `tests`).

    Raises:
        VesaliusError: for a file that cannot be used.

    Example:
        >>> tests()["6"].what
        'male and female names by career and family'
    """
    found = _data("weat") if path is None else _own(Path(path))
    sets = {}
    for name, entry in found["sets"].items():
        words = entry["words"] if isinstance(entry, Mapping) else entry
        kind = str(entry.get("kind", "mixed")) if isinstance(entry, Mapping) else "mixed"
        if kind not in sentences():
            raise UnknownName("kind of word", kind, sentences())
        sets[name] = WordSet(name, tuple(words.split() if isinstance(words, str) else map(str, words)), kind)
    made = {}
    for name, entry in found["tests"].items():
        for side in "xyab":
            if entry.get(side) not in sets:
                raise UnknownName(f"word set of test {name}", str(entry.get(side)), sets)
        made[str(name)] = Test(str(name), str(entry.get("what", "")), *(sets[entry[side]] for side in "xyab"))
    return made


def _own(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise VesaliusError(f"no file {path}; check the path") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VesaliusError(
            f"{path} is not a YAML file that can be read: {' '.join(str(error).split())[:120]}"
        ) from None
    for key in ("sets", "tests"):
        if not isinstance(found, dict) or not isinstance(found.get(key), dict) or not found[key]:
            raise VesaliusError(
                f"{path} has no '{key}'; write sets: {{NAME: [words]}} and tests: {{NAME: {{x, y, a, b}}}}"
            )
    return found


def sentences() -> dict[str, list[str]]:
    """Bland sentences by kind of word, with `{w}` and, where it takes one, its article `{a}`."""
    found: dict[str, list[str]] = _data("weat")["sentences"]
    return found


def article(word: str) -> str:
    """`a` or `an`, by the first letter.

    Example:
        >>> article("engineer"), article("tulip")
        ('an', 'a')
    """
    return "an" if word[:1].lower() in "aeiou" else "a"


def bland(words: WordSet) -> dict[str, list[str]]:
    """For each word of a set its sentences.

    Example:
        >>> bland(WordSet("plants", ("iris",), "thing"))["iris"][0]
        'This is an iris.'
    """
    return {w: [s.format(w=w, a=article(w)) for s in sentences()[words.kind]] for w in words.words}


@dataclass(frozen=True)
class Gendered:
    """Words of two groups, by default male and female ones."""

    male: frozenset[str]
    female: frozenset[str]

    @classmethod
    def default(cls) -> Gendered:
        found = _data("gender")
        return cls(frozenset(found["male"].split()), frozenset(found["female"].split()))

    def lean(self, words: Sequence[str]) -> tuple[int, int]:
        """How many female and how many male words there are among these (lower case)."""
        return sum(w in self.female for w in words), sum(w in self.male for w in words)


def suggestions() -> dict[str, list[str]]:
    """Prompt templates by kind (`neutral`, `female`, `male`, `pronoun`), and `occupations`."""
    found = dict(_data("suggestions"))
    found["occupations"] = found["occupations"].split()
    return found


def plain_lemma(word: str) -> str:
    """The singular of an English plural in -s, -es or -ies; every other word as it is.

    A dictionary would do better; what matters here is that it is the same in every corpus.

    Example:
        >>> [plain_lemma(w) for w in ("cities", "boxes", "cars", "bus", "glass", "is")]
        ['city', 'box', 'car', 'bus', 'glass', 'is']
    """
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
