"""What finding a model gives: an ordinary Hugging Face checkpoint on disk, and where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, float | None], None]
"""Told each step of a fetch: a message, and the fraction of that step that is done (None where it is not known)."""


@dataclass(frozen=True)
class Located:
    """A model found on this machine.

    Attributes:
        folder: an ordinary Hugging Face checkpoint: config.json, safetensors, tokenizer files.
        name: short, for tables and headings.
        spec: what the user asked for.
        sha256: of the weights; several files count as the list of their names and hashes.
        fingerprint: 16 hex digits over weights and configuration. Two checkpoints that share it compute the same.
        origin: one line on where the files came from.
        licence: as its publisher or the catalogue states it; "not stated" otherwise.
    """

    folder: Path
    name: str
    spec: str
    sha256: str
    fingerprint: str
    origin: str
    licence: str


def silent(message: str, fraction: float | None = None) -> None:
    """The `Progress` that says nothing."""


def megabytes(size_bytes: float) -> str:
    """A size for people: "93 MB"."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{max(1, round(size_bytes / 1e6))} MB"
