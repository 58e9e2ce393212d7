"""sha256 of files, remembered by path, size and time of change, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

BLOCK = 1 << 20


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path, memo: Path) -> str:
    """sha256 of a file that is hashed again only when its size or time of change differ from last time.

    Args:
        path: the file.
        memo: folder of the notes, one small JSON file a path. Not being able to write there costs time, nothing else.
    """
    real = path.resolve()
    stat = real.stat()
    key = {"path": str(real), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = memo / (hashlib.sha256(str(real).encode()).hexdigest()[:32] + ".json")
    with contextlib.suppress(OSError, ValueError):
        old = json.loads(note.read_text("utf-8"))
        if isinstance(old, dict) and {k: old.get(k) for k in key} == key and len(str(old.get("sha256"))) == 64:
            return str(old["sha256"])
    digest = sha256_of(real)
    with contextlib.suppress(OSError):
        memo.mkdir(parents=True, exist_ok=True)
        write_json(note, {**key, "sha256": digest})
    return digest


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` so that a reader sees the old file or the new one, never a half."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def flush_to_disk(folder: Path) -> None:
    """Makes every file of a flat folder, and the folder's own list of them, survive a power cut."""
    for path in [*sorted(p for p in folder.iterdir() if p.is_file()), folder]:
        if path.is_dir() and os.name == "nt":  # Windows has no handle on a folder
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems refuse; the rename is still atomic
            pass
        finally:
            os.close(handle)
