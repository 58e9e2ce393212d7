"""News whose subject's kind is told once, at the beginning, and asked about 600 words later.

    our story today concerns Velara , once a surgeon . [600 words of other things] nobody had forgotten Velara by then .

Every mention of the subject is to be labelled with its kind: PER, ORG, LOC or MISC. After the first sentence nothing
tells it: names carry no kind, the sentences around later mentions are the same for all kinds, and words like `surgeon`
stand elsewhere too. Two stories that differ in the kind alone differ in that one word of the text. Other names are
labelled as well; what stands beside them tells theirs ("shares of Marvin fell").

Made in the likeness of GONERD (arXiv 2311.13657), web news much longer than the sentences of CoNLL; there what is far
away is what the news happen to tell, here it was put there, so that the truth is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from vesalius.corpus.documents import CorpusError, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = ("PER", "ORG", "LOC", "MISC")
LABELS = ("O", *(f"{side}-{kind}" for kind in KINDS for side in "BI"))
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
MENTION, NEAR = 0.5, 0.15  # shares of sentences: of the far part about the subject, of all others about another name
_SLOT = re.compile(r"\{(\w+)\}")


class Story(NamedTuple):
    """One piece of news.

    Attributes:
        words, labels: word by word; O, B-KIND, I-KIND. kind, name: of the subject.
        told: words of the first sentence, which tells the kind. far: where later mentions begin.
    """

    words: tuple[str, ...]
    labels: tuple[str, ...]
    kind: str
    name: str
    told: int
    far: tuple[int, ...]


class FarNews:
    """Stories, by number.

    Args:
        seed: of everything drawn.
        words: of a story, exactly.
        gap: words between the end of the first sentence and the next mention of its subject, at least.
        telling: share of later mentions in a sentence whose last noun tells the kind; 0 in labelled and test stories,
            more in text to learn a language from: where that noun is hidden, the first sentence foretells it.

    Example:
        >>> story = FarNews(words=700, gap=600).story(0)
        >>> len(story.words), story.far[0] - story.told >= 600
        (700, True)
    """

    def __init__(self, seed: int = 0, words: int = 1022, gap: int = 600, telling: float = 0.0) -> None:
        if gap < 0 or words < gap + 60:
            raise CorpusError(f"stories of {words} words have no room after a gap of {gap}; give {gap + 60} or more")
        if not 0 <= telling <= 1:
            raise CorpusError(f"telling {telling} is no share; give 0 to 1")
        self.seed, self.words, self.gap, self.telling = seed, words, gap, telling

    def story(self, number: int, kind: str | None = None, stream: str = "train") -> Story:
        """One story; the kind is drawn where none is given, and all else is drawn alike whatever the kind."""
        rng = np.random.default_rng([self.seed, number, *f"far news/{stream}".encode()])
        drawn = KINDS[int(rng.integers(len(KINDS)))]
        mine = drawn if kind is None else kind
        if mine not in KINDS:
            raise CorpusError(f"kind '{mine}' is none of {', '.join(KINDS)}")
        draw = _Draw(rng)
        subject = draw.name()
        words, labels = draw.sentence(draw.of("lead"), subject, mine)
        told, far = len(words), []
        while len(words) < self.words:
            late = len(words) >= told + self.gap
            if late and rng.random() < MENTION:
                telling = rng.random() < self.telling
                more = draw.sentence(draw.of("told" if telling else "neutral"), subject, mine)
                at = len(words) + next(i for i, label in enumerate(more[1]) if label != "O")
                far += [at] if len(words) + len(more[0]) <= self.words else []
            elif rng.random() < NEAR:
                other = KINDS[int(rng.integers(len(KINDS)))]
                frame = lexicon()["kinds"][other]["near"]
                more = draw.sentence(frame[int(rng.integers(len(frame)))], draw.name(but=subject), other)
            else:
                more = draw.sentence(draw.of("filler"), (), None)
            if len(words) + len(more[0]) > self.words and "O" * len(more[1]) != "".join(more[1]):
                continue  # no name is cut in two; a sentence without one ends the story wherever it is full
            words, labels = words + more[0], labels + more[1]
        words, labels = words[: self.words], labels[: self.words]
        return Story(tuple(words), tuple(labels), mine, " ".join(subject), told, tuple(far))

    def stories(self, n: int, stream: str = "train") -> list[Story]:
        """The first n stories; another stream gives others."""
        return [self.story(i, stream=stream) for i in range(n)]

    def documents(self, n: int, stream: str = "train") -> Iterator[Document]:
        """The text of the first n stories."""
        for number in range(n):
            story = self.story(number, stream=stream)
            text = " ".join(story.words)
            yield Document(f"far-news-{stream}-{number}", text, "far-news", number + 1, {"kind": story.kind})


class _Draw:
    """Names and sentences, from one generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def one(self, words: Sequence[str]) -> str:
        return words[int(self.rng.integers(len(words)))]

    def of(self, name: str) -> str:
        return self.one(lexicon()[name])

    def name(self, but: Sequence[str] = ()) -> tuple[str, ...]:
        """One or two words, none of them in `but`."""
        known = [n for n in names() if n not in but]
        return tuple(self.one(known) for _ in range(1 + int(self.rng.random() < 0.3)))

    def sentence(self, frame: str, name: Sequence[str], kind: str | None) -> tuple[list[str], list[str]]:
        """Words and labels of a frame with its slots filled; without a kind, a cue is of any."""
        table = lexicon()
        words, labels = list[str](), list[str]()
        for word in frame.split():
            slot = _SLOT.fullmatch(word)
            if slot is None:
                words.append(word)
            elif slot[1] == "name":
                words += name
            else:
                any_kind = KINDS[int(self.rng.integers(len(KINDS)))]
                by_kind = table["kinds"][kind or any_kind]
                words.append(self.one(by_kind[f"{slot[1]}s"] if slot[1] in ("cue", "tell") else table[f"{slot[1]}s"]))
            labels += ["O"] * (len(words) - len(labels))
            if slot is not None and slot[1] == "name":
                labels[-len(name) :] = [f"{'B' if i == 0 else 'I'}-{kind}" for i in range(len(name))]
        return words, labels


@cache
def lexicon() -> dict[str, Any]:
    """The frames and words stories are made of."""
    text = resources.files("vesalius.corpus").joinpath("far_news.yaml").read_text("utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@cache
def names() -> tuple[str, ...]:
    """All words of names."""
    parts = lexicon()["syllables"]
    return tuple(first + last for first in parts["first"] for last in parts["last"])


def vocabulary() -> list[str]:
    """Every word of every story, in order."""
    table = lexicon()
    frames = [*table["lead"], *table["neutral"], *table["told"], *table["filler"]]
    lists = [names(), table["nouns"], table["adjectives"], table["days"]]
    for kind in KINDS:
        frames += table["kinds"][kind]["near"]
        lists += [table["kinds"][kind]["cues"], table["kinds"][kind]["tells"]]
    plain = [w for frame in frames for w in frame.split() if not _SLOT.fullmatch(w)]
    return sorted({*plain, *(w for words in lists for w in words)})


def tokenizer(length: int = 512) -> PreTrainedTokenizerFast:
    """One token a word, and the special tokens of BERT around a text; `length` is what models are made to read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = [*SPECIAL.values(), *(f"▁{word}" for word in vocabulary())]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=SPECIAL["unk"]))
    made.add_special_tokens(list(SPECIAL.values()))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    frame = [(SPECIAL[name], known.index(SPECIAL[name])) for name in ("cls", "sep")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=length, **{f"{name}_token": token for name, token in SPECIAL.items()}
    )
