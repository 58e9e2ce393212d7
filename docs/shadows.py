"""Lets the documentation's reader of source code tell `vesalius.find`, a function, from `vesalius.find`, a package."""

from __future__ import annotations

from typing import Any

import griffe


class Packages(griffe.Extension):
    """Drops names of the front door that are also packages, so that what lies inside those packages is found."""

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        """Called when the names of a module are known and its submodules are not yet."""
        if mod.path == "vesalius":
            for name in ("find", "prove", "report"):
                if name in mod.members and mod.members[name].is_alias:
                    del mod.members[name]
