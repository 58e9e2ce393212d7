"""Units of MLPs that follow sentences and phrases: frequency tagging, and similarity with recordings."""

from vesalius.features.frequency.series import Series, unit_series, untrained
from vesalius.features.frequency.similarity import Recordings, read_recordings, similarity
from vesalius.features.frequency.stimuli import made_sentences, natural_sentences, read_sentences
from vesalius.features.frequency.tagging import Tagged, frequency_tagging, overlap

__all__ = [
    "Recordings", "Series", "Tagged", "frequency_tagging", "made_sentences", "natural_sentences", "overlap",
    "read_recordings", "read_sentences", "similarity", "unit_series", "untrained",
]  # fmt: skip
