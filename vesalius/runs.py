"""Runs: one folder for each request, which a second identical request finds again.

    runs/circuit-smollm2-135m-ioi-relp-3fa9c1d27b/
        request.json    what was asked: command, arguments, seeds, fingerprints of model and task
        status.json     running, done, failed or interrupted; stage; when; the error line; the process
        versions.json   vesalius, torch, transformers, python, platform, threads, and earlier ones if it was resumed
        manifest.json   size and sha256 of every stored file
        *.parquet, *.json, *.npz, ...   what was found
        checkpoints/    pieces of an unfinished sweep; each carries its own checksum in its name
        report.html     drawn from the files above, so it can be drawn again and is not in the manifest

The folder's name is a readable slug and the first ten digits of the sha256 of the request in canonical JSON. What does
not change the numbers (`--json`, `--out`, the number of threads) must stay out of the request.

A file counts only if it is listed in the manifest with the size and sha256 it has on disk. It is written beside its
place, flushed to disk and renamed, and listed after that; a process killed at any moment leaves at worst a file that is
not believed and is made again.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from vesalius.errors import RunError
from vesalius.records import (
    Checkpoint,
    Lock,
    dump,
    now,
    one_line,
    plain,
    read_json,
    request_hash,
    sha256,
    slug,
    versions,
    why,
    write_atomic,
)
from vesalius.scores import Scores

State = Literal["running", "done", "failed", "interrupted"]
DEFAULT_ROOT = Path("runs")
DIGITS = 10  # of the request's sha256 in the folder's name: a clash among a million runs has odds of 1 in 2
_OWN = {"request.json", "status.json", "versions.json", "manifest.json", "lock", "report.html"}
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")


def folder_of(request: Mapping[str, Any], out: Path | str | None = None) -> Path:
    """Where the run of a request lies, whether it is there or not."""
    clean = plain(request)
    parent = Path(out) if out is not None else DEFAULT_ROOT
    return parent / f"{slug(clean)}-{request_hash(clean)[:DIGITS]}"


class Stage:
    """The stage a run is in; tell it how far it is."""

    def __init__(self, run: Run, entry: dict[str, Any]) -> None:
        self._run, self._entry, self._written = run, entry, 0.0

    def update(self, done: int, total: int | None = None) -> None:
        """Records that `done` of `total` steps are finished (on disk at most once a second)."""
        self._entry["done"] = int(done)
        if total is not None:
            self._entry["total"] = int(total)
        if time.monotonic() - self._written > 1:
            self._run._write_status()
            self._written = time.monotonic()


class Run:
    """A recorded request and what came of it. Made by `Run.start` (to write) or `Run.open` (to read).

    As a context manager it finishes when the block ends, fails with the error's line when it raises, and is marked
    interrupted on Ctrl-C; either way the next start of the same request goes on from what was stored.

    Example:
        >>> with Run.start({"command": "circuit", "arguments": {"task": "ioi"}, "seeds": [0]}) as run:  # doctest: +SKIP
        ...     if not run.has("scores"):
        ...         with run.stage("scores"):
        ...             run.save_table("scores", compute())
    """

    def __init__(self, folder: Path, request: dict[str, Any], lock: Lock, writable: bool) -> None:
        self.folder = folder
        self.request = request
        self.hash = request_hash(request)
        self._lock = lock
        self._writable = writable
        self._status: dict[str, Any] = {}
        self._manifest: dict[str, dict[str, Any]] = {}

    # -- making and opening

    @classmethod
    def start(
        cls, request: Mapping[str, Any], out: Path | str | None = None, fresh: bool = False, command_line: str = ""
    ) -> Run:
        """Opens the run of this request for writing: a new one, or the one that is already there.

        Args:
            request: what decides the numbers: command, arguments, seeds, model and task fingerprints.
            out: the folder that holds runs (`--out`), made if missing; `./runs` by default.
            fresh: forget what an earlier run of the same request stored.
            command_line: the exact command, shown in the report; not part of the request.

        Returns:
            The run, locked for this process. `run.done` tells that all of it is there already.

        Raises:
            RunError: if the folder cannot be written, is a file, belongs to another request, or another process is
                writing the run now; or if a number of the request is NaN or infinite, which no JSON holds.
        """
        _check_finite(request)
        clean = plain(request)
        folder = folder_of(clean, out)
        parent = folder.parent
        for path in (parent, folder):
            if path.exists() and not path.is_dir():
                raise RunError(f"{path} is a file, not a folder for runs; name another with --out")
        lock = Lock(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise RunError(f"cannot write runs in {parent}: {why(error)}; name another folder with --out") from error
        try:
            return cls._begin(folder, clean, lock, fresh, command_line)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _begin(cls, folder: Path, request: dict[str, Any], lock: Lock, fresh: bool, command_line: str) -> Run:
        run = cls(folder, request, lock, writable=True)
        for path in [*folder.rglob("*.part")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if fresh:
            run._forget()
        if (folder / "request.json").exists():
            found = read_json(folder / "request.json", "start again with --fresh")
            if request_hash(found) != run.hash:
                raise RunError(f"{folder}/request.json is not the request of that name; use --fresh or another --out")
        else:
            write_atomic(folder / "request.json", dump(request))
        with contextlib.suppress(RunError):  # a manifest that cannot be read vouches for nothing
            run._manifest = run._read_manifest()
        with contextlib.suppress(RunError):
            run._status = _read_status(folder, "")
        before = run._status.get("state")
        run._status.setdefault("started", now())
        run._status["touched"] = now()
        run._status["command"] = command_line or run._status.get("command", "")
        bad = run.damaged()
        if before == "done" and not bad:
            run._write_status()
            return run
        run._record_versions()
        run._status.update(state="running", stage=None, error=None, ended=None)
        run._status.update(pid=os.getpid(), host=socket.gethostname())
        run._status["attempts"] = int(run._status.get("attempts", 0)) + 1
        run._status.setdefault("stages", [])
        if bad:
            run._status["made_again"] = [*run._status.get("made_again", []), *bad]
        run._write_status()
        return run

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Opens a run for reading; nothing in it is changed.

        Raises:
            RunError: if the folder is not a run, or its request does not match its name.
        """
        folder = Path(folder)
        remedy = "it is not a run of Vesalius, or it is damaged; `vesalius runs` lists the good ones"
        request = read_json(folder / "request.json", remedy)
        run = cls(folder, request, Lock(folder), writable=False)
        run._status = _read_status(folder, remedy)
        if (folder / "manifest.json").exists() or run._status.get("files"):
            run._manifest = run._read_manifest()
        return run

    def _forget(self) -> None:
        with contextlib.suppress(RunError):
            for name in self._read_manifest():
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        for path in (*(self.folder / name for name in _OWN - {"lock"}), *self.folder.glob("*.html")):
            path.unlink(missing_ok=True)

    def _record_versions(self) -> None:
        path = self.folder / "versions.json"
        current: dict[str, Any] = versions()
        if path.exists():
            with contextlib.suppress(RunError):
                old = read_json(path, "")
                earlier = old.pop("earlier", [])
                if old != plain(current) and self._manifest:
                    earlier.append(old)
                if earlier:
                    current["earlier"] = earlier
        write_atomic(path, dump(current))

    # -- what it is

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> dict[str, Any]:
        """A copy of `status.json`, with the state as it really is."""
        return {**self._status, "state": self.state}

    @property
    def state(self) -> State:
        """`running` only while a process is at it; a run whose process died is `interrupted`."""
        state: State = self._status.get("state", "interrupted")
        return "interrupted" if state == "running" and not self._lock.held() else state

    @property
    def done(self) -> bool:
        """Whether it finished and every file it stored is as it was stored."""
        return self.state == "done" and not self.damaged()

    @property
    def versions(self) -> dict[str, Any]:
        """What it was computed with (`versions.json`), with `earlier` ones if it went on under others."""
        path = self.folder / "versions.json"
        return read_json(path, "start it again with --fresh") if path.exists() else {}

    @property
    def files(self) -> list[str]:
        """Names of the stored files."""
        return sorted({*self._manifest, *self._status.get("files", [])})

    def damaged(self) -> list[str]:
        """Stored files that are missing, truncated or changed, one reason each."""
        return [reason for name in self.files if (reason := self._trouble(name))]

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        remedy = "start the run again with --fresh"
        found = read_json(self.folder / "manifest.json", remedy)
        if found.get("request") != self.hash or not isinstance(found.get("files"), dict):
            raise RunError(f"{self.folder / 'manifest.json'} belongs to another request; {remedy}")
        return {name: entry for name, entry in found["files"].items() if _NAME.match(name) and _is_entry(entry)}

    def _trouble(self, name: str) -> str:
        entry, path = self._manifest.get(name), self.folder / name
        if entry is None:  # it was there when the run finished
            return f"{name} is missing from manifest.json"
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            same = sha256(path) == entry["sha256"]
            return "" if same else f"{name} was changed after it was stored (its sha256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({why(error)})"

    # -- storing

    def _file(self, name: str, suffix: str) -> str:
        file = name if name.endswith(suffix) else name + suffix
        if file in _OWN or not _NAME.match(file) or file.endswith(".part"):
            raise RunError(f"'{file}' cannot be the name of a stored file; use letters, digits, '_', '-' and '.'")
        return file

    def _must_write(self) -> None:
        if not self._writable or self._lock.handle is None:
            raise RunError(f"{self.folder} is not open for writing; start its request again to add to it")

    def save_file(self, name: str, data: bytes | Callable[[Path], object]) -> Path:
        """Stores any file, given its content or a function that writes to the path it is handed; returns its path."""
        return self._store({self._file(name, ""): data})[0]

    def _store(self, files: Mapping[str, bytes | Callable[[Path], object]]) -> list[Path]:
        """Writes files that belong together: they are listed, and so believed, all at once."""
        self._must_write()
        if self._status.get("state") == "done":  # something was missing after all
            self._status["state"] = "running"
        paths = [self.folder / name for name in files]
        for path, data in zip(paths, files.values(), strict=True):
            write_atomic(path, data)
        for path in paths:
            self._manifest[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path), "stored": now()}
        write_atomic(self.folder / "manifest.json", dump({"request": self.hash, "files": self._manifest}))
        return paths

    def save_table(self, name: str, frame: pd.DataFrame) -> Path:
        """Stores a table as `<name>.parquet`, without its index."""
        buffer = io.BytesIO()
        try:
            frame.to_parquet(buffer, index=False)
        except (ValueError, TypeError) as error:  # pyarrow's errors are of these kinds
            raise RunError(f"table '{name}' cannot be stored as parquet: {one_line(error)}") from error
        return self.save_file(self._file(name, ".parquet"), buffer.getvalue())

    def save_json(self, name: str, value: Any) -> Path:
        """Stores `<name>.json`; numbers that are not finite become null."""
        return self.save_file(self._file(name, ".json"), dump(value))

    def save_array(self, name: str, **arrays: ArrayLike) -> Path:
        """Stores arrays by name as `<name>.npz`, without pickle."""
        buffer = io.BytesIO()
        solid = {k: np.asarray(v) for k, v in arrays.items()}
        if any(a.dtype == object for a in solid.values()):
            raise RunError(f"array '{name}' holds Python objects; store numbers or text")
        np.savez(buffer, allow_pickle=False, **solid)
        return self.save_file(self._file(name, ".npz"), buffer.getvalue())

    def save_scores(self, name: str, scores: Scores) -> None:
        """Stores Scores as `<name>.parquet` (with per-prompt values) and `<name>.json`."""
        with tempfile.TemporaryDirectory() as folder:
            scores.save(Path(folder))
            both = {
                self._file(name, end): (Path(folder) / f"scores{end}").read_bytes() for end in (".json", ".parquet")
            }
        self._store(both)

    # -- reading

    def has(self, name: str) -> bool:
        """Whether a table, JSON, array, scores or file of that name is stored, all of it, and whole.

        A damaged one counts as absent while the run is being written (it is made again); when reading, it is an error
        rather than something "not measured".
        """
        stored = [f for f in (name, f"{name}.parquet", f"{name}.json", f"{name}.npz") if f in self.files]
        reasons = [reason for f in stored if (reason := self._trouble(f))]
        if reasons and not self._writable:
            raise RunError(self._refusal(reasons[0]))
        return bool(stored) and not reasons

    def _refusal(self, reason: str) -> str:
        return f"{self.folder}: {reason}; run the same command again and it is made anew"

    def bytes(self, name: str) -> bytes:
        """The content of a stored file, checked against the manifest.

        Raises:
            RunError: if it was not stored, or is not what was stored.
        """
        if name not in self.files:
            near = difflib.get_close_matches(name, self.files, n=3, cutoff=0.4)
            hint = " or ".join(near) or ", ".join(self.files[:20]) or "nothing"
            raise RunError(f"{self.folder} holds no {name} (it has {hint})")
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise RunError(self._refusal(f"{name} cannot be read ({why(error)})")) from error
        if hashlib.sha256(data).hexdigest() != self._manifest.get(name, {}).get("sha256"):
            raise RunError(self._refusal(self._trouble(name) or f"{name} changed while it was read"))
        return data

    def table(self, name: str) -> pd.DataFrame:
        """A stored table."""
        return pd.read_parquet(io.BytesIO(self.bytes(self._file(name, ".parquet"))))

    def json(self, name: str) -> Any:
        """A stored JSON value."""
        return json.loads(self.bytes(self._file(name, ".json")))

    def array(self, name: str) -> dict[str, NDArray[Any]]:
        """Stored arrays by name."""
        with np.load(io.BytesIO(self.bytes(self._file(name, ".npz"))), allow_pickle=False) as arrays:
            return {k: arrays[k] for k in arrays.files}

    def scores(self, name: str = "scores") -> Scores:
        """Stored Scores."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "scores.json").write_bytes(self.bytes(self._file(name, ".json")))
            (Path(folder) / "scores.parquet").write_bytes(self.bytes(self._file(name, ".parquet")))
            return Scores.load(Path(folder))

    def checkpoint(self, name: str) -> Checkpoint:
        """The store of finished pieces of the sweep of that name, bound to this request."""
        return Checkpoint(self.folder / "checkpoints" / self._file(name, ""), self.hash, self._writable)

    # -- progress

    def _write_status(self) -> None:
        self._must_write()
        write_atomic(self.folder / "status.json", dump(self._status))

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        """Records that the run is at that stage, when it began and ended, and how far it is."""
        entry: dict[str, Any] = {"name": name, "started": now(), "ended": None}
        if total is not None:
            entry.update(done=0, total=total)
        self._status.setdefault("stages", []).append(entry)
        self._status.update(stage=name, state="running")
        self._write_status()
        try:
            yield Stage(self, entry)
        except KeyboardInterrupt:
            self._status["state"] = "interrupted"
            self._write_status()
            raise
        entry["ended"] = now()
        self._status["stage"] = None
        self._write_status()

    def _end(self, state: State, error: str | None) -> None:
        if self._lock.handle is None:
            return
        try:
            self._status.update(state=state, ended=now(), error=error)
            if state == "done":
                self._status.update(stage=None, files=sorted(self._manifest))
            self._write_status()
        finally:
            self.close()

    def finish(self) -> None:
        """Marks the run done and lets go of its folder; a run that was done already keeps its dates."""
        if self._status.get("state") == "done":
            self.close()
        else:
            self._end("done", None)

    def fail(self, error: BaseException | str) -> None:
        """Marks the run failed (or interrupted, if the error is Ctrl-C) and lets go of its folder."""
        if isinstance(error, KeyboardInterrupt):
            self._end("interrupted", None)
        else:
            self._end("failed", one_line(error))

    def close(self) -> None:
        """Lets go of the folder without changing the run's state."""
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            with contextlib.suppress(RunError):  # the first error is the one to show
                self.fail(error)

    def __repr__(self) -> str:
        return f"Run({self.name}; {self.state}; {len(self._manifest)} files)"


def _is_entry(entry: Any) -> bool:
    kinds = {"bytes": int, "sha256": str}
    return isinstance(entry, dict) and all(isinstance(entry.get(k), kind) for k, kind in kinds.items())


def _check_finite(value: Any, name: str = "the request") -> None:
    """Refuses NaN and infinity, which would be stored as null and so be taken for another request."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_finite(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_finite(inner, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RunError(f"{name} is {value:g}; give a finite number")


def _read_status(folder: Path, remedy: str) -> dict[str, Any]:
    """`status.json`, or a RunError if something in it is not what was written there."""
    found = read_json(folder / "status.json", remedy)
    stages, files = found.get("stages", []), found.get("files", [])
    sound = isinstance(stages, list) and all(isinstance(s, dict) for s in stages)
    sound = sound and isinstance(files, list) and all(isinstance(f, str) for f in files)
    sound = sound and found.get("state", "running") in get_args(State) and isinstance(found.get("attempts", 0), int)
    times = [found.get(k) for k in ("started", "touched", "ended")]
    times += [s.get(k) for s in (stages if sound else []) for k in ("started", "ended")]
    try:
        for time_ in times:
            datetime.fromisoformat(time_) if time_ is not None else None
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise RunError(f"{folder / 'status.json'} was changed by hand or is damaged{'; ' if remedy else ''}{remedy}")
    return found


__all__ = [
    "DEFAULT_ROOT", "Checkpoint", "Run", "Stage", "folder_of", "plain", "request_hash", "slug",
    "versions", "write_atomic",
]  # fmt: skip
