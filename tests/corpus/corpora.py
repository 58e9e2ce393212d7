"""A small corpus with many short words, and its tokenizers, made once."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from vesalius.corpus import Document, train_tokenizer

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "he",
    "she",
    "it",
    "was",
    "her",
    "his",
    "him",
    "that",
    "with",
    "for",
    "as",
    "had",
    "not",
    "at",
    "on",
    "is",
    "by",
    "but",
    "they",
    "from",
    "be",
    "were",
    "so",
    "water",
    "light",
    "earth",
    "house",
    "river",
    "stone",
    "king",
    "city",
    "word",
    "hand",
    "day",
    "night",
    "man",
    "woman",
    "child",
    "fire",
    "tree",
    "road",
    "field",
    "ship",
]


@functools.cache
def texts(n: int = 60, seed: int = 0) -> tuple[Document, ...]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        words = rng.choice(WORDS, rng.integers(5, 60)).tolist()
        body = " ".join(words) + f" number {number}. Ünï☕ é\n"
        made.append(Document(f"d{number}", body, "made", number + 1))
    return tuple(made)


@functools.cache
def tokenizer(kind: str = "bpe") -> Any:
    return train_tokenizer(
        texts(), kind, None if kind == "bytes" else 520, **({} if kind != "bpe" else {"multiple": 8})
    )
