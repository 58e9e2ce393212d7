"""A tokenizer for tasks whose ids are plain numbers: each id gets a made-up word, so that text tasks work too."""

from __future__ import annotations

from itertools import islice, product
from typing import TYPE_CHECKING

from vesalius.corpus.documents import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def symbol_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words of three to six letters divided by spaces, id by id: "bab dus" is two tokens.

    Example:
        >>> tokenizer = symbol_tokenizer(20)
        >>> tokenizer.decode([0, 7]), tokenizer("bab bal")["input_ids"]
        ('bab bal', [0, 5])
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    syllables = ["".join(s) for s in product(_CONSONANTS, _VOWELS, _CONSONANTS)]
    words = syllables + ["".join(s) for s in islice(product(syllables, repeat=2), max(0, vocab_size - len(syllables)))]
    if vocab_size < 1 or vocab_size > len(words):
        raise CorpusError(f"{vocab_size} symbols cannot be named; 1 to {len(syllables) ** 2} can")
    vocabulary = {f"▁{word}": number for number, word in enumerate(words[:vocab_size])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
