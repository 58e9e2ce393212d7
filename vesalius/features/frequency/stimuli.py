"""Stimuli: sentences of one length, and what must be told apart from their structure.

A stream is sentences one after another without punctuation, so that nothing but their structure marks where one ends.
Its controls keep the words and lose something else:

    shuffled     words inside each sentence in another order, no word followed by the word that followed it before
    exchanged    the word at each place comes from the same place of another sentence: the same parts of speech in the
                 same order, and no phrase that anybody wrote
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import yaml

from vesalius.errors import UnknownName, VesaliusError

Sentence = tuple[str, ...]
CONTROLS = ("shuffled", "exchanged")
_PUNCTUATION = re.compile(r"[^\w\s'’-]|(?<!\w)['’-]|['’-](?!\w)|_")
_END = re.compile(r"(?<=[.!?;:])[\"'”’)]*\s+")


@cache
def _lists() -> dict[str, list[str]]:
    text = (resources.files("vesalius.features") / "data" / "frequency.yaml").read_text("utf-8")
    return {name: words.split() for name, words in yaml.safe_load(text).items()}


def made_sentences(n: int = 64, seed: int = 0) -> list[Sentence]:
    """Sentences "adjective noun verb noun" from word lists of our own; no word stands twice.

    Raises:
        VesaliusError: for more sentences than there are words.

    Example:
        >>> len(made_sentences(60)), len({w for s in made_sentences(60) for w in s})
        (60, 240)
    """
    lists = _lists()
    most = min(map(len, lists.values()))
    if not 1 <= n <= most:
        raise VesaliusError(f"{n} sentences cannot be made of {most} words of each kind; ask for 1 to {most}")
    rng = np.random.default_rng([seed, *b"sentences"])
    columns = [rng.permutation(lists[k])[:n].tolist() for k in ("adjectives", "subjects", "verbs", "objects")]
    return list(zip(*columns, strict=True))


def words_of(text: str) -> Sentence:
    """The words of a text, punctuation left out."""
    return tuple(_PUNCTUATION.sub(" ", text).split())


def read_sentences(path: Path | str) -> list[Sentence]:
    """Sentences of one length from a text file, one a line.

    Raises:
        VesaliusError: for a file that cannot be read, and naming the first line of another length.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise VesaliusError(f"no file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise VesaliusError(f"{path} cannot be read as UTF-8 text: {error}") from None
    found: list[Sentence] = []
    first = 0
    for number, line in enumerate(lines, 1):
        words = words_of(line)
        if not words:
            continue
        if not found:
            first = number
        elif len(words) != len(found[0]):
            raise VesaliusError(
                f"{path.name} line {number} has {len(words)} words and line {first} {len(found[0])}; all sentences of "
                "a stream need the same number"
            )
        found.append(words)
    if not found:
        raise VesaliusError(f"{path} holds no sentence; write one a line, all of the same number of words")
    return found


def natural_sentences(texts: Iterable[str], words: int, n: int) -> list[Sentence]:
    """The first `n` different sentences of exactly so many words in running text.

    Raises:
        VesaliusError: if there are fewer.
    """
    found: dict[Sentence, None] = {}
    for text in texts:
        for piece in _END.split(" ".join(text.split())):
            sentence = words_of(piece)
            if len(sentence) == words and piece[-1:] in ".!?;:":
                found[sentence] = None
                if len(found) == n:
                    return list(found)
    raise VesaliusError(f"the text has {len(found)} sentences of {words} words, and {n} are needed; give more text")


def control(kind: str, sentences: Sequence[Sentence], rng: np.random.Generator) -> list[Sentence]:
    """The sentences of a control (see the module), in the same order.

    Raises:
        UnknownName: for a control there is not. VesaliusError: for sentences of two words, which have no such order.
    """
    if kind not in CONTROLS:
        raise UnknownName("control", kind, CONTROLS)
    k = len(sentences[0])
    if kind == "exchanged":
        columns = [[sentences[i][j] for i in rng.permutation(len(sentences))] for j in range(k)]
        return list(zip(*columns, strict=True))
    if k < 3:
        raise VesaliusError(f"sentences of {k} words cannot be shuffled without keeping neighbours; use 3 or more")
    found = []
    for sentence in sentences:
        order = rng.permutation(k)
        while (np.diff(order) == 1).any():
            order = rng.permutation(k)
        found.append(tuple(sentence[i] for i in order))
    return found
