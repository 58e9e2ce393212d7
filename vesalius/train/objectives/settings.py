"""Settings of an objective, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vesalius.errors import UnknownName, VesaliusError


def number(owner: str, name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Refuses what is not a number within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        limits = f"from {low} on" if high == float("inf") else f"from {low} to {high}"
        raise VesaliusError(f"{owner}.{name} is {value!r}; give a number {limits}")


def whole(owner: str, name: str, value: Any, low: int) -> None:
    """Refuses what is not a whole number from `low` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise VesaliusError(f"{owner}.{name} is {value!r}; give a whole number from {low} on")


def flag(owner: str, name: str, value: Any) -> None:
    """Refuses what is neither true nor false."""
    if not isinstance(value, bool):
        raise VesaliusError(f"{owner}.{name} is {value!r}; give true or false")


def choice(owner: str, name: str, value: Any, known: Sequence[str]) -> None:
    """Refuses a word that is not one of those known."""
    if value not in known:
        raise UnknownName(f"{owner}.{name}", str(value), known)


def known(owner: str, made: type, given: Sequence[str]) -> None:
    """Refuses a setting that the objective's class does not have, suggesting the nearest."""
    names = [f.name for f in dataclasses.fields(made) if f.init and f.name != "needs"]
    for name in given:
        if name not in names:
            raise UnknownName(f"setting of objective '{owner}'", name, names)


def kinds(owner: str, kind: str, able: Sequence[str]) -> None:
    """Refuses a kind of model the objective cannot train."""
    if kind not in able:
        raise VesaliusError(f"objective '{owner}' trains {' or '.join(able)} models, not a {kind} one")
