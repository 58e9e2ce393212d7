"""Edits: a model changed with what was found, recorded, reversible, and kept as an ordinary checkpoint."""

from vesalius.change.cut import Keep, cut
from vesalius.change.edit import Change, Edit, recording

__all__ = ["Change", "Edit", "Keep", "cut", "recording"]
