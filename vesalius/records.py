"""Records that can be believed: canonical requests, files written whole or not at all, locks, checkpoints.

A file is written beside its place, flushed to disk and renamed, so a process killed at any moment leaves the old file
or the new one, never half of one. `vesalius.runs` builds on this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from vesalius.errors import RunError, VesaliusError

try:
    import fcntl
except ImportError:  # no advisory locks on this platform: the process id in the lock file decides alone
    fcntl = None  # type: ignore[assignment]


def plain(value: Any) -> Any:
    """The value as JSON has it: paths and parts as text, numpy numbers as numbers, sets sorted, NaN as null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__str__ is not object.__str__:  # an address prints itself
            return str(value)
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if value is pd.NA or value is pd.NaT:
        return None
    kind = type(value).__name__
    raise RunError(f"a {kind} ({repr(value)[:60]}) cannot be recorded; give text, numbers, lists or mappings")


def request_hash(request: Mapping[str, Any]) -> str:
    """The sha256 of the request in canonical JSON: the same whatever the order of its keys.

    Example:
        >>> request_hash({"seed": 0, "task": "ioi"}) == request_hash({"task": "ioi", "seed": 0})
        True
    """
    text = json.dumps(plain(request), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def slug(request: Mapping[str, Any]) -> str:
    """A readable name: command, model, task(s) and method of the request, in letters that every file system takes."""
    arguments = request.get("arguments")
    pool = {**request, **(arguments if isinstance(arguments, Mapping) else {})}
    words = []
    for key in ("command", "model", "task", "tasks", "method", "level"):
        value = pool.get(key)
        if value is None or value == "":
            continue
        texts = [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
        short = "+".join(re.split(r"[/\\]", t.rstrip("/\\"))[-1].removesuffix(".jsonl") for t in texts)
        words.append(re.sub(r"[^A-Za-z0-9.+_]+", "-", short).strip("-.")[:32])
    return "-".join(w for w in words if w)[:90] or "run"


def why(error: BaseException) -> str:
    """The reason of a system error in a few words."""
    lines = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()
    return str(lines[0])


def write_atomic(path: Path, data: bytes | Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: beside its place as `.part`, flushed to disk, then renamed.

    Args:
        path: where the file is to stand; its folder is made if missing.
        data: the content, or a function that writes it to the path it is given.

    Raises:
        RunError: if the folder or the file cannot be written; what stood at `path` before is untouched.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(data):
            part.touch()
            mode = part.stat().st_mode  # what a new file has here; safetensors keeps its own to the owner
            data(part)
            part.chmod(mode)
        else:
            part.write_bytes(data)
        with part.open("rb+") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
        with contextlib.suppress(OSError):  # some file systems do not sync folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        hint = "free some space or name another folder with --out"
        raise RunError(f"cannot write {path}: {why(error)}; {hint}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file, or a RunError that ends in the remedy."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}: {why(error)}; {remedy}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} does not hold a JSON object; {remedy}")
    return value


def typed(found: Mapping[str, Any], path: Path, remedy: str, **kinds: Any) -> None:
    """Refuses a JSON object of a file that lacks one of these entries, or has one of another kind, with a RunError."""
    for key, kind in kinds.items():
        if key not in found:
            raise RunError(f"{path} has no '{key}'; {remedy}")
        value = found[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RunError(f"{path}: '{key}' is {repr(value)[:40]}, which it cannot be; {remedy}")


def dump(value: Any) -> bytes:
    """The value as strict JSON; bytes of a path that are not UTF-8 are written as JSON's own escapes."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def now() -> str:
    """The time, UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def clock(seconds: float) -> str:
    """A span of time as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def one_line(error: BaseException | str) -> str:
    """The error on one line, its kind named unless it is one of ours."""
    text = str(error) if isinstance(error, (str, VesaliusError)) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]


def versions() -> dict[str, Any]:
    """What the numbers were computed with, without importing anything heavy."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    torch = sys.modules.get("torch")
    return {
        "vesalius": of("vesalius"),
        "torch": of("torch"),
        "transformers": of("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads() if torch is not None else None,
    }


class Lock:
    """At most one writing process for a folder. The system frees the lock when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self.handle: io.TextIOWrapper | None = None

    def acquire(self) -> None:
        """Takes the lock, or raises RunError naming who has it."""
        handle = self.path.open("a+")
        for attempt in range(5):  # someone who only looks holds it for a moment
            if self._try(handle):
                break
            if attempt == 4:
                owner = self._owner(handle)
                handle.close()
                who = (
                    "this Python process: close() that Run first"
                    if owner["pid"] == os.getpid()
                    else (f"process {owner['pid']} on {owner['host']}: wait for it, or stop it and start again")
                )
                raise RunError(f"{self.path.parent} is being written by {who}")
            time.sleep(0.05)
        handle.seek(0)
        handle.truncate()
        handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        handle.flush()
        self.handle = handle

    def _try(self, handle: io.TextIOWrapper) -> bool:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False
            except OSError:  # a file system without locks
                pass
        owner = self._owner(handle)
        return owner["pid"] == 0 or (owner["host"] == socket.gethostname() and not _alive(owner["pid"]))

    @staticmethod
    def _owner(handle: io.TextIOWrapper) -> dict[str, Any]:
        handle.seek(0)
        try:
            owner = json.loads(handle.read())
            return {"pid": int(owner["pid"]), "host": str(owner["host"])}
        except (ValueError, KeyError, TypeError):
            return {"pid": 0, "host": "?"}

    def held(self) -> bool:
        """Whether some process is writing now."""
        if self.handle is not None:
            return True
        try:
            with self.path.open() as handle:
                if fcntl is not None:
                    try:
                        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        return False
                    except BlockingIOError:
                        return True
                    except OSError:
                        pass
                owner = self._owner(handle)
                return owner["pid"] != 0 and (owner["host"] != socket.gethostname() or _alive(owner["pid"]))
        except OSError:
            return False

    def release(self) -> None:
        """Lets go; nothing happens if it is not held."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.handle.seek(0)
                self.handle.truncate()
            self.handle.close()
            self.handle = None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Checkpoint:
    """Finished pieces of a sweep: key -> array of floats, appended in chunks, each chunk whole or absent.

    A chunk's file name carries the start of the sha256 of its content, and the chunk carries the hash of the request;
    one that matches neither is ignored and counted in `ignored`. Values come back with the bits they were put with. A
    key put twice keeps the later value.

    Example:
        >>> checkpoint.put(["L0.H0", "L0.H1"], values)      # values (2, example)  # doctest: +SKIP
        >>> checkpoint.missing(["L0.H1", "L0.H2"])          # doctest: +SKIP
        ['L0.H2']
    """

    def __init__(self, folder: Path, request: str, writable: bool = True) -> None:
        self.folder = folder
        self.ignored = 0
        self._request = request
        self._writable = writable
        self._values: dict[str, NDArray[np.floating[Any]]] = {}
        self._next = 0
        for path in sorted(folder.glob("*.npz")):
            self._next = max(self._next, int(path.name[:6]) + 1) if path.name[:6].isdigit() else self._next
            try:
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest()[:16] != path.stem[7:]:
                    raise ValueError("checksum")
                with np.load(io.BytesIO(data), allow_pickle=False) as chunk:
                    if str(chunk["request"]) != request:
                        raise ValueError("another request")
                    self._values.update(zip(chunk["keys"].tolist(), chunk["values"], strict=True))
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                self.ignored += 1

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return str(key) in self._values

    def get(self, keys: Iterable[object]) -> dict[str, NDArray[np.floating[Any]]]:
        """The values of those of the keys that are known."""
        names = [str(k) for k in keys]
        return {k: self._values[k] for k in names if k in self._values}

    def missing(self, keys: Iterable[object]) -> list[str]:
        """Those of the keys that are still to be computed, in their order."""
        return [k for k in map(str, keys) if k not in self._values]

    def put(self, keys: Sequence[object], values: ArrayLike) -> None:
        """Stores one value a key, (key, ...) floats, on disk before it returns."""
        names = [str(k) for k in keys]
        array = np.array(values)  # a copy, so that a buffer used again does not change what was put
        if len(names) != len(array) or not np.issubdtype(array.dtype, np.floating):
            got = f"{len(names)} keys for {array.shape} {array.dtype}"
            raise RunError(f"a checkpoint takes one array of floats a key; got {got}")
        if not names:
            return
        if not self._writable:
            raise RunError(f"{self.folder.parent.parent} was opened for reading; nothing can be added to it")
        buffer = io.BytesIO()
        np.savez(buffer, keys=np.array(names), values=array, request=np.array(self._request))
        data = buffer.getvalue()
        name = f"{self._next:06d}-{hashlib.sha256(data).hexdigest()[:16]}.npz"
        write_atomic(self.folder / name, data)
        self._next += 1
        self._values.update(zip(names, array, strict=True))

    def clear(self) -> None:
        """Forgets everything, on disk too; for when the result itself is stored."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._values.clear()
