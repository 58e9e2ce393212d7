"""Architectures of record by name, read from `presets/*.yaml`, and tiny ones for a CPU."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import pandas as pd
import yaml

from vesalius.build.architecture import Architecture
from vesalius.errors import UnknownName


@cache
def _table() -> dict[str, dict[str, Any]]:
    """The keys of every preset, and beside them its paper under "paper"."""
    table: dict[str, dict[str, Any]] = {}
    folder = resources.files("vesalius.build").joinpath("presets")
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if not path.name.endswith(".yaml"):
            continue
        data = yaml.safe_load(path.read_text("utf-8"))
        for family in data.get("families", {"": data}).values():
            for name, size in family["sizes"].items():
                if name in table:
                    raise ValueError(f"{path.name}: preset '{name}' is described twice")
                table[name] = {**family["common"], **size, "paper": data["paper"]}
    return table


def preset(name: str, **changes: Any) -> Architecture:
    """The architecture of that name, with some keys changed.

    Raises:
        UnknownName: for a name that is not among `presets()`, or a key that does not exist.

    Example:
        >>> preset("pythia-70m").d_model, preset("pythia-70m", layers=3).layers
        (512, 3)
    """
    if name not in _table():
        raise UnknownName("preset", name, _table())
    found = Architecture(**{key: value for key, value in _table()[name].items() if key != "paper"})
    return found.replace(**changes) if changes else found


def presets() -> pd.DataFrame:
    """All presets: name, kind, parameters, layers, d_model, heads, vocab_size, the class they are built as, paper."""
    from vesalius.build.counting import parameters
    from vesalius.build.stock import STOCK, stock_name

    rows = []
    for name, keys in _table().items():
        a = preset(name)
        stock = stock_name(a)
        built = "Vesalius" if stock is None else STOCK[stock].model
        rows.append((name, a.kind, parameters(a), a.layers, a.d_model, a.heads, a.vocab_size, built, keys["paper"]))
    columns = ["name", "kind", "parameters", "layers", "d_model", "heads", "vocab_size", "class", "paper"]
    return pd.DataFrame(rows, columns=columns)
