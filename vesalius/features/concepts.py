"""Concepts: labelled phrases that an axis is found from, and held-out ones that it is judged by.

Those shipped are files of `data/concepts/`; a user's own is a `.csv` or `.jsonl` file with the columns

    text, label         one phrase a row; label: positive/negative, 1/0, 1/-1, or any two words (the first is positive)
    pair (optional)     rows with the same value say the same thing in two ways and are left out together
    rating (optional)   of a held-out phrase, instead of a label: how much of the concept it has, any scale
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vesalius.errors import UnknownName, VesaliusError
from vesalius.rows import csv_rows, is_text, jsonl_rows

LEAST = 8  # phrases of each pole: below, not even a perfect split of them is unlikely by chance in high dimension
_POLES = {"positive": 1, "negative": -1, "1": 1, "+1": 1, "1.0": 1, "0": -1, "-1": -1, "0.0": -1, "-1.0": -1}


@dataclass(frozen=True)
class Concept:
    """Phrases of two poles.

    Attributes:
        name: short name. poles: what the positive and the negative pole are called.
        positive, negative: phrases to find the axis from.
        templates: sentences with `{}` for the phrase; a phrase's vector is the mean over them. Empty: as it stands.
        paired: `positive[i]` and `negative[i]` belong together, so that both are left out at once.
        graded: held-out phrases with ratings. pairs: held-out (more, less) phrases.
        groups: for each phrase (positive, then negative) what it is left out with; made from `paired` if empty.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    templates: tuple[str, ...] = ()
    poles: tuple[str, str] = ("positive", "negative")
    paired: bool = False
    graded: Mapping[str, float] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    groups: tuple[str, ...] = ()
    what: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        for pole, phrases in zip(self.poles, (self.positive, self.negative), strict=True):
            if len(phrases) < LEAST:
                raise VesaliusError(
                    f"concept '{self.name}' has {len(phrases)} {pole} phrases; an axis needs {LEAST} or more of each"
                )
            for text in phrases:
                if not text.strip():
                    raise VesaliusError(f"concept '{self.name}' has an empty {pole} phrase; take it out")
        few, many = sorted((len(self.positive), len(self.negative)))
        if many > 4 * few:
            raise VesaliusError(
                f"concept '{self.name}' has {len(self.positive)} {self.poles[0]} and {len(self.negative)} "
                f"{self.poles[1]} phrases; the smaller side needs {-(-many // 4)}, a quarter of the larger"
            )
        both = set(self.positive) & set(self.negative)
        if both:
            raise VesaliusError(f"concept '{self.name}': '{sorted(both)[0]}' stands on both sides; decide for one")
        seen: dict[str, str] = {}
        for text, group in zip(self.phrases, self.held_together, strict=False):
            if seen.setdefault(text, group) != group:
                raise VesaliusError(
                    f"concept '{self.name}': '{text}' stands there twice, so that it would be judged by itself; take "
                    "one out, or give both rows the same pair"
                )
        for template in self.templates:
            if template.count("{}") != 1:
                raise VesaliusError(f"template {template!r} of '{self.name}' needs one {{}} where the phrase goes")

    @property
    def phrases(self) -> tuple[str, ...]:
        """All phrases, the positive ones first."""
        return self.positive + self.negative

    @property
    def held_together(self) -> tuple[str, ...]:
        """Which phrases are left out together, a key for each."""
        if self.groups:
            return self.groups
        if self.paired and len(self.positive) == len(self.negative):
            return tuple(str(i) for i in (*range(len(self.positive)), *range(len(self.negative))))
        return tuple(str(i) for i in range(len(self.phrases)))


@cache
def concepts() -> dict[str, str]:
    """The concepts that are shipped, with a line on each.

    Example:
        >>> sorted(concepts())
        ['formality', 'moral', 'politeness', 'sentiment']
    """
    found = {}
    for path in sorted((resources.files("vesalius.features") / "data" / "concepts").iterdir(), key=lambda p: p.name):
        if path.name.endswith(".yaml"):
            found[path.name.removesuffix(".yaml")] = str(yaml.safe_load(path.read_text("utf-8"))["what"])
    return found


def concept(what: str | Path | Concept) -> Concept:
    """The concept of that name, or the one in a user's `.csv` or `.jsonl` file.

    Raises:
        UnknownName: for a name that is none. VesaliusError: for a file that cannot be used.

    Example:
        >>> len(concept("moral").positive), concept("moral").pairs[0]
        (50, ('kill bacteria', 'kill children'))
    """
    if isinstance(what, Concept):
        return what
    if isinstance(what, Path) or Path(what).suffix in (".csv", ".jsonl") or "/" in what:
        return _read(Path(what))
    if what not in concepts():
        raise UnknownName("concept", what, concepts(), "or give a .csv or .jsonl file with text and label")
    path = resources.files("vesalius.features") / "data" / "concepts" / f"{what}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    for pole in ("positive", "negative"):
        words = found[pole]
        found[pole] = tuple(words.split() if isinstance(words, str) else words)
    for key in ("templates", "poles"):
        found[key] = tuple(found.get(key) or getattr(Concept, key))
    found["pairs"] = tuple((more, less) for more, less in found.get("pairs", ()))
    return Concept(name=what, **found)


def rows(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a `.csv` or `.jsonl` file, each with its line as `where`.

    Raises:
        VesaliusError: the file or a line of it cannot be read, or lacks one of the columns.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise VesaliusError(f"{path} is neither .csv nor .jsonl; write it as one of them with {', '.join(needed)}")
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise VesaliusError(f"no file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise VesaliusError(f"{path} cannot be read as UTF-8 text: {error}") from None
    found = [{**row, "where": f"{path.name} line {number}"} for number, row in _numbered(path, text)]
    if not found:
        raise VesaliusError(f"{path} holds no rows; write one for each text, with {', '.join(needed)}")
    for row in found:
        for key in needed:
            if row.get(key) is None or str(row[key]).strip() == "":
                has = ", ".join(k for k in row if k and k != "where")
                raise VesaliusError(f"{row['where']}: no '{key}' (it has {has}); the columns are {', '.join(needed)}")
        for key, value in row.items():
            if isinstance(value, (list, dict)) or not is_text(str(value)):
                raise VesaliusError(f"{row['where']}: '{key}' is {value!a}, which is neither a text nor a number")
    return found


def _numbered(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their lines."""
    if path.suffix == ".jsonl":
        yield from jsonl_rows(path.name, text)
        return
    rows = csv_rows(path.name, text)
    header = next(rows, (0, []))[1]
    for number, cells in rows:
        yield number, dict(zip(header, cells, strict=True))


def _rating(row: Mapping[str, Any], graded: Mapping[str, float]) -> float:
    """The rating of a row's text, which has no other yet."""
    try:
        found = float(str(row["rating"]))
    except ValueError:
        found = float("nan")
    if not math.isfinite(found):
        raise VesaliusError(f"{row['where']}: rating {row['rating']!r} is not a number")
    if graded.get(str(row["text"]), found) != found:
        raise VesaliusError(f"{row['where']}: '{row['text']}' has another rating further up; decide for one")
    return found


def _read(path: Path) -> Concept:
    found = rows(path, ["text"])
    graded: dict[str, float] = {}
    labelled: list[tuple[str, str, str]] = []
    for i, row in enumerate(found):
        rating, label = row.get("rating"), row.get("label")
        if rating not in (None, ""):
            graded[str(row["text"])] = _rating(row, graded)
        elif label is None or str(label).strip() == "":
            raise VesaliusError(f"{row['where']}: neither a label nor a rating; give one of them")
        else:
            group = row.get("pair")
            labelled.append((str(row["text"]), str(label).strip(), f"row {i}" if group in (None, "") else str(group)))
    names = list(dict.fromkeys(label for _, label, _ in labelled))
    if len(names) != 2:
        shown = ", ".join(names[:6]) or "none"
        raise VesaliusError(f"{path.name} has {len(names)} labels ({shown}); an axis needs exactly two")
    signs = {n: _POLES.get(n.lower(), 0) for n in names}
    if sorted(signs.values()) != [-1, 1]:
        signs = {names[0]: 1, names[1]: -1}
    ordered = sorted(labelled, key=lambda row: -signs[row[1]])
    return Concept(
        name=path.stem,
        positive=tuple(t for t, n, _ in ordered if signs[n] > 0),
        negative=tuple(t for t, n, _ in ordered if signs[n] < 0),
        poles=(next(n for n in names if signs[n] > 0), next(n for n in names if signs[n] < 0)),
        graded=graded,
        groups=tuple(g for _, _, g in ordered),
        what=f"the phrases of {path.name}",
    )
