"""A language whose sentences are look-ups: a, m, b with m = table[a, b].

The table is a Latin square: every m stands once in each row and each column, so that neither a alone nor b alone tells
anything of m. Read from the left, m is as uncertain as a, and b follows from a and m; filled in from both sides, m is
certain. So it tells whether a model can fill in (UL2R, Tay et al. 2022, arXiv 2210.11399) apart from whether it knows
the language.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vesalius.corpus.documents import CorpusError, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int64]
END, PAD = "<eos>", "<pad>"


class LookupGrammar:
    """The sentences of one table.

    Args:
        size: symbols of each kind; the table has size x size entries.
        seed: of the table.

    Attributes:
        table: (a, b) -> m, numbers 0 .. size - 1.

    Example:
        >>> grammar = LookupGrammar(16, seed=0)
        >>> sorted(set(grammar.table[3])) == sorted(set(grammar.table[:, 3])) == list(range(16))
        True
        >>> len(next(grammar.documents(1, sentences=2)).text.split())
        6
    """

    def __init__(self, size: int = 16, seed: int = 0) -> None:
        if size < 2:
            raise CorpusError(f"a look-up table of size {size} tells nothing; give 2 or more")
        self.size, self.seed = size, seed
        rng = np.random.default_rng([seed, *b"lookup table"])
        rows, columns, names = (rng.permutation(size) for _ in range(3))
        self.table: Ids = names[(rows[:, None] + columns[None, :]) % size].astype(np.int64)  # (a, b)

    def pairs(self, n: int, stream: str = "", number: int = 0) -> Ids:
        """Drawn (a, b), all alike likely, (n, 2); a function of (seed, stream, number)."""
        rng = np.random.default_rng([self.seed, number, *f"lookup pairs/{stream}".encode()])
        return rng.integers(0, self.size, (n, 2))

    def sentence(self, a: int, b: int) -> str:
        """Its text: "a3 m7 b12"."""
        return f"a{a} m{int(self.table[a, b])} b{b}"

    def documents(self, n: int, sentences: int = 16, stream: str = "train") -> Iterator[Document]:
        """Documents of so many sentences.

        Args:
            n: documents. sentences: of each.
            stream: another word gives other draws from the same table.
        """
        for number in range(n):
            text = " ".join(self.sentence(int(a), int(b)) for a, b in self.pairs(sentences, stream, number))
            yield Document(f"lookup-{stream}-{number}", text, "lookup", number + 1)

    def tokenizer(self, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
        """One token a word: the a's, the m's, the b's (in this order); then end, padding and `special`."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = [f"{kind}{i}" for kind in "amb" for i in range(self.size)]
        vocabulary = {f"▁{word}": i for i, word in enumerate(words)}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="▁a0"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace(prepend_scheme="always")
        made.add_special_tokens([END, PAD, *special])
        return PreTrainedTokenizerFast(
            tokenizer_object=made, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
        )

    def rows(self, n: int, sentences: int, stream: str = "test") -> tuple[Ids, Ids]:
        """Sentences as tokens of `tokenizer`, and where one m of each row stands, never in the first or last sentence.

        Returns:
            ids (n, 3 sentences), place (n,).
        """
        if sentences < 3:
            raise CorpusError(f"rows of {sentences} sentences have no inner one; give 3 or more")
        drawn = np.stack([self.pairs(sentences, stream, i) for i in range(n)])  # (row, sentence, 2)
        a, b = drawn[..., 0], drawn[..., 1]
        ids = np.stack([a, self.size + self.table[a, b], 2 * self.size + b], axis=-1).reshape(n, -1)
        rng = np.random.default_rng([self.seed, *f"lookup places/{stream}".encode()])
        return ids.astype(np.int64), (3 * rng.integers(1, sentences - 1, n) + 1).astype(np.int64)

    def every(self) -> Ids:
        """All sentences as tokens of `tokenizer`, (size * size, 3): a, m, b."""
        a, b = np.divmod(np.arange(self.size**2), self.size)
        return np.stack([a, self.size + self.table[a, b], 2 * self.size + b], axis=1).astype(np.int64)
