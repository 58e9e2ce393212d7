"""Multiple-choice questions: drawn from lists, or a user's; and the prompts they become.

    Which of these is an animal?
    A: hammer
    B: cat
    C: train
    D: piano
    Answer:

The right option is placed uniformly at random, or anywhere but at A (`anchored`), as in Li and Gao, "Anchored Answers",
arXiv 2405.03205.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vesalius.errors import TaskError, UnknownName
from vesalius.rows import is_text, jsonl_rows
from vesalius.tasks.facts import relations
from vesalius.tasks.words import lines

LETTERS = "ABCDE"
SOURCES = ("kinds", "capital", "all")


@dataclass(frozen=True)
class Choice:
    """One question.

    Attributes:
        question: its text. options: what to choose from, in the order shown. right: index of the right one.
        about: a label to split results by.
    """

    question: str
    options: tuple[str, ...]
    right: int
    about: str = ""

    @property
    def prompt(self) -> str:
        """The text up to where the letter follows after a space."""
        shown = [f"{LETTERS[i]}: {option}" for i, option in enumerate(self.options)]
        return "\n".join([self.question, *shown, "Answer:"])

    @property
    def open(self) -> str:
        """The question without its options, to which an option's own words are an answer."""
        return f"{self.question}\nAnswer:"

    def placed(self, place: int) -> Choice:
        """The same with the right option at a place; the others keep their order."""
        rest = [o for i, o in enumerate(self.options) if i != self.right]
        rest.insert(place, self.options[self.right])
        return replace(self, options=tuple(rest), right=place)


def draw(n: int, source: str = "all", choices: int = 4, seed: int = 0, anchored: bool = False) -> list[Choice]:
    """Different questions from lists, the right option balanced over places.

    Args:
        n: how many. source: `kinds` ("Which of these is a fruit?"), `capital`, or `all` for both. choices: 2 to 5.
        seed: of the drawing. anchored: the right option is never at A.

    Raises:
        TaskError: if there are not so many.
    """
    if source not in SOURCES:
        raise UnknownName("source of questions", source, SOURCES)
    if not 2 <= choices <= len(LETTERS):
        raise TaskError(f"{choices} choices are not possible; give 2 to {len(LETTERS)}")
    rng = random.Random(f"choice/{seed}")
    pool = [
        *(_kinds(rng, choices) if source != "capital" else ()),
        *(_capitals(rng, choices) if source != "kinds" else ()),
    ]
    if not 1 <= n <= len(pool):
        raise TaskError(f"{n} questions were asked for, and '{source}' has {len(pool)}; give 1 to {len(pool)}")
    rng.shuffle(pool)
    return place(pool[:n], rng, anchored)


def place(questions: Sequence[Choice], rng: random.Random, anchored: bool = False) -> list[Choice]:
    """Right options at every place once in each run of as many questions as places, in random order."""
    found: list[Choice] = []
    order: list[int] = []
    for q in questions:
        if not order or max(order) >= len(q.options):
            order = list(range(int(anchored), len(q.options)))
            rng.shuffle(order)
        found.append(q.placed(order.pop()))
    return found


def _kinds(rng: random.Random, choices: int) -> list[Choice]:
    kinds = {k: words.split() for k, _, words in (line.partition(": ") for line in lines("kinds"))}
    found = []
    for kind, words in kinds.items():
        article = "an" if kind[0] in "aeiou" else "a"
        asked = f"Which of these is {article} {kind}?"
        asked = {"weather": "Which of these is a kind of weather?", "clothing": "Which of these is worn?"}.get(
            kind, asked
        )
        for word in words:
            others = rng.sample([k for k in kinds if k != kind], choices - 1)
            found.append(Choice(asked, (word, *(rng.choice(kinds[k]) for k in others)), 0, kind))
    return found


def _capitals(rng: random.Random, choices: int) -> list[Choice]:
    answers = relations()["capital"].answers
    return [
        Choice(
            f"What is the capital of {country}?",
            (city, *rng.sample([c for c in answers.values() if c != city], choices - 1)),
            0,
            "capital",
        )
        for country, city in answers.items()
    ]


FORM = '{"question", "options", "answer"}'


def read(path: Path | str) -> list[Choice]:
    """A user's questions: .jsonl lines {"question", "options", "answer"}; the answer is a letter or an option."""
    path, found = Path(path), []
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from None
    for number, row in jsonl_rows(str(path), text, TaskError, FORM):
        given: Any = row.get("options")
        texts: list[Any] = [row.get("question"), row.get("answer"), *given] if isinstance(given, list) else []
        if not texts or not all(isinstance(t, str) and t.strip() and is_text(t) for t in texts):
            raise TaskError(f"{path} line {number} is no {FORM}: a text, texts, and one of them or its letter")
        question, answer, *given = texts
        options = tuple(given)
        if len(set(options)) < len(options):
            raise TaskError(f"{path} line {number} offers an option twice; give different ones")
        if not 2 <= len(options) <= len(LETTERS):
            raise TaskError(f"{path} line {number} has {len(options)} options; 2 to {len(LETTERS)} can be asked")
        right = options.index(answer) if answer in options else LETTERS.find(answer) if len(answer) == 1 else -1
        if not 0 <= right < len(options):
            raise TaskError(f"{path} line {number}: the answer {answer!r} is none of its options, nor their letter")
        found.append(Choice(question, options, right, path.stem))
    if not found:
        raise TaskError(f"{path} holds no questions")
    return found
