"""Greater-than: "The war lasted from the year 1732 to the year 17" -> a year after 32.

Hanna, Liu and Variengien, "How does GPT-2 compute greater-than?", arXiv 2305.00586, section 3. Right and wrong are
sets of continuations, and the measure is the difference of their probabilities; the corrupted prompt begins at year 01
(or the first after it that the tokenizer writes in the same way), which leaves nearly every later year possible.

Vocabularies cut years in different ways, so the question takes the first of these forms that the tokenizer allows:

- two-digit: "... 17" is followed by one token of two digits (GPT-2, Pythia). Right: the numbers above YY; wrong: those
  up to YY. The paper's form.
- digit: "... 17" is followed by single digits (SmolLM2, Gemma, Qwen). The next digit is that of the decade. With
  YY = 32, right: 4 to 9; wrong: 0 to 2. The decade's own digit, 3, could be either and is in neither set. YY runs from
  10 to 89, so that both sets have members.
- year: "... to the year" is followed by the whole year as one token (BERT). Right: the later years of the century;
  wrong: those up to the first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from vesalius.errors import TaskError
from vesalius.tasks.base import generator
from vesalius.tasks.encode import Example
from vesalius.tasks.words import Words, fill, wordlist

TEMPLATE = "The {event} lasted from the year {century}{start} to the year"
Form = Literal["two-digit", "digit", "year"]
_ALL = [f"{y:02d}" for y in range(100)]


def _sets(form: Form, century: int, start: int) -> tuple[list[str], list[str]]:
    """Right and wrong continuations, before the tokenizer has its say."""
    if form == "digit":
        return [str(d) for d in range(start // 10 + 1, 10)], [str(d) for d in range(start // 10)]
    before = f" {century}" if form == "year" else ""
    return [before + y for y in _ALL[start + 1 :]], [before + y for y in _ALL[: start + 1]]


def _prompt(form: Form, event: str, century: int, start: str) -> tuple[str, dict[str, tuple[int, int]]]:
    filled = fill(TEMPLATE, event=event, century=century, start=start)
    return filled.text + ("" if form == "year" else f" {century}"), filled.spans


class _Years:
    """Which years and continuations of one form this tokenizer can write."""

    def __init__(self, words: Words, form: Form, century: int) -> None:
        probe, _ = _prompt(form, "war", century, "32")
        before = f" {century}" if form == "year" else ""
        wanted = [before + t for t in (map(str, range(10)) if form == "digit" else _ALL)]
        words.encoder.prime(probe + t for t in wanted)
        self.single = {t for t in wanted if words.is_single(probe, t)}
        lead = TEMPLATE.split("{century}")[0].format(event="war")
        stems = {y: words.encoder.beyond(lead.rstrip(), f" {century}{y}") for y in _ALL[1:99]}
        stem = words.encoder.beyond(lead.rstrip(), f" {century}") or ()
        need = {"two-digit": 1, "digit": 2, "year": 1}[form]

        def splits(ids: tuple[int, ...] | None) -> bool:
            if ids is None:
                return False
            return len(ids) == 1 if form == "year" else ids[: len(stem)] == stem and len(ids) == len(stem) + need

        usable = [y for y in _ALL[1:99] if splits(stems[y])]
        self.early = usable[0] if usable else ""
        self.starts = []
        for y in usable:
            right, wrong = _sets(form, century, int(y))
            if y > self.early and self.single & set(right) and self.single & set(wrong):
                self.starts.append(y)


@generator(metric="prob-diff")
def greater_than(
    words: Words,
    rng: random.Random,
    century: int = 17,
    form: Literal["auto", "two-digit", "digit", "year"] = "auto",
) -> Iterator[Example]:
    """Spans of years that must end later than they begin.

    Args:
        words: word lists under the opened model's tokenizer.
        rng: the source of chance.
        century: the first two digits of the years, 10 to 20.
        form: how the year is asked for (see the head of this file); "auto" takes the first that works.

    Yields:
        Examples with the position "YY" (the last token of the first year; in the digit form also "decade"); `group` is
        the form.
    """
    if not 10 <= century <= 20:
        raise TaskError(f"task 'greater-than': century must be from 10 to 20, not {century}")
    forms: list[Form] = ["two-digit", "digit", "year"] if form == "auto" else [form]
    for kind in forms:
        years = _Years(words, kind, century)
        if len(years.starts) >= 10:
            break
    else:
        pieces = words.encoder.show(words.encoder.ids(f"the year {century}32"))
        raise TaskError(
            f"task 'greater-than': this tokenizer writes 'the year {century}32' as {pieces}, which none of the forms "
            f"{', '.join(forms)} can ask for; try another century or task 'successor'"
        )
    words.note(f"the {kind} form; corrupted prompts begin at year {century}{years.early}")
    events = wordlist("events")
    while True:
        event, start = rng.choice(events), rng.choice(years.starts)
        clean, spans = _prompt(kind, event, century, start)
        right, wrong = _sets(kind, century, int(start))
        positions = {"YY": spans["start"]}
        if kind == "digit":
            positions["decade"] = (spans["start"][0], spans["start"][0] + 1)
        yield Example(
            clean,
            _prompt(kind, event, century, years.early)[0],
            tuple(t for t in right if t in years.single),
            tuple(t for t in wrong if t in years.single),
            positions,
            kind,
        )
