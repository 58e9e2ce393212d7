"""The text that each token of a vocabulary stands for, as it reads after other text.

A token's text is what `decode` adds for it after another token: with its leading space, if it has one. Tokens that are
not valid text on their own (parts of a character of several bytes) have none, and neither have special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.errors import VesaliusError
from vesalius.model import Model

BROKEN = "\ufffd"


@dataclass(frozen=True)
class Pieces:
    """A vocabulary as text.

    Attributes:
        texts: of each token id of the model; None where it has none.
        special: ids of special tokens. ends: those of them that end a text.
    """

    texts: tuple[str | None, ...]
    special: frozenset[int]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; those without text are left out."""
        return "".join(self.texts[t] or "" for t in tokens)

    def none(self, token: int) -> str:
        """Why a token has no text."""
        return "a special token" if token in self.special else "not valid text on its own"


def pieces(model: Model) -> Pieces:
    """The vocabulary of a model with a tokenizer.

    Raises:
        VesaliusError: without a tokenizer.
    """
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise VesaliusError(f"{model.name} was opened without a tokenizer, so no text can be written; open it with one")
    size = int(model.hf.config.get_text_config().vocab_size)
    special = frozenset(int(i) for i in tokenizer.all_special_ids if i is not None)
    known = min(size, len(tokenizer))
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = len(tokenizer.decode(anchor, **options))
    found = tokenizer.batch_decode([[*anchor, i] for i in range(known)], **options)
    texts = [None if i in special else _sound(text[before:]) for i, text in enumerate(found)]
    declared = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(declared if isinstance(declared, (list, tuple)) else [declared])}
    return Pieces(tuple(texts + [None] * (size - known)), special, tuple(sorted(e for e in ends if e is not None)))


def _sound(text: str) -> str | None:
    return None if not text or BROKEN in text else text
