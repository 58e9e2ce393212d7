"""Text written under rules: filters over the vocabulary, in token mode and in word mode, and a rule language."""

from vesalius.apply.writing.filters import FILTERS, Filter
from vesalius.apply.writing.language import Rules, known_rules, parse
from vesalius.apply.writing.transforms import TRANSFORMS
from vesalius.apply.writing.write import Text, Writer, as_table, drawing, writer, written

__all__ = [
    "FILTERS", "TRANSFORMS", "Filter", "Rules", "Text", "Writer", "as_table", "drawing", "known_rules", "parse",
    "writer", "written",
]  # fmt: skip
