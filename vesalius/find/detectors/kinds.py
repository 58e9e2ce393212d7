"""Ordinal series (days, months, numbers, letters ...) whose items are single tokens of an opened model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from vesalius.errors import UnknownName
from vesalius.find.detectors.base import NotHere
from vesalius.model import Model
from vesalius.tasks import wordlist

FEWEST = 5  # items of a series that are still worth a question
LEADS = (" ", "")  # what may stand before an item
CASES = (str, str.lower, str.upper)


@dataclass(frozen=True)
class Kind:
    """One series under one tokenizer.

    Attributes:
        name: what it is. texts: its items as the tokenizer writes them, in order. tokens: their ids.
        follows: for each item its successor's place, -1 where that is no single token, (item,).
        lead: what stands before an item in a text.
    """

    name: str
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    follows: tuple[int, ...]
    lead: str

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Places of items and of their successors."""
        return [(i, j) for i, j in enumerate(self.follows) if j >= 0]


def series() -> dict[str, tuple[list[str], bool]]:
    """Every known series: its items, and whether it begins again after the last."""
    text = (resources.files("vesalius.find.detectors") / "data" / "kinds.yaml").read_text("utf-8")
    found = {}
    for name, entry in yaml.safe_load(text).items():
        low, high = entry.get("range", (1, 0))
        items = wordlist(entry["list"]) if "list" in entry else entry.get("items") or [*map(str, range(low, high + 1))]
        found[name] = (list(items), bool(entry.get("round", False)))
    return found


def kinds_of(model: Model, names: str = "all", fewest: int = FEWEST) -> list[Kind]:
    """The series of which at least `fewest` items are single tokens, in whichever form has the most of them.

    Args:
        names: `all`, or some of them (`days,months`).

    Raises:
        UnknownName: for a series that is not known. NotHere: if none has enough single tokens.
    """
    known = series()
    wanted = list(known) if names == "all" else [n.strip() for n in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UnknownName("series", name, known)
    if model.tokenizer is None:
        raise NotHere("series are words, and this model was opened without a tokenizer; open it with one")
    found = []
    for name in wanted:
        items, around = known[name]
        forms = [_kind(model.tokenizer, name, items, around, lead, case) for lead in LEADS for case in CASES]
        best = max(forms, key=lambda k: len(k.pairs))  # the first of equals: with a space, as written
        if len(best.pairs) >= fewest:
            found.append(best)
    if not found:
        raise NotHere(
            f"of no series ({', '.join(wanted)}) are {fewest} items with their successors single tokens of "
            f"{model.name}'s vocabulary; successor heads cannot be asked for here"
        )
    return found


def _kind(tokenizer: Any, name: str, items: list[str], around: bool, lead: str, case: Any) -> Kind:
    """A series in one form; items that are not one token of their own are left out."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    texts = [lead + case(item) for item in items]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    place: dict[int, int] = {}
    kept: list[tuple[str, int]] = []
    for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if len(ids) == 1 and ids[0] != unknown and str(tokenizer.decode(ids)).strip() == text.strip():
            place[i] = len(kept)
            kept.append((text, int(ids[0])))
    after = [(i + 1) % len(items) if around else i + 1 for i in range(len(items))]
    follows = tuple(place.get(after[i], -1) for i in place)
    return Kind(name, tuple(t for t, _ in kept), tuple(t for _, t in kept), follows, lead)
