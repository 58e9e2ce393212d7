"""Token mode: every token's own text must pass every filter; the mask is made once.

This is the Constrained Text Generation Studio as published. A word of several tokens is judged piece by piece, so rules
about whole words (syllables, rhyme) can be broken by words that are put together: word mode cannot. Tokens without a
letter or a digit (spaces, marks) and those that end the text pass by rule; special tokens and those that are not valid
text on their own do not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from vesalius.apply.writing.language import Rules
from vesalius.apply.writing.pieces import Pieces
from vesalius.errors import VesaliusError
from vesalius.model.stack import Rule


class TokenRule(Rule):
    """Token mode as a rule of the decoding stack: one mask, whatever was written.

    Args:
        rules: about words. vocabulary: the tokens' texts. see: what is done to a text before filters see it.

    Raises:
        VesaliusError: for rules about lines, which no single token can keep; or if no word is left.
    """

    name = "tokens"

    def __init__(self, rules: Rules, vocabulary: Pieces, see: Callable[[str], str]) -> None:
        if rules.lines:
            raise VesaliusError(
                f"'{rules.lines[0][0]}' is about lines, and token mode judges one token at a time; use word mode"
            )
        self.rules, self.vocabulary, self.see = rules, vocabulary, see
        self.mask = torch.tensor([self._why(t) is not None for t in range(len(vocabulary))])
        with_word = [i for i, t in enumerate(vocabulary.texts) if t and any(c.isalnum() for c in t)]
        if bool(self.mask[with_word].all()):
            raise VesaliusError(f"no token keeps {' and '.join(map(repr, rules.names))}; loosen a rule")

    def _why(self, token: int) -> str | None:
        text = self.vocabulary.texts[token]
        if token in self.vocabulary.ends:
            return None
        if text is None:
            return self.vocabulary.none(token)
        if not any(c.isalnum() for c in text):
            seen = self.see(text)  # banned strings may be marks
            return next((w for _, f in self.rules.words if f.closed and (w := f.why(seen))), None) if seen else None
        seen = self.see(text)
        return next((w for _, f in self.rules.words if (w := f.why(seen))), None)

    def barred(self, state: Hashable) -> Tensor:
        """The one mask."""
        return self.mask

    def reason(self, state: Hashable, token: int) -> str:
        """What the first filter says that refuses it."""
        return (
            f"{(self.vocabulary.texts[token] or '').strip()!r} {self._why(token)}"
            if self.vocabulary.texts[token]
            else self.vocabulary.none(token)
        )
