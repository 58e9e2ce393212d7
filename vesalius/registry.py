"""Names to objects, loaded when first used.

Each room keeps one `Registry`. An entry is either the object itself (registered with the decorator) or a lazy
"module:attribute" string, so that `import vesalius` stays light and `--help` can list everything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vesalius.errors import UnknownName

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One registered name: where it is, what it is for, and where it was published."""

    name: str
    target: Any  # the object, or "module:attribute"
    summary: str
    paper: str = ""
    info: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """A table of named objects of one kind ("task", "method", ...), refusing doubles and suggesting near names.

    Example:
        >>> methods: Registry = Registry("method")
        >>> @methods.register("zero", summary="always zero")
        ... def zero(): return 0
        >>> methods.get("zero")()
        0
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, target: Any, summary: str, paper: str = "", **info: Any) -> None:
        """Registers `target` (an object or "module:attribute") under `name`; a second one of that name is refused."""
        old = self._entries.get(name)
        if old is not None and old.target is not target and old.target != target:
            raise ValueError(f"{self.kind} '{name}' is registered twice: {old.target} and {target}")
        self._entries[name] = Entry(name, target, summary, paper, info)

    def register(self, name: str, summary: str, paper: str = "", **info: Any) -> Callable[[T], T]:
        """Decorator form of `add`."""

        def wrap(obj: T) -> T:
            self.add(name, obj, summary, paper, **info)
            return obj

        return wrap

    def entry(self, name: str) -> Entry:
        """The entry of that name; raises `UnknownName` with the nearest names otherwise."""
        if name not in self._entries:
            raise UnknownName(self.kind, name, self._entries)
        return self._entries[name]

    def get(self, name: str) -> T:
        """The object of that name, imported now if it was registered lazily."""
        target = self.entry(name).target
        if isinstance(target, str):
            module, attribute = target.split(":")
            target = getattr(importlib.import_module(module), attribute)
        return target

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda e: e.name))

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
