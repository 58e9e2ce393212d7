"""The cache of converted checkpoints: built beside their place, renamed into it whole, checked at each opening.

Its folders:
    CACHE/models/LABEL-KEY/     a checkpoint and its vesalius-source.json; KEY is from the sha256 of what it was made of
    CACHE/models/.building-*    work in progress, never read; what a killed process left is removed
    CACHE/locks/KEY.lock        held while KEY is built, so that two processes do not both convert
    CACHE/hashes/               remembered sha256 of files that lie elsewhere
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from vesalius.errors import DownloadError, ModelError
from vesalius.model.sources.hashing import flush_to_disk, sha256_of, write_json
from vesalius.model.sources.located import Progress

NOTE = "vesalius-source.json"
FORMAT = 1
BUILDING = ".building-"
OLD = ".old-"
DAY_S = 24 * 3600


def cache_folder(cache: Path | None = None) -> Path:
    """Where Vesalius keeps what it fetched: the argument, else $VESALIUS_CACHE, else under the user's cache folder."""
    if cache is not None:
        return Path(cache).expanduser().absolute()
    if own := os.environ.get("VESALIUS_CACHE"):
        return Path(own).expanduser().absolute()
    return platformdirs.user_cache_path("vesalius", appauthor=False)


@dataclass(frozen=True)
class Cached:
    """One whole checkpoint of the cache and its note."""

    folder: Path
    note: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(int(f["bytes"]) for f in self.note["files"].values())

    @property
    def weights_sha256(self) -> dict[str, str]:
        """sha256 of each weight file, by name."""
        return {n: str(f["sha256"]) for n, f in self.note["files"].items() if n.endswith(".safetensors")}


class Cache:
    """The cache under `root`. Nothing is written before something is built."""

    def __init__(self, root: Path) -> None:
        """Names the folder; it need not exist."""
        self.root = root
        self.models = root / "models"
        self.hashes = root / "hashes"

    def find(self, key: str) -> Path | None:
        """The folder of a key, whatever its label; not yet checked."""
        with contextlib.suppress(OSError):
            for folder in sorted(self.models.glob(f"*-{key}")):
                if not folder.name.startswith(".") and folder.is_dir():
                    return folder
        return None

    def open(self, folder: Path, name: str, verify: bool = False) -> Cached:
        """Checks a cached checkpoint against its note and returns it.

        Names and sizes are compared each time; the sha256 of a file when its time of change is not the noted one, and
        of every file with `verify`.

        Args:
            folder: of the checkpoint.
            name: for the repair command of the message.
            verify: hash every file.

        Raises:
            DownloadError: something is missing, added, cut short or changed. Nothing is repaired in silence.
        """
        repair = f"repair it with: vesalius models --refetch '{name}'"
        cached = _inspect(folder, repair)
        note = cached.note
        moved = False
        for file_name, entry in note["files"].items():
            path = folder / file_name
            mtime_ns = path.stat().st_mtime_ns
            if verify or mtime_ns != entry["mtime_ns"]:
                got = sha256_of(path)
                if got != entry["sha256"]:
                    raise DownloadError(
                        f"the cached {path} is damaged: expected sha256 {entry['sha256']}, got {got}; {repair}"
                    )
                moved = moved or mtime_ns != entry["mtime_ns"]
                entry["mtime_ns"] = mtime_ns
        if moved:  # a copied cache: the content was just proved, so that the next start need not hash it again
            with contextlib.suppress(OSError):
                write_json(folder / NOTE, note)
        return cached

    def build(
        self,
        key: str,
        label: str,
        fill: Callable[[Path], dict[str, Any]],
        progress: Progress,
        refetch: bool = False,
    ) -> Path:
        """Makes the checkpoint of a key, unless another process just did, and returns its folder.

        Args:
            key: hex digits that name the content.
            label: readable head of the folder's name.
            fill: writes the checkpoint's files into an empty folder and returns what the note should say of the source.
                It may use the folder's sub-folders as working space: they are removed.
            progress: told when another process has to be waited for.
            refetch: replace a checkpoint that is already there, once the new one is whole.
        """
        with _writing(self.root), self._lock(key, progress):
            here = self.find(key)
            if here is not None and not refetch:
                return here
            self._sweep(key)
            building = Path(tempfile.mkdtemp(prefix=f"{BUILDING}{key}-", dir=self.models))
            try:
                about = fill(building)
                for inner in building.iterdir():
                    if inner.is_dir():
                        shutil.rmtree(inner)
                building.chmod(0o755)
                for path in building.iterdir():  # safetensors are written for their owner alone
                    path.chmod(0o644)
                write_json(building / NOTE, _new_note(building, about))
                (building / NOTE).chmod(0o644)
                flush_to_disk(building)
                return self._put(building, here or self.models / f"{label}-{key}")
            finally:
                shutil.rmtree(building, ignore_errors=True)

    def entries(self) -> dict[str, Cached | ModelError]:
        """What the cache holds, by key: a checkpoint whose names and sizes are as noted, or what is wrong with it."""
        found: dict[str, Cached | ModelError] = {}
        with contextlib.suppress(OSError):
            for folder in sorted(self.models.iterdir()):
                if not folder.name.startswith(".") and folder.is_dir():
                    label, _, key = folder.name.rpartition("-")
                    try:
                        found[key] = _inspect(folder, f"repair it with: vesalius models --refetch '{label}'")
                    except ModelError as error:
                        found[key] = error
        return found

    def _put(self, building: Path, target: Path) -> Path:
        if target.exists():  # a folder cannot be renamed over a full one
            aside = Path(tempfile.mkdtemp(prefix=f"{OLD}{target.name}-", dir=self.models))
            os.rename(target, aside / "old")
            os.rename(building, target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(building, target)
        if os.name != "nt":
            handle = os.open(self.models, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):
                    os.fsync(handle)
            finally:
                os.close(handle)
        return target

    def _sweep(self, key: str) -> None:
        """Removes leftovers: of this key at once (its lock is held, so nobody works there), of others after a day."""
        for left in [*self.models.glob(f"{BUILDING}*"), *self.models.glob(f"{OLD}*")]:
            with contextlib.suppress(OSError):
                newest = max([left.stat().st_mtime, *(p.stat().st_mtime for p in left.rglob("*"))])
                if left.name.startswith(f"{BUILDING}{key}-") or time.time() - newest > DAY_S:
                    shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self, key: str, progress: Progress) -> Iterator[None]:
        self.models.mkdir(parents=True, exist_ok=True)
        (self.root / "locks").mkdir(exist_ok=True)
        lock = FileLock(self.root / "locks" / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress("another process is preparing this model; waiting for it", None)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _new_note(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    files = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        files[path.name] = {"bytes": stat.st_size, "sha256": sha256_of(path), "mtime_ns": stat.st_mtime_ns}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, **about, "date": date, "files": files}


def _inspect(folder: Path, repair: str) -> Cached:
    """Compares names and sizes with the note."""
    note = _read_note(folder, repair)
    try:
        present = {p.name for p in folder.iterdir() if not p.name.startswith(".")} - {NOTE}
    except OSError as error:
        raise ModelError(f"the cached {folder} cannot be read: {error.strerror or error}") from None
    for strange in sorted(present - set(note["files"])):
        raise DownloadError(f"the cached {folder / strange} was not put there by Vesalius; remove it, or {repair}")
    for name, entry in note["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DownloadError(f"the cached {path} cannot be read ({error.strerror or error}); {repair}") from None
        if size != entry["bytes"]:
            raise DownloadError(f"the cached {path} is damaged: {size} bytes, expected {entry['bytes']}; {repair}")
    return Cached(folder, note)


def _read_note(folder: Path, repair: str) -> dict[str, Any]:
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
        sound = note["format"] == FORMAT and all(
            isinstance(f["bytes"], int) and isinstance(f["mtime_ns"], int) and len(f["sha256"]) == 64
            for f in note["files"].values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise DownloadError(f"the cached {folder} has no {NOTE} that can be read; {repair}")
    return note


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turns what can go wrong with a disk into one line."""
    try:
        yield
    except OSError as error:
        elsewhere = "set VESALIUS_CACHE to a folder with room that can be written"
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise ModelError(f"no space is left for the cache {root}; {elsewhere}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ModelError(f"the cache {root} cannot be written ({error.strerror}); {elsewhere}") from error
        raise
