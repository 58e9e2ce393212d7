"""From text to tensors: how prompts and answers become the rows of a `Pairs`.

Rules, the same for templates and for a user's file:

- A prompt is tokenised as the tokenizer does by default (with a beginning-of-sequence token where it adds one); causal
  models get no end-of-sequence token.
- The tokens of an answer are those of prompt + answer beyond those of the prompt, exactly as written: nothing is
  stripped or inserted. The prompt's tokens must be a prefix of the whole, or the example is refused.
- Clean and corrupted prompts have the same number of tokens and differ in at least one.

What a row looks like, by kind of model (`c` is a continuation of k tokens):

- causal: `[BOS] prompt c[:-1]`, padded on the left, read from the prompt's last token on.
- masked: `[CLS] prompt MASK*k . [SEP]`, padded on the right, read at the masks. With k > 1 the masks are filled
  independently of each other (a pseudo-likelihood).
- encoder-decoder: the prompt to the encoder, padded on the right, and `start c[:-1]` to the decoder. A tokenizer with
  T5's sentinels gets the prompt followed by `<extra_id_0>` and the decoder `start <extra_id_0> c[:-1]`, the form of
  its pre-training (arXiv 1910.10683, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from vesalius.errors import TaskError
from vesalius.model.pairs import Pairs
from vesalius.rows import is_text
from vesalius.tasks.metrics import make_metric

Ids = tuple[int, ...]
Scoring = Literal["auto", "single", "sequence"]
SENTINEL = "<extra_id_0>"


@dataclass(frozen=True)
class Example:
    """One clean prompt, its counterfactual, and what counts as right and as wrong.

    Attributes:
        clean: the prompt, up to where the answer begins.
        corrupted: the counterfactual, aligned with `clean` token by token.
        answer: acceptable continuations of `clean`, with their leading space if they have one.
        wrong: continuations to set against them.
        positions: named character spans in `clean`; the last token of a span is meant, in both prompts.
        group: a label to split results by (the template's order, say).
        options: for a choice among several, all continuations to choose from, right one included; accuracy is then
            taken over them rather than against `wrong` alone.
    """

    clean: str
    corrupted: str
    answer: tuple[str, ...]
    wrong: tuple[str, ...]
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)
    group: str = ""
    options: tuple[str, ...] = ()


class OpenModel(Protocol):
    """What is needed of an opened model here: its tokenizer, its kind, its length, and the Hugging Face model."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def kind(self) -> str: ...

    @property
    def n_positions(self) -> int | None: ...

    @property
    def hf(self) -> Any: ...


class Encoder:
    """A tokenizer with a memory of what it was asked, and with the special tokens around a text known.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise TaskError("the model has no tokenizer, so no text can be read with it; open it with one")
        self.tokenizer = tokenizer
        self._seen: dict[str, Ids] = {}
        self.prefix, self.suffix = self._specials()

    def _specials(self) -> tuple[Ids, Ids]:
        body = self.ids("The end")
        full = tuple(self.tokenizer("The end")["input_ids"])
        for i in range(len(full) - len(body) + 1):
            if full[i : i + len(body)] == body:
                return full[:i], full[i + len(body) :]
        raise TaskError(
            f"this tokenizer gives other tokens with special tokens ({self.show(full)}) than without "
            f"({self.show(body)}); answers cannot be placed after a prompt with it"
        )

    def prime(self, texts: Iterable[str]) -> None:
        """Tokenises many texts in one call, for `ids` to find."""
        new = [t for t in dict.fromkeys(texts) if t not in self._seen]
        for text in new:
            if not is_text(text):
                raise TaskError(f"{text!a} holds half a character (\\ud800 to \\udfff alone); write it whole")
        if new:
            found = self.tokenizer(new, add_special_tokens=False)["input_ids"]
            self._seen.update((t, tuple(f)) for t, f in zip(new, found, strict=True))

    def ids(self, text: str) -> Ids:
        """Token ids of a text without special tokens."""
        self.prime([text])
        return self._seen[text]

    def show(self, ids: Sequence[int]) -> str:
        """Tokens as a person reads them, for error messages."""
        return str(self.tokenizer.convert_ids_to_tokens(list(ids)))

    def beyond(self, prompt: str, answer: str) -> Ids | None:
        """Tokens of prompt + answer beyond the prompt's; None where the prompt's tokens are not a prefix."""
        before, whole = self.ids(prompt), self.ids(prompt + answer)
        return whole[len(before) :] if whole[: len(before)] == before and len(whole) > len(before) else None

    def continuation(self, prompt: str, answer: str, where: str) -> Ids:
        """Tokens of an answer; `where` names the example in the error.

        Raises:
            TaskError: the answer is empty, or changes how the end of the prompt is tokenised.
        """
        found = self.beyond(prompt, answer)
        if found is not None:
            return found
        if not answer:
            raise TaskError(f"{where}: an empty answer; write the text that should follow the prompt")
        before, whole = self.ids(prompt), self.ids(prompt + answer)
        if prompt[-1:].isspace() and not answer[0].isspace():
            space = prompt[len(prompt.rstrip()) :]
            last = prompt.rstrip()[-12:]
            remedy = f"move the space: end the prompt at {last!r} and write the answer {space + answer!r}"
        elif prompt[-1:].isalnum() and answer[0].isalnum():
            remedy = f"write the answer {' ' + answer!r} if a space is meant, or end the prompt at a word boundary"
        else:
            remedy = "end the prompt where the tokenizer ends a token"
        at = _first_difference(before, whole)
        raise TaskError(
            f"{where}: the answer {answer!r} changes the tokens of the prompt's end: alone it ends "
            f"{self.show(before[max(0, at - 2) :])}, with the answer {self.show(whole[max(0, at - 2) :])}; {remedy}"
        )

    def misaligned(self, example: Example) -> str | None:
        """Why clean and corrupted do not pair token by token, with the remedy; None where they do."""
        clean, corrupted = self.ids(example.clean), self.ids(example.corrupted)
        at = _first_difference(clean, corrupted)
        if len(clean) != len(corrupted):
            return (
                f"clean has {len(clean)} tokens and corrupted {len(corrupted)}; from token {at} on they read "
                f"{self.show(clean[at : at + 6])} and {self.show(corrupted[at : at + 6])}; put words of equally many "
                "tokens in the same places (or leave such rows out with on_misaligned='skip')"
            )
        if clean == corrupted:
            return "clean and corrupted have the same tokens; the corrupted prompt must differ in at least one word"
        return None

    def token_at(self, text: str, end: int) -> int:
        """Index (without special tokens) of the token that holds the character before `end`."""
        if getattr(self.tokenizer, "is_fast", False):
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            holding = [i for i, (low, high) in enumerate(offsets) if low < end <= high]
            # A space that belongs to no token is counted with the token before it.
            return holding[-1] if holding else max(i for i, (low, _) in enumerate(offsets) if low < max(end, 1))
        before, whole = self.ids(text[:end]), self.ids(text)
        if whole[: len(before)] != before:
            raise TaskError(
                f"this tokenizer gives no character offsets, and the place before {text[end:]!r} is inside a token"
            )
        return len(before) - 1


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def problem(encoder: Encoder, example: Example, where: str) -> str | None:
    """The first reason for which this example cannot be used with this tokenizer, or None."""
    texts = (*example.answer, *example.wrong, *example.options)
    encoder.prime([example.clean, example.corrupted, *(example.clean + a for a in texts)])
    found = encoder.misaligned(example)
    if found is not None:
        return f"{where}: {found}"
    try:
        for text in texts:
            ids = encoder.continuation(example.clean, text, where)
            if len(ids) > 1 and encoder.beyond(example.corrupted, text) != ids:
                return (
                    f"{where}: the answer {text!r} is tokenised otherwise after the corrupted prompt; end both "
                    "prompts with the same word"
                )
        unknown = getattr(encoder.tokenizer, "unk_token_id", None)
        for text in texts:
            if unknown is not None and unknown in encoder.continuation(example.clean, text, where):
                return f"{where}: the answer {text!r} is unknown to this tokenizer; choose words that it knows"
        right = {encoder.continuation(example.clean, a, where) for a in example.answer}
        both = [w for w in example.wrong if encoder.continuation(example.clean, w, where) in right]
    except TaskError as error:
        return str(error)
    return f"{where}: {both[0]!r} is both a right and a wrong answer; leave it out of one" if both else None


def glued(example: Example) -> str | None:
    """A note on an answer that runs on from the prompt's last word without a space, as in `is` + `Paris`."""
    for text in (*example.answer, *example.wrong):
        if example.clean[-1:].isalpha() and text[:1].isalpha():
            return f"answer {text!r} is glued to the prompt; write {' ' + text!r} if a space is meant"
    return None


class _Row(NamedTuple):
    example: int
    right: bool
    clean: Ids
    corrupted: Ids
    reads: tuple[int, ...]
    targets: Ids
    decoder: Ids


@dataclass(frozen=True)
class _Frame:
    """What stands around prompt and answer in this kind of model."""

    kind: str
    prefix: Ids
    suffix: Ids
    blank: int = -1  # mask or sentinel id
    start: Ids = ()  # what the decoder begins with

    def row(self, clean: Ids, corrupted: Ids, tail: Ids, c: Ids, example: int, right: bool) -> _Row:
        head = len(self.prefix) + len(clean)
        k = len(c)
        after: Ids
        decoder: Ids = ()
        if self.kind == "causal":
            after, reads = c[:-1], range(head - 1, head - 1 + k)
        elif self.kind == "masked":
            after, reads = (self.blank,) * k + tail + self.suffix, range(head, head + k)
        else:
            after = ((self.blank,) if self.blank >= 0 else ()) + self.suffix
            decoder = self.start + c[:-1]
            reads = range(len(self.start) - 1, len(self.start) - 1 + k)
        return _Row(
            example, right, self.prefix + clean + after, self.prefix + corrupted + after, tuple(reads), c, decoder
        )

    def end(self, clean: Ids) -> int:
        """Where END is: the token at which the answer is read (encoder-decoder: the encoder's last of the prompt)."""
        last = len(self.prefix) + len(clean) - 1
        return last + 1 if self.kind == "masked" or (self.kind == "encoder-decoder" and self.blank >= 0) else last


def _frame(encoder: Encoder, model: OpenModel) -> _Frame:
    tokenizer = encoder.tokenizer
    if model.kind == "causal":
        return _Frame("causal", encoder.prefix, ())
    if model.kind == "masked":
        if tokenizer.mask_token_id is None:
            raise TaskError("this model fills in blanks, but its tokenizer has no mask token; set tokenizer.mask_token")
        return _Frame("masked", encoder.prefix, encoder.suffix, tokenizer.mask_token_id)
    if model.kind == "encoder-decoder":
        start = getattr(model.hf.config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(getattr(model.hf, "generation_config", None), "decoder_start_token_id", None)
        if start is None:
            raise TaskError("the model's config has no decoder_start_token_id; set it to the decoder's first token")
        blank = tokenizer.get_vocab().get(SENTINEL, -1)
        return _Frame(model.kind, encoder.prefix, encoder.suffix, blank, (start, blank) if blank >= 0 else (start,))
    raise TaskError(
        f"a model of kind '{model.kind}' gives no logits over the vocabulary, and tasks are read from those; open it "
        "with its language-model head"
    )


def _tail(encoder: Encoder, clean: str, where: str) -> Ids:
    """The tokens of the full stop after a mask, as this tokenizer writes it there."""
    tokenizer = encoder.tokenizer
    if tokenizer.mask_token in clean:
        raise TaskError(f"{where}: the prompt already holds {tokenizer.mask_token}; write it up to the blank only")
    ids = encoder.ids(f"{clean} {tokenizer.mask_token}.")
    return ids[ids.index(tokenizer.mask_token_id) + 1 :]


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> Tensor:
    """(row, longest), padded on one side."""
    width = max(map(len, rows))
    return torch.tensor(
        [[value] * (width - len(r)) + list(r) if left else list(r) + [value] * (width - len(r)) for r in rows]
    )


def encode(
    encoder: Encoder,
    examples: Sequence[Example],
    model: OpenModel,
    metric: str,
    scoring: Scoring,
    where: Sequence[str],
) -> Pairs:
    """The tensors of checked examples for this kind of model; `where` names each example in errors.

    Raises:
        TaskError: an answer of several tokens where one is needed, no wrong answer where the metric needs one, a
            prompt that does not fit the model, or a model that has no vocabulary head.
    """
    frame = _frame(encoder, model)
    encoder.prime(e.clean + a for e in examples for a in (*e.answer, *e.wrong, *e.options))

    def tokens(texts: Sequence[str], i: int) -> list[Ids]:
        return list(dict.fromkeys(encoder.continuation(examples[i].clean, t, where[i]) for t in texts))

    answers = [tokens(e.answer, i) for i, e in enumerate(examples)]
    wrong = [tokens(e.wrong, i) for i, e in enumerate(examples)]
    for i, e in enumerate(examples):
        if not e.wrong and metric != "log-prob":
            raise TaskError(f"{where[i]}: no wrong answer, which '{metric}' needs; add one or use metric='log-prob'")
    if scoring == "single":
        for i, e in enumerate(examples):
            for text in (*e.answer, *e.wrong):
                ids = encoder.continuation(e.clean, text, where[i])
                if len(ids) > 1:
                    raise TaskError(
                        f"{where[i]}: the answer {text!r} is {len(ids)} tokens, {encoder.show(ids)}, where one is "
                        "needed; choose single-token answers, or score whole continuations with scoring='sequence'"
                    )
    long = any(len(c) > 1 for some in (answers, wrong) for cs in some for c in cs)
    sequence = scoring == "sequence" or long

    rows: list[_Row] = []
    owner: list[Ids] = []  # clean body of each row, for positions
    for i, e in enumerate(examples):
        clean, corrupted = encoder.ids(e.clean), encoder.ids(e.corrupted)
        tail = _tail(encoder, e.clean, where[i]) if frame.kind == "masked" else ()
        continuations = [(c, True) for c in answers[i]] + [(c, False) for c in wrong[i]]
        for c, right in continuations if sequence else continuations[:1]:
            rows.append(frame.row(clean, corrupted, tail, c, i, right))
            owner.append(clean)
    _check_length(rows, model, where)
    known = _rows_known(model)
    for r in rows:
        _check_known(encoder, {*r.clean, *r.corrupted, *r.targets, *r.decoder}, known, where[r.example])
    for i in range(len(examples)):
        _check_known(encoder, {t for c in (*answers[i], *wrong[i]) for t in c}, known, where[i])

    left = frame.kind == "causal"
    tokenizer = encoder.tokenizer
    pad = next((p for p in (tokenizer.pad_token_id, tokenizer.eos_token_id) if p is not None and p < known), 0)
    width = max(len(r.clean) for r in rows)
    shift = torch.tensor([width - len(r.clean) if left else 0 for r in rows])  # (row,)
    # A read that a row does not have repeats its last one, so that every index is valid; read_mask tells them apart.
    most = max(len(r.reads) for r in rows)
    reads = torch.tensor([list(r.reads) + [r.reads[-1]] * (most - len(r.reads)) for r in rows])  # (row, read)
    return Pairs(
        clean=_pad([r.clean for r in rows], pad, left),
        corrupted=_pad([r.corrupted for r in rows], pad, left),
        mask=_pad([[1] * len(r.clean) for r in rows], 0, left),
        reads=reads + shift[:, None],
        read_mask=_pad([[1] * len(r.reads) for r in rows], 0, left=False).bool(),
        row_example=torch.tensor([r.example for r in rows]),
        row_right=torch.tensor([r.right for r in rows]),
        answers=[[c[0] for c in cs] for cs in answers],
        wrong=[[c[0] for c in cs] for cs in wrong],
        metric=make_metric(metric, sequence),
        targets=_pad([r.targets for r in rows], pad, left=False) if sequence else None,
        positions=_positions(encoder, examples, rows, owner, frame, shift),
        decoder=_pad([r.decoder for r in rows], pad, left=False) if frame.kind == "encoder-decoder" else None,
        options=None if sequence else _options(examples, tokens),
    )


def _options(examples: Sequence[Example], tokens: Any) -> list[list[int]] | None:
    """First tokens of each example's options (of its answers and wrong ones where it names none)."""
    if not any(e.options for e in examples):
        return None
    found = (tokens(e.options or (*e.answer, *e.wrong), i) for i, e in enumerate(examples))
    return [[c[0] for c in cs] for cs in found]


def _positions(
    encoder: Encoder,
    examples: Sequence[Example],
    rows: Sequence[_Row],
    owner: Sequence[Ids],
    frame: _Frame,
    shift: Tensor,
) -> dict[str, Tensor]:
    """Named positions of every row, (row,), padding counted in; -1 where an example lacks the name."""
    names = list(dict.fromkeys(n for e in examples for n in e.positions if n != "END"))
    place = [
        {n: len(frame.prefix) + encoder.token_at(e.clean, span[1]) for n, span in e.positions.items()} for e in examples
    ]
    found = {n: torch.tensor([place[r.example].get(n, -1) for r in rows]) for n in names}
    found["END"] = torch.tensor([frame.end(clean) for clean in owner])
    return {n: torch.where(v >= 0, v + shift, v) for n, v in found.items()}


def _rows_known(model: OpenModel) -> float:
    """How many tokens the model has a row for; a tokenizer may have been given more."""
    table = getattr(model.hf, "get_input_embeddings", lambda: None)()
    return getattr(table, "num_embeddings", float("inf"))


def _check_known(encoder: Encoder, ids: Iterable[int], known: float, where: str) -> None:
    beyond = sorted(i for i in ids if i >= known)
    if beyond:
        raise TaskError(
            f"{where}: token {encoder.show(beyond[:1])} is number {beyond[0]}, and the model knows {known:.0f}; the "
            "tokenizer was given more tokens than the model: resize_token_embeddings, or open it with its own tokenizer"
        )


def _check_length(rows: Sequence[_Row], model: OpenModel, where: Sequence[str]) -> None:
    limit = model.n_positions
    longest = max(rows, key=lambda r: len(r.clean))
    if limit and len(longest.clean) > limit:
        raise TaskError(
            f"{where[longest.example]}: {len(longest.clean)} tokens, and this model reads at most {limit}; shorten it"
        )
