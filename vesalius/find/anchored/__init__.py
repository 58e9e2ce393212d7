"""Anchored answers: how far a model's letter follows the place rather than the option, who does it, and the repair."""

from vesalius.find.anchored.bias import Bias, bias, knowledge, known, letter_logits, letter_tokens, prior_of, variation
from vesalius.find.anchored.diagnosis import Diagnosis, diagnose
from vesalius.find.anchored.examine import Examined, examine
from vesalius.find.anchored.questions import LETTERS, SOURCES, Choice, draw, place, read
from vesalius.find.anchored.repair import (
    ValueEdit,
    even_look,
    fit_values,
    label_aware,
    letter_places,
    looking_heads,
    moved,
    random_values,
    text_loss,
)

__all__ = [
    "LETTERS", "SOURCES", "Bias", "Choice", "Diagnosis", "Examined", "ValueEdit", "bias", "diagnose", "draw",
    "even_look",
    "examine",
    "fit_values", "knowledge", "known", "label_aware", "letter_logits", "letter_places", "letter_tokens",
    "looking_heads", "moved", "place", "prior_of", "random_values", "read", "text_loss", "variation",
]  # fmt: skip
