"""Codebook features: a model whose hidden states are means of few codes, to read and to force."""

from vesalius.features.codebooks.books import Codebooks
from vesalius.features.codebooks.layer import Codebook
from vesalius.features.codebooks.reading import Chosen, chosen, fit, pattern_labels, texts_of
from vesalius.features.codebooks.training import CodebookRecipe, train_codebooks

__all__ = [
    "Chosen", "Codebook", "CodebookRecipe", "Codebooks", "chosen", "fit", "pattern_labels", "texts_of",
    "train_codebooks",
]  # fmt: skip
