"""Methods that score parts and edges: `find(method, model, task) -> Scores`."""

from vesalius.callable_module import callable_as
from vesalius.find.base import METHODS, find

callable_as(__name__, find)

__all__ = ["METHODS", "find"]
