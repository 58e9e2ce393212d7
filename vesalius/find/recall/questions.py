"""A prompt taken apart: its topic, what is asked of it, the answer, and many prompts that ask the same of others."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vesalius.errors import ModelError, TaskError, UnknownName, VesaliusError
from vesalius.find.recall.regression import NEEDED
from vesalius.model import Model, Pairs
from vesalius.model.sweep import BATCH, read_logits
from vesalius.rows import csv_rows
from vesalius.tasks.encode import Encoder, Example, encode, problem
from vesalius.tasks.facts import Relation, examples, relation_of, relations
from vesalius.tasks.metrics import accuracy
from vesalius.tasks.words import fill

MOST = 320  # prompts tried for some that are answered rightly
Span = tuple[int, int]


@dataclass(frozen=True)
class OverOthers:
    """Logit of the right answer over the mean of the other answers of its relation: linear in the logits."""

    name: str = "logit over others"
    unit: str = "logit"

    def tokens(self, pairs: Pairs) -> Tensor:
        """All answers, sorted."""
        return torch.tensor(sorted({i for ids in [*pairs.answers, *(pairs.options or pairs.wrong)] for i in ids}))

    def __call__(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Values (example,) from logits (row, read, len(tokens) or vocabulary)."""
        tokens = self.tokens(pairs)
        place = {int(t): i if logits.shape[-1] == len(tokens) else int(t) for i, t in enumerate(tokens)}
        found = []
        for row, right, options in zip(logits[:, 0], pairs.answers, pairs.options or pairs.wrong, strict=True):
            others = [place[i] for i in options if i not in right]
            found.append(row[place[right[0]]] - row[others].mean())
        return torch.stack(found)


@dataclass(frozen=True)
class First:
    """1 where the right answer is the likeliest token: of all, or of its relation's answers.

    Args:
        among: `all` or `answers`.
    """

    among: str = "all"
    name: str = "first"
    unit: str = "share"

    def tokens(self, pairs: Pairs) -> Tensor | None:
        """None for all tokens, else all answers."""
        return None if self.among == "all" else OverOthers().tokens(pairs)

    def __call__(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Values (example,) from logits (row, read, vocabulary or token)."""
        found = accuracy(logits, pairs)
        won = found.top1 if self.among == "all" else found.preferred
        assert won is not None
        return won.double()


@dataclass(frozen=True)
class Question:
    """A prompt taken apart.

    Attributes:
        prompt: as asked. topic: what it is about; span: where it stands. answer: the right one, without its space.
        relation: what is asked, with every known topic's answer. template: the prompt with `{topic}` for the topic.
        known: whether the answer is from the list rather than given.
    """

    prompt: str
    topic: str
    span: Span
    answer: str
    relation: Relation
    template: str
    known: bool


@dataclass(frozen=True)
class Asked:
    """Prompts that ask one relation of many topics.

    Attributes:
        pairs: as tensors; the counterfactual asks of another topic. examples: as text. topics: of each example.
        tried: prompts the model was asked. right: how many of those it answered rightly.
        own: examples in the traced prompt's own wording.
    """

    pairs: Pairs
    examples: list[Example]
    topics: list[str]
    tried: int
    right: int
    own: int


def facts_file(path: Path | str) -> Relation:
    """A relation of the user's: a .csv file with columns `topic` and `answer`."""
    path = Path(path)
    try:
        lines = csv_rows(path.name, path.read_text("utf-8-sig"), TaskError)
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read as a .csv file: {error}") from None
    header = next(lines, (0, []))[1]
    if lacking := {"topic", "answer"} - set(header):
        raise TaskError(f"{path} lacks column {' and '.join(sorted(lacking))}; its head must be topic,answer")
    rows: dict[str, str] = {}
    for number, cells in lines:
        row = dict(zip(header, cells, strict=True))
        topic, answer = row["topic"].strip(), row["answer"].strip()
        if not (topic and answer):
            raise TaskError(f"{path.name} line {number}: no {'answer' if topic else 'topic'}; give both")
        if rows.setdefault(topic, answer) != answer:
            raise TaskError(f"{path.name} line {number}: '{topic}' has another answer further up; decide for one")
    if len(set(rows.values())) < 2:
        count = "no facts" if not rows else "facts of one answer"
        raise TaskError(f"{path} holds {count}, and a wrong answer is another fact's; write more, such as France,Paris")
    return Relation(path.stem, rows, ())


def take_apart(
    model: Model,
    prompt: str,
    *,
    topic: str | None = None,
    relation: str | Relation | None = None,
    answer: str | None = None,
) -> Question:
    """Finds the topic, the relation and the right answer of a prompt.

    Args:
        prompt: up to where the answer begins. topic: a text in it; by default the known topic that stands in it.
        relation: `capital`, `language`, `currency`, or facts of one's own; by default by the prompt's words.
        answer: the right one; by default from the relation's list.

    Raises:
        VesaliusError: if one of the three cannot be found, or the answer is several tokens.
    """
    refuse_unfit(model)
    prompt = prompt.rstrip()
    if not prompt:
        raise VesaliusError("an empty prompt has no topic; give a text up to where the answer begins")
    if isinstance(relation, str) and relation not in relations():
        raise UnknownName("relation", relation, relations())
    named = relations()[relation] if isinstance(relation, str) else relation
    asked = named or relation_of(prompt)
    if asked is None:
        raise VesaliusError(
            f"what '{prompt}' asks is none of {', '.join(relations())}; name one with --relation, or give facts of "
            "your own with --facts FILE.csv (columns topic,answer)"
        )
    topic, span = _topic(prompt, topic, asked)
    right = answer.strip() if answer is not None else asked.answers.get(topic)
    if right is None:
        raise VesaliusError(f"'{topic}' has no {asked.name} in the list; give the right answer with --answer")
    encoder = Encoder(model.tokenizer)
    ids = encoder.continuation(prompt, f" {right}", "the traced prompt")
    if len(ids) > 1:
        raise VesaliusError(
            f"the answer ' {right}' is {len(ids)} tokens {encoder.show(ids)}, and a trace follows one logit; choose a "
            "fact whose answer is one token, or give another with --answer"
        )
    before, after = (part.replace("{", "{{").replace("}", "}}") for part in (prompt[: span[0]], prompt[span[1] :]))
    template = f"{before}{{topic}}{after}"
    return Question(prompt, topic, span, right, asked, template, answer is None)


def refuse_unfit(model: Model) -> None:
    """Refuses models whose stream at END is not a sum of writes that a next token is read from."""
    if model.kind != "causal":
        raise ModelError(f"{model.name} is {model.kind}; facts are traced in causal language models, at a prompt's end")
    if model.anatomy.post_norm:
        raise ModelError(f"{model.name} norms the stream after each sum, so it is no sum of writes; open another model")
    if model.tokenizer is None:
        raise ModelError(f"{model.name} was opened without a tokenizer, and a fact is text; open it with one")


def _topic(prompt: str, given: str | None, asked: Relation) -> tuple[str, Span]:
    if given is not None:
        at = prompt.rfind(given.strip())
        if at < 0 or not given.strip():
            raise VesaliusError(f"the topic '{given}' does not stand in '{prompt}'")
        return given.strip(), (at, at + len(given.strip()))
    found = [
        (m.start(), len(topic), topic)
        for topic in asked.answers
        for m in re.finditer(rf"\b{re.escape(topic)}\b", prompt)
    ]
    if not found:
        raise VesaliusError(
            f"no topic of '{asked.name}' stands in '{prompt}'; name it with --topic, and with --answer what is right"
        )
    at, size, topic = max(found)  # the last one, the longest of those that begin there
    return topic, (at, at + size)


def ask(model: Model, question: Question, n: int, seed: int = 0, all_facts: bool = False) -> Asked:
    """Prompts of the question's relation that the model answers rightly: own wording first, then other templates.

    Args:
        n: how many. seed: of counterfactuals and order. all_facts: wrong answers count as well.

    Raises:
        VesaliusError: if there are fewer than a regression needs.
    """
    rng = random.Random(f"recall/{seed}")
    encoder = Encoder(model.tokenizer)
    answers = {**question.relation.answers}
    own = [(question.template, t) for t in answers]
    more = [(t, topic) for t in question.relation.templates if t != question.template for topic in answers]
    rng.shuffle(own)
    rng.shuffle(more)
    length = {t: len(encoder.beyond("the", f" {t}") or ()) for t in answers}
    known = {t: a for t, a in answers.items() if length[t] == 1 and len(encoder.beyond("the", f" {a}") or ()) == 1}
    wanted = [(template, t) for template, t in [*own, *more] if t in known]
    pool = [e for e in examples(known, wanted, length, rng) if problem(encoder, e, "") is None][:MOST]
    kept: list[Example] = []
    tried = right = 0
    for lo in range(0, len(pool), BATCH):
        if len(kept) >= n:
            break
        some = pool[lo : lo + BATCH]
        good = [True] * len(some)
        made = tensors(model, some)
        if not all_facts:
            with torch.no_grad():
                top1 = accuracy(read_logits(model, made, "clean")[0], made).top1
            assert top1 is not None
            good = top1.tolist()
        tried, right = tried + len(some), right + sum(good)
        kept += [e for e, ok in zip(some, good, strict=True) if ok]
    kept = kept[:n]
    if len(kept) < NEEDED:
        raise VesaliusError(
            f"{model.name} answers {len(kept)} of {tried} prompts about '{question.relation.name}' rightly, and a "
            f"regression needs {NEEDED}; give more facts (--facts), another model, or take wrong answers too "
            "(--all-facts)"
        )
    topics = [e.clean[slice(*e.positions["topic"])] for e in kept]
    return Asked(tensors(model, kept), kept, topics, tried, right, sum(e.group == question.template for e in kept))


def tensors(model: Model, some: Sequence[Example]) -> Pairs:
    """Examples as pairs measured by the logit of the right answer over the other answers."""
    where = [f"prompt {i + 1}" for i in range(len(some))]
    made = encode(Encoder(model.tokenizer), list(some), model, "logit-diff", "single", where)
    return replace(made, metric=OverOthers())


def one(model: Model, question: Question) -> Pairs:
    """The traced prompt alone; its counterfactual asks of another topic of as many tokens where there is one."""
    encoder = Encoder(model.tokenizer)
    answers = {t: a for t, a in question.relation.answers.items() if len(encoder.beyond("the", f" {a}") or ()) == 1}
    size = len(encoder.ids(question.prompt))
    texts = [fill(question.template, topic=t).text for t, a in answers.items() if a != question.answer]
    filler = [question.prompt.replace(question.topic, "the" + " the" * k) for k in range(9)]
    fits = [t for t in [*texts, *filler] if len(encoder.ids(t)) == size and t != question.prompt]
    if not fits:
        raise VesaliusError(f"no other topic of as many tokens fits into '{question.prompt}'; ask it in other words")
    every = tuple(dict.fromkeys([f" {question.answer}", *(f" {a}" for a in answers.values())]))
    example = Example(
        question.prompt, fits[0], every[:1], every[1:2], {"topic": question.span}, question.template, every
    )
    return tensors(model, [example])
