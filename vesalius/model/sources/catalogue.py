"""The models that open by a short name, read from catalogue.yaml, and what of everything is here already."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vesalius.errors import ModelError
from vesalius.model.sources import hub
from vesalius.model.sources.cache import Cache, Cached, cache_folder
from vesalius.model.sources.checkpoint import weight_files
from vesalius.model.sources.spec import Hub, Wheel, parse_wheel

FILE = Path(__file__).parent.parent / "catalogue.yaml"
KEY_DIGITS = 16


@dataclass(frozen=True)
class Entry:
    """One row of catalogue.yaml; `source` says where its files come from."""

    name: str
    what: str
    parameters: int
    licence: str
    source: Hub | Wheel
    download_bytes: int | None
    disk_bytes: int | None


@dataclass(frozen=True)
class CatalogueRow:
    """One model that can be opened here, as `vesalius models` lists it.

    Attributes:
        name: what to give as the model.
        what: one line.
        parameters: how many, where known.
        licence: as stated.
        needs_network: whether opening it now would have to fetch something.
        cached: whether a copy is on this machine.
        path: of that copy.
        size_bytes: of that copy on disk, or what it will take; None where not known.
        source: hub name, or the wheels it comes from.
        problem: what is wrong with the copy on this machine and how to repair it; empty when nothing is.
        download_bytes: to fetch, if it has to be; None where not known.
    """

    name: str
    what: str
    parameters: int | None
    licence: str
    needs_network: bool
    cached: bool
    path: Path | None
    size_bytes: int | None
    source: str
    problem: str = ""
    download_bytes: int | None = None


@functools.cache
def catalogue() -> dict[str, Entry]:
    """The rows of catalogue.yaml by name."""
    content = yaml.safe_load(FILE.read_text("utf-8"))
    return {name: _entry(name, row) for name, row in content["models"].items()}


def default_model() -> str:
    """The short name that is opened when none is given."""
    return str(yaml.safe_load(FILE.read_text("utf-8"))["default"])


def listing(cache: Path | None = None) -> list[CatalogueRow]:
    """What can be opened here by a short name, then what else lies in the cache. Nothing is fetched or hashed."""
    store = Cache(cache_folder(cache))
    found = store.entries()
    rows = [_row(entry, found) for entry in catalogue().values()]
    rows += [_cached_row(c) for c in found.values() if isinstance(c, Cached)]
    rows += [_damaged_row(key, store.find(key), error) for key, error in found.items() if isinstance(error, ModelError)]
    return rows


def _entry(name: str, row: dict[str, Any]) -> Entry:
    if "wheel" in row:
        source: Hub | Wheel = parse_wheel(f"wheel:{row['wheel']}#sha256={row['sha256']}")
    else:
        repo, _, revision = row["hub"].partition("@")
        source = Hub(repo, revision or None)
    return Entry(
        name, row["what"], int(row["parameters"]), row["licence"], source, row.get("download"), row.get("disk")
    )


def _row(entry: Entry, found: dict[str, Cached | ModelError]) -> CatalogueRow:
    path, size, problem = None, entry.disk_bytes, ""
    if isinstance(entry.source, Hub):
        source = entry.source.repo
        folder = hub.cached(entry.source)
        if folder is not None:
            try:
                weight_files(folder)
            except ModelError:  # begun and never finished: opening it asks the hub for the rest
                pass
            else:
                path, size = folder, sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    else:
        source = " + ".join(p.requirement for p in entry.source.parts)
        here = found.pop(str(entry.source.sha256)[:KEY_DIGITS], None)
        if isinstance(here, Cached):
            path, size = here.folder, here.size_bytes
        elif here is not None:
            problem = str(here)
    have = path is not None
    to_fetch = None if have else entry.download_bytes
    return CatalogueRow(
        entry.name, entry.what, entry.parameters, entry.licence, not have, have, path, size, source, problem, to_fetch
    )


def _cached_row(cached: Cached) -> CatalogueRow:
    note = cached.note
    return CatalogueRow(
        # A wheel is found again by its spec; the GGUF file may be gone by now, but its checkpoint opens as a folder.
        name=str(note["spec"]) if "source" in note else str(cached.folder),
        what=f"converted from {note.get('origin', 'a file')}",
        parameters=None,
        licence=str(note.get("licence", "not stated")),
        needs_network=False,
        cached=True,
        path=cached.folder,
        size_bytes=cached.size_bytes,
        source=str(note.get("origin", "")),
    )


def _damaged_row(key: str, folder: Path | None, error: ModelError) -> CatalogueRow:
    name = folder.name if folder is not None else key
    return CatalogueRow(name, "a damaged copy", None, "not stated", True, False, folder, None, "", str(error))
