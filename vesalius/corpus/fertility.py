"""How a tokenizer cuts text: numbers that do not depend on its vocabulary's size alone.

fertility = tokens / words          words are runs of characters other than whitespace
bytes per token                     UTF-8
round trip                          share of documents that come back exactly
grapheme split                      share of what a reader sees as one character (UAX 29) that lies in two tokens
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vesalius.corpus.documents import CorpusError, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenizerStatistics:
    """Counts over documents; the ratios are properties."""

    documents: int
    tokens: int
    words: int
    characters: int
    bytes: int
    graphemes: int
    graphemes_split: int
    exact: int
    unknown: int

    @property
    def fertility(self) -> float:
        """Tokens a word."""
        return self.tokens / self.words if self.words else float("nan")

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token."""
        return self.bytes / self.tokens if self.tokens else float("nan")

    @property
    def round_trip(self) -> float:
        """Share of documents whose text comes back exactly."""
        return self.exact / self.documents

    @property
    def grapheme_split(self) -> float:
        """Share of graphemes that lie in more than one token."""
        return self.graphemes_split / self.graphemes if self.graphemes else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Counts and ratios, for a table."""
        ratios = {k: getattr(self, k) for k in ("fertility", "bytes_per_token", "round_trip", "grapheme_split")}
        return {**asdict(self), **ratios}


def statistics(tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document | str]) -> TokenizerStatistics:
    """Counts what the tokenizer makes of texts; special tokens are not added.

    Raises:
        CorpusError: there are no documents.
    """
    import regex  # type: ignore[import-untyped]
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()

    total = dict.fromkeys(TokenizerStatistics.__dataclass_fields__, 0)
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    for document in documents:
        text = document if isinstance(document, str) else document.text
        encoding = backend.encode(text, add_special_tokens=False)
        ids = encoding.ids
        total["documents"] += 1
        total["tokens"] += len(ids)
        total["words"] += len(text.split())
        total["characters"] += len(text)
        total["bytes"] += len(text.encode())
        total["exact"] += tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        total["unknown"] += 0 if unknown_id is None else ids.count(unknown_id)
        spans = np.array([m.span() for m in regex.finditer(r"\X", text)], dtype=np.int64).reshape(-1, 2)
        total["graphemes"] += len(spans)
        offsets = np.array([o for o in encoding.offsets if o[1] > o[0]], dtype=np.int64).reshape(-1, 2)
        # tokens that begin before the grapheme ends, less those that end where it begins or earlier
        touching = np.searchsorted(offsets[:, 0], spans[:, 1], "left") - np.searchsorted(
            offsets[:, 1], spans[:, 0], "right"
        )
        total["graphemes_split"] += int((touching > 1).sum())
    if not total["documents"]:
        raise CorpusError("there are no documents to take statistics of")
    return TokenizerStatistics(**total)
