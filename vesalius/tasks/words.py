"""Word lists, and the text helpers that generators share.

The lists are data files (`data/*.txt`): words separated by blanks or line ends, or, for templates and pairs, one entry
a line; lines that begin with `#` are remarks. `Words` filters them by what the opened model's tokenizer does with them,
so that every prompt made from one template has the same number of tokens.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from vesalius.errors import TaskError, UnknownName
from vesalius.tasks.encode import Encoder

Span = tuple[int, int]


def _known() -> list[str]:
    folder = resources.files("vesalius.tasks") / "data"
    return sorted(p.name.removesuffix(".txt") for p in folder.iterdir() if p.name.endswith(".txt"))


def lines(name: str) -> list[str]:
    """The entries of a data file that holds one entry a line (templates, pairs), in file order."""
    path = resources.files("vesalius.tasks") / "data" / f"{name}.txt"
    if not path.is_file():
        raise UnknownName("word list", name, _known())
    text = path.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def wordlist(name: str) -> list[str]:
    """All words of a list in file order, whatever the tokenizer.

    Example:
        >>> wordlist("days")[:2]
        ['Monday', 'Tuesday']
    """
    return [word for line in lines(name) for word in line.split()]


@dataclass(frozen=True)
class Filled:
    """A template filled in, and where each field came to stand (character spans)."""

    text: str
    spans: dict[str, Span]


def fill(template: str, **values: object) -> Filled:
    """Fills `{field}`s and remembers where each one stands; a field used twice keeps its last place.

    Example:
        >>> fill("{a} and {b}", a="Tom", b="Ann")
        Filled(text='Tom and Ann', spans={'a': (0, 3), 'b': (8, 11)})
    """
    text, spans = "", {}
    for literal, key, _, _ in string.Formatter().parse(template):
        text += literal
        if key is not None:
            spans[key] = (len(text), len(text) + len(str(values[key])))
            text += str(values[key])
    return Filled(text, spans)


def token_after(text: str, span: Span) -> Span:
    """The span of the beginning of the token that follows `span`: the next character, past one space."""
    end = span[1]
    return end, end + (2 if text[end : end + 1] == " " else 1)


class Words:
    """Word lists seen through one tokenizer; what every generator is given.

    Args:
        encoder: the tokenizer, wrapped.

    Attributes:
        notes: what a generator wants the reader of the task to know (a form chosen for this tokenizer, say).
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.notes: list[str] = []

    def __call__(self, name: str, least: int = 1) -> list[str]:
        """The words of a list that are one token after a space, in file order.

        Args:
            name: the list, a file of `data/` without its ending.
            least: how many the caller cannot do without.

        Raises:
            TaskError: fewer than `least` words remain.
        """
        return self.single(wordlist(name), least, f"the word list '{name}'")

    def single(self, candidates: Sequence[str], least: int = 1, what: str = "the candidates") -> list[str]:
        """Those candidates that are one token after a space, in order; `what` names them in the error."""
        self.encoder.prime([f"the {word}" for word in candidates])
        good = [word for word in candidates if self.length(word) == 1 and self._known(word)]
        if len(good) < least:
            bad = next((w for w in candidates if w not in good), "")
            pieces = self.encoder.show(self.encoder.ids(f"the {bad}")[len(self.encoder.ids("the")) :]) if bad else "[]"
            raise TaskError(
                f"only {len(good)} of {len(candidates)} words of {what} are single tokens in this model's vocabulary "
                f"('{bad}' is {pieces}), and this task needs {least}; choose another task or model, or give your own "
                "prompts as a .jsonl file"
            )
        return good

    def _known(self, word: str) -> bool:
        """Whether the word's token is the word's own, and not the one for anything unknown."""
        shown = self.encoder.tokenizer.decode(list(self.encoder.beyond("the", f" {word}") or ()))
        return str(shown).strip().casefold() == word.casefold()

    def vocabulary(self, least: int = 1) -> list[str]:
        """Words of small letters, three or more, that the tokenizer's own vocabulary holds as one token after a space.

        For models whose vocabulary is too small, or too special, for the lists.

        Raises:
            TaskError: fewer than `least` of them.
        """
        tokens = self.encoder.tokenizer.get_vocab()
        texts = sorted({t.lstrip("Ġ▁") for t in tokens if t[:1] in ("Ġ", "▁")})
        plain = [t for t in texts if len(t) >= 3 and t.isalpha() and t.islower() and t.isascii()]
        return self.single(plain, least, "the tokenizer's own words")

    def length(self, word: str) -> int:
        """Number of tokens of a word after a space; 0 where the space and the word cannot be told from their left."""
        return len(self.encoder.beyond("the", f" {word}") or ())

    def is_single(self, prompt: str, answer: str) -> bool:
        """Whether `answer` right after `prompt` is exactly one more token."""
        return len(self.encoder.beyond(prompt, answer) or ()) == 1

    def note(self, text: str) -> None:
        """Adds a line to what the task says about itself."""
        if text not in self.notes:
            self.notes.append(text)
