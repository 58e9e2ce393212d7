"""Writing under rules: parsed rules, the mode they are kept in, decoding, and texts whose every word was judged.

In word mode no dead end exists by rules alone; where something else in the stack leaves no token, and in token mode, a
row takes back its last word, bars what began it there, and tries again (`tries` times), then stops and says so.

A text that ran out of tokens within a word loses that word: it was never judged whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from vesalius.apply.writing.filters import Vectors
from vesalius.apply.writing.language import Rules, parse
from vesalius.apply.writing.pieces import Pieces, pieces
from vesalius.apply.writing.tokens import TokenRule
from vesalius.apply.writing.transforms import DEFAULT, transformed
from vesalius.apply.writing.words import Spelling, WordRule
from vesalius.errors import VesaliusError
from vesalius.model import Model
from vesalius.model.decode import TRIES, Draw, Line, Step, decode
from vesalius.model.stack import Stack
from vesalius.rows import is_text

Mode = Literal["word", "token"]


@dataclass(frozen=True)
class Writer:
    """A model with rules to write under.

    Attributes:
        model, rules, mode: as given. vocabulary: the tokens' texts. rule: what bars tokens; None without rules.
        dropped: words of the lexicon that were left out, by reason; empty without a lexicon.
    """

    model: Model
    rules: Rules
    mode: Mode
    vocabulary: Pieces
    rule: WordRule | TokenRule | None
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def stack(self) -> Stack:
        """A fresh stack of the rule alone."""
        return Stack([] if self.rule is None else [self.rule])

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt; the end of a text stands for an empty one."""
        if not is_text(prompt):
            raise VesaliusError(
                f"the prompt {prompt[:40]!a} is not UTF-8 text, or holds half a character; write it whole"
            )
        tokenizer: Any = self.model.tokenizer
        ids = [int(i) for i in tokenizer(prompt)["input_ids"]] if prompt else []
        if ids and ids[-1] in self.vocabulary.ends and len(ids) > 1:
            ids = ids[:-1]
        known = [int(i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
        if not ids and not known:
            raise VesaliusError(f"{self.model.name} has no token that begins a text; give a prompt")
        return ids or known[:1]


def writer(
    model: Model,
    rules: Sequence[str],
    *,
    mode: Mode = "word",
    words: Iterable[str] | None = None,
    lines: int = 1,
    transforms: Sequence[str] = DEFAULT,
    accents: bool = False,
    vectors: Vectors | None = None,
) -> Writer:
    """Prepares a model and rules.

    Args:
        model: a causal language model with a tokenizer. rules: sentences, see `language`.
        mode: `word` looks ahead and judges whole words; `token` judges each token alone, as the original does.
        words: the lexicon, in lower case; the pronouncing dictionary if None and one is needed.
        lines: to be written, where a rule is about lines. transforms: before filters, in token mode.
        accents: whether é is another letter than e, in word mode.
        vectors: what `similar to` compares; the model's own input embeddings if None.

    Raises:
        VesaliusError: for a sentence that is no rule, rules that leave nothing, or a model without a tokenizer.

    Example:
        >>> w = writer(model, ["no letter e", "2 syllables a word"])        # doctest: +SKIP
        >>> written(w, ["The sailor"], 40)[0].text                          # doctest: +SKIP
    """
    if mode not in ("word", "token"):
        raise VesaliusError(f"mode {mode!r} is neither 'word' nor 'token'")
    if lines < 1:
        raise VesaliusError(f"{lines} lines leave nothing to write; give 1 or more")
    vocabulary = pieces(model)
    parsed = parse(rules, vectors or embedding_vectors(model))
    if not parsed.names and words is None:
        return Writer(model, parsed, mode, vocabulary, None)
    if mode == "token":
        return Writer(model, parsed, mode, vocabulary, TokenRule(parsed, vocabulary, transformed(transforms)))
    alone = {t for t in vocabulary.texts if t and len(t) == 1}
    spelling = Spelling(parsed, words, alone.__contains__, lines, accents)
    dropped = spelling.dropped if spelling.lexicon is not None else {}
    return Writer(model, parsed, mode, vocabulary, WordRule(spelling, vocabulary), dropped)


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        prompt, text: what was given, and what was written. cut: an unfinished word that was taken off its end.
        line: tokens, stop, sizes of masks, log-probabilities under the model alone.
    """

    prompt: str
    text: str
    cut: str
    line: Line

    @property
    def perplexity(self) -> float:
        """Of what was written, under the model without rules."""
        return float(np.exp(-np.mean(self.line.log_probs))) if self.line.log_probs else float("nan")


def written(
    writer: Writer,
    prompts: Sequence[str],
    tokens: int = 60,
    draw: Draw | None = None,
    *,
    more: Sequence[Any] = (),
    tries: int = TRIES,
    rows: int = 25,
    progress: Callable[[int, int], object] | None = None,
    seen: Callable[[Step], object] | None = None,
) -> list[Text]:
    """Writes after some prompts.

    Args:
        writer: from `writer`. tokens: at most so many. draw: how tokens are chosen; the likeliest if None.
        more: further rules and processors, after the writer's own. tries: times a row may go back.
        rows: written together. progress: told (tokens written, of all).
        seen: told of every step of decoding.
    """
    draw = draw or Draw()
    own = [] if writer.rule is None else [writer.rule]
    stack = Stack([*own, *more])
    found: list[Text] = []
    for start in range(0, len(prompts), rows):
        piece = prompts[start : start + rows]
        done = start * tokens

        def tell(step: Step, done: int = done) -> None:
            if progress is not None:
                progress(done + sum(len(line.tokens) for line in step.lines), len(prompts) * tokens)
            if seen is not None:
                seen(step)

        lines = decode(
            writer.model, [writer.encode(p) for p in piece], tokens, stack, draw, ends=writer.vocabulary.ends,
            back=lambda written: last_word(writer.vocabulary, written), tries=tries, seen=tell,
        )  # fmt: skip
        found += [_text(writer, p, line) for p, line in zip(piece, lines, strict=True)]
    return found


def last_word(vocabulary: Pieces, tokens: Sequence[int]) -> int:
    """How many tokens the last word has, at least 1."""
    count = 0
    for token in reversed(tokens):
        count += 1
        if (vocabulary.texts[token] or " ")[0].isspace():
            break
    return max(1, count)


def _text(writer: Writer, prompt: str, line: Line) -> Text:
    kept = line.tokens[:-1] if line.stop == "end" else line.tokens
    tokenizer: Any = writer.model.tokenizer
    before = tokenizer.decode(line.prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(
        [*line.prompt, *kept], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )  # the space before a first word is kept by tokenizers that strip it elsewhere
    text = whole[len(before) :] if whole.startswith(before) else writer.vocabulary.text(kept)
    if line.stop in ("count", "dead end") and writer.mode == "word" and writer.rule is not None:
        end = len(text)
        while end and (text[end - 1].isalnum() or text[end - 1] in "'\u2019"):
            end -= 1
        return Text(prompt, text[:end], text[end:], line)
    return Text(prompt, text, "", line)


def embedding_vectors(model: Model) -> Vectors:
    """A text's vector: the mean of the model's input embeddings over its tokens, less the vocabulary's mean."""
    tokenizer: Any = model.tokenizer
    weight = model.hf.get_input_embeddings().weight.detach().float().cpu()
    centre = weight.mean(0)
    known: dict[str, np.ndarray[Any, Any] | None] = {}

    def vector(text: str) -> np.ndarray[Any, Any] | None:
        if text not in known:
            ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            known[text] = (weight[ids].mean(0) - centre).numpy() if ids else None
        return known[text]

    return vector


def read_words(path: Path) -> list[str]:
    """A lexicon: the words of a text file, in lower case, each once.

    Raises:
        VesaliusError: if there is none, or the file cannot be read.
    """
    from vesalius.corpus import documents

    found = {w for d in documents(str(path)) for w in d.text.lower().split() if w.replace("'", "").isalnum()}
    if not found:
        raise VesaliusError(f"{path} holds no word; give a text file with the words that may be written")
    return sorted(found)


def as_table(texts: Sequence[Text]) -> pd.DataFrame:
    """prompt, text, tokens, stop, perplexity, allowed (median over steps), went_back, cut."""
    rows = [
        {
            "prompt": t.prompt, "text": t.text, "tokens": len(t.line.tokens), "stop": t.line.stop,
            "perplexity": t.perplexity, "allowed": float(np.median(t.line.allowed)) if t.line.allowed else float("nan"),
            "went_back": t.line.went_back, "cut": t.cut,
        }
        for t in texts
    ]  # fmt: skip
    return pd.DataFrame(rows)


def drawing(temperature: float, top_k: int, top_p: float, seed: int) -> Draw:
    """A way to choose with a generator of its own."""
    return Draw(temperature, top_k, top_p, torch.Generator().manual_seed(seed))
