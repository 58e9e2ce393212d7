"""Lets `vesalius.find(...)` and `vesalius.prove(...)` be called although `find` and `prove` are also packages.

Importing a subpackage binds its name on the parent, hiding a function of the same name; a callable module is both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def callable_as(name: str, function: Callable[..., Any]) -> None:
    """Makes the module of that name callable as the function."""

    class Callable_(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    Callable_.__call__.__doc__ = function.__doc__
    Callable_.__call__.__wrapped__ = function  # type: ignore[attr-defined]
    sys.modules[name].__class__ = Callable_
