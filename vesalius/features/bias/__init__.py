"""Bias audit: associations of embeddings, co-occurrence in texts, suggestions of a model, groups compared."""

from vesalius.features.bias.cooccurrence import Corpus, GenderBias, genbit, word_bias
from vesalius.features.bias.groups import LEANS, Comparison, compare, leans
from vesalius.features.bias.pipeline import (
    Suggestions,
    continuations,
    labour_statistics,
    pronoun_preference,
    suggest,
    with_statistics,
)
from vesalius.features.bias.weat import Association, associations, audit, holm, profile, weat
from vesalius.features.bias.words import Gendered, Test, WordSet, tests

__all__ = [
    "LEANS",
    "Association", "Comparison", "Corpus", "GenderBias", "Gendered", "Suggestions", "Test", "WordSet", "associations",
    "audit", "compare", "continuations", "genbit", "holm", "labour_statistics", "leans", "profile",
    "pronoun_preference", "suggest", "tests", "weat", "with_statistics", "word_bias",
]  # fmt: skip
