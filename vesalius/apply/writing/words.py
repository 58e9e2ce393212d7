"""Word mode: a token may come if the word it leaves unfinished can still become an accepted word.

Text is read character by character. Letters, digits and apostrophes inside words make words; everything else stands
between them. Under closed filters alone (see `filters`) any spelling may be written that every filter accepts so far.
With any other filter, or a rule about lines, words come from a lexicon (the pronouncing dictionary, or a list), of
which those stay that all filters accept and whose letters all are tokens of their own: from every beginning of such
a word tokens go on to its end, so dead ends are impossible. A token of several characters is legal if each of them is.

What was written before the rules began is not judged; if it ends within a word, that word is ended first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vesalius.apply.writing import sounds
from vesalius.apply.writing.filters import AnyBanned
from vesalius.apply.writing.language import Rules
from vesalius.apply.writing.lexicon import Kind, Lines, Trie, kind_of
from vesalius.apply.writing.pieces import Pieces
from vesalius.apply.writing.transforms import folded
from vesalius.errors import VesaliusError
from vesalius.model.stack import Rule

GAP = 3  # characters between two words, where lines are counted: without a limit a model may write full stops for ever
LINE_END = "\n"
_MARKS = "'\u2019"


class State(NamedTuple):
    """Where a text is.

    Attributes:
        bans: states of the banned strings, which are looked for in all text.
        inside: states of the other closed filters within the word; None between words.
        node: of the lexicon's trie; 0 between words. line: state of the line. lines: whole lines behind.
        gap: characters since the last word. old: within the word that the prompt ended in.
    """

    bans: tuple[Hashable, ...]
    inside: tuple[Hashable, ...] | None
    node: int
    line: tuple[int, int, bool]
    lines: int
    gap: int
    old: bool


class Spelling:
    """The automaton over characters.

    Args:
        rules: what words and lines must be. words: the lexicon, in lower case; the pronouncing dictionary if None.
        alphabet: characters that are tokens of their own. lines: how many are wanted, where rules are about lines.
        accents: whether an accented letter is another letter.

    Attributes:
        lexicon: the trie; None where any spelling may be written. dropped: words of the lexicon left out, by reason.

    Raises:
        VesaliusError: if no word or no line is left.
    """

    def __init__(
        self,
        rules: Rules,
        words: Iterable[str] | None = None,
        alphabet: Callable[[str], bool] = lambda c: True,
        lines: int = 1,
        accents: bool = False,
    ) -> None:
        self.rules, self.lines, self.accents = rules, lines, accents
        self.bans = tuple(f for _, f in rules.words if isinstance(f, AnyBanned))
        self.closed = tuple(f for _, f in rules.words if f.closed and not isinstance(f, AnyBanned))
        self.lexicon: Trie | None = None
        self.order: Lines | None = None
        self.dropped = {"refused by a filter": 0, "sound unknown or disputed": 0, "a letter is no token": 0}
        if words is not None or rules.lines or not all(f.closed for _, f in rules.words):
            self.lexicon = Trie(self._accepted(sounds.dictionary() if words is None else words, alphabet))
            if not self.lexicon.count:
                told = " and ".join(f"'{n}'" for n in rules.names)
                raise VesaliusError(f"no word of the lexicon keeps {told}; loosen a rule, or give other --words")
            if rules.lines:
                self.order = Lines([r for _, r in rules.lines], self.lexicon.kinds)

    def _accepted(self, words: Iterable[str], alphabet: Callable[[str], bool]) -> Iterable[tuple[str, Kind]]:
        asked = [r for _, r in self.rules.lines]
        filters = [f for _, f in self.rules.words]
        for word in words:
            kind = None
            if not all(alphabet(c) for c in word):
                self.dropped["a letter is no token"] += 1
            elif any(f.why(word) for f in filters):
                self.dropped["refused by a filter"] += 1
            elif (kind := kind_of(word, asked)) is None:
                self.dropped["sound unknown or disputed"] += 1
            if kind is not None:
                yield word, kind

    # -- reading

    def start(self, before: str) -> State:
        """The state after a text that is not judged."""
        old = bool(before) and before[-1].isalnum()
        return State(tuple(b.first() for b in self.bans), None, 0, Lines.start, 0, 0, old)

    def read(self, state: State, text: str) -> State | None:
        """The state after some more text; None if it may not be written."""
        for char in text:
            after = self.step(state, char)
            if after is None:
                return None
            state = after
        return state

    def step(self, state: State, char: str) -> State | None:
        """The state after one more character; None if it may not be written."""
        if self.done(state):
            return None
        bans = state.bans
        for letter in folded(char, self.accents):
            found = [b.step(s, letter) for b, s in zip(self.bans, bans, strict=True)]
            if None in found:
                return None
            bans = tuple(found)
        if state.old:
            if char in _MARKS or self._belongs(state, char):
                return None
            return state._replace(bans=bans, old=False, gap=1)
        if self._belongs(state, char):
            return self._letter(state._replace(bans=bans), char)
        return self._between(state._replace(bans=bans), char)

    def _belongs(self, state: State, char: str) -> bool:
        """Whether a character is part of a word here."""
        if char.isalnum() or (self.lexicon is None and not folded(char, self.accents)):  # a combining mark
            return True
        if char not in _MARKS:
            return False
        if self.lexicon is not None:
            return "'" in self.lexicon.children[state.node] if state.node else False
        return state.inside is not None

    def _letter(self, state: State, char: str) -> State | None:
        letters = "'" if char in _MARKS else folded(char, self.accents)
        if self.lexicon is None:
            inside = state.inside if state.inside is not None else tuple(f.first() for f in self.closed)
            for letter in letters:
                found = [f.step(s, letter) for f, s in zip(self.closed, inside, strict=True)]
                if None in found:
                    return None
                inside = tuple(found)
            return state._replace(inside=inside, gap=0)
        node = state.node
        for letter in letters:
            node = self.lexicon.children[node].get(letter, 0)
            if not node:
                return None
        if self.order is not None and not self.lexicon.below[node] & self.order.allowed[state.line]:
            return None
        return state._replace(node=node, gap=0)

    def _between(self, state: State, char: str) -> State | None:
        now = self._closed(state)
        if state.node and char in _MARKS:  # a word goes on or ends; what follows its apostrophe is no word
            return None
        if now is None or self.order is None:
            return now
        if char == LINE_END:
            if not self.order.finished(now.line):
                return None
            return now._replace(line=Lines.start, lines=now.lines + 1, gap=0)
        if now.gap >= GAP or (char.isspace() and self.order.over(now.line)):
            return None
        now = now._replace(gap=now.gap + 1)
        if self.order.over(now.line) and now.lines + 1 >= self.lines:
            return now._replace(lines=now.lines + 1)  # the last line, and its last mark
        return now

    def _closed(self, state: State) -> State | None:
        """The state between words, if the word may end here."""
        if self.lexicon is None:
            return state._replace(inside=None)
        if not state.node:
            return state
        kind = self.lexicon.ends[state.node]
        if kind < 0:
            return None
        if self.order is None:
            return state._replace(node=0)
        line = self.order.move(state.line, kind)
        return None if line is None else state._replace(node=0, line=line)

    def may_end(self, state: State) -> bool:
        """Whether the text may end here."""
        now = self._closed(state)
        if now is None or state.old:
            return now is not None
        if self.order is None:
            return True
        return now.lines >= self.lines or (now.lines + 1 == self.lines and self.order.finished(now.line))

    def done(self, state: State) -> bool:
        """Whether all lines that were wanted are written."""
        return self.order is not None and state.lines >= self.lines

    def in_word(self, state: State) -> bool:
        """Whether a word is unfinished."""
        return bool(state.node) or state.inside is not None

    # -- reasons

    def why(self, state: State, text: str, word: str) -> str:
        """Why a text may not follow; `word` is what the unfinished word has so far."""
        bare = text.lstrip()
        if self.lexicon is not None and bare and all(c.isalnum() for c in bare) and not state.old:
            whole = bare if bare != text else word + bare  # a filter's own words tell more than the first dead letter
            refused = self._refused("".join(folded(c, self.accents) for c in whole))
            if refused and (bare == text or self.read(state, " ") is not None):
                return f"{whole!r} {refused}"
        for char in text:
            now = self.step(state, char)
            if now is None:
                return self._reason(state, char, word)
            word = word + char if self.in_word(now) else ""
            state = now
        return "barred"

    def _reason(self, state: State, char: str, word: str) -> str:
        if self.done(state):
            return "all lines are written"
        for ban, at in zip(self.bans, state.bans, strict=True):
            now: Hashable | None = at
            for letter in folded(char, self.accents):
                now = None if now is None else ban.step(now, letter)
            if now is None:
                hit = [s for s in ban.strings if f"{at}{''.join(folded(char, self.accents))}".endswith(s)]
                return f"has {', '.join(map(repr, hit))}"
        if state.old:
            return "goes on with the last word of what was given, which is not judged; begin with a space"
        if self._belongs(state, char):
            return self._no_letter(state, word + char)
        return self._no_end(state, char, word)

    def _no_letter(self, state: State, word: str) -> str:
        plain = "".join(folded(c, self.accents) for c in word)
        if self.lexicon is None:
            told = (f.why(plain) for f in self.closed)
            return f"{word!r} {next((t for t in told if t), 'is refused')}"
        node = 0
        for letter in plain:
            node = self.lexicon.children[node].get(letter, -1)
            if node < 0:
                refused = self._refused(plain)
                return f"{word!r} {refused}" if refused else f"no accepted word begins with {word!r}"
        assert self.order is not None
        return f"every word that begins with {word!r} {self._line_says(state, node)}"

    def _no_end(self, state: State, char: str, word: str) -> str:
        plain = "".join(folded(c, self.accents) for c in word)
        if self.lexicon is not None and state.node:
            kind = self.lexicon.ends[state.node]
            if kind < 0:
                return f"{word!r} {self._refused(plain) or 'is no word yet'}"
            if char in _MARKS:
                return f"no accepted word begins with {word + char!r}"
            assert self.order is not None
            if self.order.move(state.line, kind) is None:
                return f"{word!r} {self.order.left(state.line, self.lexicon.kinds[kind])}"
        assert self.order is not None
        now = self._closed(state)
        if char == LINE_END:
            return f"the line is not finished: {' and '.join(r.says() for r in self.order.rules)}"
        if now is not None and self.order.over(now.line):
            return "the line is full: a mark or a new line must follow"
        return f"more than {GAP} characters between two words"

    def _refused(self, word: str) -> str | None:
        """What a filter says against a whole word."""
        return next((w for _, f in self.rules.words if (w := f.why(word))), None)

    def _line_says(self, state: State, node: int) -> str:
        assert self.lexicon is not None and self.order is not None
        kinds = [k for i, k in enumerate(self.lexicon.kinds) if self.lexicon.below[node] >> i & 1]
        return self.order.left(state.line, min(kinds, key=lambda k: k.syllables))


class WordRule(Rule):
    """Word mode as a rule of the decoding stack.

    Args:
        spelling: the automaton. vocabulary: the tokens' texts.
    """

    name = "words"

    def __init__(self, spelling: Spelling, vocabulary: Pieces) -> None:
        self.spelling, self.vocabulary = spelling, vocabulary
        self.children: list[dict[str, int]] = [{}]  # the trie of the tokens' texts
        self.tokens: list[list[int]] = [[]]
        for token, text in enumerate(vocabulary.texts):
            node = 0
            for char in text or "":
                known = self.children[node].get(char)
                if known is None:
                    known = self.children[node][char] = len(self.children)
                    self.children.append({})
                    self.tokens.append([])
                node = known
            if text:
                self.tokens[node].append(token)
        self._masks: dict[State, Tensor] = {}
        self._below: dict[tuple[int, State], list[int]] = {}

    def start(self, prompt: Any) -> Hashable:
        """Judging begins after the prompt."""
        return (self.spelling.start(self.vocabulary.text(prompt[-8:])), "")

    def advance(self, state: Any, token: int) -> Hashable:
        """The state after a token; the word so far is kept for reasons."""
        now, word = state
        for char in self.vocabulary.texts[token] or "":
            after = self.spelling.step(now, char)
            if after is None:  # written in spite of the rule: judged from here on
                return (self.spelling.start(char), "")
            word = word + char if self.spelling.in_word(after) else ""
            now = after
        return (now, word)

    def barred(self, state: Any) -> Tensor:
        """Everything but the tokens whose characters may all be written, and the end where the text may end."""
        now = state[0]
        if now not in self._masks:
            mask = torch.ones(len(self.vocabulary), dtype=torch.bool)
            mask[self._legal(0, now)] = False
            if self.spelling.may_end(now):
                mask[list(self.vocabulary.ends)] = False
            if len(self._masks) >= 512:
                self._masks.pop(next(iter(self._masks)))
            self._masks[now] = mask
        return self._masks[now]

    def _legal(self, at: int, state: State) -> list[int]:
        """Tokens below a node of the tokens' trie that may be written, in this state."""
        found: list[int] = []
        todo = [(at, state)]
        while todo:
            node, now = todo.pop()
            for char, child in self.children[node].items():
                after = self.spelling.step(now, char)
                if after is None:
                    continue
                found.extend(self.tokens[child])
                if not self.children[child]:
                    continue
                if self.spelling.in_word(after) or after.old:
                    todo.append((child, after))
                else:  # between words, what may follow does not depend on the word before
                    key = (child, after)
                    if key not in self._below:
                        self._below[key] = self._legal(child, after)
                    found.extend(self._below[key])
        return found

    def ended(self, state: Any) -> bool:
        """Whether all lines that were wanted are written."""
        return self.spelling.done(state[0])

    def reason(self, state: Any, token: int) -> str:
        """Which character may not be written, and why."""
        now, word = state
        text = self.vocabulary.texts[token]
        if token in self.vocabulary.ends:
            if self.spelling.in_word(now) and self.spelling._closed(now) is None:
                return self.spelling.why(now, " ", word)
            return "the lines are not finished"
        if text is None:
            return self.vocabulary.none(token)
        return self.spelling.why(now, text, word)
