"""Dictionaries: sparse autoencoders (trained, read, put in place) and the discrete codes of heads."""

from vesalius.features.dictionaries.meaning import Meaning, meanings
from vesalius.features.dictionaries.places import parse_place, place_name
from vesalius.features.dictionaries.quality import Quality, quality
from vesalius.features.dictionaries.reading import Rows, corpus_rows, gather, prompt_rows
from vesalius.features.dictionaries.sae import SAE
from vesalius.features.dictionaries.splice import changing, spliced
from vesalius.features.dictionaries.training import SAERecipe, train_sae

__all__ = [
    "SAE", "Meaning", "Quality", "Rows", "SAERecipe", "changing", "corpus_rows", "gather", "meanings", "parse_place",
    "place_name", "prompt_rows", "quality", "spliced", "train_sae",
]  # fmt: skip
