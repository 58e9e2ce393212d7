"""Tokens an objective needs beside text, by role: padding, mask, sentinels, modes; and where words start."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.errors import VesaliusError
from vesalius.train.objectives.base import Needs

MODES = {"mode_r": "[NLU]", "mode_x": "[NLG]", "mode_s": "[S2S]"}  # of U-PaLM (arXiv 2210.11399)
_ROLES = ("pad", "eos", "bos", "mask", "cls", "sep", "unk")


def sentinels(count: int) -> list[str]:
    """The names T5's tokenizers give to the tokens that stand for a span.

    Example:
        >>> sentinels(2)
        ['<extra_id_0>', '<extra_id_1>']
    """
    return [f"<extra_id_{i}>" for i in range(count)]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids by role: pad, eos, bos, mask, cls, sep, unk; `sentinel_0`, `sentinel_1`, ... in order; modes; other specials.

    Tokens the tokenizer calls special without one of these roles are named `special_ID`, so that they are never masked.
    """
    found = {r: int(i) for r in _ROLES if (i := getattr(tokenizer, f"{r}_token_id", None)) is not None}
    vocabulary = tokenizer.get_vocab()
    count = 0
    while (name := f"<extra_id_{count}>") in vocabulary:
        found[f"sentinel_{count}"] = int(vocabulary[name])
        count += 1
    found |= {role: int(vocabulary[name]) for role, name in MODES.items() if name in vocabulary}
    known = set(found.values())
    return found | {f"special_{i}": int(i) for i in tokenizer.all_special_ids if i not in known}


def needs_for(model: Any, tokenizer: Any) -> Needs:
    """What an objective must know of a model and its tokenizer."""
    from vesalius.train.masks import kind_of

    special = special_tokens(tokenizer) if tokenizer is not None else {}
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is not None:
        special["decoder_start"] = int(start)
    return Needs(int(model.config.vocab_size), special, kind_of(model.config))


def require(needs: Needs, name: str, why: str) -> int:
    """The id of a special token, or a refusal that says what needs it."""
    if name not in needs.special:
        text = MODES.get(name, f"<{name}>")
        raise VesaliusError(f"{why} needs the special token '{name}'; add it with surgery.add_tokens(..., ['{text}'])")
    return needs.special[name]


def one_token(tokenizer: Any, word: str, after: str = "") -> int:
    """The id of a word that is one token at the beginning of a text, or after another word and a space.

    Raises:
        VesaliusError: if it is several tokens there, or unknown.
    """
    before = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    ids = tokenizer(f"{after} {word}" if after else word, add_special_tokens=False)["input_ids"]
    if len(ids) != len(before) + 1 or ids[: len(before)] != before or ids[-1] == tokenizer.unk_token_id:
        raise VesaliusError(
            f"'{word}' is {tokenizer.convert_ids_to_tokens(ids[len(before) :])} in this tokenizer, and one known "
            "token is needed; choose another word"
        )
    return int(ids[-1])


def sentinel_ids(needs: Needs) -> NDArray[np.int64]:
    """Ids of sentinels 0, 1, ... in order."""
    found: list[int] = []
    while (name := f"sentinel_{len(found)}") in needs.special:
        found.append(needs.special[name])
    return np.array(found, dtype=np.int64)


def masking_for(tokenizer: Any) -> dict[str, bool]:
    """Settings of `masked-lm` that fit a tokenizer: whole words if it marks them, [CLS] and [SEP] if it has both.

    Example:
        >>> masking_for(bert_tokenizer)                                              # doctest: +SKIP
        {'whole_words': True, 'frame': True}
    """
    try:
        word_starts(tokenizer)
        marked = True
    except VesaliusError:
        marked = False
    return {
        "whole_words": marked,
        "frame": tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None,
    }


def word_starts(tokenizer: Any) -> NDArray[np.bool_]:
    """Which tokens begin a word, (vocabulary,) bool: not '##' (WordPiece), or 'Ġ' (byte-level), or '▁' (Unigram).

    Special tokens count as words of their own. In a byte-level vocabulary the tokens of blanks other than the space
    ('Ċ' for a line's end, 'ĉ' for a tab) begin a word as well, and so does text after one, by `masked-lm`.

    Raises:
        VesaliusError: if the vocabulary bears none of these marks.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    starts = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
    special = set(tokenizer.all_special_tokens)
    words = [w for w in vocabulary if w not in special]
    if any(w.startswith("##") for w in words):
        begins = [w for w in vocabulary if not w.startswith("##") or w in special]
    elif (mark := next((m for m in ("Ġ", "▁") if any(w.startswith(m) for w in words)), None)) is not None:
        begins = [w for w in vocabulary if w.startswith((mark, "Ċ", "ĉ")) or w in special]
    else:
        raise VesaliusError(
            "the tokenizer's vocabulary marks no word starts ('##', 'Ġ' or '▁'); give masked-lm a table word_start, or "
            "whole_words: false"
        )
    starts[[vocabulary[w] for w in begins]] = True
    return starts
