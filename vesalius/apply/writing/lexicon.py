"""Words that may be written, as a trie that looks ahead: which kinds of word can still come of a beginning.

A kind is what lines ask of a word: its syllables, its stress, whether it rhymes. Kinds are few; a set of them is the
bits of a whole number. Each node of the trie holds the kinds of the words below it, so that a beginning is alive for a
line exactly if its kinds meet those that the line can take next.

A line is a finite automaton over kinds (`Lines`): states are what was used up, and a kind may come next only if a
finished line can be reached after it, over words that exist. So neither a word nor a line can run into a dead end.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from vesalius.apply.writing import sounds
from vesalius.apply.writing.language import LineRule
from vesalius.errors import VesaliusError


class Kind(NamedTuple):
    """What a line asks of a word."""

    syllables: int = 0
    stress: str = ""  # of longer words; "x" for one syllable, which fits both
    rhymes: bool = False


def kind_of(word: str, rules: Sequence[LineRule]) -> Kind | None:
    """A word's kind under some rules; None if it cannot be in any line (unknown or disputed sound)."""
    asked = {r.kind for r in rules}
    syllables, stress, rhymes = 0, "", False
    if asked & {"syllables", "meter"}:
        counts = sounds.syllables(word)
        if len(counts) > 1 or not counts[0]:
            return None
        syllables = counts[0]
    if "meter" in asked:
        found = sounds.stresses(word)
        if not found:
            return None
        stress = "x" if syllables == 1 else found[0]
    for rule in rules:
        if rule.kind == "rhyme":
            rhymes = word != rule.text and bool(sounds.rhymes(word) & sounds.rhymes(rule.text))
    return Kind(syllables, stress, rhymes)


class Trie:
    """Words by their letters; node 0 is the empty beginning.

    Attributes:
        children: (node) letter -> node. ends: (node) the kind of the word that ends here, or -1.
        below: (node) kinds of the words at or below, as bits. kinds: what the numbers mean.
    """

    def __init__(self, words: Iterable[tuple[str, Kind]]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.ends: list[int] = [-1]
        self.kinds: list[Kind] = []
        self.count = 0
        numbers: dict[Kind, int] = {}
        for word, kind in words:
            number = numbers.setdefault(kind, len(numbers))
            node = 0
            for letter in word:
                known = self.children[node].get(letter)
                if known is None:
                    known = len(self.children)
                    self.children[node][letter] = known
                    self.children.append({})
                    self.ends.append(-1)
                node = known
            self.count += self.ends[node] < 0
            self.ends[node] = number
        self.kinds = list(numbers)
        self.below = [0 if e < 0 else 1 << e for e in self.ends]
        for node in range(len(self.children) - 1, -1, -1):  # children come after their parents
            for child in self.children[node].values():
                self.below[node] |= self.below[child]


class Lines:
    """The line rules over the kinds of a lexicon.

    A state is (syllables, words, whether the last word rhymes) as far as a rule asks.

    Raises:
        VesaliusError: if no line of these words keeps all rules.
    """

    start: tuple[int, int, bool] = (0, 0, False)

    def __init__(self, rules: Sequence[LineRule], kinds: Sequence[Kind]) -> None:
        self.rules, self.kinds = tuple(rules), tuple(kinds)
        self.by = {r.kind: r for r in rules}
        self._next: dict[Hashable, dict[int, tuple[int, int, bool]]] = {}
        todo = [self.start]
        while todo:
            state = todo.pop()
            if state in self._next:
                continue
            moves = {i: s for i, k in enumerate(kinds) if (s := self._move(state, k)) is not None}
            self._next[state] = moves
            todo.extend(moves.values())
        alive = {s for s in self._next if self._full(s)}  # type: ignore[arg-type]
        grown = True
        while grown:
            more = {s for s, moves in self._next.items() if s not in alive and alive & set(moves.values())}
            alive |= more
            grown = bool(more)
        if self.start not in alive:
            raise VesaliusError(
                f"no line of the words that are left keeps the rule that {' and '.join(r.says() for r in rules)}; "
                "drop or loosen a rule"
            )
        self.allowed = {s: sum(1 << i for i, t in moves.items() if t in alive) for s, moves in self._next.items()}

    def _move(self, state: tuple[int, int, bool], kind: Kind) -> tuple[int, int, bool] | None:
        syllables, words, _ = state
        meter = self.by["meter"].text if "meter" in self.by else None
        if meter is not None:
            there = meter[syllables : syllables + kind.syllables]
            if len(there) < kind.syllables or (kind.stress != "x" and kind.stress != there):
                return None
        if {"syllables", "meter"} & set(self.by):
            syllables += kind.syllables
            if "syllables" in self.by and syllables > self.by["syllables"].n:
                return None
        if "words" in self.by:
            words += 1
            if words > self.by["words"].n:
                return None
        return (syllables, words, kind.rhymes if "rhyme" in self.by else False)

    def move(self, state: tuple[int, int, bool], kind: int) -> tuple[int, int, bool] | None:
        """The state after a word of that kind; None if no finished line can follow."""
        return self._next[state][kind] if self.allowed[state] >> kind & 1 else None

    def _full(self, state: tuple[int, int, bool]) -> bool:
        syllables, words, rhymed = state
        asked = self.by
        return (
            ("syllables" not in asked or syllables == asked["syllables"].n)
            and ("meter" not in asked or syllables == len(asked["meter"].text))
            and ("words" not in asked or words == asked["words"].n)
            and ("rhyme" not in asked or rhymed)
        )

    def finished(self, state: tuple[int, int, bool]) -> bool:
        """Whether a line may end here."""
        return self._full(state)

    def over(self, state: tuple[int, int, bool]) -> bool:
        """Whether it must end here: no word fits any more."""
        return not self.allowed[state]

    def left(self, state: tuple[int, int, bool], kind: Kind) -> str:
        """Why a word of that kind cannot come here."""
        if "syllables" in self.by and kind.syllables > (room := self.by["syllables"].n - state[0]):
            return f"has {kind.syllables} syllables, and the line has room for {room}"
        if "meter" in self.by:
            return f"has stress {kind.stress}, and the line goes on {self.by['meter'].text[state[0] :] or 'no more'}"
        return f"leaves no way to a finished line ({' and '.join(r.says() for r in self.rules)})"
